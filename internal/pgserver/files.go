package pgserver

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// copyTree copies a directory with its regular files, symbolic links and modes.
func copyTree(dst, src string) error {
	return filepath.WalkDir(src, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(src, path)
		if err != nil {
			return err
		}
		target := filepath.Join(dst, rel)
		switch {
		case entry.IsDir():
			return copyDir(target, entry)
		case entry.Type()&fs.ModeSymlink != 0:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			return os.Symlink(to, target)
		default:
			return copyFile(target, path, entry)
		}
	})
}

func copyDir(dst string, entry fs.DirEntry) error {
	info, err := entry.Info()
	if err != nil {
		return err
	}
	return os.MkdirAll(dst, info.Mode().Perm()|0o700)
}

func copyFile(dst, src string, entry fs.DirEntry) error {
	info, err := entry.Info()
	if err != nil {
		return err
	}
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_EXCL, info.Mode().Perm())
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		return errors.Join(err, out.Close())
	}
	return out.Close()
}

// buildCache fills a new directory with build and puts it in place under its final name in one step, so that test
// binaries that run at the same time see either nothing or all of it. Who loses the race uses the winner's.
func buildCache(final string, owner *account, build func(tmp string) error) error {
	tmp, err := os.MkdirTemp(filepath.Dir(final), filepath.Base(final)+".tmp-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if err := chownTree(tmp, owner); err != nil {
		return err
	}
	if err := build(tmp); err != nil {
		return err
	}
	if err := chownTree(tmp, owner); err != nil {
		return err
	}
	if err := os.Rename(tmp, final); err != nil && !ownedCache(final, owner) {
		return err
	}
	return nil
}

// ownedCache says whether dir is a cache that this user, or the one its server runs as, has made. In a temporary
// directory shared by everybody, anyone could have prepared a directory of that name.
func ownedCache(dir string, owner *account) bool {
	info, err := os.Lstat(dir)
	if err != nil || !info.IsDir() || info.Mode().Perm()&0o022 != 0 {
		return false
	}
	want := os.Getuid()
	if owner != nil {
		want = int(owner.uid)
	}
	return ownerOf(info) == want
}

// chownTree gives a tree to the server's user; nothing is to do when that is the user of this process.
func chownTree(root string, owner *account) error {
	if owner == nil {
		return nil
	}
	return filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, int(owner.uid), int(owner.gid))
	})
}

// unreachable returns the first directory on the way to path that the server's user may not pass, or "".
func unreachable(user *account, path string) string {
	if user == nil {
		return ""
	}
	for dir := filepath.Clean(path); ; dir = filepath.Dir(dir) {
		if info, err := os.Stat(dir); err == nil && !mayPass(user, info) {
			return dir
		}
		if dir == filepath.Dir(dir) {
			return ""
		}
	}
}

func mayPass(user *account, info fs.FileInfo) bool {
	if ownerOf(info) == int(user.uid) {
		return info.Mode().Perm()&0o100 != 0
	}
	return info.Mode().Perm()&0o001 != 0
}

// checkReachable fails when the server's user can't get to dir.
func checkReachable(user *account, dir string) error {
	if blocked := unreachable(user, dir); blocked != "" {
		return fmt.Errorf("PostgreSQL can't run as root and runs as user %q, who may not enter %s: "+
			"use a directory that every user can reach, or run `chmod o+x %s`", user.name, blocked, blocked)
	}
	return nil
}

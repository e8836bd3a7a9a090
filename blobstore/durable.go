package blobstore

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
)

// sendBytes is after how many bytes a file that is written is sent to the disk.
const sendBytes = 4 << 20

// durable makes what a bucket of scheme file is given survive a power cut: the driver itself never waits for the disk.
type durable struct {
	root   string   // of the bucket
	prefix string   // of all keys
	synced sync.Map // directories that are known to be on the disk in their parents
	sync   func(*os.File) error
}

// durableFiles prepares the URL: temporary files beside the final ones, so that a rename stays within one file system; no files
// of metadata, which is in the records; directories that only we can read.
func durableFiles(u *url.URL) (*durable, error) {
	if u.Host != "" && u.Host != "localhost" && u.Host != "." {
		return nil, fmt.Errorf("the blob store's URL %q names a host, %s: a path begins with a third slash, as in file:///var/lib/walgate/blobs", u, u.Host)
	}
	if u.Path == "" || u.Path == "/" {
		return nil, fmt.Errorf("the blob store's URL %q names no directory: write file:///var/lib/walgate/blobs", u)
	}
	q := u.Query()
	for name, value := range map[string]string{"create_dir": "true", "no_tmp_dir": "true", "metadata": "skip", "dir_file_mode": "0700"} {
		if !q.Has(name) {
			q.Set(name, value)
		}
	}
	u.RawQuery = q.Encode()
	path := u.Path
	if u.Host == "." {
		path = strings.TrimPrefix(path, "/")
	}
	root, err := filepath.Abs(filepath.FromSlash(path))
	if err != nil {
		return nil, fmt.Errorf("the blob store's directory: %w", err)
	}
	return &durable{root: root, prefix: q.Get("prefix"), sync: (*os.File).Sync}, nil
}

// settle returns when the name of an object that was written and flushed is on the disk, with the directories above it.
func (d *durable) settle(key string) error {
	dir := filepath.Dir(filepath.Join(d.root, filepath.FromSlash(d.prefix+key)))
	if err := d.syncDirectory(dir); err != nil {
		return err
	}
	for ; len(dir) >= len(d.root); dir = filepath.Dir(dir) {
		if _, done := d.synced.Load(dir); done {
			break
		}
		if err := d.syncDirectory(filepath.Dir(dir)); err != nil && len(dir) > len(d.root) { // what is above the root may not be ours to open
			return err
		}
		d.synced.Store(dir, nil)
	}
	return nil
}

func (d *durable) syncDirectory(path string) error {
	if runtime.GOOS == "windows" {
		return nil // can't
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := d.sync(f); err != nil && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, errors.ErrUnsupported) { // some file systems can't
		return err
	}
	return nil
}

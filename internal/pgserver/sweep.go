package pgserver

import (
	"os"
	"path/filepath"
	"time"
)

const (
	temporaryPrefix = "walgate-pg-run-"
	lockName        = "lock"
	// lockAge keeps sweep away from directories whose owner is just about to lock them.
	lockAge = time.Minute
)

// lockRoot marks a temporary directory as in use, for as long as the file stays open or this process lives.
func lockRoot(root string) (*os.File, error) {
	file, err := os.OpenFile(filepath.Join(root, lockName), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := lockFile(file); err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}

// sweep removes the temporary directories of processes that were killed before they could. It works by locks, not by
// process ids, which mean nothing to another container that shares the directory. Failing is no harm: others' files
// can't be removed, and the next start tries again.
func sweep(dir string, now time.Time) {
	locks, _ := filepath.Glob(filepath.Join(dir, temporaryPrefix+"*", lockName)) // The pattern is well formed.
	for _, path := range locks {
		info, err := os.Stat(path)
		if err != nil || now.Sub(info.ModTime()) < lockAge {
			continue
		}
		file, err := os.Open(path)
		if err != nil {
			continue
		}
		if lockFile(file) == nil {
			_ = os.RemoveAll(filepath.Dir(path))
		}
		file.Close()
	}
}

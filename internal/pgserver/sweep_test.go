package pgserver

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestSweepRemovesOnlyWhatNobodyHolds(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	root := func(name string) string {
		path := filepath.Join(dir, name)
		if err := os.Mkdir(path, 0o700); err != nil {
			t.Fatal(err)
		}
		return path
	}
	lock := func(root string) *os.File {
		file, err := lockRoot(root)
		if err != nil {
			t.Fatal(err)
		}
		return file
	}
	held, dead, starting := root(temporaryPrefix+"held"), root(temporaryPrefix+"dead"), root(temporaryPrefix+"starting")
	foreign := root("somebody-else")
	defer lock(held).Close()
	lock(dead).Close()
	lock(foreign).Close()
	sweep(dir, time.Now())
	if _, err := os.Stat(dead); err != nil {
		t.Errorf("a lock made just now was taken for an old one: %v", err)
	}
	// A process that another test is just starting has our open files until it executes its program, and with them the lock.
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		sweep(dir, time.Now().Add(2*lockAge))
		if _, err := os.Stat(dead); err != nil {
			break
		}
	}
	for _, path := range []string{held, starting, foreign} {
		if _, err := os.Stat(path); err != nil {
			t.Errorf("removed although in use or not ours: %v", err)
		}
	}
	if _, err := os.Stat(dead); err == nil {
		t.Errorf("%s is still there, though nobody holds it", dead)
	}
}

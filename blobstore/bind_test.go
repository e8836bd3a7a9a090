package blobstore

import (
	"errors"
	"os"
	"strings"
	"sync"
	"testing"
)

// TestBind: a store that lost its files, as when its volume isn't mounted, or that another installation uses, isn't taken.
func TestBind(t *testing.T) {
	t.Parallel()
	f, other := newFixture(t, RecordsOptions{}), newFixture(t, RecordsOptions{})
	var done sync.WaitGroup
	for range 5 { // instances that start at once
		done.Go(func() {
			if err := f.Bind(t.Context(), f.store); err != nil {
				t.Error(err)
			}
		})
	}
	done.Wait()
	if err := other.Bind(t.Context(), f.store); !errors.Is(err, ErrOtherStore) || !strings.Contains(err.Error(), "delete that object") {
		t.Errorf("another installation's store: %v", err)
	}
	if err := f.Bind(t.Context(), other.store); err != nil {
		t.Errorf("an empty store, before there are files: %v", err)
	}
	if err := f.Bind(t.Context(), f.store); err != nil {
		t.Errorf("as before: %v", err)
	}
	f.publish(f.upload("ana", "photo", "hello"), Created)
	away := f.store.files.root + ".away"
	for _, err := range []error{os.Rename(f.store.files.root, away), os.Mkdir(f.store.files.root, 0o700)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	err := f.Bind(t.Context(), f.store)
	if !errors.Is(err, ErrOtherStore) || !strings.Contains(err.Error(), "mounted") {
		t.Errorf("an empty store, where there are files: %v", err)
	}
	remedy := err.Error()[strings.Index(err.Error(), "DELETE"):]
	f.exec(remedy)
	for range 2 {
		if err := f.Bind(t.Context(), f.store); err != nil {
			t.Errorf("after the remedy (%s): %v", remedy, err)
		}
	}
	if err := os.RemoveAll(f.store.files.root); err != nil {
		t.Fatal(err)
	}
	if err := f.Bind(t.Context(), f.store); err == nil || errors.Is(err, ErrOtherStore) {
		t.Errorf("a store that isn't there: %v", err)
	}
	memory := open(t, "mem")
	for _, records := range []*fixture{f, other} {
		if err := records.Bind(t.Context(), memory); err != nil {
			t.Errorf("a store in memory: %v", err)
		}
	}
}

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

// TestCareOfAnotherStore: of a store that isn't the one in which the files are, nothing is concluded, however few they are.
func TestCareOfAnotherStore(t *testing.T) {
	t.Parallel()
	c := newCaring(t)
	c.round(RoundOptions{Reconcile: true}) // binds
	c.file("photo", "bytes")
	c.names.set("photo", true)
	away := c.store.files.root + ".away"
	swap := func(from, to string) {
		t.Helper()
		if err := errors.Join(os.RemoveAll(to), os.Rename(from, to)); err != nil {
			t.Fatal(err)
		}
	}
	swap(c.store.files.root, away)
	if err := os.Mkdir(c.store.files.root, 0o700); err != nil {
		t.Fatal(err)
	}
	c.put("walgate/00/00000000000000000000000000000000", "another's")
	for _, force := range []bool{false, true} {
		r := c.round(RoundOptions{Reconcile: true, Force: force})
		if held := r.HeldUp(); len(held) != 1 || !held[0].Guard || !strings.Contains(held[0].Why, "mounted") {
			t.Errorf("force %t: %+v", force, r.HeldUp())
		}
		c.expect("photo", "u", "u")
	}
	swap(away, c.store.files.root)
	if r := c.round(RoundOptions{Reconcile: true}); len(r.HeldUp()) != 0 || r.Reconcile.Missing.Files != 0 {
		t.Errorf("with its own store again: %+v", r)
	}
	c.expect("photo", "u", "u")
}

// TestUnbind leaves a store to another installation, and only its own.
func TestUnbind(t *testing.T) {
	t.Parallel()
	f, other := newFixture(t, RecordsOptions{}), newFixture(t, RecordsOptions{})
	for _, step := range []struct {
		what string
		do   func() error
		want error
	}{
		{"nothing is bound", func() error { return f.Unbind(t.Context(), f.store) }, nil},
		{"bind", func() error { return f.Bind(t.Context(), f.store) }, nil},
		{"another's unbind", func() error { return other.Unbind(t.Context(), f.store) }, nil},
		{"another's bind", func() error { return other.Bind(t.Context(), f.store) }, ErrOtherStore},
		{"unbind", func() error { return f.Unbind(t.Context(), f.store) }, nil},
		{"another's bind after it", func() error { return other.Bind(t.Context(), f.store) }, nil},
	} {
		if err := step.do(); !errors.Is(err, step.want) {
			t.Errorf("%s: %v", step.what, err)
		}
	}
}

package blobstore

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/walgate/walgate/internal/failpoint"
)

// objects returns the keys of a file's objects with their sizes.
func (f *record) objects() map[string]int64 {
	if f.Parts == nil {
		return map[string]int64{f.Key: f.Size}
	}
	m := make(map[string]int64, len(f.Parts))
	for i, size := range f.Parts {
		if size > 0 { // else there is no such object
			m[PartKey(f.Key, i)] = size
		}
	}
	return m
}

// whole says of each file whether all its bytes are in the store. What can't be found out is an error, not an absence.
func (r *round) whole(ctx context.Context, list []record) ([]bool, error) {
	missing := make([]bool, len(list))
	var m sync.Mutex
	work, ctx := errgroup.WithContext(ctx)
	work.SetLimit(storeWorkers)
	for i := range list {
		for key, want := range list[i].objects() {
			work.Go(func() error {
				size, err := r.c.store.Size(ctx, key)
				if errors.Is(err, ErrNotFound) {
					size, err = -1, nil
				}
				if err == nil && size != want {
					m.Lock()
					missing[i] = true
					m.Unlock()
				}
				return err
			})
		}
	}
	if err := work.Wait(); err != nil {
		return nil, err
	}
	for i := range missing {
		missing[i] = !missing[i]
	}
	return missing, nil
}

// removeObjects deletes the bytes of files and returns those that have none left. It fails if that is none of them: the others
// have their turn with the next round.
func (r *round) removeObjects(ctx context.Context, list []record) (done []record, err error) {
	if r.o.DryRun || len(list) == 0 {
		return list, nil
	}
	errs := make([]error, len(list))
	var m sync.Mutex
	var work errgroup.Group
	work.SetLimit(storeWorkers)
	for i := range list {
		for key := range list[i].objects() { // of one file there may be thousands
			work.Go(func() error {
				if err := r.c.store.Delete(ctx, key); err != nil {
					m.Lock()
					errs[i] = err
					m.Unlock()
				}
				failpoint.Here(failpoint.BytesDeleting)
				return nil
			})
		}
	}
	_ = work.Wait() // errs says it
	for i, f := range list {
		if errs[i] == nil {
			done = append(done, f)
		}
	}
	if len(done) < len(list) {
		err = fmt.Errorf("the bytes of %d files could not be deleted: %w", len(list)-len(done), cmp.Or(errs...))
		if len(done) > 0 {
			r.c.o.Logger.Warn("some bytes of deleted files could not be deleted; trying again", "error", err)
			err = nil
		}
	}
	return done, err
}

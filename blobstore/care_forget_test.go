package blobstore

import (
	"errors"
	"sync/atomic"
	"testing"
	"time"
)

// TestDeletedFilesAreForgotten: long after its bytes went, an id is as if nobody had ever uploaded it.
func TestDeletedFilesAreForgotten(t *testing.T) {
	t.Parallel()
	c := newCaring(t)
	for _, id := range []string{"old", "young", "stuck", "swept", "there"} {
		c.file(id, id)
		c.names.set(id, id != "swept")
	}
	for _, id := range []string{"old", "young", "stuck"} {
		f, err := c.Find(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Remove(t.Context(), Removal{AttachmentID: id, EventID: f.EventID, Subject: "ana"}); err != nil {
			t.Fatal(err)
		}
	}
	stuck := c.key("stuck")
	c.care.store = &faulty{objects: c.store, onDelete: func(key string) error {
		if key == stuck {
			return errors.New("the store is away")
		}
		return nil
	}}
	for range 3 {
		_, _ = c.care.Round(t.Context(), RoundOptions{}) // one file's bytes can't be deleted
		c.age()
	}
	c.exec(`UPDATE walgate.files SET deleted_at = deleted_at - interval '31 days', created_at = created_at - interval '31 days' WHERE attachment_id <> 'young'`)
	ids := func() string {
		return ask[string](c.fixture, `SELECT string_agg(attachment_id, ' ' ORDER BY attachment_id) FROM walgate.files`)
	}
	if c.round(RoundOptions{DryRun: true}); ids() != "old stuck swept there young" {
		t.Errorf("after a dry run: %s", ids())
	}
	_, _ = c.care.Round(t.Context(), RoundOptions{})
	if ids() != "stuck there young" {
		t.Errorf("%s are known", ids())
	}
	c.care.store = c.store
	c.file("old", "again")
	c.expect("old", "u", "udu")
	c.settled()
}

// TestFileOfManyParts: the objects of one file are deleted beside each other, and there is an end to their number.
func TestFileOfManyParts(t *testing.T) {
	t.Parallel()
	c := newCaring(t)
	c.file("film", "bytes")
	c.exec(`UPDATE walgate.files SET state = 'd', deleted_at = now(), parts = array_fill(1::bigint, ARRAY[100])`)
	together, n := make(chan struct{}), atomic.Int32{}
	c.care.store = &faulty{objects: c.store, onDelete: func(string) error {
		if n.Add(1) == storeWorkers {
			close(together)
		}
		select {
		case <-together:
			return nil
		case <-time.After(10 * time.Second):
			return errors.New("alone")
		}
	}}
	c.round(RoundOptions{})
	c.expect("film", "d gone", "u")
	u, err := c.Reserve(t.Context(), Reservation{Kind: Tus, AttachmentID: "other", Subject: "ana", Length: 10})
	if err != nil {
		t.Fatal(err)
	}
	c.exec(`UPDATE walgate.uploads SET parts = array_fill(0::bigint, ARRAY[9999])`)
	if _, _, err := c.BeginPart(t.Context(), u); err != nil {
		t.Error(err)
	}
	if _, _, err := c.BeginPart(t.Context(), u); !errors.Is(err, ErrGivenUp) {
		t.Errorf("a part too many: %v", err)
	}
}

// TestScopesAreForgotten: of a file that the log withholds from nobody, it needn't be known where its uploader may write.
func TestScopesAreForgotten(t *testing.T) {
	t.Parallel()
	c := newCaring(t)
	c.names.events = map[string]int64{}
	for _, id := range []string{"open", "withheld", "newer"} {
		c.file(id, id)
		c.names.set(id, true)
		c.names.events[id] = ask[int64](c.fixture, `SELECT event_id FROM walgate.files WHERE attachment_id = $1`, id)
	}
	c.names.events["withheld"] = 0
	c.names.events["newer"]-- // the log has an earlier upload
	c.exec(`UPDATE walgate.files SET scopes = '{}'`)
	c.round(RoundOptions{DryRun: true})
	scoped := func() string {
		return ask[string](c.fixture, `SELECT string_agg(attachment_id, ' ' ORDER BY attachment_id) FROM walgate.files WHERE scopes IS NOT NULL`)
	}
	if got := scoped(); got != "newer open withheld" {
		t.Errorf("after a dry run %s have scopes", got)
	}
	c.round(RoundOptions{})
	if got := scoped(); got != "newer withheld" {
		t.Errorf("%s have scopes", got)
	}
}

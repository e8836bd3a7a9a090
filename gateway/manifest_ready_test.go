package gateway

import (
	"testing"
)

// TestManifestNotReady: while rows were never looked through, a list would lack files; later looks don't matter.
func TestManifestNotReady(t *testing.T) {
	t.Parallel()
	e := newFileEnv(t, setup{})
	a := tokenFor(t, "a", nil)
	ask := func(client string) *answer {
		return e.post(t, "/attachments/manifest", a, `{"client_id":"`+client+`","since_version":0}`)
	}
	for _, what := range []string{"collection = 0", "collection = (SELECT id FROM walgate.collections WHERE name = 'photos')"} {
		e.exec(t, `UPDATE walgate.attachment_fills SET done = false WHERE `+what)
		e.g.looked.mu.Lock()
		clear(e.g.looked.done) // as after a restart
		e.g.looked.mu.Unlock()
		ask("one").problem(t, NotReady)
		e.exec(t, `UPDATE walgate.attachment_fills SET done = true WHERE `+what)
		if a := ask("one"); a.status != 200 {
			t.Errorf("%d %s", a.status, a.body)
		}
		e.exec(t, `INSERT INTO walgate.attachment_fills (fill, collection, version) SELECT max(fill) + 1000, 0, 1 FROM walgate.attachment_fills`)
		if a := ask("two"); a.status != 200 {
			t.Errorf("while they are looked through again: %d %s", a.status, a.body)
		}
	}
}

// TestManifestOfAStoppedCollection: what is known of its files stands still, so that no list can be told to be whole.
func TestManifestOfAStoppedCollection(t *testing.T) {
	t.Parallel()
	e := newFileEnv(t, setup{})
	ask := func() *answer {
		return e.post(t, "/attachments/manifest", tokenFor(t, "a", nil), `{"client_id":"one","since_version":0}`)
	}
	e.exec(t, `UPDATE walgate.collections SET stopped = 'a test' WHERE name = 'photos'`)
	ask().problem(t, CollectionUnavailable)
	e.exec(t, `UPDATE walgate.collections SET stopped = '' WHERE name = 'photos'`)
	if a := ask(); a.status != 200 {
		t.Errorf("when it goes on: %d %s", a.status, a.body)
	}
}

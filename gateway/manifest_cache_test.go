package gateway

import (
	"context"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/walgate/walgate/changelog"
)

// TestManifestKnown: whatever is written and in whatever order clients ask, what is answered without the log is what the log
// says at the same position.
func TestManifestKnown(t *testing.T) {
	t.Parallel()
	e := newFileEnv(t, setup{})
	seed := uint64(time.Now().UnixNano())
	rng := rand.New(rand.NewPCG(seed, 1))
	w := &fileWriter{e: e, rng: rng}
	ctx := t.Context()
	ask := func(subject, client string, since int64, limit int) (*manifestPage, bool) {
		id, err := e.g.auth.Verify(ctx, tokenFor(t, subject, map[string]any{"teams": []int{1}}))
		ok(t, err)
		f, err := e.g.feedFor(id, nil)
		ok(t, err)
		scopes := newFileScopes(f.set, f.caller, client)
		r := manifestRequest{clientID: client, since: changelog.Version(since), limit: limit}
		known, err := e.g.knownPage(ctx, scopes, r)
		ok(t, err)
		p, again, err := e.g.manifestPage(ctx, clientOf(subject, client), scopes, r)
		ok(t, err)
		if again != "" {
			t.Fatalf("seed %d: %s", seed, again)
		}
		if known != nil {
			read, err := e.log.Operations(ctx, changelog.OperationsRequest{Scopes: scopes.keys, Since: r.since, Limit: limit})
			ok(t, err)
			want := slices.DeleteFunc(read.Operations, func(o changelog.Operation) bool { return since == 0 && o.Delete })
			moved := read.Last < known.current || read.Last != known.current && read.More // an idle log's position moves on
			if moved || read.More != known.more || len(want)+len(known.operations) > 0 && !reflect.DeepEqual(want, known.operations) {
				t.Fatalf("seed %d: known up to %d (more %v): %v\nread up to %d (more %v): %v", seed, known.current, known.more, known.operations, read.Last, read.More, want)
			}
		}
		return p, known != nil
	}
	type place struct {
		subject, client string
		limit           int
	}
	since := map[place][]int64{}
	known := 0
	for range 120 {
		if rng.IntN(2) == 0 {
			w.step(t)
			e.sync(t)
		}
		for range 4 {
			at := place{string(rune('a' + rng.IntN(3))), fmt.Sprint("client ", rng.IntN(2)), 1 + 4*rng.IntN(2)}
			if len(since[at]) == 0 {
				since[at] = []int64{0}
			}
			from := since[at][max(0, len(since[at])-1-rng.IntN(3))]
			p, without := ask(at.subject, at.client, from, at.limit)
			if without {
				known++
			}
			since[at] = append(since[at], int64(p.current))
		}
	}
	if known < 100 {
		t.Errorf("seed %d: only %d answers of 480 were known", seed, known)
	}
}

func clientOf(subject, id string) client { return client{subject, id} }

// TestManifestIdlePolls: a poll of scopes in which nothing happened reads no operations, however much happens elsewhere; one
// with something new does.
func TestManifestIdlePolls(t *testing.T) {
	t.Parallel()
	e := newFileEnv(t, setup{})
	a := tokenFor(t, "a", nil)
	e.exec(t, `INSERT INTO photos (id, owner, file) VALUES (1, 'a', 'a.jpg'), (2, 'b', 'b.jpg')`)
	e.upload(t, "a.jpg", "", 1, "a", "")
	e.sync(t)
	list := e.manifest(t, a, "c", 0, 0)
	idle := e.manifest(t, a, "c", list.Current, 0)
	e.upload(t, "b.jpg", "", 1, "b", "")
	e.exec(t, `INSERT INTO news VALUES (1, 'x')`)
	e.sync(t)
	e.exec(t, `ALTER TABLE walgate.attachment_operations RENAME TO hidden`)
	poll := e.manifest(t, a, "c", idle.Current, 0)
	if poll.brief() != "" || poll.Current <= idle.Current {
		t.Errorf("a poll: %s up to %d, which was %d", poll.brief(), poll.Current, idle.Current)
	}
	if again := e.manifest(t, a, "c", poll.Current, 0); again.brief() != "" || again.Current < poll.Current {
		t.Errorf("another: %+v", again)
	}
	if m := e.manifest(t, a, "c", 0, 0); m.brief() != list.brief() {
		t.Errorf("the list again: %s", m.brief())
	}
	e.exec(t, `ALTER TABLE walgate.hidden RENAME TO attachment_operations`)
	e.exec(t, `UPDATE photos SET file = NULL WHERE id = 1`)
	e.sync(t)
	e.exec(t, `ALTER TABLE walgate.attachment_operations RENAME TO hidden`)
	e.post(t, "/attachments/manifest", a, fmt.Sprintf(`{"client_id":"c","since_version":%d}`, idle.Current)).problem(t, LogUnavailable)
	e.exec(t, `ALTER TABLE walgate.hidden RENAME TO attachment_operations`)
	if m := e.manifest(t, a, "c", idle.Current, 0); m.brief() != "delete a.jpg" {
		t.Errorf("something new: %s", m.brief())
	}
}

// TestQuiet: the hub calls scopes quiet only while it knows all their operations.
func TestQuiet(t *testing.T) {
	t.Parallel()
	keys := [][16]byte{scopeKey(1), scopeKey(2)}
	batch := func(prev, last changelog.Version, scope int) *changelog.Batch {
		return &changelog.Batch{History: testHistory, Prev: prev, Last: last, Operations: []changelog.Operation{{Version: last, Scope: scopeKey(scope)}}}
	}
	stands := func(prepare func(h *hub)) *hub {
		h := newTestHub()
		h.whole = 100
		for v := changelog.Version(101); v <= 110; v++ {
			if !h.apply(t.Context(), batch(v-1, v, 7)) {
				t.Fatal("not taken")
			}
		}
		prepare(h)
		return h
	}
	for name, c := range map[string]struct {
		prepare func(*hub)
		since   changelog.Version
		want    bool
	}{
		"others' operations":       {func(*hub) {}, 105, true},
		"from where the hub began": {func(*hub) {}, 100, true},
		"before the hub began":     {func(*hub) {}, 99, false},
		"above the hub":            {func(*hub) {}, 111, false},
		"an operation since":       {func(h *hub) { h.apply(context.Background(), batch(110, 111, 2)) }, 110, false},
		"an operation before":      {func(h *hub) { h.apply(context.Background(), batch(110, 111, 2)) }, 111, true},
		"the log is further":       {func(h *hub) { h.hear(111) }, 110, false},
		"the hub has followed":     {func(h *hub) { h.hear(111); h.apply(context.Background(), batch(110, 111, 7)) }, 110, true},
		"a gap":                    {func(h *hub) { h.apply(context.Background(), batch(112, 113, 7)) }, 110, false},
		"a batch without operations": {func(h *hub) {
			h.apply(context.Background(), &changelog.Batch{History: testHistory, Prev: 110, Last: 120, Omitted: true})
		}, 110, false},
		"a jump": {func(h *hub) {
			h.standAt(&changelog.Head{Version: 200, History: testHistory})
		}, 110, false},
		"after a jump": {func(h *hub) {
			h.standAt(&changelog.Head{Version: 200, History: testHistory})
		}, 200, true},
		"another history":      {func(h *hub) { h.standAt(&changelog.Head{Version: 200, History: "ffff"}) }, 110, false},
		"within a transaction": {func(h *hub) { h.whole = 105 }, 110, false},
		"too many scopes": {func(h *hub) {
			b := &changelog.Batch{History: testHistory, Prev: 110, Last: 111}
			for i := range scopesSeen {
				b.Operations = append(b.Operations, changelog.Operation{Version: 111, Scope: scopeKey(10 + i)})
			}
			h.apply(context.Background(), b)
		}, 110, false},
	} {
		if at, quiet := stands(c.prepare).quiet(keys, c.since); quiet != c.want || quiet && at.Version < c.since {
			t.Errorf("%s: %v at %d", name, quiet, at.Version)
		}
	}
}

// TestManifestPagesAreBounded: pages that were not asked for longest are given up.
func TestManifestPagesAreBounded(t *testing.T) {
	t.Parallel()
	var m manifestPages
	f := &fileScopes{keys: [][16]byte{scopeKey(1)}}
	at := func(i int) manifestRequest { return manifestRequest{since: changelog.Version(i), limit: 10} }
	large := &manifestPage{operations: make([]changelog.Operation, pagesOperations/10)}
	for i := range 30 {
		m.put(f, at(i), testHistory, large)
		m.put(f, at(i), testHistory, large) // in its own place
		m.get(f, at(0))
	}
	if m.operations != pagesOperations || len(m.pages) != 10 || m.recent.Len() != 10 || m.get(f, at(0)) == nil || m.get(f, at(29)) == nil || m.get(f, at(15)) != nil {
		t.Errorf("%d operations in %d pages", m.operations, len(m.pages))
	}
	if m.get(f, manifestRequest{since: 29, limit: 11}) != nil || m.get(&fileScopes{keys: [][16]byte{scopeKey(2)}}, at(29)) != nil {
		t.Error("another limit's or scope's page")
	}
	for i := range 2 * pagesMost {
		m.put(f, at(100+i), testHistory, &manifestPage{more: true})
	}
	if len(m.pages) != pagesMost {
		t.Errorf("%d pages", len(m.pages))
	}
}

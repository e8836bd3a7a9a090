package gateway

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/policies"
)

// TestIsolation: one subscriber whose policy fails on every row, one that reads nothing, a tenant with a storm of writes and rows
// that cost their policy too much harm nobody else, on the leader and on another instance: everybody gets all of theirs, once and in
// order.
func TestIsolation(t *testing.T) {
	t.Parallel()
	const rows, every, storm, large = 150, 30, 100, 100_000
	e := newEnv(t, setup{
		before: `CREATE TABLE posts (id bigint PRIMARY KEY, tenant text NOT NULL, title text NOT NULL)`,
		specs: map[string]policies.Spec{"posts": {Table: "public.posts", Scope: []map[string]string{{"tenant": "claims.tenant"}},
			Where: `!row.title.contains('a text that no row has') && (claims.sub != 'failing' || int(row.title) > 0)`}},
		gateway: func(g *Gateway) { g.limits.write = 500 * time.Millisecond },
	})
	fleet := fleet{e, e.another(t, setup{bus: func(b changelog.Bus) changelog.Bus { return b }, gateway: func(g *Gateway) { g.limits.write = 500 * time.Millisecond }})}
	token := func(subject, tenant string) string { return tokenFor(t, subject, map[string]any{"tenant": tenant}) }
	const only = `,"collections":["posts"]`
	type reader struct {
		*stream
		first, last int // ids
	}
	var readers []reader
	const poison, stormy, numeric = 1_000_000, 2_000_000, 3_000_000
	for _, at := range fleet {
		at.live(t, token("stuck", "shared"), only) // and never read
		readers = append(readers, reader{at.live(t, token("ana", "shared"), only), 0, rows}, reader{at.live(t, token("storming", "storm"), only), stormy, stormy + rows/every*storm})
		failing := at.live(t, token("failing", "shared"), only)
		readers = append(readers, reader{failing, numeric, numeric + 1})
	}
	var reading sync.WaitGroup
	for _, r := range readers {
		reading.Go(func() {
			for want := r.first; want < r.last; {
				f, err := r.read()
				if err != nil {
					t.Errorf("change %d: %v", want, err)
					return
				}
				if f.Type != "" {
					continue
				}
				if f.DocID != fmt.Sprint(want) {
					t.Errorf("want change %d, got %s", want, f.DocID)
					return
				}
				want++
			}
		})
	}
	for i := range rows {
		e.exec(t, `INSERT INTO posts VALUES ($1, 'shared', repeat('x', $2))`, i, large)
		if i%every == 0 {
			n := i / every
			e.exec(t, `INSERT INTO posts VALUES ($1, 'shared', repeat('x', 10 * $2))`, poison+i, large) // nobody is to get it
			e.exec(t, `INSERT INTO posts SELECT i, 'storm', 'x' FROM generate_series($1::int, $2::int) i`, stormy+n*storm, stormy+(n+1)*storm-1)
		}
	}
	e.exec(t, `INSERT INTO posts VALUES ($1, 'shared', '1')`, numeric) // the first one that its policy says something of
	reading.Wait()
	for _, at := range fleet {
		eventually(t, "the stuck client is gone", func() bool {
			return strings.Contains(string(at.get(t, "/metrics", "").body), "walgate_stream_stuck_total 1")
		})
		if n := at.g.policyN.Load(); n == 0 {
			t.Error("no policy failed")
		}
	}
}

// TestWordsSpareLooks: while the bus tells an instance of changes, it needn't look at the log, but now and then it does.
func TestWordsSpareLooks(t *testing.T) {
	t.Parallel()
	const every = 200 * time.Millisecond
	e := newEnv(t, setup{})
	hub := e.another(t, setup{bus: func(b changelog.Bus) changelog.Bus { return b }, gateway: func(g *Gateway) { g.hub.every = every }}).g.hub
	began, looks, spared := time.Now(), hub.looks.Load(), false
	id := 0
	eventually(t, "looks are spared, and then not", func() bool {
		id++
		ok(t, e.insertAlone(id, "ana"))
		now := hub.looks.Load()
		spared = spared || now == looks && time.Since(began) > 4*every
		if now != looks {
			began, looks = time.Now(), now
			return spared
		}
		return false
	})
}

// TestNewcomersAreLookedAt: who joins was judged by the collections' state of before, so its instance looks at the log at the
// next check, however much the bus tells it.
func TestNewcomersAreLookedAt(t *testing.T) {
	t.Parallel()
	const every = 2 * time.Second
	e := newEnv(t, setup{})
	a := e.another(t, setup{bus: func(b changelog.Bus) changelog.Bus { return b }, gateway: func(g *Gateway) { g.hub.every = every }})
	hub, id := a.g.hub, 0
	write := func() (looks int64) {
		id++
		ok(t, e.insertAlone(id, "ana"))
		return hub.looks.Load()
	}
	token := tokenFor(t, "ana", nil)
	a.subscribe(t, token, a.here(t, token), "")
	eventually(t, "somebody new is there", hub.newcomers)
	joined := time.Now()
	looks := hub.looks.Load()
	eventually(t, "it looks", func() bool { return write() != looks })
	if waited := time.Since(joined); waited > sparedMost*every/2 { // words spare looks for twice that
		t.Errorf("looked after %s", waited)
	}
}

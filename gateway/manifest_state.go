package gateway

import (
	"container/list"
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/walgate/walgate/changelog"
)

// manifestState is what walgate.manifests says of a client: for which scopes its positions hold. since_version is a bare number,
// so the server remembers what it was given for.
type manifestState struct {
	hash      string            // of the scopes
	wholeFrom changelog.Version // positions below it are of other scopes
	// A listing from 0 that isn't complete may stand below wholeFrom, or below the floor of deletions: it began at runFrom, and
	// pages are the ends of its last pages.
	runFrom changelog.Version
	pages   []changelog.Version
}

// runPages is how many ends of pages are remembered: the last one, and the one before, which is asked for again where an
// answer was lost.
const runPages = 2

const (
	// manifestTrust is how long a state that was read is believed. Another instance may have changed it meanwhile, which does
	// harm only where a client comes back to a token with its former scopes within that time.
	manifestTrust = 10 * time.Second
	statesMost    = 1 << 16
)

// manifestStates keeps what was read of walgate.manifests, and of which collections the rows were looked through. Safe for
// concurrent use.
type manifestStates struct {
	mu      sync.Mutex
	states  map[client]*list.Element
	recent  list.List // of *keptState, the one read last in front
	history string    // of done
	done    map[int32]struct{}
}

type keptState struct {
	client client
	state  manifestState
	until  time.Time
}

// recallSQL reads a client's state, makes it where there is none, and notes now and then that the client is still there.
const recallSQL = `WITH was AS (SELECT scope_hash, whole_from, run_from, pages, seen_at FROM walgate.manifests WHERE subject = $1 AND client_id = $2),
	made AS (INSERT INTO walgate.manifests (subject, client_id, scope_hash) SELECT $1, $2, $3 WHERE NOT EXISTS (SELECT FROM was) ON CONFLICT DO NOTHING),
	seen AS (UPDATE walgate.manifests SET seen_at = now() WHERE subject = $1 AND client_id = $2 AND (SELECT seen_at FROM was) < now() - $4::interval)
	SELECT scope_hash, whole_from, run_from, pages FROM was`

// seenAgain is after which time it is noted that a client still comes.
const seenAgain = 24 * time.Hour

// recall returns a client's state, without a hash where there was none.
func (m *manifestStates) recall(ctx context.Context, source *pgxpool.Pool, c client, hash string) (manifestState, error) {
	m.mu.Lock()
	e := m.states[c]
	m.mu.Unlock()
	if e != nil {
		if k := e.Value.(*keptState); k.state.hash == hash && time.Now().Before(k.until) {
			return k.state, nil
		}
	}
	s := manifestState{}
	err := source.QueryRow(ctx, recallSQL, c.subject, c.id, hash, seenAgain).Scan(&s.hash, &s.wholeFrom, &s.runFrom, &s.pages)
	if errors.Is(err, pgx.ErrNoRows) {
		return s, nil // two may come first at a time: not kept
	}
	if err != nil {
		return s, storeProblem(err)
	}
	m.keep(c, s)
	return s, nil
}

func (m *manifestStates) keep(c client, s manifestState) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.states == nil {
		m.states = map[client]*list.Element{}
	}
	if e := m.states[c]; e != nil {
		m.recent.Remove(e)
	} else if len(m.states) >= statesMost {
		delete(m.states, m.recent.Remove(m.recent.Back()).(*keptState).client)
	}
	m.states[c] = m.recent.PushFront(&keptState{c, s, time.Now().Add(manifestTrust)})
}

// listed remembers what a page of a listing from 0 makes of a client's state, before the client sees the page.
func (g *Gateway) listed(ctx context.Context, c client, f *fileScopes, s manifestState, since changelog.Version, p *manifestPage) error {
	next := s
	if since == 0 {
		next.runFrom, next.pages = p.position, nil
		if s.hash != f.hash {
			next.hash, next.wholeFrom = f.hash, p.position
		}
	}
	if p.more && p.current < max(next.wholeFrom, p.floor) && !slices.Contains(next.pages, p.current) {
		next.pages = append(slices.Clone(next.pages[max(0, len(next.pages)-runPages+1):]), p.current)
	}
	if next.hash == s.hash && slices.Equal(next.pages, s.pages) {
		return nil
	}
	_, err := g.o.Source.Exec(ctx, `INSERT INTO walgate.manifests (subject, client_id, scope_hash, whole_from, run_from, pages) VALUES ($1, $2, $3, $4, $5, coalesce($6::bigint[], '{}'))
		ON CONFLICT (subject, client_id) DO UPDATE SET scope_hash = excluded.scope_hash, whole_from = excluded.whole_from, run_from = excluded.run_from,
			pages = excluded.pages, seen_at = now()`, c.subject, c.id, next.hash, int64(next.wholeFrom), int64(next.runFrom), next.pages)
	if err != nil {
		return storeProblem(err)
	}
	g.manifests.keep(c, next)
	return nil
}

// unfilled returns what of a caller's collections was never looked through, and remembers what was; "": nothing.
func (m *manifestStates) unfilled(f *fileScopes, p *changelog.OperationsPage) string {
	m.mu.Lock()
	if m.done == nil || m.history != p.Head.History {
		m.done, m.history = map[int32]struct{}{}, p.Head.History
	}
	for _, id := range p.Filled {
		m.done[id] = struct{}{}
	}
	m.mu.Unlock()
	return m.missing(f, &p.Head)
}

// filled says whether all of a caller's collections are known to have been looked through.
func (m *manifestStates) filled(f *fileScopes, h *changelog.Head) bool { return m.missing(f, h) == "" }

func (m *manifestStates) missing(f *fileScopes, h *changelog.Head) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, c := range f.collections {
		st := stateOf(h, c.Name)
		_, rows := m.done[idOf(st)]
		_, bytes := m.done[0]
		if m.history != h.History || st == nil || !rows || !bytes {
			return c.Name
		}
	}
	return ""
}

func idOf(c *changelog.Collection) int32 {
	if c == nil {
		return -1
	}
	return c.ID
}

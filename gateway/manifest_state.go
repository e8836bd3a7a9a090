package gateway

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

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

// looked keeps of which collections the rows were looked through. Safe for concurrent use.
type looked struct {
	mu      sync.Mutex
	history string
	done    map[int32]struct{}
}

// recallSQL reads a client's state, and whether to note again that it is still there.
const recallSQL = `SELECT scope_hash, whole_from, run_from, pages, seen_at < now() - $3::interval FROM walgate.manifests WHERE subject = $1 AND client_id = $2`

// seenSQL notes that a client is there, with the scopes that it came with first.
const seenSQL = `INSERT INTO walgate.manifests (subject, client_id, scope_hash) VALUES ($1, $2, $3) ON CONFLICT (subject, client_id) DO UPDATE SET seen_at = now()`

// seenAgain is after which time it is noted that a client still comes.
const seenAgain = 24 * time.Hour

// recall returns a client's state, without a hash where there was none. It is read for each manifest: the one before may have
// been another instance's.
func (g *Gateway) recall(ctx context.Context, c client, hash string) (s manifestState, err error) {
	long := false
	err = g.o.Source.QueryRow(ctx, recallSQL, c.subject, c.id, seenAgain).Scan(&s.hash, &s.wholeFrom, &s.runFrom, &s.pages, &long)
	if errors.Is(err, pgx.ErrNoRows) || err == nil && long {
		_, err = g.o.Source.Exec(ctx, seenSQL, c.subject, c.id, hash)
	}
	return s, storeProblem(err)
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
	return storeProblem(err)
}

// unfilled returns what of a caller's collections was never looked through, and remembers what was; "": nothing.
func (l *looked) unfilled(f *fileScopes, p *changelog.OperationsPage) string {
	l.mu.Lock()
	if l.done == nil || l.history != p.Head.History {
		l.done, l.history = map[int32]struct{}{}, p.Head.History
	}
	for _, id := range p.Filled {
		l.done[id] = struct{}{}
	}
	l.mu.Unlock()
	return l.missing(f, &p.Head)
}

// filled says whether all of a caller's collections are known to have been looked through.
func (l *looked) filled(f *fileScopes, h *changelog.Head) bool { return l.missing(f, h) == "" }

func (l *looked) missing(f *fileScopes, h *changelog.Head) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range f.collections {
		st := stateOf(h, c.Name)
		_, rows := l.done[idOf(st)]
		_, bytes := l.done[0]
		if l.history != h.History || st == nil || !rows || !bytes {
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

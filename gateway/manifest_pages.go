package gateway

import (
	"container/list"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"sync"
	"time"

	"github.com/walgate/walgate/changelog"
)

// manifestPage finds what a client is to do since r.since; again, if not empty, is why it must begin anew, from 0. A poll
// of scopes in which nothing happened is answered from what the hub has heard, and a page that was read before as long
// as nothing happened in its scopes.
func (g *Gateway) manifestPage(ctx context.Context, c client, f *fileScopes, r manifestRequest) (p *manifestPage, again string, err error) {
	s, err := g.recall(ctx, c, f.hash)
	if err != nil {
		return nil, "", err
	}
	if s.hash == "" { // it never asked, or so long ago that what it was given is forgotten
		if s.hash = f.hash; r.since != 0 && g.o.ClientsKept != 0 && r.since.Time().Before(time.Now().Add(seenAgain-g.o.ClientsKept)) {
			return nil, reasonTooOld, nil
		}
	}
	within := slices.Contains(s.pages, r.since) // of a listing from 0
	if r.since != 0 && (s.hash != f.hash || r.since < s.wholeFrom && !within) {
		return nil, reasonScopes, nil
	}
	if p, err = g.knownPage(ctx, f, r); p != nil || err != nil {
		if err == nil && (r.since == 0 || within) {
			err = g.listed(ctx, c, f, s, r.since, p)
		}
		return p, "", err
	}
	read, err := g.operations(ctx, changelog.OperationsRequest{Scopes: f.keys, Since: r.since, Limit: r.limit})
	if err != nil {
		return nil, "", err
	}
	switch {
	case !read.Head.Issued(r.since):
		return nil, reasonAhead, nil
	case r.since != 0 && r.since < read.Floor && !(within && s.runFrom >= read.Floor):
		return nil, reasonTooOld, nil
	}
	if err := f.usable(&read.Head); err != nil {
		return nil, "", err
	}
	if name := g.looked.unfilled(f, read); name != "" {
		return nil, "", NewProblem(NotReady, "the rows of %s are still being looked through for attachments", name)
	}
	p = &manifestPage{operations: read.Operations, current: read.Last, more: read.More, position: read.Head.Version, floor: read.Floor}
	if r.since == 0 { // who holds nothing has nothing to delete
		p.operations = slices.DeleteFunc(p.operations, func(o changelog.Operation) bool { return o.Delete })
	}
	g.pages.put(f, r, read.Head.History, p)
	g.metrics.manifests.WithLabelValues("read").Inc()
	if r.since == 0 || within {
		err = g.listed(ctx, c, f, s, r.since, p)
	}
	return p, "", err
}

// knownPage answers from memory, where nothing happened since the log was read; nil: it has to be read. The log is still asked how
// far it is: what another instance has answered for may not have come by the bus yet.
func (g *Gateway) knownPage(ctx context.Context, f *fileScopes, r manifestRequest) (*manifestPage, error) {
	kept := g.pages.get(f, r)
	since := r.since
	switch {
	case kept != nil:
		since = kept.page.position
	case r.since == 0:
		return nil, nil
	}
	at, quiet := g.hub.quiet(f.keys, since)
	if !quiet || kept != nil && kept.history != at.History || !g.looked.filled(f, &at) {
		return nil, nil
	}
	newest, err := g.newest(ctx)
	if err != nil || newest > at.Version {
		return nil, err
	}
	if err := f.usable(&at); err != nil {
		return nil, err
	}
	g.metrics.manifests.WithLabelValues("known").Inc()
	if kept == nil {
		return &manifestPage{current: at.Version, position: at.Version}, nil
	}
	p := *kept.page
	if p.position = at.Version; !p.more {
		p.current = at.Version
	}
	return &p, nil
}

// pagesOperations and pagesMost bound the pages that are kept: operations over all of them, and pages.
const (
	pagesOperations = 100_000
	pagesMost       = 10_000
)

// manifestPages keeps pages that were read, the ones used last. What a page says holds as long as its scopes are quiet.
// Safe for concurrent use.
type manifestPages struct {
	mu         sync.Mutex
	pages      map[pageKey]*list.Element
	recent     list.List // of *keptPage, the one used last in front
	operations int
}

type pageKey [16]byte

type keptPage struct {
	key     pageKey
	history string
	page    *manifestPage // never changed
}

// pageKeyOf tells apart scopes, since and limit.
func pageKeyOf(f *fileScopes, r manifestRequest) pageKey {
	sum := sha256.New()
	for _, key := range f.keys {
		sum.Write(key[:])
	}
	sum.Write(binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, uint64(r.since)), uint64(r.limit)))
	return pageKey(sum.Sum(nil))
}

func (m *manifestPages) get(f *fileScopes, r manifestRequest) *keptPage {
	key := pageKeyOf(f, r)
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.pages[key]
	if e == nil {
		return nil
	}
	m.recent.MoveToFront(e)
	return e.Value.(*keptPage)
}

// put keeps a page, unless the hub alone could answer it.
func (m *manifestPages) put(f *fileScopes, r manifestRequest, history string, p *manifestPage) {
	if len(p.operations) == 0 && !p.more && r.since != 0 {
		return
	}
	kept := &keptPage{key: pageKeyOf(f, r), history: history, page: p}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.pages == nil {
		m.pages = map[pageKey]*list.Element{}
	}
	if e := m.pages[kept.key]; e != nil {
		m.dropLocked(e)
	}
	m.pages[kept.key] = m.recent.PushFront(kept)
	m.operations += len(p.operations)
	for m.operations > pagesOperations || len(m.pages) > pagesMost {
		m.dropLocked(m.recent.Back())
	}
}

func (m *manifestPages) dropLocked(e *list.Element) {
	kept := m.recent.Remove(e).(*keptPage)
	delete(m.pages, kept.key)
	m.operations -= len(kept.page.operations)
}

package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/policies"
)

const (
	// positionCheck is how long after the last word from the bus the hub compares itself with the log: a message that was lost
	// is found by it, or by the message after it.
	positionCheck = time.Second
	// sparedMost is how many such checks messages may spare, one after the other.
	sparedMost = 10
	// headLimit bounds a look at where the log stands: batches wait for it, and come without the log.
	headLimit = 5 * time.Second
	gapPage   = 2000
	gapBytes  = 4 << 20
)

// hub hands each change to the subscribers of its scopes. It stands at one version; what is below was handed to everybody
// who is live. One goroutine (run) applies batches; the other methods are safe for concurrent use.
type hub struct {
	log    *changelog.Log
	bus    changelog.Bus
	logger *slog.Logger
	failed func(collection string, err error) // a policy failed on a row
	memory *budget
	every  time.Duration // positionCheck, but for tests
	looks  atomic.Int64  // at the log

	mu      sync.Mutex
	head    *changelog.Head   // where the hub stands; nil: nothing was read yet
	whole   changelog.Version // the newest end of a transaction at or below it
	target  changelog.Version // while it stands within a transaction: an end above it
	scopes  map[[16]byte][]*subscriber
	files   map[[16]byte][]*subscriber // by the scopes of their attachments
	seen    operationsSeen
	subs    map[*subscriber]struct{}
	waiters map[chan struct{}]changelog.LSN
	echoes  map[int64]chan echo // who waits for a push, by its id
	started chan struct{}       // closed once head is set
	touched []*subscriber       // of the transaction being delivered; kept for its memory
	partial []*subscriber       // got an earlier part of it
	foreign int64               // the claim of batches that aren't this log's; 0: none came
	joined  bool                // somebody did since the subscribers were last held against the collections' state
	// checkpoints are the frames of the transaction that ends, by scope hash.
	checkpoints map[string][]byte

	url func(*changelog.Operation) []byte // of a download
}

func newHub(log *changelog.Log, bus changelog.Bus, logger *slog.Logger, memory *budget, failed func(string, error)) *hub {
	return &hub{memory: memory, log: log, bus: bus, logger: logger, failed: failed, every: positionCheck, checkpoints: map[string][]byte{},
		scopes: map[[16]byte][]*subscriber{}, files: map[[16]byte][]*subscriber{}, subs: map[*subscriber]struct{}{},
		url: func(*changelog.Operation) []byte { return nil }, waiters: map[chan struct{}]changelog.LSN{}, echoes: map[int64]chan echo{}, started: make(chan struct{})}
}

// run follows the log until ctx ends.
func (h *hub) run(ctx context.Context) error {
	batches := h.bus.Subscribe(ctx)
	tick := time.NewTicker(h.every)
	defer tick.Stop()
	h.follow(ctx)
	looked := time.Now()
	for {
		select {
		case <-ctx.Done():
			return nil
		case b, ok := <-batches:
			if !ok {
				return nil
			}
			switch {
			case !h.apply(ctx, b):
				if h.follow(ctx) {
					h.disown(b)
				}
				looked = time.Now()
			case time.Since(looked) < sparedMost*h.every && !h.newcomers():
				tick.Reset(h.every)
			}
		case <-tick.C:
			h.follow(ctx)
			looked = time.Now()
		}
	}
}

// newcomers says whether somebody joined who wasn't yet held against the collections' state.
func (h *hub) newcomers() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.joined
}

// origin says whether a batch is of the log as the hub knows it, or of one that isn't this log: that of a copy of the database.
func (h *hub) origin(b *changelog.Batch) (ours, foreign bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	ours = h.head != nil && b.History == h.head.History && b.Claim == h.head.Claim
	return ours, !ours && b.Claim != 0 && b.Claim == h.foreign
}

// disown remembers whose batch it is, after the log was read and is another's: a claim is announced once it is committed, so
// this one is over or was never of this log. Nobody looks at the log for its sake again.
func (h *hub) disown(b *changelog.Batch) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if b.Claim != 0 && h.head != nil && h.head.Claim != b.Claim {
		h.foreign = b.Claim
	}
}

// apply hands a batch out if it continues where the hub stands; false: the log must be read.
func (h *hub) apply(ctx context.Context, b *changelog.Batch) bool {
	if ours, foreign := h.origin(b); !ours {
		return foreign
	}
	held := h.holders(ctx, b.Operations)
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.head == nil || b.History != h.head.History || b.Claim != h.head.Claim {
		return false
	}
	h.seen.heard = max(h.seen.heard, b.Last)
	told := b.Last
	if b.Omitted {
		told = 0
	}
	h.echoLocked(b.Pushes, b.Entries, b.Prev+1, told)
	if b.Last < h.head.Version || b.Last == h.head.Version && len(b.Entries) == 0 && len(b.Raises) == 0 && len(b.Operations) == 0 && !b.Omitted {
		h.passLocked(b.LSN) // a fence, an idle position, or a message that came twice
		return true
	}
	if b.Prev != h.head.Version {
		return false
	}
	if b.Omitted || !h.knowsLocked(b.Entries) {
		return false
	}
	h.raiseLocked(b.Raises) // first: a checkpoint above a new floor would let a client go on that must resynchronise
	h.deliverLocked(delivery{entries: b.Entries, pushes: b.Pushes, operations: b.Operations, held: held, complete: true})
	h.seen.note(b.Operations, b.Last)
	h.head.Version, h.whole = b.Last, b.Last
	h.passLocked(b.LSN)
	return true
}

// knowsLocked says whether the hub has heard of every entry's collection.
func (h *hub) knowsLocked(entries []changelog.Entry) bool {
	last := int32(-1)
	for i := range entries {
		if id := entries[i].Collection; id != last {
			if h.head.Collection(id) == nil {
				return false
			}
			last = id
		}
	}
	return true
}

// follow reads the log from where the hub stands to its end. It leaves the rest to the next call, and returns false, when the
// log can't be read.
func (h *hub) follow(ctx context.Context) bool {
	for ctx.Err() == nil {
		more, err := h.step(ctx)
		if err != nil {
			if ctx.Err() == nil && !errors.Is(err, changelog.ErrNotInitialised) {
				h.logger.Warn("the change log can't be read; live clients wait", "error", err)
			}
			return false
		}
		if !more {
			return true
		}
	}
	return false
}

func (h *hub) step(ctx context.Context) (more bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	h.looks.Add(1)
	h.mu.Lock()
	old, idle := h.head, h.idleLocked()
	h.mu.Unlock()
	looking, stop := context.WithTimeout(ctx, headLimit)
	now, err := h.log.Head(looking)
	if stop(); err != nil {
		return false, err
	}
	if old == nil || idle || now.Version <= old.Version && now.History == old.History { // below: the log's server was set back
		return !h.standAt(now), nil
	}
	p, err := h.log.ReadAll(ctx, old.Version, now.Version, gapPage, gapBytes)
	if err != nil {
		return false, err
	}
	held := h.holders(ctx, p.Operations)
	h.mu.Lock()
	defer h.mu.Unlock()
	if p.Head.History != old.History {
		h.adoptLocked(&p.Head)
		h.whole = p.Head.Version
		return false, nil
	}
	stand := p.Head // its collections and floors hold from here on; the position follows with the entries
	stand.Version, stand.LSN = old.Version, old.LSN
	h.adoptLocked(&stand)
	h.echoLocked(p.Pushes, p.Entries, old.Version+1, p.Last)
	h.deliverLocked(delivery{entries: p.Entries, pushes: p.Pushes, operations: p.Operations, held: held, complete: !p.Partial})
	h.seen.note(p.Operations, p.Last)
	h.head.Version, h.target = p.Last, now.Version
	if !p.Partial {
		h.whole = p.Last
	}
	if !p.More {
		h.passLocked(p.Head.LSN)
	}
	return p.More, nil
}

// standAt takes over a head that was read without entries in between; false: somebody came meanwhile, who needs them.
func (h *hub) standAt(now *changelog.Head) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.head != nil && h.head.Version < now.Version && !h.idleLocked() && h.head.History == now.History {
		return false
	}
	h.adoptLocked(now)
	h.whole, h.target = now.Version, now.Version
	h.passLocked(now.LSN)
	return true
}

// adoptLocked takes over a head's state and tells those whom it cuts off.
func (h *hub) adoptLocked(now *changelog.Head) {
	old := h.head
	h.head = now
	if old == nil || now.History != old.History || now.Version != old.Version {
		h.seen.forget(now.Version) // what lies between isn't heard
	}
	if old == nil {
		close(h.started)
		return
	}
	lost := !now.Issued(old.Version) // what was handed out is
	if now.History == old.History && !lost && !h.joined && slices.Equal(now.Collections, old.Collections) && slices.Equal(now.Gaps, old.Gaps) {
		return // nobody can be cut off: whoever is here was looked at under the same state
	}
	h.joined = false
	for s := range h.subs {
		if now.History != old.History {
			s.end(&resync{Collections: s.feed.names(), Attachments: s.feed.files != nil, Reason: reasonHistory})
			continue
		}
		if lost || now.Skipped(s.reached(old.Version)) { // it may have read the log before that was set back, and joined after
			s.end(&resync{Collections: s.feed.names(), Attachments: s.feed.files != nil, Reason: reasonAhead})
			continue
		}
		for _, c := range s.feed.collections {
			if is := stateOf(now, c.Name); is != nil {
				cutOff(s, c.Name, old.Version, is)
			}
		}
	}
}

// cutOff ends a subscription whose collection was raised above what it has, or stopped; at is where the hub stood: what a
// live subscriber has at least.
func cutOff(s *subscriber, name string, at changelog.Version, is *changelog.Collection) {
	switch {
	case is.Stopped != "":
		s.fail(NewProblem(CollectionUnavailable, "collection %s is stopped", name))
	case is.Floor > s.reached(at):
		s.end(&resync{Collections: []string{name}, Reason: reasonTooOld})
	}
}

func (h *hub) raiseLocked(raises []changelog.Raise) {
	for _, r := range raises {
		st := h.head.Collection(r.Collection)
		if st == nil {
			continue
		}
		if r.Version != 0 {
			st.Floor, st.FloorReason = r.Version, r.Reason
		}
		if r.SetStopped {
			st.Stopped = r.Stopped
		}
		for s := range h.subs {
			if s.feed.has(st.Name) {
				cutOff(s, st.Name, h.head.Version, st)
			}
		}
	}
}

// passLocked wakes those who wait for an LSN.
func (h *hub) passLocked(lsn changelog.LSN) {
	if lsn > h.head.LSN {
		h.head.LSN = lsn
	}
	for c, want := range h.waiters {
		if h.head.LSN >= want {
			close(c)
			delete(h.waiters, c)
		}
	}
}

// waitLSN waits until the log has passed an LSN of the source.
func (h *hub) waitLSN(ctx context.Context, lsn changelog.LSN) error {
	h.mu.Lock()
	if h.head != nil && h.head.LSN >= lsn {
		h.mu.Unlock()
		return nil
	}
	c := make(chan struct{})
	h.waiters[c] = lsn
	h.mu.Unlock()
	select {
	case <-c:
		return nil
	case <-ctx.Done():
		h.mu.Lock()
		delete(h.waiters, c)
		h.mu.Unlock()
		return fmt.Errorf("wait for the change log to reach %s: %w", lsn, ctx.Err())
	}
}

// awaitStart waits until the hub stands somewhere: who joined before would miss what is skipped over then.
func (h *hub) awaitStart(ctx context.Context) error {
	select {
	case <-h.started:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// position returns the newest end of a transaction that the hub has handed out; false before the first read of the log.
func (h *hub) position() (changelog.Head, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.head == nil {
		return changelog.Head{}, false
	}
	out := *h.head
	out.Version = h.whole
	out.Collections = append([]changelog.Collection(nil), h.head.Collections...)
	return out, true
}

// join makes s live and returns from where: v, which it has read up to, or, where the hub has moved on, a later version;
// then s must read the log up to there before it takes what is queued.
func (h *hub) join(s *subscriber, v changelog.Version) (from changelog.Version) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.head != nil {
		v = max(v, h.head.Version, h.target)
	}
	s.goLive(v)
	if _, known := h.subs[s]; known {
		return v
	}
	h.subs[s], h.joined = struct{}{}, true
	s.slots, s.fileSlots = rowRoster.add(h.scopes, s), fileRoster.add(h.files, s)
	return v
}

// leave takes s out, with all that is queued for it; it costs its scopes.
func (h *hub) leave(s *subscriber) {
	h.mu.Lock()
	defer h.mu.Unlock()
	defer s.drop()
	if _, known := h.subs[s]; !known {
		return
	}
	delete(h.subs, s)
	rowRoster.remove(h.scopes, s)
	fileRoster.remove(h.files, s)
}

// deliverVersionLocked hands out one row change, which may touch several scopes: the row's presence in one outweighs its
// leaving another.
func (h *hub) deliverVersionLocked(group []changelog.Entry, fr *frames) {
	if fr.name == "" {
		return
	}
	for pass := range 2 {
		for i := range group {
			e := &group[i]
			for _, s := range h.scopes[e.Scope] {
				if !s.wants(e.Version) || s.last == e.Version {
					continue
				}
				op, seen := fr.judge(s, e, h.failed)
				if !seen || (op == policies.Upsert) != (pass == 0) {
					continue
				}
				s.last = e.Version
				if s.pend(fr.encoded(s, e, op), e.Version, e.Tx) {
					h.touched = append(h.touched, s)
				}
			}
		}
		if pass == 0 && len(group) == 1 && policies.Op(group[0].Op) == policies.Upsert && len(group[0].Guard) == 0 {
			return // nothing of it can be a delete
		}
	}
}

// endTransactionLocked sends everybody whom the transaction touched a checkpoint. It is encoded once for all callers of the
// same scopes.
func (h *hub) endTransactionLocked(v changelog.Version) {
	clear(h.checkpoints)
	for _, list := range [][]*subscriber{h.touched, h.partial} {
		for _, s := range list {
			hash := s.feed.caller.ScopeHash
			frame := h.checkpoints[hash]
			if frame == nil {
				frame = checkpointFrame(s.feed, v, h.head.History)
				h.checkpoints[hash] = frame
			}
			s.flushPending(v, frame)
		}
	}
	h.touched, h.partial = h.touched[:0], h.partial[:0]
}

package gateway

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/policies"
)

const testHistory = "a1b2"

// newTestHub is a hub that stands at version 100, without a log.
func newTestHub() *hub {
	h := newHub(nil, changelog.NewMemoryBus(), slog.New(slog.DiscardHandler), newBudget(64<<20), func(string, error) {})
	h.adoptLocked(&changelog.Head{Version: 100, History: testHistory, Collections: []changelog.Collection{{ID: 1, Name: "todos", Floor: 1}, {ID: 2, Name: "news", Floor: 1}}})
	return h
}

func scopeKey(n int) (k [16]byte) {
	binary.BigEndian.PutUint64(k[:], uint64(n))
	return k
}

// newTestSub is a subscriber of scopes of todos with room for limit bytes.
func newTestSub(limit int, scopes ...int) *subscriber {
	f := &feed{caller: &policies.Caller{ScopeHash: "00000000"}, collections: []*policies.Collection{{Name: "todos"}}}
	for _, n := range scopes {
		f.scopes = append(f.scopes, scopeKey(n))
	}
	return newSubscriber(f, limit)
}

// testBatch continues prev with one transaction of changes, each in the scopes given.
func testBatch(prev changelog.Version, changes ...[]int) *changelog.Batch {
	b := &changelog.Batch{History: testHistory, Prev: prev, LSN: changelog.LSN(prev)}
	for i, scopes := range changes {
		v := prev + 1 + changelog.Version(i)
		for _, s := range scopes {
			b.Entries = append(b.Entries, changelog.Entry{Version: v, Tx: prev + 1, Scope: scopeKey(s), Collection: 1, Op: byte(policies.Upsert),
				DocID: fmt.Append(nil, v), Data: []byte(`{"id":1}`)})
		}
		b.Last = v
	}
	return b
}

// versions returns the changes' versions that wait for s, and the number of checkpoints.
func versions(t *testing.T, s *subscriber) (got []int, checkpoints int) {
	t.Helper()
	frames, _, _, _ := s.take(nil)
	defer releaseAll(frames)
	for _, f := range frames {
		if f.kind == frameCheckpoint {
			checkpoints++
			continue
		}
		_, after, found := bytes.Cut(f.data, []byte(`"seq":`))
		n := 0
		for _, c := range after[:bytes.IndexByte(after, ',')] {
			n = n*10 + int(c-'0')
		}
		if !found {
			t.Fatalf("no change: %s", f.data)
		}
		got = append(got, n)
	}
	return got, checkpoints
}

// TestHubDelivers: each subscriber gets what is in its scopes, a row in two of them once.
func TestHubDelivers(t *testing.T) {
	t.Parallel()
	h := newTestHub()
	one, both, none := newTestSub(1<<20, 1), newTestSub(1<<20, 1, 2), newTestSub(1<<20, 3)
	for _, s := range []*subscriber{one, both, none} {
		if from := h.join(s, 100); from != 100 {
			t.Fatalf("live from %d", from)
		}
	}
	if !h.apply(t.Context(), testBatch(100, []int{1}, []int{2}, []int{1, 2}, []int{9})) {
		t.Fatal("the batch continues, and was not taken")
	}
	for _, c := range []struct {
		s           *subscriber
		want        []int
		checkpoints int
	}{{one, []int{101, 103}, 1}, {both, []int{101, 102, 103}, 1}, {none, nil, 0}} {
		if got, n := versions(t, c.s); !slices.Equal(got, c.want) || n != c.checkpoints {
			t.Errorf("got %v with %d checkpoints, want %v", got, n, c.want)
		}
	}
	h.leave(both)
	h.leave(both) // twice does nothing
	h.apply(t.Context(), testBatch(104, []int{1}))
	if got, _ := versions(t, one); !slices.Equal(got, []int{105}) {
		t.Errorf("got %v", got)
	}
	if got, _ := versions(t, both); got != nil {
		t.Errorf("who left got %v", got)
	}
	h.leave(one)
	h.leave(none)
	if len(h.scopes) != 0 || len(h.subs) != 0 {
		t.Errorf("left behind: %d scopes, %d subscribers", len(h.scopes), len(h.subs))
	}
}

// TestHubRefusesGaps: what doesn't continue where the hub stands is never handed out.
func TestHubRefusesGaps(t *testing.T) {
	t.Parallel()
	unknown := testBatch(100, []int{1})
	unknown.Entries[0].Collection = 77
	omitted := testBatch(100, []int{1})
	omitted.Entries, omitted.Omitted = nil, true
	foreign := testBatch(100, []int{1})
	foreign.History = "ffff"
	for name, c := range map[string]struct {
		batch *changelog.Batch
		taken bool
	}{
		"a gap": {testBatch(101, []int{1}), false}, "far ahead": {testBatch(9999, []int{1}), false}, "without entries": {omitted, false},
		"another history": {foreign, false}, "unknown collection": {unknown, false}, "an old one": {testBatch(50, []int{1}), true},
	} {
		h, s := newTestHub(), newTestSub(1<<20, 1)
		h.join(s, 100)
		if taken := h.apply(t.Context(), c.batch); taken != c.taken {
			t.Errorf("%s: taken %v", name, taken)
		}
		if got, _ := versions(t, s); got != nil || h.head.Version != 100 {
			t.Errorf("%s: handed out %v, stands at %d", name, got, h.head.Version)
		}
	}
	h, s := newTestHub(), newTestSub(1<<20, 1)
	h.join(s, 100)
	b := testBatch(100, []int{1})
	for range 3 { // a message that comes again may send the hub to the log, but is handed out once
		h.apply(t.Context(), b)
	}
	if got, n := versions(t, s); len(got) != 1 || n != 1 {
		t.Errorf("a doubled message: %v, %d checkpoints", got, n)
	}
}

// TestSubscriberOverflow: a full queue keeps whole transactions, and says from where to read the log.
func TestSubscriberOverflow(t *testing.T) {
	t.Parallel()
	h, s := newTestHub(), newTestSub(1000, 1)
	h.join(s, 100)
	prev := changelog.Version(100)
	for range 20 {
		b := testBatch(prev, []int{1}, []int{1})
		h.apply(t.Context(), b)
		prev = b.Last
		if s.size > 1000 {
			t.Fatalf("%d bytes wait", s.size)
		}
	}
	frames, live, _, _ := s.take(nil)
	if live || len(frames)%3 != 0 || len(frames) == 0 {
		t.Fatalf("live %v with %d frames", live, len(frames))
	}
	got := changelog.Version(100 + len(frames)/3*2)
	if at := s.reached(h.head.Version); at != got {
		t.Errorf("it has all up to %d, reads from %d", got, at)
	}
	if s.pending != nil || s.size != 0 {
		t.Error("memory is held after the overflow")
	}
	if from := h.join(s, prev); from != prev {
		t.Errorf("live again from %d", from)
	}
	h.apply(t.Context(), testBatch(prev, []int{1}))
	if again, n := versions(t, s); len(again) != 1 || n != 1 {
		t.Errorf("after the return: %v", again)
	}
}

// TestHubRaises: a raised floor ends those below it, a stopped collection its subscribers; others stay.
func TestHubRaises(t *testing.T) {
	t.Parallel()
	h, s := newTestHub(), newTestSub(1<<20, 1)
	news := newSubscriber(&feed{caller: &policies.Caller{}, collections: []*policies.Collection{{Name: "news"}}}, 1<<20)
	h.join(s, 100)
	h.join(news, 100)
	b := &changelog.Batch{History: testHistory, Prev: 100, Last: 110, Raises: []changelog.Raise{{Collection: 1, Version: 110, Reason: "truncated"}}}
	if !h.apply(t.Context(), b) {
		t.Fatal("not taken")
	}
	if _, live, end, _ := s.take(nil); live || end == nil || end.Reason != reasonTooOld || !slices.Equal(end.Collections, []string{"todos"}) {
		t.Errorf("%+v", end)
	}
	if _, live, end, p := news.take(nil); !live || end != nil || p != nil {
		t.Errorf("another collection's subscriber: %v %v %v", live, end, p)
	}
	h.apply(t.Context(), &changelog.Batch{History: testHistory, Prev: 110, Last: 111, Raises: []changelog.Raise{{Collection: 2, SetStopped: true, Stopped: "why"}}})
	if _, _, _, p := news.take(nil); p == nil || p.Code != CollectionUnavailable {
		t.Errorf("%+v", p)
	}
	h.adoptLocked(&changelog.Head{Version: 5, History: "ffff"})
	late := newTestSub(1<<20, 1)
	h.join(late, 5)
	h.adoptLocked(&changelog.Head{Version: 6, History: "eeee"})
	if _, _, end, _ := late.take(nil); end == nil || end.Reason != reasonHistory {
		t.Errorf("%+v", end)
	}
}

// TestWaitLSN: waiters wake when the log passes their LSN, and leave nothing when they give up.
func TestWaitLSN(t *testing.T) {
	t.Parallel()
	h := newTestHub()
	done := make(chan error, 1)
	go func() { done <- h.waitLSN(t.Context(), 500) }()
	eventually(t, "a waiter", func() bool {
		h.mu.Lock()
		defer h.mu.Unlock()
		return len(h.waiters) == 1
	})
	h.apply(t.Context(), &changelog.Batch{History: testHistory, Prev: 100, Last: 100, LSN: 499})
	select {
	case <-done:
		t.Fatal("woken below its LSN")
	default:
	}
	h.apply(t.Context(), &changelog.Batch{History: testHistory, Prev: 100, Last: 100, LSN: 500})
	ok(t, <-done)
	ok(t, h.waitLSN(t.Context(), 500))
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := h.waitLSN(ctx, 501); !errors.Is(err, context.DeadlineExceeded) || len(h.waiters) != 0 {
		t.Errorf("%v, %d waiters", err, len(h.waiters))
	}
}

// TestHubModel holds random joins, leaves and batches against the plain meaning: a subscriber has got, in order and once,
// every version of its scopes from where it joined.
func TestHubModel(t *testing.T) {
	t.Parallel()
	seed := uint64(time.Now().UnixNano())
	rng := rand.New(rand.NewPCG(seed, 1))
	h := newTestHub()
	type member struct {
		scopes []int
		want   []int
	}
	members := map[*subscriber]*member{}
	at := changelog.Version(100)
	for range 3000 {
		switch rng.IntN(4) {
		case 0:
			m := &member{}
			for s := range 6 {
				if rng.IntN(3) == 0 {
					m.scopes = append(m.scopes, s)
				}
			}
			s := newTestSub(1<<30, m.scopes...)
			h.join(s, at)
			members[s] = m
		case 1:
			for s, m := range members { // any
				if got, _ := versions(t, s); !slices.Equal(got, m.want) {
					t.Fatalf("seed %d: got %v, want %v", seed, got, m.want)
				}
				h.leave(s)
				delete(members, s)
				break
			}
		default:
			changes := make([][]int, 1+rng.IntN(3))
			for i := range changes {
				for s := range 6 {
					if rng.IntN(3) == 0 {
						changes[i] = append(changes[i], s)
					}
				}
				for _, m := range members {
					if slices.ContainsFunc(changes[i], func(s int) bool { return slices.Contains(m.scopes, s) }) {
						m.want = append(m.want, int(at)+1+i)
					}
				}
			}
			b := testBatch(at, changes...)
			at = b.Last
			h.apply(t.Context(), b)
		}
	}
}

// BenchmarkFanOut hands out one change: to 1, 10, 1000 and 10000 subscribers, and to one of 10 and of 10000, which must
// cost the same.
func BenchmarkFanOut(b *testing.B) {
	for _, c := range []struct{ connected, concerned int }{{1, 1}, {10, 10}, {1000, 1000}, {10000, 10000}, {10, 1}, {10000, 1}} {
		b.Run(fmt.Sprintf("to=%d/of=%d", c.concerned, c.connected), func(b *testing.B) {
			h := newTestHub()
			subs := make([]*subscriber, c.connected)
			for i := range subs {
				scope := 1
				if i >= c.concerned {
					scope = i + 2
				}
				subs[i] = newTestSub(1<<30, scope)
				h.join(subs[i], 100)
			}
			entry := changelog.Entry{Scope: scopeKey(1), Collection: 1, Op: byte(policies.Upsert), DocID: []byte("7"),
				Data: []byte(`{"id":7,"title":"a title of ordinary length","done":false,"owner":"a0000000-0000-4000-8000-000000000001"}`)}
			batch := &changelog.Batch{History: testHistory, Entries: make([]changelog.Entry, 1)}
			at := changelog.Version(100)
			var room []frame
			b.ReportAllocs()
			for b.Loop() {
				entry.Version, entry.Tx = at+1, at+1
				batch.Entries[0], batch.Prev, batch.Last = entry, at, at+1
				at++
				if !h.apply(b.Context(), batch) {
					b.Fatal("not taken")
				}
				for _, s := range subs[:c.concerned] {
					room, _, _, _ = s.take(room[:0])
					releaseAll(room)
				}
			}
		})
	}
}

// TestJoinWithinATransaction: while the hub steps through a large transaction by pages, who joins reads the log to its end
// itself and is handed nothing of it; no position within it is ever told.
func TestJoinWithinATransaction(t *testing.T) {
	t.Parallel()
	h := newTestHub()
	h.mu.Lock()
	h.whole = 100
	h.head.Version, h.target = 150, 200 // as step leaves it after the first page of a transaction that ends at 200
	h.mu.Unlock()
	s := newTestSub(1<<20, 1)
	if from := h.join(s, 150); from != 200 {
		t.Errorf("joined from %d, within the transaction; want its end, 200", from)
	}
	if at, _ := h.position(); at.Version != 100 {
		t.Errorf("position %d, want 100, the newest end of a transaction", at.Version)
	}
	entry := func(v changelog.Version) changelog.Entry {
		return changelog.Entry{Version: v, Tx: 101, Scope: scopeKey(1), Collection: 1, Op: byte(policies.Upsert), DocID: []byte("1"), Data: []byte(`{"id":1}`)}
	}
	h.mu.Lock()
	h.deliverLocked(delivery{entries: []changelog.Entry{entry(180), entry(200)}, complete: true})
	h.head.Version, h.whole = 200, 200
	h.mu.Unlock()
	if got, checkpoints := versions(t, s); len(got) != 0 || checkpoints != 0 {
		t.Errorf("handed out %v and %d checkpoints of what the session reads itself", got, checkpoints)
	}
	if !h.apply(t.Context(), testBatch(200, []int{1})) {
		t.Fatal("the next batch was refused")
	}
	if got, checkpoints := versions(t, s); len(got) != 1 || got[0] != 201 || checkpoints != 1 {
		t.Errorf("then %v and %d checkpoints, want 201 and one", got, checkpoints)
	}
}

// TestJoinAwaitsTheFirstHead: before the hub stands somewhere, what it skips to would be missed.
func TestJoinAwaitsTheFirstHead(t *testing.T) {
	t.Parallel()
	h := newHub(nil, changelog.NewMemoryBus(), slog.New(slog.DiscardHandler), newBudget(64<<20), func(string, error) {})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := h.awaitStart(ctx); err == nil {
		t.Error("a hub without a head has started")
	}
	h.adoptLocked(&changelog.Head{Version: 5, History: testHistory})
	if err := h.awaitStart(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestHubTakesNothingOfAnotherLog: an announcement that would continue where the hub stands, but that another leader made (one
// before the present one, or that of a copy of the database whose instances use the same Redis), is not believed.
func TestHubTakesNothingOfAnotherLog(t *testing.T) {
	t.Parallel()
	h, s := newTestHub(), newTestSub(1<<20, 1)
	h.head.Claim = 7
	h.join(s, 100)
	b := testBatch(100, []int{1})
	b.Claim = 8
	if h.apply(t.Context(), b) {
		t.Error("taken")
	}
	if got, _ := versions(t, s); len(got) > 0 || h.head.Version != 100 || h.seen.heard > 100 {
		t.Errorf("a client got %v, the hub stands at %d and has heard of %d", got, h.head.Version, h.seen.heard)
	}
	h.disown(b) // the log was read, and is another's
	if !h.apply(t.Context(), b) {
		t.Error("the log is looked at again and again for the sake of another's announcements")
	}
	if got, _ := versions(t, s); len(got) > 0 || h.head.Version != 100 {
		t.Errorf("a client got %v, the hub stands at %d", got, h.head.Version)
	}
	b.Claim = 7
	if !h.apply(t.Context(), b) || h.head.Version != 101 {
		t.Error("its own log's is not taken")
	}
	h.disown(b)
	if h.foreign == 7 {
		t.Error("its own log is taken for another's")
	}
}

// TestHubAdoptsBeforeItDisowns: somebody comes while the head is read that a new leader's first batch asks for. The batch's claim
// isn't another log's: the hub just hasn't read it yet.
func TestHubAdoptsBeforeItDisowns(t *testing.T) {
	t.Parallel()
	h := newTestHub()
	_, forget := h.awaitPush(1)
	defer forget()
	now := &changelog.Head{Version: 150, History: testHistory, Claim: 8, Collections: h.head.Collections}
	if h.standAt(now) || h.head.Version != 100 {
		t.Errorf("the hub stands at %d, past what somebody waits for", h.head.Version)
	}
	forget()
	if !h.standAt(now) || h.head.Claim != 8 {
		t.Errorf("the hub stands at %d of claim %d", h.head.Version, h.head.Claim)
	}
}

// TestHubOfALogSetBack: the log's server was restored from a copy of its files, under running instances, whose clocks or its own ran ahead
// before. Who is live has seen what was lost, and the hub goes on from where the log is.
func TestHubOfALogSetBack(t *testing.T) {
	t.Parallel()
	for name, somebody := range map[string]bool{"while somebody is live": true, "while nobody is": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newTestHub()
			s := newTestSub(1<<20, 1)
			if somebody {
				h.join(s, 100)
			}
			h.target = 120
			h.standAt(&changelog.Head{Version: 50, LSN: 7, History: testHistory, Collections: h.head.Collections})
			if h.head.Version != 50 || h.whole != 50 || h.target > 50 {
				t.Errorf("the hub stands at %d, whole %d, target %d", h.head.Version, h.whole, h.target)
			}
			if _, _, end, _ := s.take(nil); somebody && (end == nil || end.Reason != reasonAhead) {
				t.Errorf("who has seen what was lost goes on: %+v", end)
			}
			if from := h.join(newTestSub(1<<20, 1), 50); from != 50 {
				t.Errorf("who joins is sent to %d", from)
			}
		})
	}
}

// TestHubEndsWhoReadWhatWasLost: a session read the log, which was then set back; the hub took that over, and only then the session
// joined, for its client was slow. It must not go on as if nothing had been lost.
func TestHubEndsWhoReadWhatWasLost(t *testing.T) {
	t.Parallel()
	h := newTestHub()
	at := func(gaps ...changelog.Version) *changelog.Head {
		return &changelog.Head{Version: 50, History: testHistory, Collections: h.head.Collections, Gaps: gaps}
	}
	h.standAt(at())
	reader, other := newTestSub(1<<20, 1), newTestSub(1<<20, 1)
	h.join(reader, 98)
	h.join(other, 50)
	h.adoptLocked(at())
	h.adoptLocked(at(50, 110)) // the next leader has claimed the log
	if _, _, end, _ := reader.take(nil); end == nil || end.Reason != reasonAhead {
		t.Errorf("who has seen what was lost goes on: %+v", end)
	}
	if _, live, end, _ := other.take(nil); !live || end != nil {
		t.Errorf("who hasn't is ended: %+v", end)
	}
}

package gateway

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestSendMemoryIsBounded: clients that don't read hold no more than limits.send_memory together, whatever their queues
// would take, and in the end all of them have everything in order.
func TestSendMemoryIsBounded(t *testing.T) {
	t.Parallel()
	const memory, clients, rows = 2 << 20, 8, 100 // 12 MB for each client: more than sockets hold
	e := newEnv(t, setup{options: func(o *Options) { o.SendMemory = memory }, gateway: func(g *Gateway) { g.limits.queue, g.limits.write = 64<<20, 5*time.Minute }})
	var streams []*stream
	for i := range clients {
		streams = append(streams, e.live(t, tokenFor(t, fmt.Sprint("s", i), nil), ""))
	}
	e.live(t, tokenFor(t, "s1", nil), "")          // never reads: what waits for it is given back when it ends
	quick := e.live(t, tokenFor(t, "s0", nil), "") // shares the frames of a client that doesn't read
	done := make(chan error, 1)
	go func() {
		for n := 0; n < rows; {
			f, err := quick.read()
			if err != nil {
				done <- err
				return
			}
			if f.Type == "" {
				n++
			}
		}
		done <- nil
	}()
	most := int64(0)
	for i := range rows {
		e.exec(t, `INSERT INTO todos SELECT $1::int * 100 + c, 's' || c, NULL, repeat(md5(random()::text), 4096) FROM generate_series(0, $2::int - 1) c`, i, clients)
		most = max(most, e.g.memory.held.Load())
	}
	e.sync(t)
	if most = max(most, e.g.memory.held.Load()); most > memory || most < memory/8 {
		t.Errorf("at most %d bytes were held, want some and no more than %d", most, memory)
	}
	var all sync.WaitGroup
	for i, s := range streams {
		all.Go(func() {
			for n := 0; n < rows; {
				f, err := s.read()
				if err != nil {
					t.Errorf("client %d after %d changes: %v", i, n, err)
					return
				}
				if f.Type != "" {
					continue
				}
				if f.DocID != fmt.Sprint(n*100+i) {
					t.Errorf("client %d: change %d is %s", i, n, f.DocID)
					return
				}
				n++
			}
		})
	}
	all.Wait()
	if err := <-done; err != nil {
		t.Errorf("the client that reads all the time: %v", err)
	}
}

// TestBudget: what is larger than everything comes alone, who waits gives up with its context, and a shared frame counts
// once.
func TestBudget(t *testing.T) {
	t.Parallel()
	b := newBudget(200)
	giant, err := b.acquire(t.Context(), 1000)
	if err != nil || b.held.Load() != 100 {
		t.Fatalf("a giant page holds %d of 100: %v", b.held.Load(), err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := b.acquire(ctx, 1); err == nil {
		t.Error("another page got memory beside the giant")
	}
	f := b.hold(60) // frames have memory of their own
	if f == nil || b.hold(60) != nil {
		t.Error("want room for one frame of 60, not for two")
	}
	f.refs.Add(2)
	for range 2 {
		f.release()
	}
	if b.held.Load() != 160 || b.hold(60) != nil {
		t.Errorf("the frame is still in one queue, but %d bytes are held", b.held.Load())
	}
	f.release()
	giant.release()
	giant.release()
	if b.held.Load() != 0 || b.share(1<<20) != leastPage {
		t.Errorf("%d bytes are held, a share is %d", b.held.Load(), b.share(1<<20))
	}
}

// TestLeavingGivesMemoryBack: what waits for a subscriber that leaves, and what overflowed, is held no longer; a frame that
// waits for somebody else is.
func TestLeavingGivesMemoryBack(t *testing.T) {
	t.Parallel()
	h := newTestHub()
	stays, leaves, small := newTestSub(1<<20, 1), newTestSub(1<<20, 1, 2), newTestSub(1, 1)
	for _, s := range []*subscriber{stays, leaves, small} {
		h.join(s, 100)
	}
	h.apply(t.Context(), testBatch(100, []int{1}, []int{2}))
	both := h.memory.held.Load()
	h.leave(leaves)
	one := h.memory.held.Load()
	if one == 0 || one >= both {
		t.Errorf("%d bytes for two changes, %d after one of two subscribers has left", both, one)
	}
	frames, _, _, _ := stays.take(nil)
	releaseAll(frames)
	for _, s := range []*subscriber{stays, small} {
		h.leave(s)
	}
	if n := h.memory.held.Load(); n != 0 {
		t.Errorf("%d bytes are held for nobody", n)
	}
}

// TestGiantDocuments: documents larger than the memory for pages come one at a time, whoever asks; open streams share a
// giant frame and don't read it from the log.
func TestGiantDocuments(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{options: func(o *Options) { o.SendMemory = 8 << 20 }})
	a := tokenFor(t, "a", nil)
	since := e.here(t, a)
	const live = 5
	var all sync.WaitGroup
	follow := func(s *stream) {
		all.Go(func() {
			for n := 1; n <= 3; {
				f, err := s.read()
				if err != nil {
					t.Errorf("before document %d: %v", n, err)
					return
				}
				if f.Type != "" {
					continue
				}
				if f.DocID != fmt.Sprint(n) || len(f.Data) < 3<<20 {
					t.Errorf("document %s of %d bytes, want %d", f.DocID, len(f.Data), n)
				}
				n++
			}
		})
	}
	for range live {
		follow(e.live(t, a, ""))
	}
	for i := 1; i <= 3; i++ {
		e.exec(t, `INSERT INTO todos VALUES ($1, 'a', NULL, repeat('x', 3 << 20))`, i)
		e.sync(t)
	}
	all.Wait()
	if m := string(e.get(t, "/metrics", "").body); !strings.Contains(m, fmt.Sprintf("walgate_stream_catch_up_total %d\n", live)) {
		t.Error("a stream went on from the log for a giant document")
	}
	for range live {
		follow(e.subscribe(t, a, since, ""))
		all.Go(func() {
			if n := len(e.pull(t, a, since, "limit", "3").Changes); n == 0 {
				t.Error("an empty page")
			}
		})
	}
	all.Wait()
	eventually(t, "the memory is given back", func() bool { return e.g.memory.held.Load() == 0 })
}

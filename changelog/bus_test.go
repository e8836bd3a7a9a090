package changelog

import (
	"context"
	"slices"
	"sync"
	"testing"
	"time"
)

// busConformance is the contract of every Bus. open returns two ends of one bus, which may be the same value.
func busConformance(t *testing.T, open func(t *testing.T) (here, there Bus)) {
	t.Run("delivers", func(t *testing.T) {
		here, there := open(t)
		near, far := here.Subscribe(t.Context()), there.Subscribe(t.Context())
		sent := &Batch{History: "a1b2", Prev: 4, Last: 9, LSN: 7, Entries: []Entry{
			{Version: 5, Tx: 5, Scope: scope(3), Collection: 2, Op: 'u', DocID: []byte("é"), Data: []byte(`{"a":"\u0000"}`), Guard: []byte{0, 1}, Changed: []byte{255}},
			{Version: 9, Tx: 5, Scope: scope(4), Collection: 2, Op: 'd', DocID: []byte("x")}},
			Raises: []Raise{{Collection: 2, Version: 8, Reason: "truncated", Shape: "s", SetStopped: true, Stopped: "why"}}}
		for name, sub := range map[string]<-chan *Batch{"the publisher's end": near, "the other end": far} {
			got := awaitBatch(t, here, sub, sent)
			if got.History != sent.History || got.Prev != 4 || got.LSN != 7 || len(got.Raises) != 1 || got.Raises[0] != sent.Raises[0] {
				t.Errorf("%s got %+v, want %+v", name, got, sent)
			}
			same := func(a, b Entry) bool {
				return a.Version == b.Version && a.Tx == b.Tx && a.Scope == b.Scope && a.Collection == b.Collection && a.Op == b.Op &&
					string(a.DocID) == string(b.DocID) && string(a.Data) == string(b.Data) && (a.Data == nil) == (b.Data == nil) &&
					string(a.Guard) == string(b.Guard) && string(a.Changed) == string(b.Changed) && (a.Changed == nil) == (b.Changed == nil)
			}
			if !got.Omitted && !slices.EqualFunc(got.Entries, sent.Entries, same) {
				t.Errorf("%s got other entries: %+v, want %+v", name, got.Entries, sent.Entries)
			}
			if got.Omitted && got.Entries != nil {
				t.Errorf("%s got part of an omitted batch", name)
			}
		}
	})
	t.Run("never blocks the publisher", func(t *testing.T) {
		here, there := open(t)
		_ = there.Subscribe(t.Context()) // and never reads
		done := make(chan struct{})
		go func() {
			defer close(done)
			for i := range 10000 {
				here.Publish(&Batch{History: "a1b2", Prev: Version(i), Last: Version(i + 1)})
			}
		}()
		select {
		case <-done:
		case <-time.After(20 * time.Second):
			t.Fatal("publishing waits for a subscriber that doesn't read")
		}
	})
	t.Run("ends with its context", func(t *testing.T) {
		here, there := open(t)
		ctx, cancel := context.WithCancel(t.Context())
		sub, other := there.Subscribe(ctx), here.Subscribe(t.Context())
		cancel()
		for range sub { // until closed
		}
		awaitBatch(t, here, other, &Batch{History: "a1b2", Last: 3})
	})
	t.Run("concurrently", func(t *testing.T) {
		here, there := open(t)
		var wg sync.WaitGroup
		for i := range 8 {
			ctx, cancel := context.WithCancel(t.Context())
			wg.Go(func() {
				for b := range there.Subscribe(ctx) {
					if b.Last%Version(i+1) == 0 {
						cancel()
					}
				}
			})
			wg.Go(func() {
				for v := range 200 {
					here.Publish(&Batch{History: "a1b2", Last: Version(v)})
				}
				cancel()
			})
		}
		wg.Wait()
	})
}

// awaitBatch publishes b until sub brings it: the bus may lose messages.
func awaitBatch(t *testing.T, bus Bus, sub <-chan *Batch, b *Batch) *Batch {
	t.Helper()
	deadline, again := time.After(20*time.Second), time.NewTicker(50*time.Millisecond)
	defer again.Stop()
	bus.Publish(b)
	for {
		select {
		case got := <-sub:
			if got.Last == b.Last {
				return got
			}
		case <-again.C:
			bus.Publish(b)
		case <-deadline:
			t.Fatal("the batch never arrived")
		}
	}
}

func TestMemoryBusConforms(t *testing.T) {
	t.Parallel()
	busConformance(t, func(t *testing.T) (Bus, Bus) {
		b := NewMemoryBus()
		return b, b
	})
}

func TestMemoryBusCountsWhatASlowSubscriberMisses(t *testing.T) {
	t.Parallel()
	b := NewMemoryBus()
	slow := b.Subscribe(t.Context())
	for i := range memoryBusDepth + 5 {
		b.Publish(&Batch{Last: Version(i)})
	}
	if b.Dropped() != 5 {
		t.Errorf("%d dropped, want 5", b.Dropped())
	}
	for i := range memoryBusDepth {
		if got := <-slow; got.Last != Version(i) {
			t.Fatalf("batch %d arrived in place of %d", got.Last, i)
		}
	}
}

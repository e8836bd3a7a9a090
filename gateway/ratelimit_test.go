package gateway

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// fakeClock is a clock that stands until it is moved.
type fakeClock struct{ nanos atomic.Int64 }

func newFakeClock(at time.Time) *fakeClock {
	c := &fakeClock{}
	c.nanos.Store(at.UnixNano())
	return c
}

func (c *fakeClock) now() time.Time          { return time.Unix(0, c.nanos.Load()) }
func (c *fakeClock) advance(d time.Duration) { c.nanos.Add(int64(d)) }

func TestRateLimiter(t *testing.T) {
	t.Parallel()
	clock := newFakeClock(time.Unix(1e9, 0))
	l := newRateLimiter(10, 3, 100, clock.now)
	take := func(subject string, want bool, wantWait time.Duration) {
		t.Helper()
		if wait, ok := l.allow(subject); ok != want || wait != wantWait {
			t.Errorf("got %v, %v; want %v, %v", wait, ok, wantWait, want)
		}
	}
	for range 3 {
		take("ana", true, 0)
	}
	take("ana", false, 100*time.Millisecond)
	take("ben", true, 0) // one subject's volume is not another's
	clock.advance(40 * time.Millisecond)
	take("ana", false, 60*time.Millisecond)
	clock.advance(60 * time.Millisecond)
	take("ana", true, 0)
	take("ana", false, 100*time.Millisecond)
	clock.advance(time.Hour) // a long rest earns no more than the burst
	for range 3 {
		take("ana", true, 0)
	}
	take("ana", false, 100*time.Millisecond)

	l.giveBack("ana")
	take("ana", true, 0)
	take("ana", false, 100*time.Millisecond)
	take("cleo", true, 0)
}

func TestRateLimiterIsBounded(t *testing.T) {
	t.Parallel()
	clock := newFakeClock(time.Unix(1e9, 0))
	l := newRateLimiter(1, 1, 10, clock.now)
	l.allow("busy")
	for i := range 1000 {
		l.allow(fmt.Sprint(i))
		if _, ok := l.allow("busy"); ok {
			t.Fatal("a subject in use was forgotten")
		}
	}
	if len(l.buckets) != 10 || l.recent.Len() != 10 {
		t.Errorf("%d buckets, %d in the list", len(l.buckets), l.recent.Len())
	}
}

func TestRateLimiterConcurrently(t *testing.T) {
	t.Parallel()
	clock := newFakeClock(time.Unix(1e9, 0))
	l := newRateLimiter(1, 50, 4, clock.now)
	var allowed atomic.Int64
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 100 {
				if _, ok := l.allow("ana"); ok {
					allowed.Add(1)
				}
			}
		})
	}
	wg.Wait()
	if allowed.Load() != 50 {
		t.Errorf("%d requests of a burst of 50", allowed.Load())
	}
}

func BenchmarkRateLimiter(b *testing.B) {
	l := newRateLimiter(1e6, 1e6, maxRateSubjects, time.Now)
	b.ReportAllocs()
	for b.Loop() {
		l.allow("ana")
	}
}

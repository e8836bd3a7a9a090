package gateway

import (
	"context"
	"sync/atomic"

	"golang.org/x/sync/semaphore"
)

// budget bounds the bytes of documents that wait to be sent to clients, over all connections. Half of it is for what the
// hub queues for open streams, half for pages of the log and of tables. Safe for concurrent use.
type budget struct {
	half   int64
	frames *semaphore.Weighted
	pages  *semaphore.Weighted
	held   atomic.Int64 // of both
	paged  atomic.Int64 // of it, pages
}

func newBudget(size int64) *budget {
	half := max(1, size/2)
	return &budget{half: half, frames: semaphore.NewWeighted(half), pages: semaphore.NewWeighted(half)}
}

// lease is memory held for a page. It belongs to one goroutine at a time.
type lease struct {
	budget *budget
	size   int64
}

// acquire waits until n bytes more may be held, for a page. What is larger than all there is waits until nothing else is
// held.
func (b *budget) acquire(ctx context.Context, n int) (*lease, error) {
	size := min(int64(n), b.half)
	if err := b.pages.Acquire(ctx, size); err != nil {
		return nil, err
	}
	b.held.Add(size)
	b.paged.Add(size)
	return &lease{b, size}, nil
}

// shrink gives back what is more than n bytes.
func (l *lease) shrink(n int) {
	if more := l.size - int64(n); more > 0 {
		l.size -= more
		l.budget.held.Add(-more)
		l.budget.paged.Add(-more)
		l.budget.pages.Release(more)
	}
}

// release gives all back; nil and what was released are let through.
func (l *lease) release() {
	if l != nil {
		l.shrink(0)
	}
}

// share is how large a page of a stream that catches up should be: small where many are sent at a time.
func (b *budget) share(most int) int {
	return min(most, max(leastPage, int(b.half-b.paged.Load())/64))
}

// leastPage is the bytes of documents that a page of a stream that catches up may have even if memory is short.
const leastPage = 16 << 10

// shared counts the queues that hold an encoded frame.
type shared struct {
	budget *budget
	size   int64
	refs   atomic.Int32
}

// hold takes the room for an encoded frame; nil: there is none. The caller holds the first reference.
func (b *budget) hold(n int) *shared {
	size := int64(n)
	if !b.frames.TryAcquire(size) {
		return nil
	}
	b.held.Add(size)
	s := &shared{budget: b, size: size}
	s.refs.Store(1)
	return s
}

// release gives one reference back; nil is let through.
func (s *shared) release() {
	if s != nil && s.refs.Add(-1) == 0 {
		s.budget.held.Add(-s.size)
		s.budget.frames.Release(s.size)
	}
}

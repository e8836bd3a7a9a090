package changelog

import (
	"context"
	"sync"
	"sync/atomic"
)

// Bus announces what was appended to the instances that serve. It is a hint: messages may be lost, doubled, late or out
// of order, and subscribers must heal by reading the log. What every implementation owes:
//
//   - Publish never blocks the appender and never fails it;
//   - a batch arrives whole and unchanged, or not at all, or without its entries (Omitted);
//   - a subscription delivers from some moment after Subscribe returned;
//   - batches are shared: nobody writes to one after it was published.
type Bus interface {
	Publish(*Batch)
	// Subscribe delivers batches on the returned channel until ctx ends; the channel is then closed.
	Subscribe(ctx context.Context) <-chan *Batch
}

// memoryBusDepth is how many batches, of announceLimit at most, a slow subscriber may lag before messages to it are
// dropped; it reads the log then.
const memoryBusDepth = 16

// MemoryBus is the bus of a single instance. Safe for concurrent use.
type MemoryBus struct {
	mu      sync.Mutex
	subs    map[chan *Batch]struct{}
	dropped atomic.Uint64
}

// NewMemoryBus returns an empty bus.
func NewMemoryBus() *MemoryBus { return &MemoryBus{subs: map[chan *Batch]struct{}{}} }

// Publish hands b to all subscribers; one whose queue is full misses it, which is counted.
func (m *MemoryBus) Publish(b *Batch) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for c := range m.subs {
		select {
		case c <- b:
		default:
			m.dropped.Add(1)
		}
	}
}

// Subscribe implements Bus.
func (m *MemoryBus) Subscribe(ctx context.Context) <-chan *Batch {
	c := make(chan *Batch, memoryBusDepth)
	m.mu.Lock()
	m.subs[c] = struct{}{}
	m.mu.Unlock()
	context.AfterFunc(ctx, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.subs, c)
		close(c)
	})
	return c
}

// Dropped returns how many messages were dropped for full queues.
func (m *MemoryBus) Dropped() uint64 { return m.dropped.Load() }

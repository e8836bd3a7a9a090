package changelog

import (
	"context"
	"sync"
	"time"
)

// Queue carries pieces from the sequencer to the appender. It is bounded in bytes and in pieces: when it is full, Put
// waits. One goroutine puts, one takes.
type Queue struct {
	mu     sync.Mutex
	pieces []Piece
	size   int
	limit  int
	ready  chan struct{} // capacity 1: there may be something to take
	room   chan struct{} // capacity 1: there may be room again
}

const maxQueuedPieces = 1 << 15

// NewQueue returns a queue that holds about limit bytes; one larger piece is let through alone.
func NewQueue(limit int) *Queue {
	return &Queue{limit: limit, ready: make(chan struct{}, 1), room: make(chan struct{}, 1)}
}

// TryPut adds p unless the queue is full.
func (q *Queue) TryPut(p Piece) bool {
	q.mu.Lock()
	if len(q.pieces) > 0 && (q.size+p.Size > q.limit || len(q.pieces) >= maxQueuedPieces) {
		q.mu.Unlock()
		return false
	}
	q.pieces = append(q.pieces, p)
	q.size += p.Size
	q.mu.Unlock()
	wake(q.ready)
	return true
}

// WaitRoom waits until there may be room, at most d. The caller tries again in either case.
func (q *Queue) WaitRoom(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-q.room:
	case <-t.C:
	}
	return nil
}

// Take waits for pieces and moves what one log transaction should hold into dst: all complete source transactions that
// wait, or, where the first one isn't complete yet, its pieces so far.
func (q *Queue) Take(ctx context.Context, dst []Piece) ([]Piece, error) {
	for {
		q.mu.Lock()
		n := len(q.pieces)
		for n > 0 && !q.pieces[n-1].Final {
			n--
		}
		if n == 0 {
			n = len(q.pieces)
		}
		if n > 0 {
			for i := range n {
				q.size -= q.pieces[i].Size
			}
			dst = append(dst, q.pieces[:n]...)
			rest := copy(q.pieces, q.pieces[n:])
			clear(q.pieces[rest:])
			q.pieces = q.pieces[:rest]
			more := rest > 0
			q.mu.Unlock()
			wake(q.room)
			if more {
				wake(q.ready)
			}
			return dst, nil
		}
		q.mu.Unlock()
		select {
		case <-ctx.Done():
			return dst, context.Cause(ctx)
		case <-q.ready:
		}
	}
}

// Len returns how many bytes wait.
func (q *Queue) Len() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.size
}

func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

package gateway

import "sync"

// underway counts what has to end before the gateway has. Unlike a sync.WaitGroup, it may be added to while somebody waits: a
// request that is refused during a drain still has to be answered. Safe for concurrent use.
type underway struct {
	mu   sync.Mutex
	n    int
	none chan struct{} // nil: nobody waits
}

// Add counts one more, or less.
func (u *underway) Add(n int) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.n += n; u.n == 0 && u.none != nil {
		close(u.none)
		u.none = nil
	}
}

// Done counts one less.
func (u *underway) Done() { u.Add(-1) }

// ended is closed once nothing is under way.
func (u *underway) ended() <-chan struct{} {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.n == 0 {
		none := make(chan struct{})
		close(none)
		return none
	}
	if u.none == nil {
		u.none = make(chan struct{})
	}
	return u.none
}

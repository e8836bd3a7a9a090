package gateway

import (
	"context"
	"sync"
)

// uploadTurns lets one request at a time work on an upload of this instance. A new one ends the reading of the one before:
// its client has lost that connection, or it would not ask again, and waits to hear how far it came. Requests to several
// instances are kept apart by blobstore.Records. Safe for concurrent use.
type uploadTurns struct {
	mu   sync.Mutex
	held map[turnKey]*uploadTurn
}

// turnKey is an upload as its caller names it. Whose it is isn't known yet: nobody ends the requests of another subject.
type turnKey struct{ subject, id string }

// uploadTurn is a request that works on an upload.
type uploadTurn struct {
	turns *uploadTurns
	key   turnKey
	body  *uploadBody
	ended chan struct{}
}

// take waits until nobody else works on the upload.
func (t *uploadTurns) take(ctx context.Context, key turnKey, body *uploadBody) (*uploadTurn, error) {
	turn := &uploadTurn{turns: t, key: key, body: body, ended: make(chan struct{})}
	for {
		t.mu.Lock()
		before := t.held[key]
		if before == nil {
			if t.held == nil {
				t.held = map[turnKey]*uploadTurn{}
			}
			t.held[key] = turn
		} else {
			before.body.interrupt() // while its request still has the connection
		}
		t.mu.Unlock()
		if before == nil {
			return turn, nil
		}
		select {
		case <-before.ended:
		case <-ctx.Done():
			return nil, (&Problem{Code: UploadLocked}).Because(ctx.Err())
		}
	}
}

// end lets the next one work.
func (t *uploadTurn) end() {
	t.turns.mu.Lock()
	delete(t.turns.held, t.key)
	t.turns.mu.Unlock()
	close(t.ended)
}

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
	held map[string]*uploadTurn
}

// uploadTurn is a request that works on an upload.
type uploadTurn struct {
	turns *uploadTurns
	id    string
	body  *uploadBody
	ended chan struct{}
}

// take waits until nobody else works on the upload.
func (t *uploadTurns) take(ctx context.Context, id string, body *uploadBody) (*uploadTurn, error) {
	turn := &uploadTurn{turns: t, id: id, body: body, ended: make(chan struct{})}
	for {
		t.mu.Lock()
		before := t.held[id]
		if before == nil {
			if t.held == nil {
				t.held = map[string]*uploadTurn{}
			}
			t.held[id] = turn
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
	delete(t.turns.held, t.id)
	t.turns.mu.Unlock()
	close(t.ended)
}

package main

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"time"

	"github.com/fasthttp/websocket"
)

// follow subscribes from the cursor and stays for a random time. What came after the last checkpoint is forgotten when the
// connection ends.
func (c *syncClient) follow(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(50+c.rng.IntN(2500))*time.Millisecond)
	defer cancel()
	dialer := websocket.Dialer{HandshakeTimeout: 10 * time.Second}
	conn, res, err := dialer.DialContext(ctx, "ws"+strings.TrimPrefix(c.base, "http")+"/sync/stream", http.Header{"Authorization": {"Bearer " + c.token}})
	if res != nil && res.Body != nil {
		res.Body.Close()
	}
	if err != nil {
		return errAway
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() }) // ends the read
	defer stop()
	frame := map[string]any{"type": "subscribe", "since": c.replica.cursor, "collections": c.names, "batch": c.rng.IntN(2) == 0}
	if c.device != "" {
		frame["client_id"] = c.device
	}
	subscribe, _ := json.Marshal(frame) // texts and a boolean
	if err := conn.WriteMessage(websocket.TextMessage, subscribe); err != nil {
		return errAway
	}
	s := &following{c: c, seen: c.replica.cursor}
	frames := -1
	if c.rng.IntN(3) == 0 {
		frames = c.rng.IntN(3000)
	}
	c.note("stream from %s", c.replica.cursor)
	for frames != 0 {
		frames--
		if c.rng.IntN(500) == 0 {
			c.counts["slow read"]++
			pause(ctx, time.Duration(c.rng.IntN(700))*time.Millisecond)
		}
		_, text, err := conn.ReadMessage()
		if err != nil {
			c.note("stream ended at %s, %d frames uncommitted: %v", c.replica.cursor, len(s.staged), err)
			return errAway
		}
		var f syncChange
		if err := json.Unmarshal(text, &f); err != nil {
			return err
		}
		if ended, err := s.handle(&f); ended || err != nil {
			return err
		}
	}
	return nil
}

// following is one stream's state.
type following struct {
	c      *syncClient
	seen   string // newest version of a change
	staged []syncChange
	ready  bool
}

// handle takes one frame.
func (s *following) handle(f *syncChange) (ended bool, err error) {
	c := s.c
	switch f.Type {
	case "":
		s.stage(f)
	case "changes":
		for i := range f.Changes {
			s.stage(&f.Changes[i])
		}
	case "checkpoint":
		if len(s.staged) == 0 {
			c.broken("a checkpoint at %s follows no change", f.LastSeq)
		}
		s.store(f.LastSeq)
	case "ready", "heartbeat":
		if len(s.staged) > 0 {
			c.broken("%s at %s while the transaction of %s has no checkpoint", f.Type, f.LastSeq, s.staged[0].Tx)
		}
		if f.Type == "ready" && s.ready {
			c.broken("ready twice")
		}
		s.ready = s.ready || f.Type == "ready"
		s.store(f.LastSeq)
	case "full_resync_required":
		c.note("stream: resync of %v, %s", f.Collections, f.Reason)
		c.lose(f)
		return true, nil
	case "goodbye":
		c.counts["goodbye"]++
		return true, nil
	case "error":
		c.counts[f.Code]++
		if wire := f.Code; wire == "internal" || wire == "invalid_frame" || wire == "invalid_token" {
			return true, errors.New("the stream reports " + f.Code)
		}
		return true, errAway
	default:
		c.broken("unknown frame %q", f.Type)
	}
	return false, nil
}

func (s *following) stage(ch *syncChange) {
	if versionOf(ch.Version) <= versionOf(s.seen) {
		s.c.broken("the stream brings %s %s of %s after %s", ch.Collection, ch.DocID, ch.Version, s.seen)
	}
	if n := len(s.staged); n > 0 && s.staged[n-1].Tx != ch.Tx {
		s.c.broken("the stream goes from transaction %s to %s without a checkpoint", s.staged[n-1].Tx, ch.Tx)
	}
	s.seen = ch.Version
	s.staged = append(s.staged, *ch)
}

// store applies what is staged, together with its cursor.
func (s *following) store(cursor string) {
	c := s.c
	if versionOf(cursor) < versionOf(s.seen) {
		c.broken("the cursor %s lies before the change %s", cursor, s.seen)
	}
	r := c.replica // in place: nothing reads the replica between here and commit
	since := r.cursor
	for i := range s.staged {
		since = c.apply(r, &s.staged[i], since)
	}
	s.staged, s.seen, r.cursor = s.staged[:0], cursor, cursor
	c.counts["checkpoint"]++
	c.commit(r)
}

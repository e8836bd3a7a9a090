package chaos

import (
	"context"
	"encoding/json"
	"net/http"
	"strings"
	"time"

	"github.com/fasthttp/websocket"
)

// frame is any frame of the stream.
type frame struct {
	change
	Type        string   `json:"type"`
	Changes     []change `json:"changes"`
	LastSeq     string   `json:"last_seq"`
	Collections []string `json:"collections"`
	Reason      string   `json:"reason"`
	Code        string   `json:"code"`
}

const closedToResync = 4410

// follow subscribes from where the client stands, and stays until ctx ends, or with untilReady until it is told that it
// has caught up. What came after the last checkpoint is forgotten when the connection ends.
func (c *client) follow(ctx context.Context, untilReady bool) error {
	if len(c.names) == 0 {
		return nil
	}
	dialer := websocket.Dialer{HandshakeTimeout: patience}
	conn, res, err := dialer.DialContext(ctx, "ws"+strings.TrimPrefix(c.w.o.Gateway, "http")+"/sync/stream", http.Header{"Authorization": {"Bearer " + c.token}})
	if res != nil && res.Body != nil {
		res.Body.Close()
	}
	if err != nil {
		c.note("stream: no connection: %v", err)
		if res != nil && res.StatusCode >= http.StatusBadRequest && res.StatusCode < http.StatusInternalServerError && res.StatusCode != http.StatusTooManyRequests {
			return c.wrong("the handshake of a stream", answer{status: res.StatusCode, header: res.Header})
		}
		return errAway
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() }) // ends the read
	defer stop()
	s := &following{c: c, seen: c.cursor, instance: from(res.Header)}
	batch := c.rng.IntN(2) == 0
	subscribe, _ := json.Marshal(map[string]any{"type": "subscribe", "since": c.cursor, "collections": c.names, "batch": batch, "client_id": c.device,
		"attachments": len(c.w.uploads) > 0 && c.rng.IntN(2) == 0}) // texts and booleans
	if err := conn.WriteMessage(websocket.TextMessage, subscribe); err != nil {
		return errAway
	}
	c.note("stream from %s, batch %t%s", c.cursor, batch, s.instance)
	c.w.count("clients: streams")
	for {
		if c.slow && !c.calm && c.rng.IntN(40) == 0 {
			c.w.count("clients: slow or dead readers")
			if pause(ctx, upTo(c.rng, 600*time.Millisecond)); c.rng.IntN(4) == 0 {
				<-ctx.Done() // it reads nothing any more, and its connection stays
			}
		}
		if untilReady { // silence of a dead connection
			_ = conn.SetReadDeadline(time.Now().Add(patience))
		}
		_, text, err := conn.ReadMessage()
		if err != nil {
			c.note("stream ended at %s, %d changes without a checkpoint: %v", c.cursor, len(s.staged), err)
			if websocket.IsCloseError(err, closedToResync) && !s.resync {
				c.violation("a resync names its collections", "the stream was closed with 4410, without a frame that says of what")
			}
			return errAway
		}
		var f frame
		if err := json.Unmarshal(text, &f); err != nil {
			c.violation("frames are JSON", "%v: %.300s", err, text)
			return errWrong
		}
		if ended, err := s.handle(&f, text); ended || err != nil || untilReady && s.ready {
			return err
		}
	}
}

// following is one stream's state.
type following struct {
	c        *client
	instance string
	seen     string // version of the newest change
	staged   []change
	files    int // frames of attachments since the last checkpoint
	ready    bool
	resync   bool
}

// handle takes one frame.
func (s *following) handle(f *frame, text []byte) (ended bool, err error) {
	c := s.c
	switch f.Type {
	case "":
		s.stage(&f.change)
	case "changes":
		for i := range f.Changes {
			s.stage(&f.Changes[i])
		}
	case "attachment": // the manifest says the same
		s.files++
	case "checkpoint":
		if len(s.staged) == 0 && s.files == 0 {
			c.violation("a checkpoint ends a transaction", "one at %s follows no change", f.LastSeq)
		}
		s.files = 0
		s.store(f.LastSeq)
		c.w.count("clients: checkpoints")
	case "ready", "heartbeat":
		if len(s.staged) > 0 {
			c.violation("a transaction comes whole", "%s at %s while the transaction of %s has no checkpoint", f.Type, f.LastSeq, &s.staged[0])
		}
		if f.Type == "ready" && s.ready {
			c.violation("a stream is ready once", "again at %s", f.LastSeq)
		}
		s.ready = s.ready || f.Type == "ready"
		s.store(f.LastSeq)
		c.note("stream: %s at %s", f.Type, f.LastSeq)
	case "full_resync_required":
		c.turn("stream: resync of %v, %s", f.Collections, f.Reason)
		s.resync = true
		return true, c.told(f.Collections, f.Reason)
	case "goodbye":
		c.note("stream: goodbye")
		c.w.count("clients: goodbye")
		return true, errAway
	case "error":
		c.note("stream: error %s at %s%s", f.Code, c.cursor, s.instance)
		c.w.count("clients: stream told " + f.Code)
		switch f.Code {
		case "internal":
			c.violation("no fault is the gateway's own", "stream: %s", text)
			return true, errWrong
		case "invalid_frame", "invalid_token", "token_expired", "forbidden", "unknown_collection", "invalid_since", "client_mismatch", "second_subscribe":
			c.violation("answers are those of the documentation", "stream: %s", text)
			return true, errWrong
		}
		return true, errAway
	default:
		c.violation("answers are those of the documentation", "an unknown frame: %.300s", text)
		return true, errWrong
	}
	return false, nil
}

func (s *following) stage(ch *change) {
	if rank(ch.Version) <= rank(s.seen) {
		s.c.violation("versions rise, and nothing comes twice", "the stream from %s brings %s after %s", s.c.cursor, ch, s.seen)
	}
	if n := len(s.staged); n > 0 && s.staged[n-1].Tx != ch.Tx {
		s.c.violation("a transaction comes whole", "the stream goes from %s to %s without a checkpoint", &s.staged[n-1], ch)
	}
	s.seen = ch.Version
	s.staged = append(s.staged, *ch)
}

// store applies what is staged, together with its position.
func (s *following) store(last string) {
	c := s.c
	if rank(last) < rank(c.cursor) {
		c.violation("last_seq doesn't go back", "the stream went from %s to %s", c.cursor, last)
	}
	c.store(&unit{since: c.cursor, last: last, changes: s.staged})
	s.staged, s.seen = nil, last
}

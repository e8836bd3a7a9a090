package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/fasthttp/websocket"

	"github.com/walgate/walgate/changelog"
)

const (
	subscribeTimeout  = 10 * time.Second
	heartbeatInterval = 25 * time.Second
	pingInterval      = 30 * time.Second
	// writeTimeout is how long one write may stand still before the reader counts as stuck.
	writeTimeout = 20 * time.Second
	queueLimit   = 256 << 10 // bytes of frames that wait for one session
	pageBytes    = 8 << 20
)

// clientFrame is what a client may send.
type clientFrame struct {
	Type        string          `json:"type"`
	Since       json.RawMessage `json:"since"`
	Collections []string        `json:"collections"`
	Token       string          `json:"token"`
	Batch       bool            `json:"batch"`
	ClientID    string          `json:"client_id"`
	Attachments bool            `json:"attachments"`
}

// session is one subscribed WebSocket. run owns the writing; a second goroutine reads.
type session struct {
	g        *Gateway
	conn     *websocket.Conn
	out      *outlet
	id       string
	identity *Identity
	sub      *subscriber // its bell wakes the writer, whatever there is to do
	clientID string      // whose files it is told of besides everybody's
	since    changelog.Cursor
	batch    bool
	sent     changelog.Version // everything up to here was written
	history  string
	ready    bool
	reading  chan error       // what ended the reader
	renewals chan clientFrame // that came and wait
	timer    *time.Timer      // rings the bell at wakeAt
	wakeAt   time.Time        // the next of:
	beatAt   time.Time
	pingAt   time.Time
	// open is the newest change written by catching up, while its transaction has no checkpoint yet; else zero.
	open struct{ version, tx changelog.Version }
}

// closing is how a session ends: with a last frame and a close code.
type closing struct {
	code  int
	frame []byte
}

func (c *closing) Error() string { return fmt.Sprintf("closing with code %d", c.code) }

func (s *session) closeWith(p *Problem) *closing {
	return &closing{code: p.Code.Wire().Close, frame: p.frame(s.id)}
}

// serveStream runs one WebSocket from its upgrade to its end. token comes from the handshake and may be empty.
func (g *Gateway) serveStream(ctx context.Context, conn *websocket.Conn, out *outlet, id, token string) {
	conn.SetReadLimit(int64(g.o.FrameLimit))
	s := &session{g: g, conn: conn, out: out, id: id, renewals: make(chan clientFrame, 1), reading: make(chan error, 1)}
	err := s.begin(ctx, token)
	if err == nil && !g.subjects.add(s.identity.Subject, g.o.StreamsPerSubject) {
		err = &Problem{Code: TooManyConnections, Detail: "this subject has as many streams as it may"}
	} else if err == nil {
		defer g.subjects.remove(s.identity.Subject)
		g.metrics.streams.Inc()
		err = s.run(ctx)
		g.metrics.streams.Dec()
		g.hub.leave(s.sub)
	}
	s.close(err)
}

// close tells the client why and closes the socket.
func (s *session) close(err error) {
	var end *closing
	var p *Problem
	switch {
	case errors.As(err, &end):
	case errors.As(err, &p):
		end = s.closeWith(p)
	case err == nil || errors.Is(err, context.Canceled):
		end = &closing{code: websocket.CloseGoingAway}
	default:
		return // the connection is broken: nobody listens
	}
	s.out.hurry(2 * time.Second)
	if len(end.frame) > 0 {
		s.writeText(end.frame)
	}
	s.conn.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(end.code, ""), time.Time{})
}

// begin authenticates and reads the subscribe frame.
func (s *session) begin(ctx context.Context, token string) error {
	s.conn.SetReadDeadline(time.Now().Add(s.g.limits.subscribe))
	f, err := s.read()
	if err != nil {
		var p *Problem
		if !errors.As(err, &p) && ctx.Err() == nil {
			return NewProblem(SubscribeTimeout, "no subscribe frame came within %s", s.g.limits.subscribe)
		}
		return err
	}
	if f.Type != "subscribe" {
		return NewProblem(InvalidFrame, "the first frame must be subscribe")
	}
	if f.Token != "" {
		token = f.Token
	}
	id, err := s.g.auth.Verify(ctx, token)
	if err != nil {
		return err
	}
	s.keep(id)
	if err := s.g.admit(ctx, s.identity.Subject); err != nil {
		return err
	}
	if s.since, err = parseSince(f.Since); err != nil {
		return err
	}
	if detail := clientFault(f.ClientID); detail != "" {
		return NewProblem(InvalidFrame, "client_id %s", detail)
	}
	feed, err := s.g.feedFor(id, f.Collections)
	if err != nil {
		return err
	}
	if f.Attachments {
		if s.clientID = f.ClientID; f.ClientID != "" {
			if err := s.g.checkClient(id, f.ClientID); err != nil {
				return err
			}
		}
		feed.files = newFileScopes(feed.set, feed.caller, f.ClientID)
	}
	s.batch, s.sent = f.Batch, s.since.Version
	s.sub = newSubscriber(feed, s.g.limits.queue)
	if f.ClientID != "" {
		s.sub.client = client{s.identity.Subject, f.ClientID}
	}
	return nil
}

// keep remembers of a caller what an open stream needs: its claims are in the feed.
func (s *session) keep(id *Identity) {
	s.identity = &Identity{Subject: id.Subject, ClientID: id.ClientID, Expires: id.Expires}
}

// parseSince reads since as JSON: a string or a whole number.
func parseSince(raw json.RawMessage) (changelog.Cursor, error) {
	text := string(raw)
	if len(raw) > 0 && raw[0] == '"' {
		if err := json.Unmarshal(raw, &text); err != nil {
			return changelog.Cursor{}, NewProblem(InvalidSince, "since can't be read")
		}
	}
	c, err := changelog.ParseCursor(text)
	if err != nil {
		return c, NewProblem(InvalidSince, "since is %s", err)
	}
	return c, nil
}

// read reads one client frame.
func (s *session) read() (f clientFrame, err error) {
	kind, data, err := s.conn.ReadMessage()
	if err != nil {
		if errors.Is(err, websocket.ErrReadLimit) {
			return f, NewProblem(FrameTooLarge, "frames may have %d bytes", s.g.o.FrameLimit)
		}
		return f, err
	}
	if kind != websocket.TextMessage {
		return f, NewProblem(BinaryFrame, "binary frames mean nothing here")
	}
	return decodeFrame(data)
}

// decodeFrame reads a client frame; unknown fields are let through for clients newer than this server.
func decodeFrame(data []byte) (f clientFrame, err error) {
	if err := json.Unmarshal(data, &f); err != nil {
		return f, NewProblem(InvalidFrame, "the frame is not the JSON of a message: %s", jsonFault(err))
	}
	if f.Type != "subscribe" && f.Type != "auth" {
		return f, NewProblem(InvalidFrame, "type must be subscribe or auth")
	}
	return f, nil
}

// jsonFault says what is wrong without repeating what was sent.
func jsonFault(err error) string {
	var syntax *json.SyntaxError
	var typ *json.UnmarshalTypeError
	switch {
	case errors.As(err, &syntax):
		return fmt.Sprintf("syntax error at byte %d", syntax.Offset)
	case errors.As(err, &typ):
		return fmt.Sprintf("%s must not be a %s", typ.Field, typ.Value)
	}
	return "unreadable"
}

// run writes until the session ends, and then waits for the reader.
func (s *session) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer context.AfterFunc(ctx, s.wake)()
	readerEnded := make(chan struct{})
	go func() {
		defer close(readerEnded)
		s.reading <- s.readLoop(ctx)
		s.wake()
	}()
	defer func() {
		cancel()
		s.conn.SetReadDeadline(time.Unix(1, 0)) // after cancel: who sets a later one then looks at ctx
		<-readerEnded
	}()
	return s.write(ctx)
}

// wake makes the writer look at everything that may have happened.
func (s *session) wake() { ring(s.sub.bell) }

// readLoop reads renewals until the connection ends or a frame is wrong.
func (s *session) readLoop(ctx context.Context) error {
	wait := func(string) error {
		s.conn.SetReadDeadline(time.Now().Add(3 * s.g.limits.ping))
		return ctx.Err() // last: run cancels before it sets its own deadline
	}
	s.conn.SetPongHandler(wait)
	for {
		if err := wait(""); err != nil {
			return err
		}
		f, err := s.read()
		if err != nil {
			return err
		}
		if f.Type != "auth" {
			return NewProblem(SecondSubscribe, "this stream is subscribed already")
		}
		select {
		case s.renewals <- f:
			s.wake()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// write is the session's loop: catch up, then pass on what the hub queues, until something ends it.
func (s *session) write(ctx context.Context) error {
	now := time.Now()
	s.beatAt, s.pingAt = now.Add(s.g.limits.heartbeat), now.Add(s.g.limits.ping)
	s.timer = time.AfterFunc(time.Hour, s.wake)
	defer s.timer.Stop()
	s.setTimer(now)
	var queued []frame
	for {
		var live bool
		var end *resync
		var problem *Problem
		if cap(queued) > keptFrames {
			queued = nil
		}
		queued, live, end, problem = s.sub.take(queued[:0])
		if err := s.send(queued); err != nil {
			return err
		}
		switch {
		case end != nil:
			return s.resyncClosing(end)
		case problem != nil:
			return problem
		}
		if err := s.attend(ctx, live); err != nil {
			return err
		}
		if !live {
			if err := s.catchUp(ctx); err != nil {
				return err
			}
			continue
		}
		<-s.sub.bell // one channel for everything: waiting for many would cost more than the frame
	}
}

// attend handles what isn't a change: the end, a renewal, a timer. While catching up there are no heartbeats, for what is
// queued comes after what is read.
func (s *session) attend(ctx context.Context, live bool) error {
	if ctx.Err() != nil {
		return s.goodbye()
	}
	select {
	case err := <-s.reading:
		return err
	case f := <-s.renewals:
		if err := s.renew(ctx, f.Token); err != nil {
			return err
		}
		s.wake() // there may be another
	default:
	}
	now := time.Now()
	if now.Before(s.wakeAt) {
		return nil
	}
	if !now.Before(s.identity.Expires) {
		return NewProblem(TokenExpired, "renew the token with an auth frame before it expires")
	}
	if !now.Before(s.pingAt) {
		s.pingAt = now.Add(s.g.limits.ping)
		if err := s.conn.WriteControl(websocket.PingMessage, nil, time.Time{}); err != nil {
			return err
		}
	}
	if !now.Before(s.beatAt) {
		s.beatAt = now.Add(s.g.limits.heartbeat)
		if live {
			if err := s.heartbeat(); err != nil {
				return err
			}
		}
	}
	s.setTimer(now)
	return nil
}

// setTimer lets the bell ring when there is something to do at a time.
func (s *session) setTimer(now time.Time) {
	s.wakeAt = s.identity.Expires
	for _, t := range []time.Time{s.beatAt, s.pingAt} {
		if t.Before(s.wakeAt) {
			s.wakeAt = t
		}
	}
	s.timer.Reset(s.wakeAt.Sub(now))
}

func (s *session) goodbye() error {
	return &closing{code: ShuttingDown.Wire().Close, frame: fmt.Appendf(nil, `{"type":"goodbye","reconnect_after_ms":%d}`, s.g.reconnectAfter().Milliseconds())}
}

func (s *session) resyncClosing(r *resync) error {
	s.g.metrics.resyncs.Inc()
	names, files := []byte("[]"), ""
	if len(r.Collections) > 0 {
		names, _ = json.Marshal(r.Collections) // strings
	}
	if r.Attachments {
		files = `,"attachments":true`
	}
	return &closing{code: FullResyncRequired.Wire().Close,
		frame: fmt.Appendf(nil, `{"type":"full_resync_required","collections":%s%s,"reason":%q}`, names, files, r.Reason)}
}

// renew takes a new token of the same subject. Other scopes need other rows than those the client holds.
func (s *session) renew(ctx context.Context, token string) error {
	id, err := s.g.auth.Verify(ctx, token)
	if err != nil {
		return err
	}
	if id.Subject != s.identity.Subject {
		return NewProblem(InvalidToken, "a renewed token must have the same subject")
	}
	feed, err := s.g.feedFor(id, s.sub.feed.names())
	if err != nil {
		return err
	}
	r := &resync{Reason: reasonScopes}
	if feed.caller.ScopeHash != s.sub.feed.caller.ScopeHash {
		r.Collections = s.sub.feed.scoped()
	}
	if files := s.sub.feed.files; files != nil {
		if s.clientID != "" {
			if err := s.g.checkClient(id, s.clientID); err != nil {
				return err
			}
		}
		r.Attachments = newFileScopes(feed.set, feed.caller, s.clientID).hash != files.hash
	}
	if len(r.Collections) > 0 || r.Attachments {
		return s.resyncClosing(r)
	}
	s.keep(id)
	s.setTimer(time.Now())
	return nil
}

// heartbeat tells a quiet client how far it has come, so that its next since isn't old.
func (s *session) heartbeat() error {
	head, ok := s.g.hub.position() // first: all up to there is queued or was sent
	frames, live, _, _ := s.sub.take(nil)
	if err := s.send(frames); err != nil {
		return err
	}
	if !live || !ok || head.History != s.history {
		return nil // catching up tells more
	}
	v := max(s.sent, s.sub.checkpointed(), head.Version)
	return s.writeText([]byte(`{"type":"heartbeat","last_seq":"` + s.sub.feed.cursor(v, s.history) + `"}`))
}

// send writes frames, many at a time, and releases them; in batch mode the changes before each checkpoint become one, and
// what they bring of attachments follows.
func (s *session) send(frames []frame) error {
	defer releaseAll(frames)
	out := s.out.gather()
	defer out.drop()
	for i := 0; i < len(frames); {
		j := i + 1
		var err error
		if frames[i].kind == frameCheckpoint || !s.batch {
			err = out.add(frames[i].data)
		} else {
			for j < len(frames) && frames[j].kind != frameCheckpoint {
				j++
			}
			err = addBatch(out, frames[i:j])
		}
		if err != nil {
			return s.sendFailed(err)
		}
		i = j
	}
	if err := out.flush(); err != nil {
		return s.sendFailed(err)
	}
	return nil
}

// addBatch adds a frame that holds all changes, and then those of attachments.
func addBatch(out *gathered, frames []frame) error {
	parts := make([][]byte, 0, 2*len(frames)+1)
	before := []byte(`{"type":"changes","changes":[`)
	for _, f := range frames {
		if f.kind == frameChange {
			parts = append(parts, before, f.data)
			before = []byte{','}
		}
	}
	if len(parts) > 0 {
		if err := out.add(append(parts, []byte("]}"))...); err != nil {
			return err
		}
	}
	for _, f := range frames {
		if f.kind == frameAttachment {
			if err := out.add(f.data); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *session) writeText(b []byte) error {
	out := s.out.gather()
	defer out.drop()
	err := out.add(b)
	if err == nil {
		err = out.flush()
	}
	if err != nil {
		return s.sendFailed(err)
	}
	return nil
}

func (s *session) sendFailed(err error) error {
	s.g.metrics.writeFailed(err)
	return fmt.Errorf("write to the client: %w", err)
}

package gateway

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	ws "github.com/fasthttp/websocket"

	"github.com/walgate/walgate/changelog"
)

// TestStream: catch-up, ready, live transactions with their checkpoints, on the same frames as a pull's changes.
func TestStream(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{})
	a := tokenFor(t, "a", nil)
	since := e.here(t, a)
	e.exec(t, `INSERT INTO todos VALUES (1, 'a'), (2, 'b'), (3, 'a')`)
	e.exec(t, `UPDATE todos SET title = 'x' WHERE id = 1`)
	e.sync(t)
	page := e.get(t, "/sync/pull?"+query("since", since), a)
	s := e.subscribe(t, a, since, "")
	for _, want := range []string{"upsert todos/1", "upsert todos/3"} {
		if f := s.want(t, ""); f.brief() != want {
			t.Fatalf("want %s, got %s", want, f.raw)
		}
	}
	s.want(t, "checkpoint")
	f := s.want(t, "")
	if !strings.Contains(string(page.body), string(f.raw)) {
		t.Errorf("the frame %s is not what the pull says: %s", f.raw, page.body)
	}
	s.want(t, "checkpoint")
	ready := s.want(t, "ready")
	e.exec(t, `INSERT INTO todos VALUES (4, 'a'), (5, 'b'), (6, 'a')`)
	first := s.wantChanges(t, "upsert todos/4", "upsert todos/6")
	e.exec(t, `DELETE FROM todos WHERE id IN (4, 5); UPDATE todos SET owner = 'b' WHERE id = 6`)
	second := s.wantChanges(t, "delete todos/4", "delete todos/6 left")
	if !(ready.LastSeq < first && first < second) {
		t.Errorf("cursors don't rise: %s, %s, %s", ready.LastSeq, first, second)
	}
	// Every cursor continues exactly where it stood.
	again := e.subscribe(t, a, first, "")
	again.wantChanges(t, "delete todos/4", "delete todos/6 left")
	again.want(t, "ready")
	if changes, _ := e.pullAll(t, a, ready.LastSeq); briefs(changes) != "delete todos/4, delete todos/6 left" {
		t.Errorf("the pull from ready: %s", briefs(changes))
	}
}

// TestStreamBatch: with batch a transaction is one frame.
func TestStreamBatch(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{})
	a := tokenFor(t, "a", nil)
	since := e.here(t, a)
	e.exec(t, `INSERT INTO todos VALUES (1, 'a'), (2, 'a')`)
	e.sync(t)
	s := e.subscribe(t, a, since, `,"batch":true`)
	if f := s.want(t, "changes"); briefs(f.Changes) != "upsert todos/1, upsert todos/2" {
		t.Errorf("got %s", f.raw)
	}
	s.want(t, "checkpoint")
	s.want(t, "ready")
	e.exec(t, `UPDATE todos SET title = 'x'; INSERT INTO news VALUES (1)`)
	if f := s.want(t, "changes"); briefs(f.Changes) != "upsert todos/1, upsert todos/2, upsert news/1" {
		t.Errorf("got %s", f.raw)
	}
	s.want(t, "checkpoint")
	e.exec(t, `DELETE FROM news`)
	if f := s.want(t, "changes"); briefs(f.Changes) != "delete news/1" {
		t.Errorf("got %s", f.raw)
	}
}

// TestStreamRefusals: every way of opening a stream wrongly ends with its own code, also after others have succeeded.
func TestStreamRefusals(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{gateway: func(g *Gateway) { g.limits.subscribe = 200 * time.Millisecond }})
	a := tokenFor(t, "a", nil)
	many := make([]int, changelog.MaxScopes+1)
	for i := range many {
		many[i] = i
	}
	past := tokenFor(t, "a", map[string]any{"exp": time.Now().Add(-time.Hour).Unix()})
	text := func(frame string) func(*stream) {
		return func(s *stream) { s.send(t, frame) }
	}
	for _, c := range []struct {
		name  string
		token string
		act   func(*stream)
		code  Code
	}{
		{"nothing", a, func(*stream) {}, SubscribeTimeout},
		{"bad JSON", a, text(`{"type":`), InvalidFrame},
		{"no object", a, text(`[]`), InvalidFrame},
		{"trailing", a, text(`{"type":"subscribe","since":0}{}`), InvalidFrame},
		{"unknown type", a, text(`{"type":"hello"}`), InvalidFrame},
		{"no type", a, text(`{}`), InvalidFrame},
		{"wrong type of a member", a, text(`{"type":"subscribe","since":0,"collections":"todos"}`), InvalidFrame},
		{"auth first", a, text(`{"type":"auth","token":"x"}`), InvalidFrame},
		{"binary", a, func(s *stream) { ok(t, s.conn.WriteMessage(ws.BinaryMessage, []byte(`{}`))) }, BinaryFrame},
		{"no since", a, text(`{"type":"subscribe"}`), InvalidSince},
		{"since null", a, text(`{"type":"subscribe","since":null}`), InvalidSince},
		{"since a list", a, text(`{"type":"subscribe","since":[0]}`), InvalidSince},
		{"no token", "", text(`{"type":"subscribe","since":0}`), InvalidToken},
		{"bad token", "x.y.z", text(`{"type":"subscribe","since":0}`), InvalidToken},
		{"expired token", past, text(`{"type":"subscribe","since":0}`), TokenExpired},
		{"bad token in the frame", a, text(`{"type":"subscribe","since":0,"token":"x"}`), InvalidToken},
		{"unknown collection", a, text(`{"type":"subscribe","since":0,"collections":["todos","nope"]}`), UnknownCollection},
		{"forbidden collection", a, text(`{"type":"subscribe","since":0,"collections":["vault"]}`), Forbidden},
		{"too many scopes", tokenFor(t, "a", map[string]any{"teams": many}), text(`{"type":"subscribe","since":0}`), TooManyScopes},
	} {
		t.Run(c.name, func(t *testing.T) {
			var headers []string
			if c.token != "" {
				headers = []string{"Authorization", "Bearer " + c.token}
			}
			s := e.dial(t, "", headers...)
			c.act(s)
			s.wantError(t, c.code)
		})
	}
	t.Run("oversized", func(t *testing.T) {
		s := e.dial(t, "", "Authorization", "Bearer "+a)
		s.send(t, `{"type":"subscribe","since":0,"token":"`+strings.Repeat("x", 65<<10)+`"}`)
		for { // the protocol's own close frame may come before ours
			if _, err := s.read(); err != nil {
				if !ws.IsCloseError(err, 1009) {
					t.Errorf("got %v", err)
				}
				return
			}
		}
	})
	eventually(t, "no stream is left", func() bool { return e.g.open.Load() == 0 })
}

// TestStreamAfterSubscribe: what ends a subscribed stream.
func TestStreamAfterSubscribe(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{})
	a := tokenFor(t, "a", nil)
	for name, c := range map[string]struct {
		frame string
		code  Code
	}{
		"second subscribe": {`{"type":"subscribe","since":0}`, SecondSubscribe},
		"bad JSON":         {`nonsense`, InvalidFrame},
		"unknown type":     {`{"type":"unsubscribe"}`, InvalidFrame},
		"no token":         {`{"type":"auth"}`, InvalidToken},
		"bad token":        {`{"type":"auth","token":"x"}`, InvalidToken},
		"other subject":    {`{"type":"auth","token":"` + tokenFor(t, "b", nil) + `"}`, InvalidToken},
		"expired":          {`{"type":"auth","token":"` + tokenFor(t, "a", map[string]any{"exp": 1}) + `"}`, TokenExpired},
	} {
		s := e.live(t, a, "")
		s.send(t, c.frame)
		if f := s.next(t); f.Code != c.code {
			t.Errorf("%s: got %s", name, f.raw)
		}
		s.wantClose(t, c.code.Wire().Close)
	}
	s := e.live(t, a, "")
	ok(t, s.conn.WriteMessage(ws.BinaryMessage, []byte(`{"type":"auth"}`)))
	s.wantError(t, BinaryFrame)
	e.waiting(t, 0)
}

// TestStreamToken: the three places of a token, its expiry in mid-stream, and its renewal.
func TestStreamToken(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{})
	a := tokenFor(t, "a", nil)
	subscribe := `{"type":"subscribe","since":0`
	for name, s := range map[string]*stream{
		"header": e.dial(t, "", "Authorization", "Bearer "+a), "scheme Token": e.dial(t, "", "Authorization", "Token "+a), "query": e.dial(t, "?token="+a)} {
		s.send(t, subscribe+"}")
		if f := s.next(t); f.Type != "ready" {
			t.Errorf("%s: %s", name, f.raw)
		}
	}
	s := e.dial(t, "")
	s.send(t, subscribe+`,"token":"`+a+`"}`)
	s.want(t, "ready")
	if strings.Contains(e.logged.String(), a) {
		t.Error("a token was logged")
	}

	expiring := func(d time.Duration) string {
		return tokenFor(t, "a", map[string]any{"exp": float64(time.Now().Add(d).UnixMilli()) / 1000})
	}
	s = e.live(t, expiring(time.Second), "")
	s.wantError(t, TokenExpired)

	s = e.live(t, expiring(1500*time.Millisecond), "")
	renewed := time.Now()
	s.send(t, `{"type":"auth","token":"`+expiring(3*time.Second)+`"}`)
	s.wantError(t, TokenExpired)
	if lived := time.Since(renewed); lived < 2*time.Second {
		t.Errorf("the renewed token lived for %s", lived)
	}

	s = e.live(t, a, "")
	s.send(t, `{"type":"auth","token":"`+tokenFor(t, "a", map[string]any{"jti": "new"})+`"}`)
	e.exec(t, `INSERT INTO todos VALUES (1, 'a')`)
	s.wantChanges(t, "upsert todos/1")

	s = e.live(t, a, "")
	s.send(t, `{"type":"auth","token":"`+tokenFor(t, "a", map[string]any{"teams": []int{1}})+`"}`)
	if f := s.want(t, "full_resync_required"); strings.Join(f.Collections, ",") != "notes,todos" || f.Reason != "scopes_changed" {
		t.Errorf("got %s", f.raw)
	}
	s.wantClose(t, 4410)

	s = e.live(t, a, `,"collections":["news"]`) // depends on no claim: other scopes change nothing
	s.send(t, `{"type":"auth","token":"`+tokenFor(t, "a", map[string]any{"teams": []int{1}})+`"}`)
	e.exec(t, `INSERT INTO news VALUES (1)`)
	s.wantChanges(t, "upsert news/1")

	admin := tokenFor(t, "a", map[string]any{"roles": []string{"admin"}})
	s = e.subscribe(t, admin, e.here(t, admin), `,"collections":["vault"]`)
	s.want(t, "ready")
	s.send(t, `{"type":"auth","token":"`+a+`"}`) // has lost the role
	s.wantError(t, Forbidden)
}

// TestStreamTruncate: a truncated table cuts its subscribers off at once, and only those.
func TestStreamTruncate(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{})
	a := tokenFor(t, "a", nil)
	e.exec(t, `INSERT INTO todos VALUES (1, 'a')`)
	s, news := e.live(t, a, ""), e.live(t, a, `,"collections":["news"]`)
	e.exec(t, `INSERT INTO todos VALUES (2, 'a')`)
	s.wantChanges(t, "upsert todos/2") // before: in one batch with the truncate, the cut comes first
	e.exec(t, `TRUNCATE todos`)
	if f := s.want(t, "full_resync_required"); strings.Join(f.Collections, ",") != "todos" || f.Reason != "too_old" {
		t.Errorf("got %s", f.raw)
	}
	s.wantClose(t, 4410)
	e.exec(t, `INSERT INTO news VALUES (1)`)
	news.wantChanges(t, "upsert news/1")
	s = e.live(t, a, `,"collections":["news","notes"]`)
	e.exec(t, `INSERT INTO news VALUES (2)`)
	s.wantChanges(t, "upsert news/2")
}

// TestStreamHeartbeat: heartbeats move last_seq past what the client may not see.
func TestStreamHeartbeat(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{gateway: func(g *Gateway) { g.limits.heartbeat, g.limits.ping = 50*time.Millisecond, time.Second }})
	a := tokenFor(t, "a", nil)
	s := e.subscribe(t, a, e.here(t, a), "")
	pings := 0
	s.conn.SetPingHandler(func(string) error {
		pings++
		return s.conn.WriteControl(ws.PongMessage, nil, time.Now().Add(time.Second))
	})
	ready := s.want(t, "ready")
	e.exec(t, `INSERT INTO todos VALUES (1, 'b')`)
	e.sync(t)
	for last := ready.LastSeq; ; {
		f := s.want(t, "heartbeat")
		if f.LastSeq < last {
			t.Fatalf("heartbeats go back: %s after %s", f.LastSeq, last)
		}
		if last = f.LastSeq; last > ready.LastSeq && pings > 0 {
			if changes, _ := e.pullAll(t, a, last); len(changes) != 0 {
				t.Errorf("after the heartbeat: %s", briefs(changes))
			}
			return
		}
	}
}

// TestStreamDeadPeer: a client that answers no ping is dropped.
func TestStreamDeadPeer(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{gateway: func(g *Gateway) { g.limits.ping = 400 * time.Millisecond }})
	a := tokenFor(t, "a", nil)
	s := e.live(t, a, "")
	s.conn.SetPingHandler(func(string) error { return nil })
	if f, err := s.read(); err == nil {
		t.Errorf("got %s", f.raw)
	}
	eventually(t, "the stream is gone", func() bool { return e.g.open.Load() == 0 })
}

// TestStreamGoodbye: a drain says goodbye to each client and then refuses new ones.
func TestStreamGoodbye(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{})
	a := tokenFor(t, "a", nil)
	subscribed := []*stream{e.live(t, a, ""), e.live(t, tokenFor(t, "b", nil), "")}
	e.stop()
	for _, s := range subscribed {
		if f := s.want(t, "goodbye"); f.After < 1 {
			t.Errorf("got %s", f.raw)
		}
		s.wantClose(t, 1001)
	}
	<-e.ended
}

// TestStreamLimits: of connections, of a subject's connections, and of rate.
func TestStreamLimits(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{options: func(o *Options) { o.StreamConnections, o.StreamsPerSubject, o.RequestsPerSecond, o.Burst = 4, 2, 1, 7 }})
	a := tokenFor(t, "a", nil)
	subscribe := `{"type":"subscribe","since":0,"token":"`
	open := func(token string) *stream {
		s := e.dial(t, "")
		s.send(t, subscribe+token+`"}`)
		return s
	}
	first := open(a)
	first.want(t, "ready")
	open(a).want(t, "ready")
	open(a).wantError(t, TooManyConnections)
	eventually(t, "two streams", func() bool { return e.g.open.Load() == 2 })
	open(tokenFor(t, "b", nil)).want(t, "ready")
	open(tokenFor(t, "c", nil)).want(t, "ready")
	_, res, err := e.tryDial(t, "")
	if err == nil || res.StatusCode != http.StatusTooManyRequests || res.Header.Get("Retry-After") == "" {
		t.Errorf("a fifth stream: %v %v", err, res)
	}
	first.conn.Close()
	eventually(t, "the closed stream's place is free", func() bool { return e.g.open.Load() == 3 })
	open(a).want(t, "ready")

	var limited *answer
	for range 20 { // 4 of the 7 tokens are used
		if limited = e.get(t, "/sync/pull?since=0", a); limited.status != http.StatusOK {
			break
		}
	}
	limited.problem(t, RateLimited)
	e.get(t, "/sync/pull?since=0", tokenFor(t, "d", nil)) // others are not touched
}

// TestSlowReader: a client that doesn't read for a while gets everything afterwards, in order and once, and its queue
// stays small meanwhile. One that stays stuck is closed.
func TestSlowReader(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{gateway: func(g *Gateway) { g.limits.queue = 32 << 10 }})
	a := tokenFor(t, "a", nil)
	s, quick := e.live(t, a, ""), e.live(t, a, `,"batch":true`)
	const rows, batches = 20000, 200
	done := make(chan int)
	go func() {
		n := 0
		for n < rows {
			f, err := quick.read()
			if err != nil {
				t.Errorf("the quick client: %v after %d changes", err, n)
				break
			}
			n += len(f.Changes)
		}
		done <- n
	}()
	most := 0
	for i := range batches {
		e.exec(t, `INSERT INTO todos SELECT i, 'a', NULL, repeat('x', 500) FROM generate_series($1::int, $2::int) i`, i*rows/batches, (i+1)*rows/batches-1)
		e.g.hub.mu.Lock()
		for sub := range e.g.hub.subs {
			sub.mu.Lock()
			most = max(most, sub.size+sub.held)
			sub.mu.Unlock()
		}
		e.g.hub.mu.Unlock()
	}
	e.sync(t)
	if n := <-done; n != rows {
		t.Errorf("the quick client got %d", n)
	}
	if most > e.g.limits.queue {
		t.Errorf("%d bytes were queued, %d may be", most, e.g.limits.queue)
	}
	for n, last := 0, ""; n < rows; {
		f, err := s.read()
		if err != nil {
			t.Fatalf("after %d changes: %v", n, err)
		}
		if f.Type != "" {
			continue
		}
		if f.DocID != fmt.Sprint(n) || f.Version <= last {
			t.Fatalf("change %d is %s after %s", n, f.raw, last)
		}
		n, last = n+1, f.Version
	}
}

// TestStuckReader: a client that never reads is closed when a write times out, and counted.
func TestStuckReader(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{gateway: func(g *Gateway) { g.limits.write = 200 * time.Millisecond }})
	a := tokenFor(t, "a", nil)
	e.live(t, a, "")
	e.exec(t, `INSERT INTO todos SELECT i, 'a', NULL, repeat('x', 1 << 20) FROM generate_series(1, 40) i`)
	eventually(t, "the stuck client is gone", func() bool { return e.g.open.Load() == 0 })
	if m := string(e.get(t, "/metrics", "").body); !strings.Contains(m, "walgate_stream_stuck_total 1") {
		t.Errorf("not counted:\n%s", m)
	}
}

// TestStreamLargeTransaction: a transaction larger than the queue arrives whole, with one checkpoint at its end.
func TestStreamLargeTransaction(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{gateway: func(g *Gateway) { g.limits.queue = 32 << 10 }})
	a := tokenFor(t, "a", nil)
	s := e.live(t, a, "")
	e.exec(t, `INSERT INTO todos SELECT i, 'a', NULL, 'x' FROM generate_series(0, 4999) i`)
	tx := ""
	for n := range 5000 {
		f := s.want(t, "")
		if tx == "" {
			tx = f.Tx
		}
		if f.DocID != fmt.Sprint(n) || f.Tx != tx {
			t.Fatalf("change %d is %s", n, f.raw)
		}
	}
	s.want(t, "checkpoint")
	e.exec(t, `INSERT INTO news VALUES (1)`)
	s.wantChanges(t, "upsert news/1")
}

func TestDecodeFrame(t *testing.T) {
	t.Parallel()
	f, err := decodeFrame([]byte(`{"type":"subscribe","since":7,"collections":["a"],"batch":true,"new":1}`))
	if err != nil || string(f.Since) != "7" || !f.Batch || len(f.Collections) != 1 {
		t.Errorf("%+v, %v", f, err)
	}
	for _, bad := range []string{`{"type":"subscribe","batch":"secret"}`, `{"type":"subscribe" secret`, `"secret"`} {
		if _, err := decodeFrame([]byte(bad)); err == nil || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v", bad, err)
		}
	}
	if !json.Valid((&Problem{Code: Internal}).frame("")) {
		t.Error("the frame of a problem is no JSON")
	}
}

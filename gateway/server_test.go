package gateway

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/policies"
)

// TestAuthentication: the routes of the feed refuse whoever doesn't prove who they are.
func TestAuthentication(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{})
	for _, path := range []string{"/sync/pull?since=0", "/sync/full"} {
		for token, code := range map[string]Code{
			"": InvalidToken, "x": InvalidToken, "x.y.z": InvalidToken, "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhIiwiZXhwIjo5OTk5OTk5OTk5fQ.": InvalidToken,
			tokenFor(t, "", nil): InvalidToken, tokenFor(t, "a", map[string]any{"exp": 1}): TokenExpired,
		} {
			a := e.get(t, path, token)
			a.problem(t, code)
			if !strings.HasPrefix(a.header.Get("WWW-Authenticate"), "Bearer") {
				t.Errorf("%s with %q: %v", path, token, a.header)
			}
		}
	}
	if a := e.get(t, "/sync/pull?since=0", "", "Authorization", "Token "+tokenFor(t, "a", nil)); a.status != http.StatusOK {
		t.Errorf("scheme Token: %d", a.status)
	}
}

// TestOrigins: CORS answers and WebSocket handshakes let the configured origins in only.
func TestOrigins(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{options: func(o *Options) { o.AllowedOrigins = []string{"https://app.example"} }})
	a := tokenFor(t, "a", nil)
	got := e.get(t, "/sync/pull?since=0", a, "Origin", "https://app.example")
	if got.header.Get("Access-Control-Allow-Origin") != "https://app.example" || !strings.Contains(got.header.Get("Access-Control-Expose-Headers"), "X-Sync-LastSeq") {
		t.Errorf("%v", got.header)
	}
	if got = e.get(t, "/sync/pull?since=0", a, "Origin", "https://evil.example"); got.header.Get("Access-Control-Allow-Origin") != "" {
		t.Errorf("a foreign origin is let in: %v", got.header)
	}
	got = e.do(t, http.MethodOptions, "/sync/pull", "", "Origin", "https://app.example", "Access-Control-Request-Method", "GET", "Access-Control-Request-Headers", "authorization")
	if got.status != http.StatusNoContent || !strings.Contains(strings.ToLower(got.header.Get("Access-Control-Allow-Headers")), "authorization") {
		t.Errorf("preflight: %d %v", got.status, got.header)
	}
	if got = e.get(t, "/sync/pull?since=0", "", "Origin", "https://app.example"); got.header.Get("Access-Control-Allow-Origin") == "" {
		t.Error("a page can't read its own 401")
	}
	for origin, allowed := range map[string]bool{"https://app.example": true, "http://sync.example": true, "HTTPS://APP.EXAMPLE": true,
		"https://app.example.evil": false, "https://evil.example": false, "null": false, "http://app.example": false} {
		s, res, err := e.tryDial(t, "?token="+a, "Origin", origin)
		if (err == nil) != allowed {
			t.Errorf("origin %s: %v", origin, err)
		}
		if err != nil {
			checkHandshake(t, res, Forbidden)
			continue
		}
		s.send(t, `{"type":"subscribe","since":0}`)
		s.want(t, "ready")
	}
}

// checkHandshake holds a refused handshake against table and document.
func checkHandshake(t testing.TB, res *http.Response, code Code) {
	t.Helper()
	body, err := io.ReadAll(res.Body)
	ok(t, err)
	a := &answer{res.StatusCode, res.Header, body}
	a.problem(t, code)
	checkAnswer(t, res.Request, a)
}

// TestOperations: health, readiness, metrics and the document itself.
func TestOperations(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{})
	eventually(t, "leading", func() bool { return e.g.o.SourceStatus().Leading })
	if a := e.get(t, "/healthz", ""); a.status != 200 || string(a.body) != `{"status":"alive"}` {
		t.Errorf("%d %s", a.status, a.body)
	}
	if a := e.get(t, "/readyz", ""); a.status != 200 || !strings.Contains(string(a.body), `"problems":{}`) || !strings.Contains(string(a.body), `"status":"ready"`) {
		t.Errorf("%d %s", a.status, a.body)
	}
	a := tokenFor(t, "a", nil)
	e.live(t, a, "")
	e.pull(t, a, "0")
	e.full(t, a)
	m := string(e.get(t, "/metrics", "").body)
	for _, want := range []string{"sync_pull_total 1", "sync_full_resync_total 1", "sync_websocket_connections 1", "walgate_leading 1", "walgate_policy_errors_total 0"} {
		if !strings.Contains(m, want+"\n") {
			t.Errorf("no %s in\n%s", want, m)
		}
	}
	if d := e.get(t, "/openapi.json", ""); string(d.body) != string(openAPIDocument) || !json.Valid(d.body) {
		t.Error("the document served is another")
	}
	// A stopped collection answers 503 and is named; the others are served.
	e.exec(t, `ALTER TABLE todos DROP COLUMN archived CASCADE`)
	eventually(t, "degraded", func() bool { return strings.Contains(string(e.get(t, "/readyz", "").body), `"collection todos"`) })
	if r := e.get(t, "/readyz", ""); r.status != 200 || !strings.Contains(string(r.body), `"status":"degraded"`) {
		t.Errorf("%d %s", r.status, r.body)
	}
	if p := e.pull(t, a, "0", "collections", "news"); p.Resync {
		t.Errorf("%+v", p)
	}
}

// TestStoppedCollection: its live subscribers are told, and requests for it are refused as a passing state. Clients of the
// others go on from where they are.
func TestStoppedCollection(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{})
	a := tokenFor(t, "a", nil)
	s := e.live(t, a, `,"collections":["todos"]`)
	since := e.full(t, a, "collections", "notes").header.Get("X-Sync-LastSeq")
	e.exec(t, `ALTER TABLE todos DROP COLUMN archived CASCADE`)
	s.wantError(t, CollectionUnavailable)
	if p := e.pull(t, a, since, "collections", "notes"); p.Resync || p.LastSeq[len(p.LastSeq)-8:] != since[len(since)-8:] {
		t.Errorf("another collection goes on from %s with %+v", since, p)
	}
	e.get(t, "/sync/pull?since=0&collections=todos", a).problem(t, CollectionUnavailable)
	e.get(t, "/sync/full?collections=todos", a).problem(t, CollectionUnavailable)
	s = e.subscribe(t, a, "0", `,"collections":["todos"]`)
	s.wantError(t, CollectionUnavailable)
}

// TestRoutes: what isn't there, and what must not be.
func TestRoutes(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{})
	a := tokenFor(t, "a", nil)
	e.get(t, "/", a).problem(t, NotFound)
	e.get(t, "/sync", a).problem(t, NotFound)
	e.get(t, "/sync/pull/x", a).problem(t, NotFound)
	e.get(t, "/sync/stream", a).problem(t, UpgradeRequired)
	for _, method := range []string{http.MethodPost, http.MethodPut, http.MethodDelete, http.MethodPatch} {
		for _, path := range []string{"/sync/pull", "/sync/full", "/healthz"} {
			got := e.do(t, method, path, a)
			got.problem(t, MethodNotAllowed)
			if !strings.Contains(got.header.Get("Allow"), "GET") {
				t.Errorf("%s %s: Allow %q", method, path, got.header.Get("Allow"))
			}
		}
	}
	e.get(t, "/sync/pull?since=0&collections="+strings.Repeat("x", 20<<10), a).problem(t, RequestTooLarge)
	if got := e.get(t, "/healthz", "", "X-Request-ID", "mine"); got.header.Get("X-Request-Id") != "mine" {
		t.Errorf("%v", got.header)
	}
}

// TestPanic: a panic in a handler is an internal problem that tells clients nothing, and the server goes on.
func TestPanic(t *testing.T) {
	t.Parallel()
	var armed atomic.Bool
	e := newEnv(t, setup{options: func(o *Options) {
		current := o.Policies
		o.Policies = func() *policies.Set {
			if armed.Load() {
				panic("a secret of the server")
			}
			return current()
		}
	}})
	a := tokenFor(t, "a", nil)
	armed.Store(true)
	for _, path := range []string{"/sync/pull?since=0", "/sync/full", "/sync/full?limit=all"} {
		if got := e.get(t, path, a); strings.Contains(string(got.body), "secret") {
			t.Errorf("%s: %s", path, got.body)
		} else {
			got.problem(t, Internal)
		}
	}
	s := e.subscribe(t, a, "0", "")
	s.wantClose(t, 1011)
	armed.Store(false)
	e.full(t, a)
	e.live(t, a, "")
	if !strings.Contains(e.logged.String(), "a secret of the server") {
		t.Error("the panic isn't in the log")
	}
	if n := e.g.open.Load(); n != 1 {
		t.Errorf("%d streams are counted", n)
	}
}

// TestDraining: a stopping gateway refuses new requests with a time to come again.
func TestDraining(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{})
	a := tokenFor(t, "a", nil)
	e.g.draining.Store(true)
	e.get(t, "/sync/pull?since=0", a).problem(t, ShuttingDown)
	e.get(t, "/sync/full", a).problem(t, ShuttingDown)
	_, res, err := e.tryDial(t, "")
	if err == nil {
		t.Fatal("a stopping gateway takes a stream")
	}
	checkHandshake(t, res, ShuttingDown)
	if r := e.get(t, "/readyz", ""); r.status != http.StatusServiceUnavailable || !strings.Contains(string(r.body), "stopping") {
		t.Errorf("%d %s", r.status, r.body)
	}
	e.g.draining.Store(false)
}

// TestDrainCutsOff: clients that stand still, on a stream and in a full resync, delay a stop by the drain time and no more,
// and nothing of them goes on afterwards.
func TestDrainCutsOff(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{options: func(o *Options) { o.Drain = 300 * time.Millisecond }})
	a := tokenFor(t, "a", nil)
	e.exec(t, `INSERT INTO todos SELECT i, 'a', NULL, repeat(md5(i::text), 4096) FROM generate_series(1, 300) i`)
	e.sync(t)
	e.subscribe(t, a, "0", "")
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, e.base+"/sync/full?limit=all&collections=todos", nil)
	ok(t, err)
	req.Header.Set("Authorization", "Bearer "+a)
	res, err := e.client.Do(req)
	ok(t, err)
	defer res.Body.Close()
	still, last := 0, int64(0)
	eventually(t, "the stream stands still with a page half sent", func() bool {
		n := e.g.memory.held.Load()
		if still++; n != last || n == 0 {
			still = 0
		}
		last = n
		return still == 60
	})
	e.stop()
	<-e.ended
	if n := e.g.open.Load(); n != 0 {
		t.Errorf("%d streams are open after the stop", n)
	}
	if body, err := io.ReadAll(res.Body); err == nil {
		t.Errorf("a resync that was cut off ended well, after %d bytes", len(body))
	}
}

// TestNotStarted: before the log's first leader, clients are told to come again.
func TestNotStarted(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{})
	e.exec(t, `DELETE FROM walgate.checkpoint`)
	e.get(t, "/sync/pull?since=0", tokenFor(t, "a", nil)).problem(t, NotReady)
	if got := asProblem(e.g.logProblem(changelog.ErrNotInitialised)); got.Code != NotReady {
		t.Errorf("%+v", got)
	}
}

// TestStoppedBeforeItBegan: a server that is stopped at once doesn't begin to accept afterwards.
func TestStoppedBeforeItBegan(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{})
	stopped, stop := context.WithCancel(t.Context())
	stop()
	for range 50 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		ok(t, err)
		ok(t, New(e.g.o).Run(stopped, l))
		if c, err := net.Dial("tcp", l.Addr().String()); err == nil {
			c.Close()
			t.Fatal("it listens after Run has returned")
		}
	}
}

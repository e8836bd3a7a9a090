package gateway

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	ws "github.com/fasthttp/websocket"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.uber.org/goleak"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/internal/pgserver"
	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/replication"
	"github.com/walgate/walgate/schema"
)

func TestMain(m *testing.M) {
	os.Exit(pgserver.Main(m,
		// The HTTP library's own: one sleeps up to 10 s before it sees that its server has stopped, the other never ends.
		goleak.IgnoreAnyFunction("github.com/valyala/fasthttp.(*workerPool).Start.func2"),
		goleak.IgnoreAnyFunction("github.com/valyala/fasthttp.updateServerDate.func1")))
}

// patience bounds every wait of these tests; a test that reaches it has failed.
const patience = 90 * time.Second

const testTables = `
CREATE TABLE todos (id bigint PRIMARY KEY, owner text, team int, title text NOT NULL DEFAULT '', archived bool NOT NULL DEFAULT false);
CREATE TABLE notes (id text, lang text, level int NOT NULL, body text, PRIMARY KEY (id, lang));
CREATE TABLE news (id int PRIMARY KEY, headline text);
CREATE TABLE vault (id int PRIMARY KEY, secret text);
`

// testSpecs: todos by owner or team with a filter over the row, notes with a filter over claims, news for everybody, vault
// for a role.
func testSpecs() map[string]policies.Spec {
	return map[string]policies.Spec{
		"todos": {Table: "public.todos", Scope: []map[string]string{{"owner": "claims.sub"}, {"team": "claims.teams"}}, Where: "!row.archived"},
		"notes": {Table: "public.notes", Where: "row.level <= claims.level"},
		"news":  {Table: "public.news"},
		"vault": {Table: "public.vault", Read: policies.ReadSpec{Roles: []string{"admin"}}},
	}
}

// setup is what a test wants otherwise than usual.
type setup struct {
	before  string                   // SQL before the gateway first starts
	specs   map[string]policies.Spec // besides, or instead of, testSpecs
	options func(*Options)
	gateway func(*Gateway)
	bus     func(changelog.Bus) changelog.Bus
	source  func(dsn string) string // how the gateway's reads reach the source
}

// env is a whole gateway over a database of its own.
type env struct {
	g      *Gateway
	base   string // http://host:port
	db     *pgxpool.Pool
	log    *changelog.Log
	client *http.Client
	stop   context.CancelFunc // begins the drain
	ended  chan struct{}      // closed when the gateway has stopped
	logged *logBuffer
}

// logBuffer collects what the gateway logs. Safe for concurrent use.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newEnv(t testing.TB, s setup) *env {
	t.Helper()
	dsn := pgserver.ForTest(t).Database(t)
	ctx := t.Context()
	e := &env{logged: &logBuffer{}, ended: make(chan struct{}), client: &http.Client{Transport: &http.Transport{DisableCompression: true}}}
	logger := slog.New(slog.NewTextHandler(e.logged, nil))
	reach := dsn
	if s.source != nil {
		reach = s.source(dsn)
	}
	source, err := schema.OpenPool(ctx, reach, 12)
	ok(t, err)
	e.db, err = pgxpool.New(ctx, dsn)
	ok(t, err)
	e.exec(t, testTables+s.before)
	e.log, err = changelog.Open(ctx, dsn, 8)
	ok(t, err)
	publications := schema.PublicationsFor("walgate")
	specs := testSpecs()
	maps.Copy(specs, s.specs)
	watcher := replication.NewWatcher(source, publications, specs, true, time.Second, logger)
	faults, err := watcher.Start(ctx)
	ok(t, err)
	if len(faults) > 0 {
		t.Fatal(faults)
	}
	slot := "walgate_" + fmt.Sprint(databaseOID(t, e.db))
	prepare(t, source, e.log, watcher, publications, slot, logger)

	var bus changelog.Bus = changelog.NewMemoryBus()
	if s.bus != nil {
		bus = s.bus(bus)
	}
	var stats replication.Stats
	leader := replication.NewLeader(replication.Options{Source: source, ReplicationURL: dsn, Slot: slot, Publications: publications,
		MaxSlotLag: 1 << 40, Log: e.log, Bus: bus, Watcher: watcher, Stats: &stats, Logger: logger})
	auth, err := NewAuthenticator(ctx, AuthConfig{Secret: testSecret}, nil)
	ok(t, err)
	o := Options{Log: e.log, Bus: bus, Source: source, Types: watcher.Types(), Auth: auth, Logger: logger,
		Policies: func() *policies.Set { return watcher.Current().Set },
		SourceStatus: func() SourceStatus {
			leading, failure, _ := stats.State()
			return SourceStatus{Leading: leading, Err: failure, Logged: changelog.LSN(stats.Logged.Load()), Stopped: watcher.Current().Stopped}
		},
		Fence:     func(ctx context.Context) (changelog.LSN, error) { return replication.Fence(ctx, source) },
		PublicURL: "http://sync.example", FrameLimit: 64 << 10, RequestsPerSecond: 100000, Burst: 100000, StreamConnections: 1000,
		StreamsPerSubject: 100, FullConcurrency: 4, Drain: 10 * time.Second, ReadersConcurrency: 6, SendMemory: 64 << 20,
		PushBody: 16 << 20, PushConcurrency: 4, EchoTimeout: patience}
	if s.options != nil {
		s.options(&o)
	}
	e.g = New(o)
	if s.gateway != nil {
		s.gateway(e.g)
	}
	e.run(t, leader, watcher, source)
	return e
}

func databaseOID(t testing.TB, db *pgxpool.Pool) (oid uint32) {
	t.Helper()
	ok(t, db.QueryRow(t.Context(), `SELECT oid FROM pg_database WHERE datname = current_database()`).Scan(&oid))
	return oid
}

// prepare does what walgate init does.
func prepare(t testing.TB, source *pgxpool.Pool, log *changelog.Log, w *replication.Watcher, p schema.Publications, slot string, logger *slog.Logger) {
	t.Helper()
	ctx := t.Context()
	conn, err := source.Acquire(ctx)
	ok(t, err)
	defer conn.Release()
	ok(t, schema.Migrate(ctx, conn.Conn()))
	d := w.Current()
	_, err = replication.Join(ctx, conn.Conn(), p, d.Set, d.Catalog)
	ok(t, err)
	_, err = replication.EnsureSlot(ctx, conn.Conn(), slot, logger, nil)
	ok(t, err)
	ok(t, log.Migrate(ctx))
	ok(t, w.Reload(ctx))
}

// run starts everything and stops it in the order of the program.
func (e *env) run(t testing.TB, leader *replication.Leader, watcher *replication.Watcher, source *pgxpool.Pool) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ok(t, err)
	e.base = "http://" + l.Addr().String()
	serving, stop := context.WithCancel(context.Background())
	working, stopWorking := context.WithCancel(context.Background())
	e.stop = stop
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(e.ended)
		if err := e.g.Run(serving, l); err != nil {
			t.Errorf("run: %v", err)
		}
	})
	wg.Go(func() {
		if err := leader.Run(working); err != nil {
			t.Errorf("leader: %v", err)
		}
	})
	wg.Go(func() {
		if err := watcher.Run(working); err != nil {
			t.Errorf("watcher: %v", err)
		}
	})
	t.Cleanup(func() {
		e.client.CloseIdleConnections()
		stop()
		<-e.ended
		if n := e.g.memory.held.Load(); n != 0 {
			t.Errorf("%d bytes of limits.send_memory are held although every client has gone", n)
		}
		stopWorking()
		wg.Wait()
		e.log.Close()
		source.Close()
		e.db.Close()
		if t.Failed() {
			t.Logf("the gateway logged:\n%s", e.logged.String())
		}
	})
	e.sync(t)
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// exec runs SQL as the application; several statements are one transaction.
func (e *env) exec(t testing.TB, sql string, args ...any) {
	t.Helper()
	_, err := e.db.Exec(t.Context(), sql, args...)
	ok(t, err)
}

// sync waits until everything committed so far is in the log and handed out by the hub.
func (e *env) sync(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var lsn changelog.LSN
	lsn, err := e.g.o.Fence(ctx)
	ok(t, err)
	ok(t, e.g.hub.waitLSN(ctx, lsn))
}

// eventually waits for a state of the gateway that nothing announces.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	for !holds() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("%s: not within %s", what, patience)
		}
	}
}

// tokenFor signs a token that is good for an hour; more claims may replace those.
func tokenFor(t testing.TB, sub string, more map[string]any) string {
	t.Helper()
	claims := map[string]any{"sub": sub, "exp": time.Now().Add(time.Hour).Unix()}
	maps.Copy(claims, more)
	token, err := SignHS256(testSecret, claims)
	ok(t, err)
	return token
}

// answer is what an HTTP request brought.
type answer struct {
	status int
	header http.Header
	body   []byte
}

// get sends a GET and holds the answer against the OpenAPI document. headers are name, value pairs.
func (e *env) get(t testing.TB, path, token string, headers ...string) *answer {
	t.Helper()
	return e.do(t, http.MethodGet, path, token, headers...)
}

func (e *env) do(t testing.TB, method, path, token string, headers ...string) *answer {
	t.Helper()
	return e.send(t, method, path, token, nil, headers...)
}

// send sends a request with a body and holds the answer against the OpenAPI document.
func (e *env) send(t testing.TB, method, path, token string, body io.Reader, headers ...string) *answer {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, e.base+path, body)
	ok(t, err)
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	for i := 0; i+1 < len(headers); i += 2 {
		switch name := headers[i]; name {
		case "Content-Length":
			_, err := fmt.Sscan(headers[i+1], &req.ContentLength)
			ok(t, err)
		case "Content-Type": // a later one replaces an earlier one
			req.Header.Set(name, headers[i+1])
		default:
			req.Header.Add(name, headers[i+1])
		}
	}
	res, err := e.client.Do(req)
	ok(t, err)
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	ok(t, err)
	a := &answer{res.StatusCode, res.Header, text}
	checkAnswer(t, req, a)
	return a
}

// problem expects an error answer with this code in the form of RFC 9457.
func (a *answer) problem(t testing.TB, code Code) problemBody {
	t.Helper()
	var p problemBody
	w := code.Wire()
	if err := json.Unmarshal(a.body, &p); err != nil || p.Code != code || a.status != w.Status || p.Status != w.Status {
		t.Fatalf("want %s (%d), got %d %s", code, w.Status, a.status, a.body)
	}
	switch {
	case a.header.Get("Content-Type") != "application/problem+json", p.Title != w.Title, p.Retryable != w.Retryable,
		!strings.HasSuffix(p.Type, "#"+string(code)), p.RequestID == "", p.RequestID != a.header.Get("X-Request-Id"), p.Errors == nil:
		t.Errorf("not the form of a problem: %v %s", a.header, a.body)
	case (a.status == 429 || a.status == 503) != (a.header.Get("Retry-After") != ""):
		t.Errorf("Retry-After %q with status %d", a.header.Get("Retry-After"), a.status)
	}
	return p
}

// wireChange is a change as clients get it.
type wireChange struct {
	Type       string          `json:"type"`
	Version    string          `json:"version"`
	Seq        int64           `json:"seq"`
	Collection string          `json:"collection"`
	DocID      string          `json:"doc_id"`
	Operation  string          `json:"operation"`
	Data       json.RawMessage `json:"data"`
	Reason     string          `json:"reason"`
	Tx         string          `json:"tx"`
	ClientID   string          `json:"client_id"`
	LocalID    string          `json:"local_id"`
}

// brief is the change in one word, such as "upsert todos/1" or "delete todos/1 left".
func (c *wireChange) brief() string {
	return strings.TrimSpace(c.Operation + " " + c.Collection + "/" + c.DocID + " " + c.Reason)
}

func briefs(changes []wireChange) string {
	var out []string
	for i := range changes {
		out = append(out, changes[i].brief())
	}
	return strings.Join(out, ", ")
}

// wirePage is the answer of a pull.
type wirePage struct {
	Changes     []wireChange `json:"changes"`
	LastSeq     string       `json:"last_seq"`
	Seq         int64        `json:"seq"`
	HasMore     bool         `json:"has_more"`
	Partial     bool         `json:"partial"`
	Resync      bool         `json:"full_resync_required"`
	Collections []string     `json:"collections"`
	Reason      string       `json:"reason"`
}

// pull expects a page; params are name, value pairs.
func (e *env) pull(t testing.TB, token, since string, params ...string) *wirePage {
	t.Helper()
	a := e.get(t, "/sync/pull?"+query(append([]string{"since", since}, params...)...), token)
	if a.status != http.StatusOK {
		t.Fatalf("pull: %d %s", a.status, a.body)
	}
	p := &wirePage{}
	ok(t, json.Unmarshal(a.body, p))
	return p
}

// pullAll pulls to the end of the log.
func (e *env) pullAll(t testing.TB, token, since string, params ...string) (changes []wireChange, last string) {
	t.Helper()
	for {
		p := e.pull(t, token, since, params...)
		if p.Resync {
			t.Fatalf("unexpected resync: %v", *p)
		}
		if p.HasMore && p.LastSeq <= since {
			t.Fatalf("has_more, but last_seq stays at %s", since)
		}
		changes, since = append(changes, p.Changes...), p.LastSeq
		if !p.HasMore {
			return changes, since
		}
	}
}

// here is the caller's cursor at the end of the log.
func (e *env) here(t testing.TB, token string) string {
	t.Helper()
	e.sync(t)
	id, err := e.g.auth.Verify(t.Context(), token)
	ok(t, err)
	f, err := e.g.feedFor(id, nil)
	ok(t, err)
	h, err := e.log.Head(t.Context())
	ok(t, err)
	return f.cursor(h.Version, h.History)
}

func query(params ...string) string {
	v := url.Values{}
	for i := 0; i+1 < len(params); i += 2 {
		v.Set(params[i], params[i+1])
	}
	return v.Encode()
}

// stream is a WebSocket client.
type stream struct{ conn *ws.Conn }

// wireFrame is any frame of the server.
type wireFrame struct {
	wireChange
	LastSeq     string       `json:"last_seq"`
	Changes     []wireChange `json:"changes"`
	Collections []string     `json:"collections"`
	Code        Code         `json:"code"`
	After       int          `json:"reconnect_after_ms"`
	raw         []byte
}

// dial opens a stream; headers are name, value pairs.
func (e *env) dial(t testing.TB, params string, headers ...string) *stream {
	t.Helper()
	s, res, err := e.tryDial(t, params, headers...)
	if err != nil {
		t.Fatalf("dial: %v (%v)", err, res)
	}
	return s
}

func (e *env) tryDial(t testing.TB, params string, headers ...string) (*stream, *http.Response, error) {
	t.Helper()
	h := http.Header{}
	for i := 0; i+1 < len(headers); i += 2 {
		h.Set(headers[i], headers[i+1])
	}
	conn, res, err := ws.DefaultDialer.DialContext(t.Context(), "ws"+strings.TrimPrefix(e.base, "http")+"/sync/stream"+params, h)
	if err != nil {
		return nil, res, err
	}
	t.Cleanup(func() { conn.Close() })
	return &stream{conn}, res, nil
}

// subscribe dials and subscribes; extra is more JSON members.
func (e *env) subscribe(t testing.TB, token, since, extra string) *stream {
	t.Helper()
	s := e.dial(t, "", "Authorization", "Bearer "+token)
	s.send(t, fmt.Sprintf(`{"type":"subscribe","since":%q%s}`, since, extra))
	return s
}

// live subscribes at the end of the log and reads up to ready.
func (e *env) live(t testing.TB, token, extra string) *stream {
	t.Helper()
	s := e.subscribe(t, token, e.here(t, token), extra)
	s.want(t, "ready")
	return s
}

func (s *stream) send(t testing.TB, text string) {
	t.Helper()
	ok(t, s.conn.WriteMessage(ws.TextMessage, []byte(text)))
}

func (s *stream) read() (f wireFrame, err error) {
	s.conn.SetReadDeadline(time.Now().Add(patience))
	_, f.raw, err = s.conn.ReadMessage()
	if err == nil {
		err = json.Unmarshal(f.raw, &f)
	}
	return f, err
}

// next reads a frame and holds it against the OpenAPI document.
func (s *stream) next(t testing.TB) wireFrame {
	t.Helper()
	f, err := s.read()
	if err != nil {
		t.Fatalf("read the stream: %v", err)
	}
	checkFrame(t, f.raw)
	return f
}

// want expects the next frame to be of a type; "" is a change.
func (s *stream) want(t testing.TB, kind string) wireFrame {
	t.Helper()
	f := s.next(t)
	if f.Type != kind {
		t.Fatalf("want a frame of type %q, got %s", kind, f.raw)
	}
	return f
}

// wantChanges expects one transaction: these changes and a checkpoint at the last of them.
func (s *stream) wantChanges(t testing.TB, want ...string) (checkpoint string) {
	t.Helper()
	var last string
	for _, w := range want {
		f := s.want(t, "")
		if f.brief() != w {
			t.Fatalf("want %q, got %s", w, f.raw)
		}
		last = f.Version
	}
	f := s.want(t, "checkpoint")
	if !strings.HasPrefix(f.LastSeq, last) {
		t.Fatalf("the checkpoint %s is not at the last change %s", f.LastSeq, last)
	}
	return f.LastSeq
}

// wantClose expects the stream to end with this close code, and nothing before it.
func (s *stream) wantClose(t testing.TB, code int) {
	t.Helper()
	f, err := s.read()
	if !ws.IsCloseError(err, code) {
		t.Fatalf("want close code %d, got %v %s", code, err, f.raw)
	}
}

// wantError expects an error frame with this code and the close code of the table.
func (s *stream) wantError(t testing.TB, code Code) wireFrame {
	t.Helper()
	f := s.want(t, "error")
	if f.Code != code {
		t.Fatalf("want %s, got %s", code, f.raw)
	}
	s.wantClose(t, code.Wire().Close)
	return f
}

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/fasthttp/websocket"
	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/internal/badlink"
	"github.com/walgate/walgate/internal/pgserver"
)

const sourceConfig = `
auto_init: true
database: {url: "URL"}
storage: {url: "STORAGE"}
http: {listen: "127.0.0.1:%[1]d"}
limits: {requests_per_second: 100000, burst: 100000}
auth: {jwt: {secret: %[2]q}}
log: {format: text}
collections:
  docs: {table: public.docs, scope: {owner_id: claims.sub}}
`

// sourceTable is all of the application's schema.
const sourceTable = `CREATE TABLE docs (id bigint PRIMARY KEY, owner_id text NOT NULL DEFAULT 'u0', body text)`

// followedSource is a source that goes through something, with the gateway that follows it by an address that can be
// turned to another server, and clients that do nothing but follow the protocol.
type followedSource struct {
	t       *testing.T
	server  *pgserver.Server // the source at present
	conn    *pgx.Conn        // the application's connection to it
	link    *badlink.Link    // what the gateway takes for the source
	gateway *gatewayProcess
	config  *Config
	present *syncClient // is there all the time
	absent  *syncClient // is away, with its old cursor, while things happen
}

// followSource makes the table in the server and starts a gateway, its log in storage (empty: in the source), and clients
// that hold the first three rows.
func followSource(t *testing.T, server *pgserver.Server, storage string) *followedSource {
	t.Helper()
	w := &followedSource{t: t, server: server, link: badlink.To(t, server.DSN("postgres"))}
	w.use(server)
	w.exec(sourceTable)
	w.gateway, w.config = newGatewayProcess(t, strings.NewReplacer("URL", w.link.DSN(t, server.DSN("postgres")), "STORAGE", storage).Replace(sourceConfig))
	if err := w.gateway.start(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.present, w.absent = w.client("present", 1), w.client("absent", 2)
	w.exec(`INSERT INTO docs SELECT n, 'u0', 'first' FROM generate_series(1, 3) n`)
	w.settle(w.present, w.absent)
	return w
}

func (w *followedSource) client(name string, seed uint64) *syncClient {
	c := newSyncClient(w.t, w.config, w.gateway.base, name, `{"sub":"u0","roles":[]}`, rand.New(rand.NewPCG(5, seed)))
	c.names, c.told = []string{"docs"}, true // so a resync that is counted is one that the gateway asked for
	return c
}

// use makes a server the one that the application writes to.
func (w *followedSource) use(server *pgserver.Server) {
	w.t.Helper()
	w.server, w.conn = server, connect(w.t, server.DSN("postgres"))
}

// exec runs SQL as the application.
func (w *followedSource) exec(sql string, args ...any) {
	w.t.Helper()
	resyncExec(w.t, w.conn, sql, args...)
}

func sourceQuery[T any](w *followedSource, sql string, args ...any) (v T) {
	w.t.Helper()
	resyncScan(w.t, w.conn, []any{&v}, sql, args...)
	return v
}

// settle waits until the clients hold what the table holds.
func (w *followedSource) settle(clients ...*syncClient) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), convergenceLimit)
	defer cancel()
	for _, c := range clients {
		for {
			err := c.catchUp(ctx)
			if err == nil {
				err = compareReplica(ctx, w.conn, c)
			}
			if err == nil {
				break
			}
			if ctx.Err() != nil || !errors.Is(err, errAway) && !errors.Is(err, errDiffers) {
				c.broken("it doesn't get what the table holds: %v", err)
				w.t.FailNow()
			}
			pause(ctx, 20*time.Millisecond)
		}
	}
}

// during lets the client that is present sync in all ways until the returned function is called.
func (w *followedSource) during() (end func()) {
	ctx, cancel := context.WithCancel(w.t.Context())
	var running sync.WaitGroup
	running.Go(func() { w.present.run(ctx) })
	end = sync.OnceFunc(func() { cancel(); running.Wait() })
	w.t.Cleanup(end)
	return end
}

// logged waits until the gateway's log holds a text.
func (w *followedSource) logged(text string) {
	w.t.Helper()
	resyncEventually(w.t, "the gateway's log holds "+text, func() bool {
		all, err := os.ReadFile(w.gateway.log)
		return err == nil && strings.Contains(string(all), text)
	})
}

// readiness waits until /readyz says something, while it goes on serving.
func (w *followedSource) readiness(text string) {
	w.t.Helper()
	resyncEventually(w.t, "/readyz says "+text, func() bool {
		status, body := w.get("/readyz", nil)
		return status == http.StatusOK && strings.Contains(body, text)
	})
}

// get returns the answer once there is one that isn't to be tried again.
func (w *followedSource) get(path string, query url.Values) (status int, body string) {
	w.t.Helper()
	resyncEventually(w.t, path+" answers", func() bool {
		r, err := http.NewRequestWithContext(w.t.Context(), http.MethodGet, w.gateway.base+path+"?"+query.Encode(), nil)
		if err != nil {
			w.t.Fatal(err)
		}
		r.Header.Set("Authorization", "Bearer "+w.absent.token)
		a, err := w.absent.http.Do(r)
		if err != nil {
			return false
		}
		defer a.Body.Close()
		text, err := io.ReadAll(a.Body)
		if cursor := a.Header.Get("X-Sync-Cursor"); cursor != "" {
			text = []byte(cursor)
		}
		status, body = a.StatusCode, string(text)
		return err == nil && status != http.StatusServiceUnavailable && status != http.StatusTooManyRequests
	})
	return status, body
}

// witness stands, from now on, where the absent client does: with a cursor, with a stream, and in the middle of a full
// resync. The returned function fails unless each of them is told to start anew.
func (w *followedSource) witness() (refused func()) {
	w.t.Helper()
	since := w.absent.replica.cursor
	status, page := w.get("/sync/full", url.Values{"limit": {"1"}})
	if status != http.StatusOK || strings.Contains(page, "{") {
		w.t.Fatalf("a first page: %d %s", status, page)
	}
	stream, _, err := websocket.DefaultDialer.DialContext(w.t.Context(), "ws"+strings.TrimPrefix(w.gateway.base, "http")+"/sync/stream",
		http.Header{"Authorization": {"Bearer " + w.absent.token}})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = stream.Close() })
	if err := stream.WriteJSON(map[string]any{"type": "subscribe", "since": since}); err != nil {
		w.t.Fatal(err)
	}
	limit := time.Now().Add(resyncWait) // heartbeats don't count
	next := func() (f syncChange) {
		w.t.Helper()
		_ = stream.SetReadDeadline(limit)
		if err := stream.ReadJSON(&f); err != nil {
			w.t.Fatalf("the stream ended without a word: %v", err)
		}
		return f
	}
	for next().Type != "ready" {
	}
	return func() {
		w.t.Helper()
		limit = time.Now().Add(resyncWait)
		for next().Type != "full_resync_required" { // what was logged before may still come
		}
		var closed *websocket.CloseError
		if _, _, err := stream.ReadMessage(); !errors.As(err, &closed) || closed.Code != 4410 {
			w.t.Errorf("the stream ended with %v, want 4410", err)
		}
		w.refused(since)
		if status, body := w.get("/sync/full", url.Values{"limit": {"1"}, "cursor": {page}}); status != http.StatusGone {
			w.t.Errorf("the next page of the full resync: %d %s, want 410", status, body)
		}
	}
}

// refused fails unless a cursor, and the bare version in it, are answered with full_resync_required.
func (w *followedSource) refused(since string) {
	w.t.Helper()
	for _, since := range []string{since, fmt.Sprint(int64(resyncVersion(w.t, since)))} {
		_, body := w.get("/sync/pull", url.Values{"since": {since}})
		var page syncChange
		if err := json.Unmarshal([]byte(body), &page); err != nil || !page.Resync {
			w.t.Errorf("pull since %s: %s (%v), want full_resync_required", since, body, err)
		}
	}
}

// resynchronised says how often the client was told to start anew.
func resynchronised(c *syncClient) (n int) {
	for what, times := range c.counts {
		if strings.HasPrefix(what, "resync ") {
			n += times
		}
	}
	return n
}

// historyOf is the history of a client's cursor.
func historyOf(c *syncClient) string { return strings.Split(c.replica.cursor, "-")[2] }

// stopGateway ends the gateway and waits until nobody reads the slot.
func (w *followedSource) stopGateway() {
	w.t.Helper()
	if err := w.gateway.end(syscall.SIGTERM); err != nil {
		w.t.Fatal(err)
	}
	resyncEventually(w.t, "nobody reads the slot", func() bool {
		return !sourceQuery[bool](w, `SELECT coalesce((SELECT active FROM pg_replication_slots WHERE slot_name = 'walgate'), false)`)
	})
}

func (w *followedSource) startGateway() {
	w.t.Helper()
	if err := w.gateway.start(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
}

// must fails the test for an error of preparing it.
func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// prepareAnew does what an operator does with a source that was made anew: walgate init.
func (w *followedSource) prepareAnew() {
	w.t.Helper()
	out, err := exec.CommandContext(w.t.Context(), w.gateway.binary, "init", "--config", w.gateway.config).CombinedOutput()
	if err != nil {
		w.t.Fatalf("walgate init: %v\n%s", err, out)
	}
}

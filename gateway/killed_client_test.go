package gateway

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	ws "github.com/fasthttp/websocket"

	"github.com/walgate/walgate/internal/badlink"
)

// TestClientKilled: a client of each kind dies in the middle, with a reset or without a word. In bounded time the gateway
// holds nothing for it any more: no subscriber, no place among the full resyncs, readers and streams, no connection of a
// pool, no transaction in the database; and the next client is served, though there is only one place.
func TestClientKilled(t *testing.T) {
	t.Parallel()
	const wait = 2 * time.Second // of the long poll
	kinds := map[string]func(t *testing.T, e *env, link *badlink.Link, token string){
		"pull": func(t *testing.T, e *env, link *badlink.Link, token string) {
			begin(t, link, "/sync/pull?"+query("since", e.here(t, token), "wait", wait.String()), token)
			eventually(t, "the pull waits", func() bool { return e.subscribers() == 1 })
		},
		"full": func(t *testing.T, e *env, link *badlink.Link, token string) {
			e.exec(t, `INSERT INTO news SELECT n, repeat('x', 1000) FROM generate_series(1, 30000) n`)
			e.sync(t)
			link.Slow(4 << 20)
			res := begin(t, link, "/sync/full?limit=all&collections=news", token)
			answer := <-res
			if _, err := answer.Body.Read(make([]byte, 64<<10)); err != nil {
				t.Fatal(err)
			}
			if e.g.fulls.TryAcquire(1) {
				t.Fatal("the resync is over before its client dies")
			}
		},
		"stream": func(t *testing.T, e *env, link *badlink.Link, token string) {
			conn, _, err := ws.DefaultDialer.DialContext(t.Context(), "ws://"+link.Addr()+"/sync/stream", http.Header{"Authorization": {"Bearer " + token}})
			ok(t, err)
			t.Cleanup(func() { conn.Close() })
			s := &stream{conn}
			s.send(t, `{"type":"subscribe","since":"`+e.here(t, token)+`"}`)
			s.want(t, "ready")
		},
	}
	deaths := map[string]func(*badlink.Link){"reset": func(l *badlink.Link) { l.Cut() }, "silent": (*badlink.Link).Strand}
	for kind, start := range kinds {
		for how, die := range deaths {
			t.Run(kind+" "+how, func(t *testing.T) {
				t.Parallel()
				e := newEnv(t, setup{
					options: func(o *Options) {
						o.FullConcurrency, o.ReadersConcurrency, o.StreamConnections, o.StreamsPerSubject = 1, 1, 1, 1
					},
					gateway: func(g *Gateway) {
						g.limits.ping, g.limits.write, g.limits.fullWrite = 300*time.Millisecond, time.Second, time.Second
					},
				})
				token := tokenFor(t, "ana", nil)
				link := badlink.New(t, strings.TrimPrefix(e.base, "http://"))
				start(t, e, link, token)
				began := time.Now()
				die(link)
				e.awaitNothingHeld(t)
				t.Logf("nothing is held %s after the death", time.Since(began).Round(10*time.Millisecond))
				if a := e.get(t, "/sync/full?limit=10&collections=news", token); a.status != http.StatusOK {
					t.Errorf("the next full: %d %s", a.status, a.body)
				}
				e.pull(t, token, e.here(t, token))
				e.live(t, token, "")
			})
		}
	}
}

// TestFullFromASilentSource: the connection on which a full resync reads dies without a word. The client sees that its
// answer was cut short, its place is free in bounded time, and the next one is served.
func TestFullFromASilentSource(t *testing.T) {
	t.Parallel()
	var link *badlink.Link
	e := newEnv(t, setup{
		source: func(dsn string) string {
			link = badlink.To(t, dsn)
			return link.DSN(t, dsn)
		},
		options: func(o *Options) { o.FullConcurrency = 1 },
		gateway: func(g *Gateway) { g.limits.chunk = 2 * time.Second },
	})
	t.Cleanup(func() { link.Cut() }) // else the pool takes leave of dead connections for 15 s
	e.exec(t, `INSERT INTO news SELECT n, repeat('x', 1000) FROM generate_series(1, 30000) n`)
	e.sync(t)
	token := tokenFor(t, "ana", nil)
	link.Slow(4 << 20)
	answer := <-begin(t, badlink.New(t, strings.TrimPrefix(e.base, "http://")), "/sync/full?limit=all&collections=news", token)
	if _, err := answer.Body.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	link.Strand()
	link.Slow(0)
	body, err := io.ReadAll(answer.Body)
	took := time.Since(began)
	if err == nil || bytes.Contains(body, []byte(`"end":true`)) {
		t.Errorf("the answer looks complete: %d bytes, %v", len(body), err)
	}
	t.Logf("cut short after %s", took.Round(10*time.Millisecond))
	eventually(t, "the next full is served", func() bool { // on a slow machine a chunk may take longer than this test allows
		a := e.get(t, "/sync/full?limit=10&collections=news", token)
		if a.status != http.StatusOK && a.status != http.StatusServiceUnavailable {
			t.Fatalf("the next full: %d %s", a.status, a.body)
		}
		return a.status == http.StatusOK
	})
	if os.Getenv("WALGATE_TEST_LONG") != "" { // the server ends the transaction that it can't hear of after a minute
		e.awaitNoTransaction(t, 90*time.Second)
	}
}

// begin sends a request over the link and returns its answer when that begins.
func begin(t *testing.T, link *badlink.Link, path, token string) <-chan *http.Response {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+link.Addr()+path, nil)
	ok(t, err)
	req.Header.Set("Authorization", "Bearer "+token)
	transport := &http.Transport{DisableCompression: true}
	answers, ended := make(chan *http.Response, 1), make(chan struct{})
	go func() {
		defer close(ended)
		if res, err := transport.RoundTrip(req); err == nil {
			answers <- res
		} else {
			close(answers)
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
		transport.CloseIdleConnections()
	})
	return answers
}

func (e *env) subscribers() int {
	e.g.hub.mu.Lock()
	defer e.g.hub.mu.Unlock()
	return len(e.g.hub.subs)
}

// awaitNothingHeld waits until no client's work is left in the gateway and in its databases.
func (e *env) awaitNothingHeld(t *testing.T) {
	t.Helper()
	eventually(t, "no subscriber is left", func() bool { return e.subscribers() == 0 })
	eventually(t, "no stream is left", func() bool { return e.g.open.Load() == 0 })
	select {
	case <-e.g.streams.ended():
	case <-time.After(patience):
		t.Fatal("a stream or a full resync is still under way")
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	ok(t, e.g.fulls.Acquire(ctx, 1))
	e.g.fulls.Release(1)
	ok(t, e.g.readers.Acquire(ctx, 1))
	e.g.readers.Release(1)
	eventually(t, "the source's pool is whole", func() bool { return e.g.o.Source.Stat().AcquiredConns() == 0 })
	e.awaitNoTransaction(t, patience)
}

// awaitNoTransaction waits until the database has no transaction that the gateway left open.
func (e *env) awaitNoTransaction(t *testing.T, most time.Duration) {
	t.Helper()
	began := time.Now()
	for n := 1; n > 0; {
		ok(t, e.db.QueryRow(t.Context(), `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'walgate'
			AND backend_type = 'client backend' AND xact_start < clock_timestamp() - interval '1 s'`).Scan(&n))
		if time.Since(began) > most {
			t.Fatalf("the database still has %d transactions of the gateway after %s", n, most)
		}
	}
	t.Logf("no transaction is left after %s", time.Since(began).Round(100*time.Millisecond))
}

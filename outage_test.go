package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/walgate/walgate/internal/badlink"
	"github.com/walgate/walgate/internal/pgserver"
)

// outage is a gateway, its clients and an application, whose databases are taken away.
type outage struct {
	*killing
	server, storage *pgserver.Server // of the source and of the log; the same where one server has both
	dsn, logDSN     string
	link            *badlink.Link // between the gateway and the log
	clients         []*syncClient
	stop            func() // ends the clients
}

// newOutage starts everything, with the log at logDSN on the server storage; nil: with the tables.
func newOutage(t *testing.T, storage *pgserver.Server, logDSN string) *outage {
	t.Helper()
	o := &outage{server: pgserver.StartForTest(t, pgserver.Options{}), storage: storage, logDSN: logDSN}
	o.dsn = o.server.Database(t)
	if storage == nil {
		o.storage, o.logDSN = o.server, o.dsn
	}
	o.link = badlink.To(t, o.logDSN)
	o.killing = newKilling(t, o.dsn, o.logDSN, fmt.Sprintf("database: {url: %q}\nstorage: {url: %q}\n", o.dsn, o.link.DSN(t, o.logDSN)+quickly()))
	if err := o.gateway.start(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var following sync.WaitGroup
	o.clients = []*syncClient{o.client}
	for _, c := range o.clients {
		following.Go(func() { c.run(ctx) })
	}
	o.stop = sync.OnceFunc(func() { cancel(); following.Wait() })
	t.Cleanup(o.stop)
	o.write(nil)
	o.awaitLogged()
	return o
}

// writeFor lets the application go on for a while.
func (o *outage) writeFor(d time.Duration) {
	o.t.Helper()
	o.app.burst()
	pace := time.NewTicker(20 * time.Millisecond)
	defer pace.Stop()
	for began := time.Now(); time.Since(began) < d; <-pace.C {
		o.app.small()
	}
}

// health is the answer of /readyz.
type health struct {
	code     int
	Status   string
	Leading  bool
	Problems map[string]string
}

func (o *outage) health() (h health) {
	o.t.Helper()
	res, err := http.Get(o.gateway.base + "/readyz")
	if err != nil {
		o.t.Fatal(err)
	}
	defer res.Body.Close()
	h.code = res.StatusCode
	if err := json.NewDecoder(res.Body).Decode(&h); err != nil {
		o.t.Fatal(err)
	}
	return h
}

// until polls for something that the outage brings.
func (o *outage) until(what string, done func() bool) {
	o.t.Helper()
	deadline, tick := time.After(60*time.Second), time.NewTicker(20*time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-tick.C:
		case <-deadline:
			o.t.Fatalf("waited 60s in vain until %s; /readyz: %+v", what, o.health())
		}
	}
}

// pull reads the log from its beginning, within 45 s.
func (o *outage) pull() (status int, header http.Header, body []byte) {
	o.t.Helper()
	ctx, cancel := context.WithTimeout(o.t.Context(), 45*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, o.gateway.base+"/sync/pull?since=0&collections=docs", nil)
	if err != nil {
		o.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+o.client.token)
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		o.t.Fatalf("pull: %v", err)
	}
	defer res.Body.Close()
	if body, err = io.ReadAll(res.Body); err != nil {
		o.t.Fatal(err)
	}
	return res.StatusCode, res.Header, body
}

// pullAway pulls while the log is away: a problem that says to come again, in bounded time.
func (o *outage) pullAway() {
	o.t.Helper()
	began := time.Now()
	status, header, body := o.pull()
	if status != http.StatusServiceUnavailable || header.Get("Retry-After") == "" || !strings.Contains(string(body), `"code":"log_unavailable","retryable":true`) {
		o.t.Errorf("a pull while the log is away: %d, Retry-After %q, %s", status, header.Get("Retry-After"), body)
	}
	o.t.Logf("a pull is refused after %s", time.Since(began).Round(10*time.Millisecond))
}

// healed waits until the log has everything, and holds it and the clients against the tables.
func (o *outage) healed() {
	o.t.Helper()
	began := time.Now()
	o.until("the gateway is ready", func() bool { h := o.health(); return h.code == http.StatusOK && h.Status == "ready" && h.Leading })
	o.awaitLogged()
	o.t.Logf("healed %s after the cause was gone", time.Since(began).Round(10*time.Millisecond))
	o.stop()
	if n := o.check(); n != len(o.app.committed) {
		o.t.Errorf("the log holds %d of %d transactions", n, len(o.app.committed))
	}
	o.compare()
}

// quickly lets a pull that finds the log silent fail sooner than usual, where the test shall be short.
func quickly() string {
	if os.Getenv(longEnv) != "" {
		return ""
	}
	return "&connect_timeout=3"
}

// away is how long something is away.
func away(otherwise time.Duration) time.Duration {
	if os.Getenv(longEnv) != "" {
		return time.Minute
	}
	return otherwise
}

// TestLogAway takes the log's database away for a while (a minute, WALGATE_TEST_LONG=1) in each way that it can go, while
// the application writes and clients pull, resync and stream. Nothing is acknowledged that isn't logged, /readyz and the
// clients' answers say what is the matter, and everything heals by itself, with every transaction once and in order.
func TestLogAway(t *testing.T) {
	t.Parallel()
	must := func(t *testing.T, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, tc := range map[string]struct {
		go_, back func(t *testing.T, o *outage)
		hold      time.Duration
	}{
		"refused": {func(t *testing.T, o *outage) { o.link.Down() }, func(t *testing.T, o *outage) { o.link.Up() }, 2 * time.Second},
		"silent":  {func(t *testing.T, o *outage) { o.link.Stall() }, func(t *testing.T, o *outage) { o.link.Resume() }, 2 * time.Second},
		"stopped": {func(t *testing.T, o *outage) { must(t, o.storage.Stop(t.Context())) }, func(t *testing.T, o *outage) { must(t, o.storage.Restart(t.Context())) }, 2 * time.Second},
		"crashed": {func(t *testing.T, o *outage) { must(t, o.storage.Crash()) }, func(t *testing.T, o *outage) { must(t, o.storage.Restart(t.Context())) }, 2 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			storage := pgserver.StartForTest(t, pgserver.Options{})
			o := newOutage(t, storage, storage.Database(t))
			tc.go_(t, o)
			o.writeFor(away(tc.hold))
			o.until("/readyz says so", func() bool {
				h := o.health()
				return h.code == http.StatusServiceUnavailable && strings.Contains(h.Problems["change_log"], "doesn't answer")
			})
			o.pullAway()
			if name != "silent" || os.Getenv(longEnv) != "" { // silence is noticed after half a minute
				o.until("the leader says so", func() bool {
					h := o.health()
					return !h.Leading && strings.Contains(h.Problems["replication"], "change log's database can't be reached") && strings.Contains(h.Problems["replication"], "see that it runs")
				})
			}
			o.app.burst()
			tc.back(t, o)
			o.store = connect(t, o.logDSN)
			o.healed()
		})
	}
}

// TestSourceCrashesUnderStreams: the source's server goes down and comes back, with the log on it or elsewhere, while
// clients are on the stream. They stay connected, and nothing is lost or doubled.
func TestSourceCrashesUnderStreams(t *testing.T) {
	t.Parallel()
	for name, elsewhere := range map[string]bool{"log with the tables": false, "log elsewhere": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var storage *pgserver.Server
			logDSN := ""
			if elsewhere {
				storage = pgserver.StartForTest(t, pgserver.Options{})
				logDSN = storage.Database(t)
			}
			o := newOutage(t, storage, logDSN)
			steady := o.steadyStream()
			for _, down := range []func() error{o.server.Crash, func() error { return o.server.Stop(t.Context()) }, o.server.Crash} {
				o.app.burst()
				if err := down(); err != nil {
					t.Fatal(err)
				}
				o.until("/readyz says so", func() bool { h := o.health(); return !h.Leading && h.Problems["replication"] != "" })
				if err := o.server.Restart(t.Context()); err != nil {
					t.Fatal(err)
				}
				o.conn, o.app.conn, o.app.other = connect(t, o.dsn), connect(t, o.dsn), connect(t, o.dsn)
				o.store = connect(t, o.logDSN)
			}
			o.app.burst()
			o.healed()
			steady(o.app)
		})
	}
}

package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/replication"
)

const resyncWait = 90 * time.Second // Far above what anything here takes, but for a fault.

// resyncGateway is a gateway over a test's database, with a client's view of it.
type resyncGateway struct {
	dsn    string
	url    string
	token  string
	client *http.Client
	stop   func() error // Ends the gateway and returns what serve returned; may be called again.
}

// resyncItems is the table of most tests here, and resyncItemsPolicy lets everybody see all of it.
const (
	resyncItems       = `CREATE TABLE items (id bigint PRIMARY KEY, n integer NOT NULL DEFAULT 0, body text)`
	resyncItemsPolicy = "  items: {table: public.items}\n"
)

// startResyncGateway prepares the database, serves it under the collections' YAML, and waits until it answers.
func startResyncGateway(t *testing.T, dsn, schemaSQL, collections string) *resyncGateway {
	t.Helper()
	conn := connect(t, dsn)
	resyncExec(t, conn, schemaSQL)
	const secret = "0123456789abcdef0123456789abcdef"
	slot := "walgate_" + strings.ToLower(rand.Text()[:12])
	text := fmt.Sprintf(`auto_init: true
database: {url: %q}
replication: {slot: %s}
catalog: {poll_interval: 100ms}
http: {listen: "127.0.0.1:0"}
auth: {jwt: {secret: %s}}
limits: {requests_per_second: 1000000, burst: 1000000, full_concurrency: 2, drain: 1s}
log: {level: error, format: text}
collections:
%s`, dsn, slot, secret, collections)
	path := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	config, err := Load(path, func(string) (string, bool) { return "", false })
	if err != nil {
		t.Fatal(err)
	}
	token, err := signToken(config, "ana", nil, map[string]any{"teams": []int{1, 3}}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	g := &resyncGateway{dsn: dsn, token: token, client: &http.Client{Transport: &http.Transport{DisableCompression: true}}}
	g.serve(t, config)
	resyncEventually(t, "the gateway answers", func() bool { return g.get(t, "/sync/full?limit=1").status == http.StatusOK })
	return g
}

func (g *resyncGateway) serve(t *testing.T, config *Config) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ready, ended := make(chan string, 1), make(chan struct{})
	var failed error
	go func() {
		defer close(ended)
		failed = serve(ctx, config, newLogger(config, t.Output()), ready)
	}()
	g.stop = func() error {
		g.client.CloseIdleConnections()
		cancel()
		<-ended
		return failed
	}
	t.Cleanup(func() {
		if err := g.stop(); err != nil {
			t.Errorf("the gateway ended with: %v", err)
		}
	})
	select {
	case g.url = <-ready:
	case <-ended:
		t.Fatalf("the gateway didn't start: %v", failed)
	}
}

// resyncAnswer is what a request brought.
type resyncAnswer struct {
	status int
	header http.Header
	body   []byte
}

func (g *resyncGateway) open(t *testing.T, path string) *http.Response {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, g.url+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+g.token)
	answer, err := g.client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	return answer
}

// get may be called from the test's own goroutine only; see inBackground.
func (g *resyncGateway) get(t *testing.T, path string) resyncAnswer {
	t.Helper()
	answer := g.open(t, path)
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return resyncAnswer{answer.StatusCode, answer.Header, body}
}

// code is the problem's code, if the answer is one.
func (a resyncAnswer) code() string {
	var p struct{ Code string }
	_ = json.Unmarshal(a.body, &p) // Another body has no code.
	return p.Code
}

func (a resyncAnswer) last() string    { return a.header.Get("X-Sync-LastSeq") }
func (a resyncAnswer) cursor() string  { return a.header.Get("X-Sync-Cursor") }
func (a resyncAnswer) settles() string { return a.header.Get("X-Sync-Settles") }

// resyncReplica is what a client holds: documents, byte for byte, by collection and id.
type resyncReplica map[string]string

// resyncLine is a line of a full resync or a change of a pull.
type resyncLine struct {
	Collection string          `json:"collection"`
	DocID      string          `json:"doc_id"`
	Data       json.RawMessage `json:"data"`
	Deleted    bool            `json:"deleted"`
	Operation  string          `json:"operation"`
	End        bool            `json:"end"`
	LastSeq    string          `json:"last_seq"`
	Settles    string          `json:"settles"`
}

func (r resyncReplica) apply(l resyncLine) {
	key := l.Collection + "/" + l.DocID
	if l.Deleted || l.Operation == "delete" {
		delete(r, key)
		return
	}
	r[key] = string(l.Data)
}

// applyLines takes over an answer of a full resync, and returns the end line of limit=all.
func (r resyncReplica) applyLines(t *testing.T, body io.Reader) (end resyncLine) {
	t.Helper()
	lines := bufio.NewScanner(body)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var l resyncLine
		if err := json.Unmarshal(lines.Bytes(), &l); err != nil {
			t.Fatalf("line %q: %v", lines.Text(), err)
		}
		if l.End {
			end = l
			continue
		}
		r.apply(l)
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	return end
}

// keep drops everything that isn't in the set: what a resync by replacement says.
func (r resyncReplica) keep(sent resyncReplica) {
	maps.DeleteFunc(r, func(key, _ string) bool { _, ok := sent[key]; return !ok })
}

// full resynchronises page by page, calling between (if any) before each further page, and returns L and settles.
func (g *resyncGateway) full(t *testing.T, query string, r resyncReplica, between func(page int)) (last, settles string) {
	t.Helper()
	sent := resyncReplica{}
	cursor := ""
	for page := 1; ; page++ {
		path := "/sync/full?" + query
		if cursor != "" {
			if between != nil {
				between(page)
			}
			path += "&cursor=" + url.QueryEscape(cursor)
		}
		var a resyncAnswer
		resyncEventually(t, "an answer other than 503", func() bool { // log_behind under load: clients try again.
			a = g.get(t, path)
			return a.status != http.StatusServiceUnavailable
		})
		if a.status != http.StatusOK {
			t.Fatalf("page %d: %d %s", page, a.status, a.body)
		}
		if last == "" {
			last = a.last()
		}
		if a.last() != last {
			t.Fatalf("X-Sync-LastSeq of page %d is %s, of the first %s", page, a.last(), last)
		}
		settles = max(settles, a.settles())
		r.applyLines(t, strings.NewReader(string(a.body)))
		sent.applyLines(t, strings.NewReader(string(a.body)))
		if cursor = a.cursor(); cursor == "" {
			if a.header.Get("X-Sync-Mode") == "replace" {
				r.keep(sent)
			}
			return last, settles
		}
	}
}

// pull follows the feed to its end and returns the cursor; false: the gateway demands a full resync.
func (g *resyncGateway) pull(t *testing.T, since string, r resyncReplica) (last string, ok bool) {
	t.Helper()
	for {
		a := g.get(t, "/sync/pull?limit=1000&since="+url.QueryEscape(since))
		var page struct {
			Changes []resyncLine
			LastSeq string `json:"last_seq"`
			HasMore bool   `json:"has_more"`
			Resync  bool   `json:"full_resync_required"`
		}
		if err := json.Unmarshal(a.body, &page); err != nil || a.status != http.StatusOK {
			t.Fatalf("pull: %d %s (%v)", a.status, a.body, err)
		}
		if page.Resync {
			return "", false
		}
		for _, c := range page.Changes {
			r.apply(c)
		}
		if since = page.LastSeq; !page.HasMore {
			return since, true
		}
	}
}

// catchUp waits until the log holds all that is committed now, then pulls to the end.
func (g *resyncGateway) catchUp(t *testing.T, conn *pgx.Conn, since string, r resyncReplica) (last string, ok bool) {
	t.Helper()
	resyncLogged(t, conn)
	return g.pull(t, since, r)
}

// resyncLogged waits until the log holds all that is committed now.
func resyncLogged(t *testing.T, conn *pgx.Conn) {
	t.Helper()
	var lsn string
	resyncExec(t, conn, `BEGIN; SET LOCAL synchronous_commit = on`)
	resyncScan(t, conn, []any{&lsn}, `SELECT pg_logical_emit_message(true, $1, '')::text`, replication.FencePrefix)
	resyncExec(t, conn, `COMMIT`)
	resyncEventually(t, "the log reaches "+lsn, func() bool {
		var passed bool
		resyncScan(t, conn, []any{&passed}, `SELECT lsn >= $1::pg_lsn FROM walgate.checkpoint`, lsn)
		return passed
	})
}

// requireTable fails unless the replica equals what the query (id as text, document) returns, byte for byte.
func (r resyncReplica) requireTable(t *testing.T, conn *pgx.Conn, query string) {
	t.Helper()
	want := resyncReplica{}
	rows, err := conn.Query(t.Context(), query)
	if err != nil {
		t.Fatal(err)
	}
	var id, document string
	if _, err := pgx.ForEachRow(rows, []any{&id, &document}, func() error { want[id] = document; return nil }); err != nil {
		t.Fatal(err)
	}
	if maps.Equal(r, want) {
		return
	}
	var faults []string
	for key, document := range want {
		if got, ok := r[key]; !ok {
			faults = append(faults, "lacks "+key)
		} else if got != document {
			faults = append(faults, fmt.Sprintf("%s is %s, want %s", key, got, document))
		}
	}
	for key := range r {
		if _, ok := want[key]; !ok {
			faults = append(faults, "still has "+key)
		}
	}
	slices.Sort(faults)
	t.Fatalf("the replica (%d documents) differs from the table (%d) in %d places: %s",
		len(r), len(want), len(faults), strings.Join(faults[:min(8, len(faults))], "; "))
}

const resyncItemsQuery = `SELECT 'items/' || id, row_to_json(items)::text FROM items`

// resyncVersion is the version in a cursor.
func resyncVersion(t *testing.T, cursor string) changelog.Version {
	t.Helper()
	c, err := changelog.ParseCursor(cursor)
	if err != nil {
		t.Fatalf("cursor %q: %v", cursor, err)
	}
	return c.Version
}

func resyncExec(t *testing.T, conn *pgx.Conn, sql string, args ...any) {
	t.Helper()
	mode := []any{}
	if len(args) == 0 {
		mode = append(mode, pgx.QueryExecModeSimpleProtocol)
	}
	if _, err := conn.Exec(t.Context(), sql, append(mode, args...)...); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

func resyncScan(t *testing.T, conn *pgx.Conn, into []any, sql string, args ...any) {
	t.Helper()
	if err := conn.QueryRow(t.Context(), sql, args...).Scan(into...); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

// resyncEventually waits until a state is reached that nothing announces.
func resyncEventually(t *testing.T, what string, reached func() bool) {
	t.Helper()
	limit := time.After(resyncWait)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !reached() {
		select {
		case <-limit:
			t.Fatalf("not within %s: %s", resyncWait, what)
		case <-tick.C:
		}
	}
}

// inBackground asks for path and tells the answer later; a request that fails has status 0.
func (g *resyncGateway) inBackground(ctx context.Context, path string) <-chan resyncAnswer {
	out := make(chan resyncAnswer, 1)
	go func() {
		var a resyncAnswer
		defer func() { out <- a }()
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, g.url+path, nil)
		if err != nil {
			return
		}
		r.Header.Set("Authorization", "Bearer "+g.token)
		answer, err := g.client.Do(r)
		if err != nil {
			return
		}
		defer answer.Body.Close()
		if body, err := io.ReadAll(answer.Body); err == nil {
			a = resyncAnswer{answer.StatusCode, answer.Header, body}
		}
	}()
	return out
}

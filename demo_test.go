package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fasthttp/websocket"
	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/internal/pgserver"
)

// demoApp returns connection strings to a server's maintenance database and to the application on it.
func demoApp(t *testing.T) (admin, app string) {
	t.Helper()
	server := pgserver.StartForTest(t, pgserver.Options{})
	admin, app = server.DSN("postgres"), server.DSN(demoDatabase)
	if err := createDemoApp(t.Context(), admin, app); err != nil {
		t.Fatal(err)
	}
	return admin, app
}

func connect(t *testing.T, dsn string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

func TestDemoAppIsCreatedOnce(t *testing.T) {
	t.Parallel()
	admin, app := demoApp(t)
	if err := createDemoApp(t.Context(), admin, app); err != nil {
		t.Errorf("a second run on the same directory: %v", err)
	}
}

func TestDemoAppActs(t *testing.T) {
	t.Parallel()
	_, app := demoApp(t)
	conn := connect(t, app)
	for _, action := range demoActions {
		tag, err := conn.Exec(t.Context(), action.sql, "some text")
		if err != nil || tag.RowsAffected() != 1 {
			t.Errorf("touched %d rows, want 1 (%v): %s", tag.RowsAffected(), err, action.sql)
		}
	}
	if _, err := conn.Exec(t.Context(), demoTrim); err != nil {
		t.Error(err)
	}
}

func TestDemoAppTriggersFollow(t *testing.T) {
	t.Parallel()
	_, app := demoApp(t)
	conn := connect(t, app)
	var stray, miscounted int
	err := conn.QueryRow(t.Context(), `WITH moved AS (
			UPDATE todos SET owner_id = $1, team_id = $2 WHERE photo_id IS NOT NULL RETURNING id)
		SELECT count(*) FROM moved`, demoBen, demoKitchen).Scan(new(int))
	if err != nil {
		t.Fatal(err)
	}
	err = conn.QueryRow(t.Context(), `SELECT
			(SELECT count(*) FROM comments c JOIN todos t ON t.id = c.todo_id
				WHERE c.owner_id <> t.owner_id OR c.team_id IS DISTINCT FROM t.team_id),
			(SELECT count(*) FROM todos t
				WHERE comment_count <> (SELECT count(*) FROM comments WHERE todo_id = t.id))`).Scan(&stray, &miscounted)
	if err != nil || stray != 0 || miscounted != 0 {
		t.Errorf("%d comments stayed behind their todo, %d todos are miscounted (%v)", stray, miscounted, err)
	}
}

func TestDemoWriterWritesUntilTold(t *testing.T) {
	t.Parallel()
	_, app := demoApp(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- demoWriter(ctx, app, 500) }()
	conn := connect(t, app)
	for wrote := false; !wrote; {
		err := conn.QueryRow(t.Context(), "SELECT max(updated_at) > min(updated_at) FROM todos").Scan(&wrote)
		if err != nil {
			t.Fatal(err)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("the writer, told to end: %v", err)
	}
}

func TestDemoActionsAreDrawnByWeight(t *testing.T) {
	t.Parallel()
	total, next := 0, 0
	counts := map[string]int{}
	for _, action := range demoActions {
		total += action.weight
	}
	for next = range total {
		counts[pickDemoAction(func(int) int { return next }).sql]++
	}
	for _, action := range demoActions {
		if counts[action.sql] != action.weight {
			t.Errorf("drawn %d times of %d, want %d: %s", counts[action.sql], total, action.weight, action.sql)
		}
	}
}

func TestDemoConfigLoads(t *testing.T) {
	t.Parallel()
	const dsn, secret = "postgres://postgres:p%40ss@127.0.0.1:1/todo?sslmode=disable", "0123456789abcdef0123456789abcdef"
	path := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(path, []byte(demoConfig(dsn, t.TempDir(), 4711, secret)), 0o600); err != nil {
		t.Fatal(err)
	}
	config, err := Load(path, func(string) (string, bool) { return "", false })
	if err != nil {
		t.Fatal(err)
	}
	if string(config.Database.URL) != dsn || !config.AutoInit || config.HTTP.Listen != "127.0.0.1:4711" ||
		config.HTTP.PublicURL != "http://127.0.0.1:4711" {
		t.Errorf("the configuration reads back as %+v", config)
	}
	for name := range strings.SplitSeq(demoCollections, ",") {
		if len(config.Collections[name].Scope) == 0 {
			t.Errorf("collection %s has no scope: everybody would see everything", name)
		}
	}
}

func TestDemoLineTellsLatency(t *testing.T) {
	t.Parallel()
	arrived := time.Date(2026, 5, 2, 15, 0, 0, 12_000_000, time.UTC)
	frame := demoFrame{
		Version: "20260502T150000.005Z-0005-a1b2", Collection: "todos", DocID: "10000000-0000-4000-8000-000000000001",
		Operation: "upsert", Data: map[string]any{"title": "Buy milk", "done": true},
	}
	want := regexp.MustCompile(`^15:00:00\.012  upsert  todos     10000000  Buy milk \(done\) +7 ms$`)
	if got := demoLine(frame, arrived); !want.MatchString(got) {
		t.Errorf("line %q, want %s", got, want)
	}
	left := demoFrame{Operation: "delete", Reason: "left", Collection: "todos"}
	if got := demoLine(left, arrived); !strings.Contains(got, "left") || strings.Contains(got, "delete") {
		t.Errorf("line %q of a row that moved out of sight", got)
	}
}

// terminal collects what the demo prints and says when it holds a text.
type terminal struct {
	mu      sync.Mutex
	text    bytes.Buffer
	want    string
	reached chan struct{}
}

func newTerminal(want string) *terminal { return &terminal{want: want, reached: make(chan struct{})} }

func (w *terminal) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	before := strings.Contains(w.text.String(), w.want)
	n, err := w.text.Write(p)
	if !before && strings.Contains(w.text.String(), w.want) {
		close(w.reached)
	}
	return n, err
}

func (w *terminal) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.text.String()
}

// standInGateway answers as the gateway does: first a connection that demands a full resync, then one with a change.
func standInGateway(ctx context.Context, _ string, ready chan<- string) error {
	const version = "20260502T150000.000Z-0000-a1b2"
	var streams atomic.Int32
	mux := http.NewServeMux()
	mux.HandleFunc("GET /readyz", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("GET /sync/full", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, `{"collection":"lists","doc_id":"1","data":{"name":"One"}}`+"\n"+
			`{"end":true,"count":1,"last_seq":"%s-%d"}`+"\n", version, streams.Load())
	})
	mux.HandleFunc("GET /sync/stream", func(w http.ResponseWriter, r *http.Request) {
		conn, err := (&websocket.Upgrader{}).Upgrade(w, r, nil)
		if err != nil {
			return
		}
		defer conn.Close()
		_, subscribe, _ := conn.ReadMessage()
		if streams.Add(1) == 1 || !strings.Contains(string(subscribe), version+"-1") {
			_ = conn.WriteMessage(websocket.TextMessage, []byte(`{"type":"full_resync_required","collections":["lists"]}`))
			return
		}
		_ = conn.WriteMessage(websocket.TextMessage, []byte(`{"version":"`+version+
			`","collection":"todos","doc_id":"2","operation":"upsert","data":{"title":"It arrived"}}`))
		_, _, _ = conn.ReadMessage() // Until the client goes.
	})
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	server := &http.Server{Handler: mux}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	ready <- "http://" + listener.Addr().String()
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func standInToken(_, sub string, _ []string, _ map[string]any) (string, error) {
	return "token-of-" + sub, nil
}

func TestDemoShowsChangesAndCleansUp(t *testing.T) {
	t.Parallel()
	out := newTerminal("It arrived")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	copied := filepath.Join(t.TempDir(), "copy.yaml")
	done := make(chan error, 1)
	go func() {
		done <- runDemo(ctx, demoOptions{rate: 5, configOut: copied, out: out, serve: standInGateway, token: standInToken})
	}()
	select {
	case <-out.reached:
		cancel()
	case err := <-done:
		t.Fatalf("the demo ended before a change arrived: %v\n%s", err, out)
	}
	if err := <-done; err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"export ANA='token-of-" + demoAna, "export BEN=", "psql 'postgres://", "/sync/pull?since=2026", "full resync required"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the terminal lacks %q:\n%s", want, out)
		}
	}
	if _, err := os.Stat(copied); err != nil {
		t.Errorf("--config-out: %v", err)
	}
	dir := regexp.MustCompile(`their files are in (\S+)\.`).FindStringSubmatch(out.String())
	if dir == nil {
		t.Fatalf("the directory isn't named:\n%s", out)
	}
	if _, err := os.Stat(dir[1]); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("directory %s is still there (%v)", dir[1], err)
	}
}

// TestDemoTabletReturns: the demo with its own gateway, as a newcomer runs it.
func TestDemoTabletReturns(t *testing.T) {
	t.Parallel()
	out := newTerminal("marked as its own")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- runDemo(ctx, demoOptions{out: out, serve: demoServing, token: demoSigning}) }()
	select {
	case <-out.reached:
	case err := <-done:
		t.Fatalf("the demo ended before the tablet had returned: %v\n%s", err, out)
	}
	printed := regexp.MustCompile(`(?s)export ANA='([^']+)'.*'(http[^']+/sync/push)' -d '([^']+)'`).FindStringSubmatch(out.String())
	if printed == nil {
		t.Fatalf("the guide has no push:\n%s", out)
	}
	for _, want := range []string{"accepted", "duplicate"} {
		var answer demoAnswer
		if err := demoCall(ctx, http.MethodPost, printed[2], printed[1], []byte(printed[3]), &answer); err != nil || len(answer.Results) != 1 || answer.Results[0].Status != want {
			t.Errorf("the printed push: %+v (%v), want %s", answer, err, want)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"off          accepted", "conflict_resolved by merge: title stays", `hundred"        accepted`, "in 2 rows marked", "Choose thick paper (done)"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the terminal lacks %q:\n%s", want, out)
		}
	}
	if strings.Contains(out.String(), "ERROR") || strings.Contains(out.String(), "connects again") {
		t.Errorf("the terminal shows an error:\n%s", out)
	}
}

func TestDemoDirectoryIsKeptAndUsedAgain(t *testing.T) {
	t.Parallel()
	base, err := os.MkdirTemp("", "walgate-demo-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(base) })
	if err := os.Chmod(base, 0o711); err != nil {
		t.Fatal(err)
	}
	failed := errors.New("the gateway can't start")
	serve := func(context.Context, string, chan<- string) error { return failed }
	for range 2 {
		err := runDemo(t.Context(), demoOptions{dir: filepath.Join(base, "kept"), out: newTerminal(""), serve: serve, token: standInToken})
		if !errors.Is(err, failed) {
			t.Errorf("runDemo = %v, want the gateway's error", err)
		}
	}
}

func TestDemoEndsWhenItsTimeIsUp(t *testing.T) {
	t.Parallel()
	serve := func(ctx context.Context, _ string, _ chan<- string) error { <-ctx.Done(); return ctx.Err() }
	o := demoOptions{duration: time.Millisecond, out: newTerminal("never"), serve: serve, token: standInToken}
	if err := runDemo(t.Context(), o); err != nil {
		t.Errorf("time up while starting: %v", err)
	}
	quit := func(context.Context, string, chan<- string) error { return nil }
	o.serve, o.duration = quit, 0
	if err := runDemo(t.Context(), o); err == nil || !strings.Contains(err.Error(), "ended by itself") {
		t.Errorf("a gateway that just ends: %v", err)
	}
}

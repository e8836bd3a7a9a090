package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

const ddlWait = 90 * time.Second // far above what anything here takes, but for a fault

// ddlOutcome is what a change of a table means to the clients of its collection.
type ddlOutcome int

const (
	ddlGoesOn   ddlOutcome = iota // nobody notices
	ddlResyncs                    // clients resynchronise, and that is all
	ddlStops                      // the collection stops and says why; undone, its clients resynchronise
	ddlImpaired                   // changes flow on, but who asks for a full resync is told to wait; /readyz says why
)

// ddlCase changes one table while an application writes to it and two clients follow it. $T is the table, which has the
// case's name. Each line of change and heal is one transaction.
type ddlCase struct {
	name    string
	create  string // default: ddlTable
	policy  string // the collection's, besides table
	write   string // what the application does to row $I; default: ddlWrite
	quiet   bool   // the application writes nothing
	change  string
	want    ddlOutcome
	reason  string // within /readyz meanwhile; | separates texts
	heal    string
	may     string // SQLSTATEs that the application's statements may meet
	key     string // doc_id in SQL; default: id
	where   string
	exclude string // a column that documents don't have
	major   int    // of PostgreSQL, from which on the case makes sense
}

const (
	ddlTable = `CREATE TABLE $T (id int PRIMARY KEY, owner text, n int NOT NULL DEFAULT 0, note varchar(20));
		INSERT INTO $T SELECT g, 'ana', g, 'quiet' FROM generate_series(1, 20) g`
	// ddlWrite leaves rows 1 to 20 alone: what they look like must reach clients without anybody touching them.
	ddlWrite = `INSERT INTO $T (id, owner) SELECT $I, 'ana' WHERE NOT EXISTS (SELECT FROM $T WHERE id = $I)
		UPDATE $T SET n = n + 1 WHERE id = $I
		DELETE FROM $T WHERE id = $I - 5`
)

// ddlGateway serves the collections of many cases at once.
type ddlGateway struct {
	*resyncGateway
	t        *testing.T
	app      string // connection string of the application
	path     string // of the configuration
	sentinel sync.Mutex
	columns  int
}

// startDDLGateway makes the tables of all cases and serves them from a database, connecting as url says.
func startDDLGateway(t *testing.T, app, url string, autoInit bool, cases []ddlCase, install func(path string)) *ddlGateway {
	t.Helper()
	conn := connect(t, app)
	collections := "  a_witness: {table: public.witness}\n  sentinel: {table: public.sentinel}\n"
	resyncExec(t, conn, `CREATE TABLE witness (id int PRIMARY KEY); CREATE TABLE sentinel (id int PRIMARY KEY)`)
	for _, c := range cases {
		create := c.create
		if create == "" {
			create = ddlTable
		}
		resyncExec(t, conn, c.sql(create))
		collections += fmt.Sprintf("  %s: {table: public.%s", c.name, c.name)
		if c.policy != "" {
			collections += ", " + c.policy
		}
		collections += "}\n"
	}
	process, config := newGatewayProcess(t, fmt.Sprintf(`auto_init: %t
database: {url: %q, pool_size: 36}
replication: {slot: %s}
catalog: {poll_interval: 200ms}
http: {listen: "127.0.0.1:%%[1]d"}
auth: {jwt: {secret: %%[2]q}}
limits: {requests_per_second: 1000000, burst: 1000000, full_concurrency: 16, drain: 1s, stream_connections_per_subject: 1000}
log: {level: info, format: text}
collections:
%s`, autoInit, url, slotOf(t, conn), collections))
	install(process.config)
	token, err := signToken(config, "ana", nil, nil, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	g := &ddlGateway{t: t, app: app, path: process.config, resyncGateway: &resyncGateway{dsn: url, url: process.base, token: token, client: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 200}}}}
	if err := process.start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.client.CloseIdleConnections)
	resyncEventually(t, "the gateway answers", func() bool { return g.get(t, "/sync/full?limit=1&collections=a_witness").status == http.StatusOK })
	return g
}

// slotOf makes a slot's name of a database's.
func slotOf(t *testing.T, conn *pgx.Conn) (slot string) {
	t.Helper()
	resyncScan(t, conn, []any{&slot}, `SELECT 'walgate_' || oid FROM pg_database WHERE datname = current_database()`)
	return slot
}

func (c ddlCase) sql(text string) string { return strings.ReplaceAll(text, "$T", c.name) }

// newClient starts a client of a collection; stop ends it and says what it had to complain about.
func (g *ddlGateway) newClient(ctx context.Context, collection string, stream bool) (c *ddlClient, stop func() error) {
	c = &ddlClient{base: g.url, token: g.token, collection: collection, stream: stream, http: g.client, state: ddlState{documents: map[string]string{}}}
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() { defer close(ended); c.run(ctx) }()
	return c, func() error {
		cancel()
		<-ended
		return c.broken
	}
}

// eventually waits until reached is true; a test's helper for other goroutines than the test's own.
func eventually(ctx context.Context, what string, reached func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, ddlWait)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !reached() {
		select {
		case <-ctx.Done():
			return fmt.Errorf("not within %s: %s", ddlWait, what)
		case <-tick.C:
		}
	}
	return nil
}

// problem is what /readyz says of a part.
func (g *ddlGateway) problem(part string) string {
	res, err := g.client.Get(g.url + "/readyz")
	if err != nil {
		return ""
	}
	defer res.Body.Close()
	var body struct{ Problems map[string]string }
	_ = json.NewDecoder(res.Body).Decode(&body) // a cut answer has no problems
	return body.Problems[part]
}

// polled waits until the gateway has read the catalog as it is now: the sentinel's new column is in its stored shape.
func (g *ddlGateway) polled(ctx context.Context, conn *pgx.Conn) error {
	g.sentinel.Lock()
	defer g.sentinel.Unlock()
	g.columns++
	column := fmt.Sprintf("seen_%d", g.columns)
	if _, err := conn.Exec(ctx, `ALTER TABLE sentinel ADD `+column+` int`); err != nil {
		return err
	}
	return eventually(ctx, "the sentinel's column is noticed", func() bool {
		var seen bool
		err := conn.QueryRow(ctx, `SELECT strpos(shape, $1) > 0 FROM walgate.collections WHERE name = 'sentinel'`, `"`+column+`"`).Scan(&seen)
		return err == nil && seen
	})
}

// application writes to the case's table until its context ends.
type application struct {
	writes atomic.Int64
	failed error
}

func (a *application) run(ctx context.Context, conn *pgx.Conn, c ddlCase) {
	write := c.write
	if write == "" {
		write = ddlWrite
	}
	statements := strings.Split(c.sql(write), "\n")
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for i := 0; ; i++ {
		for _, sql := range statements {
			_, err := conn.Exec(context.WithoutCancel(ctx), strings.ReplaceAll(sql, "$I", fmt.Sprint(100+i/2%10)), pgx.QueryExecModeSimpleProtocol)
			var pg *pgconn.PgError
			if errors.As(err, &pg) && slices.Contains(strings.Fields(c.may), pg.Code) {
				err = nil
			}
			if err != nil {
				a.failed = fmt.Errorf("the application's own statement failed: %s: %w", strings.TrimSpace(sql), err)
				return
			}
		}
		a.writes.Add(1)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// run plays one case.
func (g *ddlGateway) run(ctx context.Context, c ddlCase) error {
	conn, err := pgx.Connect(ctx, g.app)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	writing, err := pgx.Connect(ctx, g.app)
	if err != nil {
		return err
	}
	defer writing.Close(context.WithoutCancel(ctx))
	app, ended := &application{}, make(chan struct{})
	appCtx, stopWriting := context.WithCancel(ctx)
	go func() {
		defer close(ended)
		if !c.quiet {
			app.run(appCtx, writing, c)
		}
	}()
	defer func() { stopWriting(); <-ended }()
	puller, stopPuller := g.newClient(ctx, c.name, false)
	streamer, stopStreamer := g.newClient(ctx, c.name, true)
	clients := []*ddlClient{puller, streamer}
	err = g.play(ctx, c, conn, app, clients)
	if err == nil { // rows of the new form, too
		_, err = conn.Exec(ctx, c.sql(`UPDATE $T SET n = n + 1000 WHERE id = 5`))
	}
	stopWriting()
	<-ended
	if err == nil {
		err = g.converges(ctx, c, conn, clients)
	}
	err = errors.Join(err, app.failed, stopPuller(), stopStreamer())
	if err != nil {
		err = fmt.Errorf("%w\n  puller:\n   %s\n  streamer:\n   %s\n  /readyz: %s", err, puller.story(), streamer.story(), g.problem("collection "+c.name))
	}
	return err
}

// play changes the table and watches what comes of it.
func (g *ddlGateway) play(ctx context.Context, c ddlCase, conn *pgx.Conn, app *application, clients []*ddlClient) error {
	every := func(what string, holds func(i int, s ddlState) bool) error {
		return eventually(ctx, what, func() bool {
			for i, client := range clients {
				if !holds(i, client.snapshot()) {
					return false
				}
			}
			return true
		})
	}
	goesOn := func() error { // the application still writes, in vain or not
		from := app.writes.Load()
		return eventually(ctx, "the application goes on writing", func() bool { return c.quiet || app.writes.Load() > from+2 })
	}
	first, err := c.oracle(ctx, conn)
	if err != nil {
		return err
	}
	err = every("the clients hold the table", func(_ int, s ddlState) bool { return s.cursor != "" && len(s.documents) >= min(20, len(first)) })
	if err := errors.Join(err, goesOn()); err != nil {
		return err
	}
	before := []ddlState{clients[0].snapshot(), clients[1].snapshot()}
	if err := g.exec(ctx, conn, c.sql(c.change)); err != nil {
		return err
	}
	resynced := func(i int, s ddlState) bool { return s.resyncs > before[i].resyncs && s.cursor != "" }
	part := "collection " + c.name
	reasoned := func() bool {
		text := g.problem(part)
		return text != "" && !slices.ContainsFunc(strings.Split(c.sql(c.reason), "|"), func(want string) bool { return !strings.Contains(text, want) })
	}
	switch c.want {
	case ddlGoesOn:
		err = errors.Join(g.polled(ctx, conn), goesOn())
		for i, client := range clients {
			if s := client.snapshot(); s.resyncs > before[i].resyncs || s.refused > before[i].refused || s.cursor == "" {
				err = errors.Join(err, errors.New("a client had to resynchronise or was refused, though nothing happened that it must know of"))
			}
		}
		return err
	case ddlResyncs:
		return errors.Join(every("the clients resynchronise", resynced), goesOn())
	case ddlStops:
		err := errors.Join(eventually(ctx, "/readyz says why the collection stopped: "+c.sql(c.reason), reasoned),
			every("the clients are refused", func(i int, s ddlState) bool { return s.refused > before[i].refused }), goesOn())
		if err != nil {
			return err
		}
	case ddlImpaired:
		if err := errors.Join(eventually(ctx, "/readyz says why full resyncs fail: "+c.sql(c.reason), reasoned), g.polled(ctx, conn), goesOn()); err != nil {
			return err
		}
		if _, err := (&ddlClient{base: g.url, token: g.token, collection: c.name, http: g.client}).get(ctx, "/sync/full", map[string][]string{}); !errors.Is(err, errDDLAway) {
			return fmt.Errorf("a full resync that can't read the table answers %w", err)
		}
		for i, client := range clients {
			if s := client.snapshot(); s.resyncs > before[i].resyncs || s.refused > before[i].refused || s.cursor <= before[i].cursor {
				err = errors.Join(err, fmt.Errorf("a client doesn't follow any more: at %s, was at %s", s.cursor, before[i].cursor))
			}
		}
		if err != nil {
			return err
		}
		resynced = func(int, ddlState) bool { return true }
	}
	if err := g.exec(ctx, conn, c.sql(c.heal)); err != nil {
		return err
	}
	return errors.Join(eventually(ctx, "/readyz is content again", func() bool { return g.problem(part) == "" }), every("the clients resynchronise", resynced), goesOn())
}

func (g *ddlGateway) exec(ctx context.Context, conn *pgx.Conn, script string) error {
	for _, sql := range strings.Split(script, "\n") {
		if _, err := conn.Exec(ctx, sql, pgx.QueryExecModeSimpleProtocol); err != nil {
			return fmt.Errorf("%s: %w", strings.TrimSpace(sql), err)
		}
	}
	return nil
}

// converges waits until both clients hold what SELECT returns.
func (g *ddlGateway) converges(ctx context.Context, c ddlCase, conn *pgx.Conn, clients []*ddlClient) error {
	var last error
	err := eventually(ctx, "the clients hold what SELECT returns", func() bool {
		var want map[string]string
		if want, last = c.oracle(ctx, conn); last != nil {
			return false
		}
		for _, client := range clients {
			last = errors.Join(last, differs(client.snapshot().documents, want))
		}
		return last == nil
	})
	if err != nil {
		return fmt.Errorf("%w: %w", err, last)
	}
	return nil
}

// oracle selects what clients must hold.
func (c ddlCase) oracle(ctx context.Context, conn *pgx.Conn) (map[string]string, error) {
	var columns, kind string
	err := conn.QueryRow(ctx, `SELECT string_agg('t.' || quote_ident(attname), ', ' ORDER BY attnum), (SELECT relkind::text FROM pg_class WHERE oid = $1::text::regclass)
		FROM pg_attribute WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped AND attgenerated = '' AND attname <> $2`, c.name, c.exclude).Scan(&columns, &kind)
	if err != nil {
		return nil, err
	}
	key, from := c.key, "ONLY "+c.name
	if key == "" {
		key = "id::text"
	}
	if kind == "p" {
		from = c.name
	}
	sql := fmt.Sprintf(`SELECT %s, (SELECT row_to_json(walgate_doc)::text FROM (SELECT %s) walgate_doc) FROM %s t`, key, columns, from)
	if c.where != "" {
		sql += " WHERE " + c.where
	}
	rows, err := conn.Query(ctx, sql, pgx.QueryExecModeSimpleProtocol)
	if err != nil {
		return nil, err
	}
	want := map[string]string{}
	var id, doc string
	_, err = pgx.ForEachRow(rows, []any{&id, &doc}, func() error { want[id] = doc; return nil })
	return want, err
}

// witness writes to a collection that nobody changes and waits for each row at a client, until ctx ends. It returns how
// long they took: what happens to one collection must not hold up another.
func (g *ddlGateway) witness(ctx context.Context) (took []time.Duration, err error) {
	conn, err := pgx.Connect(ctx, g.app)
	if err != nil {
		return nil, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	client, stop := g.newClient(context.WithoutCancel(ctx), "a_witness", true)
	if err := eventually(ctx, "the witness has begun", func() bool { return client.snapshot().cursor != "" }); err != nil {
		return nil, errors.Join(err, stop())
	}
	client.mu.Lock()
	client.arrived = map[string]time.Time{}
	client.mu.Unlock()
	for i := 1; ctx.Err() == nil; i++ {
		began := time.Now()
		if _, err := conn.Exec(context.WithoutCancel(ctx), `INSERT INTO witness VALUES ($1)`, i); err != nil {
			return nil, errors.Join(err, stop())
		}
		err := eventually(context.WithoutCancel(ctx), "the witness sees row "+fmt.Sprint(i), func() bool {
			client.mu.Lock()
			defer client.mu.Unlock()
			at, ok := client.arrived[fmt.Sprint(i)]
			if ok {
				took = append(took, at.Sub(began))
			}
			return ok
		})
		if err != nil {
			return took, errors.Join(fmt.Errorf("%w\n   %s", err, client.story()), stop())
		}
	}
	s := client.snapshot()
	if s.resyncs != 1 || s.refused != 0 {
		err = fmt.Errorf("the witness resynchronised %d times and was refused %d times, though nothing happened to its table:\n   %s", s.resyncs-1, s.refused, client.story())
	}
	return took, errors.Join(err, stop())
}

// runAll plays all cases at the same time and reports each under its name.
func (g *ddlGateway) runAll(cases []ddlCase) {
	ctx, stop := context.WithCancel(g.t.Context())
	witnessed := make(chan error, 1)
	var took []time.Duration
	go func() {
		var err error
		took, err = g.witness(ctx)
		witnessed <- err
	}()
	results := make([]chan error, len(cases))
	for i, c := range cases {
		result := make(chan error, 1)
		results[i] = result
		go func() { result <- g.run(g.t.Context(), c) }()
	}
	for i, c := range cases {
		err := <-results[i]
		g.t.Run(c.name, func(t *testing.T) {
			if err != nil {
				t.Error(err)
			}
		})
	}
	stop()
	if err := <-witnessed; err != nil {
		g.t.Error(err)
	}
	slices.Sort(took)
	if n := len(took); n > 0 {
		g.t.Logf("%d cases beside %d rows of an unchanged collection: half of them within %s, the slowest %s", len(results), n, took[n/2].Round(time.Millisecond), took[n-1].Round(time.Millisecond))
	}
}

// dropRole drops a role that a test made for itself.
func dropRole(t *testing.T, dsn, role string) {
	conn, err := pgx.Connect(context.Background(), dsn)
	if err != nil {
		t.Error(err)
		return
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(context.Background(), `DROP ROLE `+role); err != nil {
		t.Error(err)
	}
}

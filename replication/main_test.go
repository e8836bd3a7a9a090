package replication

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/internal/pgserver"
	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/schema"
)

func TestMain(m *testing.M) { os.Exit(pgserver.Main(m)) }

const patience = 90 * time.Second

// logBuffer keeps what is logged, for the failure messages and for tests of warnings.
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

// setup is what a test of the whole read side wants to be different.
type setup struct {
	server   *pgserver.Server // nil: the shared one
	dsn      string           // of the source; empty: a new database of server
	storage  string           // empty: the source
	before   string           // SQL in the source before anything is installed
	specs    map[string]policies.Spec
	autoInit bool
	every    time.Duration // of the catalog poll; 0: an hour, so that only Relation messages tell

	linked   string        // the source as the gateway reaches it; empty: dsn
	timing   timing        // of the stream; zero: the usual
	patience time.Duration // of the log's watchdog; 0: the usual
	fillRows int           // of one step of a fill; 0: the usual
}

// source is a source with a leader that tails it into a log.
type source struct {
	lost    func(*Leader) // nil, or what the next leader remembers
	t       testing.TB
	dsn     string
	slot    string
	linked  string // the source as the gateway reaches it
	timing  timing
	conn    *pgx.Conn // the application
	pool    *pgxpool.Pool
	log     *changelog.Log
	bus     *changelog.MemoryBus
	watcher *Watcher
	stats   *Stats
	logged  *logBuffer
	stop    func()
	maxLag  int64 // of the slot; 0: far away
	rows    int   // of one step of a fill; 0: the usual

	storageDSN string
	store      *pgx.Conn // to the log's database
}

const itemsTable = `CREATE TABLE items (id int PRIMARY KEY, owner text, title text, body text);`

func itemsSpec() map[string]policies.Spec {
	return map[string]policies.Spec{"items": {Table: "items"}}
}

// newSource prepares everything as walgate init does and starts the leader.
func newSource(t testing.TB, o setup) *source {
	t.Helper()
	if o.dsn == "" {
		if o.server == nil {
			o.server = pgserver.ForTest(t)
		}
		o.dsn = o.server.Database(t)
	}
	if o.specs == nil {
		o.specs, o.before = itemsSpec(), itemsTable+o.before
	}
	if o.every == 0 {
		o.every = time.Hour
	}
	if o.storage == "" {
		o.storage = o.dsn
	}
	s := &source{t: t, dsn: o.dsn, linked: cmp.Or(o.linked, o.dsn), timing: o.timing, rows: o.fillRows, storageDSN: o.storage, logged: &logBuffer{}}
	s.conn = s.connect()
	s.exec(o.before)
	s.slot = fmt.Sprintf("walgate_%d", query[uint32](s, `SELECT oid FROM pg_database WHERE datname = current_database()`))
	logger := slog.New(slog.NewTextHandler(s.logged, nil))
	s.open(o, logger)
	s.start()
	return s
}

func (s *source) open(o setup, logger *slog.Logger) {
	s.t.Helper()
	ctx := s.t.Context()
	var err error
	s.pool, err = schema.OpenPool(ctx, s.linked, 6)
	s.ok(err)
	s.t.Cleanup(s.pool.Close)
	s.log, err = changelog.Open(ctx, o.storage, 4)
	s.ok(err)
	s.t.Cleanup(s.log.Close)
	s.log.Patience = cmp.Or(o.patience, s.log.Patience)
	s.watcher = NewWatcher(s.pool, schema.PublicationsFor("walgate"), o.specs, o.autoInit, o.every, logger)
	faults, err := s.watcher.Start(ctx)
	s.ok(err)
	if len(faults) > 0 {
		s.t.Fatal(faults)
	}
	s.ok(schema.Migrate(ctx, s.conn))
	d := s.watcher.Current()
	_, err = Join(ctx, s.conn, schema.PublicationsFor("walgate"), d.Set, d.Catalog)
	s.ok(err)
	_, err = EnsureSlot(ctx, s.conn, s.slot, logger, nil)
	s.ok(err)
	s.ok(s.log.Migrate(ctx))
	s.ok(s.watcher.Reload(ctx))
}

// start runs a leader and the catalog's watch until stop, and waits until it leads.
func (s *source) start() {
	s.t.Helper()
	s.launch()
	s.await("the leader leads", func() bool { leading, _, _ := s.stats.State(); return leading })
}

// launch runs a leader and the catalog's watch until stop.
func (s *source) launch() {
	s.t.Helper()
	s.bus, s.stats = changelog.NewMemoryBus(), &Stats{}
	leader := NewLeader(Options{Source: s.pool, ReplicationURL: s.linked, timing: s.timing, fillRows: s.rows, Slot: s.slot, Publications: schema.PublicationsFor("walgate"),
		MaxSlotLag: cmp.Or(s.maxLag, 1<<40), Log: s.log, Bus: s.bus, Watcher: s.watcher, Stats: s.stats, Logger: slog.New(slog.NewTextHandler(s.logged, nil))})
	if s.lost != nil {
		s.lost(leader)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := leader.Run(ctx); err != nil {
			s.t.Errorf("the leader ended: %v", err)
		}
	})
	wg.Go(func() {
		if err := s.watcher.Run(ctx); err != nil {
			s.t.Errorf("the watcher ended: %v", err)
		}
	})
	s.stop = sync.OnceFunc(func() { cancel(); wg.Wait() })
	s.t.Cleanup(s.stop)
}

func (s *source) ok(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatalf("%v\nlog:\n%s", err, s.logged)
	}
}

func (s *source) connect() *pgx.Conn {
	s.t.Helper()
	conn, err := pgx.Connect(s.t.Context(), s.dsn)
	s.ok(err)
	s.t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

// exec runs SQL as the application.
func (s *source) exec(sql string, args ...any) {
	s.t.Helper()
	if _, err := s.conn.Exec(s.t.Context(), sql, args...); err != nil {
		s.t.Fatalf("%s: %v", sql, err)
	}
}

func query[T any](s *source, sql string, args ...any) (v T) {
	s.t.Helper()
	if err := s.conn.QueryRow(s.t.Context(), sql, args...).Scan(&v); err != nil {
		s.t.Fatalf("%s: %v", sql, err)
	}
	return v
}

// await polls until done; every wait of these tests ends so or fails the test with what was logged.
func (s *source) await(what string, done func() bool) {
	s.t.Helper()
	deadline, tick := time.After(patience), time.NewTicker(5*time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-tick.C:
		case <-deadline:
			s.t.Fatalf("waited %s in vain until %s\nlog:\n%s", patience, what, s.logged)
		}
	}
}

// settle waits until the log holds everything committed so far.
func (s *source) settle() *changelog.Head {
	s.t.Helper()
	var lsn changelog.LSN
	var err error
	s.await("a fence is in the WAL", func() bool { lsn, err = Fence(s.t.Context(), s.pool); return err == nil })
	var h *changelog.Head
	s.await("the log has passed "+lsn.String(), func() bool {
		h, err = s.log.Head(s.t.Context()) // may fail while a server restarts
		return err == nil && h.LSN > lsn
	})
	return h
}

// entries returns everything logged after since, as "op doc_id data".
func (s *source) entries(since changelog.Version) []changelog.Entry {
	s.t.Helper()
	s.settle()
	var all []changelog.Entry
	for {
		p, err := s.log.ReadAll(s.t.Context(), since, 1<<62, 10000, 64<<20)
		s.ok(err)
		all = append(all, p.Entries...)
		if since = p.Last; !p.More {
			return all
		}
	}
}

// changes returns everything logged after since in short: "u 1" for an upsert of document 1.
func (s *source) changes(since changelog.Version) string {
	s.t.Helper()
	var out []string
	for _, e := range s.entries(since) {
		out = append(out, fmt.Sprintf("%c %s", e.Op, e.DocID))
	}
	return strings.Join(out, ", ")
}

func (s *source) expect(since changelog.Version, want string) {
	s.t.Helper()
	if got := s.changes(since); got != want {
		s.t.Errorf("logged: %s\nwant:   %s\nlog:\n%s", got, want, s.logged)
	}
}

// collection returns the stored state of a collection.
func (s *source) collection(name string) changelog.Collection {
	s.t.Helper()
	h, err := s.log.Head(s.t.Context())
	s.ok(err)
	for _, c := range h.Collections {
		if c.Name == name {
			return c
		}
	}
	s.t.Fatalf("no collection %s", name)
	return changelog.Collection{}
}

// awaitRaise waits until the floor of a collection lies above v.
func (s *source) awaitRaise(name string, v changelog.Version) changelog.Collection {
	s.t.Helper()
	var c changelog.Collection
	s.await("the floor of "+name+" rises", func() bool { c = s.collection(name); return c.Floor > v })
	return c
}

func readFile(t testing.TB, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func newDatabase(t testing.TB) string {
	t.Helper()
	return pgserver.ForTest(t).Database(t)
}

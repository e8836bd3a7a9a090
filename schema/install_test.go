package schema

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/walgate/walgate/internal/pgserver"
)

var testPublications = PublicationsFor("walgate")

// database is a test's own database and a connection to it.
func database(t *testing.T, statements ...string) (string, *pgx.Conn) {
	t.Helper()
	dsn := pgserver.ForTest(t).Database(t)
	conn := connection(t, dsn)
	mustExec(t, conn, statements...)
	return dsn, conn
}

func connection(t *testing.T, dsn string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

func loadTables(t *testing.T, conn *pgx.Conn, names ...string) *Catalog {
	t.Helper()
	var types Types
	c, err := LoadCatalog(t.Context(), conn, &types, testPublications.Rows, names)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// plan returns the steps that let the named tables, and no others, be published.
func plan(t *testing.T, conn *pgx.Conn, names ...string) []Step {
	t.Helper()
	published, err := ReadPublished(t.Context(), conn, testPublications)
	if err != nil {
		t.Fatal(err)
	}
	c := loadTables(t, conn, names...)
	var wanted []Synced
	for _, table := range c.Tables {
		wanted = append(wanted, Synced{Table: table})
	}
	return Plan(testPublications, c, published, wanted)
}

// install does what walgate init does.
func install(t *testing.T, conn *pgx.Conn, names ...string) {
	t.Helper()
	if err := Migrate(t.Context(), conn); err != nil {
		t.Fatal(err)
	}
	for _, s := range plan(t, conn, names...) {
		if err := Execute(t.Context(), conn, s); err != nil {
			t.Fatal(err)
		}
	}
	if left := plan(t, conn, names...); len(left) > 0 {
		t.Fatalf("after executing the plan it still has %v", left)
	}
}

// footprint is everything in the catalog that an installation could have touched, one fact per line.
func footprint(t *testing.T, conn *pgx.Conn) string {
	t.Helper()
	rows, err := conn.Query(t.Context(), `SELECT * FROM (
		SELECT format('relation %s.%s kind %s identity %s acl %s options %s', n.nspname, c.relname, c.relkind, c.relreplident, c.relacl, c.reloptions) AS f FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname !~ '^pg_|information_schema'
		UNION ALL SELECT format('index %s replident %s', indexrelid::regclass, indisreplident) FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid WHERE c.relnamespace = 'public'::regnamespace
		UNION ALL SELECT format('column %s.%s %s', attrelid::regclass, attname, atttypid::regtype) FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid WHERE c.relnamespace = 'public'::regnamespace AND attnum > 0
		UNION ALL SELECT format('publication %s %s %s%s%s%s', pubname, puballtables, pubinsert, pubupdate, pubdelete, pubtruncate) FROM pg_publication
		UNION ALL SELECT format('published %s', prrelid::regclass) FROM pg_publication_rel
		UNION ALL SELECT format('trigger %s on %s', tgname, tgrelid::regclass) FROM pg_trigger
		UNION ALL SELECT format('function %s', p.oid::regprocedure) FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname !~ '^pg_|information_schema'
		UNION ALL SELECT format('type %s', t.oid::regtype) FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace WHERE n.nspname !~ '^pg_|information_schema'
		UNION ALL SELECT format('schema %s', nspname) FROM pg_namespace WHERE nspname !~ '^pg_'
		UNION ALL SELECT format('extension %s', extname) FROM pg_extension
		UNION ALL SELECT format('setting %s %s', setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database()), setconfig) FROM pg_db_role_setting WHERE setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database())
		) x ORDER BY f`)
	if err != nil {
		t.Fatal(err)
	}
	facts, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(facts, "\n")
}

const identityTables = `CREATE TABLE by_default (id int PRIMARY KEY, v text);
CREATE TABLE by_index (id int PRIMARY KEY, code text NOT NULL, "odd Name" int);
CREATE UNIQUE INDEX "the ""odd"" index" ON by_index (code);
ALTER TABLE by_index REPLICA IDENTITY USING INDEX "the ""odd"" index";
CREATE TABLE by_nothing (id int PRIMARY KEY); ALTER TABLE by_nothing REPLICA IDENTITY NOTHING;
CREATE TABLE by_full (id int PRIMARY KEY); ALTER TABLE by_full REPLICA IDENTITY FULL;
CREATE TABLE "Odd ""table'é" (id int PRIMARY KEY);
CREATE TABLE parts (id int, at date, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM ('2024-01-01') TO ('2025-01-01');
CREATE TABLE parts_2 PARTITION OF parts FOR VALUES FROM ('2025-01-01') TO ('2026-01-01') PARTITION BY RANGE (id);
CREATE TABLE parts_2a PARTITION OF parts_2 FOR VALUES FROM (0) TO (1000);
ALTER TABLE parts_2a REPLICA IDENTITY NOTHING`

var identityNames = []string{"public.by_default", "public.by_index", "public.by_nothing", "public.by_full", `public.Odd "table'é`, "public.parts"}

func TestUninstallLeavesNothing(t *testing.T) {
	t.Parallel()
	_, conn := database(t, identityTables)
	before := footprint(t, conn)
	for range 2 { // a second time, as if never installed
		install(t, conn, identityNames...)
		var full int
		if err := conn.QueryRow(t.Context(), `SELECT count(*) FROM pg_class WHERE relreplident = 'f' AND relkind = 'r'`).Scan(&full); err != nil || full != 7 {
			t.Errorf("%d tables have FULL, want 7 (%v)", full, err)
		}
		if err := Uninstall(t.Context(), conn, testPublications); err != nil {
			t.Fatal(err)
		}
		if after := footprint(t, conn); after != before {
			t.Errorf("before:\n%s\nafter:\n%s", before, after)
		}
	}
	if err := Uninstall(t.Context(), conn, testPublications); err != nil {
		t.Errorf("uninstalling what isn't there: %v", err)
	}
}

func TestUninstallKeepsWhatTheApplicationChangedSince(t *testing.T) {
	t.Parallel()
	_, conn := database(t, identityTables)
	install(t, conn, identityNames...)
	mustExec(t, conn, `ALTER TABLE by_default REPLICA IDENTITY NOTHING`, `DROP TABLE by_nothing`, `DROP INDEX "the ""odd"" index"`)
	if err := Uninstall(t.Context(), conn, testPublications); err != nil {
		t.Fatal(err)
	}
	var a, b string
	if err := conn.QueryRow(t.Context(), `SELECT (SELECT relreplident::text FROM pg_class WHERE relname = 'by_default'), (SELECT relreplident::text FROM pg_class WHERE relname = 'by_index')`).Scan(&a, &b); err != nil || a != "n" || b != "d" {
		t.Errorf("identities %s and %s (%v), want n, as the application set it, and d for the index that is gone", a, b, err)
	}
}

// TestPrintedSQLGivesTheSameState: what a DBA runs instead of init.
func TestPrintedSQLGivesTheSameState(t *testing.T) {
	t.Parallel()
	_, ours := database(t, identityTables)
	install(t, ours, identityNames...)
	_, theirs := database(t, identityTables)
	text := pendingSQL(t, theirs)
	for _, s := range plan(t, theirs, identityNames...) {
		text += s.String()
	}
	if _, err := theirs.PgConn().Exec(t.Context(), text).ReadAll(); err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	if a, b := footprint(t, ours), footprint(t, theirs); a != b {
		t.Errorf("init gives\n%s\nthe printed SQL gives\n%s", a, b)
	}
	if err := Migrate(t.Context(), theirs); err != nil {
		t.Errorf("init after the printed SQL: %v", err)
	}
	if left := plan(t, theirs, identityNames...); len(left) > 0 {
		t.Errorf("init after the printed SQL would still do %v", left)
	}
	if err := Uninstall(t.Context(), theirs, testPublications); err != nil {
		t.Errorf("uninstall after the printed SQL: %v", err)
	}
}

func pendingSQL(t *testing.T, conn *pgx.Conn) string {
	t.Helper()
	pending, err := PendingMigrations(t.Context(), conn)
	if err != nil {
		t.Fatal(err)
	}
	return MigrationSQL(pending)
}

// TestInitUpgradesAnOlderInstallation: of a walgate that knew no pushes, and of one that knew no attachments.
func TestInitUpgradesAnOlderInstallation(t *testing.T) {
	t.Parallel()
	_, fresh := database(t, identityTables)
	install(t, fresh, identityNames...)
	want := footprint(t, fresh)
	for _, table := range []string{"walgate.pushes", "walgate.attachments"} {
		if !strings.Contains(want, "published "+table+"\n") {
			t.Errorf("a fresh installation doesn't publish %s", table)
		}
	}
	for name, older := range map[string][]string{
		"no pushes":      {MigrationSQL([]string{"001_source.sql"}), `CREATE PUBLICATION walgate_events WITH (publish = 'insert')`},
		"no attachments": {MigrationSQL([]string{"001_source.sql", "002_pushes.sql", "003_sessions.sql"}), `CREATE PUBLICATION walgate_events FOR TABLE ONLY walgate.pushes WITH (publish = 'insert')`},
	} {
		_, printed := database(t, identityTables)
		_, migrated := database(t, identityTables)
		mustExec(t, printed, older...)
		mustExec(t, migrated, older...)
		text := pendingSQL(t, printed)
		for _, s := range plan(t, printed, identityNames...) {
			text += s.String()
		}
		if _, err := printed.PgConn().Exec(t.Context(), text).ReadAll(); err != nil {
			t.Fatalf("%s: %v in\n%s", name, err, text)
		}
		install(t, migrated, identityNames...)
		for how, conn := range map[string]*pgx.Conn{"printed": printed, "init": migrated} {
			if got := footprint(t, conn); got != want {
				t.Errorf("%s: %s gives\n%s\na fresh installation\n%s", name, how, got, want)
			}
			if pending, err := PendingMigrations(t.Context(), conn); err != nil || len(pending) > 0 {
				t.Errorf("%s: %s leaves %v to do (%v)", name, how, pending, err)
			}
		}
	}
}

// TestSigningKeyIsMade: each installation has its own, long enough to sign with.
func TestSigningKeyIsMade(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	for range 2 {
		_, conn := database(t)
		install(t, conn)
		var key []byte
		if err := conn.QueryRow(t.Context(), `SELECT value FROM walgate.secrets WHERE name = 'signing_key'`).Scan(&key); err != nil || len(key) != 32 || seen[string(key)] {
			t.Errorf("key of %d bytes, seen before: %v (%v)", len(key), seen[string(key)], err)
		}
		seen[string(key)] = true
	}
}

func TestPlanTakesOutWhatIsNotWanted(t *testing.T) {
	t.Parallel()
	_, conn := database(t, identityTables)
	install(t, conn, identityNames...)
	install(t, conn, "public.by_full", "public.parts") // fails unless the plan ends where it should
	published, err := ReadPublished(t.Context(), conn, testPublications)
	if err != nil || len(published.Tables) != 2 {
		t.Errorf("published are %+v (%v), want 2 tables", published, err)
	}
}

// TestJoinWaitsForWritersInFlight: invariant "no row in flight escapes". A writer has rows in an open transaction when the
// table joins; the join must come after its commit, and what is written after the join is decoded whole.
func TestJoinWaitsForWritersInFlight(t *testing.T) {
	t.Parallel()
	for name, identity := range map[string]string{
		"identity altered": "DEFAULT",
		"identity full":    "FULL", // nothing to alter: only the lock waits
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			joinBesideWriter(t, identity)
		})
	}
}

func joinBesideWriter(t *testing.T, identity string) {
	dsn, conn := database(t, `CREATE TABLE tasks (id int PRIMARY KEY, v text); ALTER TABLE tasks REPLICA IDENTITY `+identity)
	if err := Migrate(t.Context(), conn); err != nil {
		t.Fatal(err)
	}
	writer, watcher := connection(t, dsn), connection(t, dsn)
	mustExec(t, writer, `BEGIN`, `INSERT INTO tasks VALUES (1, 'in flight')`)
	steps := plan(t, conn, "public.tasks")
	joined := make(chan error, 1)
	go func() {
		for _, s := range steps {
			if err := Execute(t.Context(), conn, s); err != nil {
				joined <- err
				return
			}
		}
		joined <- nil
	}()
	awaitLockWait(t, watcher)
	select {
	case err := <-joined:
		t.Fatalf("the table joined while a writer was in flight (%v)", err)
	default:
	}
	mustExec(t, writer, `UPDATE tasks SET v = 'still in flight'`, `COMMIT`)
	if err := <-joined; err != nil {
		t.Fatal(err)
	}
	slot := "join_" + conn.Config().Database[len(conn.Config().Database)-10:]
	mustExec(t, watcher, fmt.Sprintf(`SELECT pg_create_logical_replication_slot('%s', 'pgoutput')`, slot))
	mustExec(t, writer, `UPDATE tasks SET v = 'after'`)
	var olds int
	err := watcher.QueryRow(t.Context(), `SELECT count(*) FROM pg_logical_slot_get_binary_changes($1, NULL, NULL, 'proto_version', '1', 'publication_names', 'walgate')
		WHERE get_byte(data, 0) = ascii('U') AND get_byte(data, 5) = ascii('O')`, slot).Scan(&olds)
	if err != nil || olds != 1 {
		t.Errorf("%d updates with the whole old row after the join (%v), want 1", olds, err)
	}
}

func awaitLockWait(t *testing.T, watcher *pgx.Conn) {
	t.Helper()
	deadline, tick := time.After(20*time.Second), time.NewTicker(5*time.Millisecond)
	defer tick.Stop()
	for {
		var waits bool
		err := watcher.QueryRow(t.Context(), `SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))`).Scan(&waits)
		if err != nil {
			t.Fatal(err)
		}
		if waits {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatal("the join never waited for the writer's lock")
		}
	}
}

// TestJoinGivesWayToTheApplication: behind a long transaction the join doesn't hold up the application for longer than
// its lock timeout, and it succeeds once the way is free.
func TestJoinGivesWayToTheApplication(t *testing.T) {
	t.Parallel()
	dsn, conn := database(t, `CREATE TABLE tasks (id int PRIMARY KEY)`)
	if err := Migrate(t.Context(), conn); err != nil {
		t.Fatal(err)
	}
	long, other, watcher := connection(t, dsn), connection(t, dsn), connection(t, dsn)
	mustExec(t, long, `BEGIN`, `INSERT INTO tasks VALUES (1)`)
	steps := plan(t, conn, "public.tasks")
	joined := make(chan error, 1)
	go func() {
		var err error
		for _, s := range steps {
			err = errors.Join(err, Execute(t.Context(), conn, s))
		}
		joined <- err
	}()
	awaitLockWait(t, watcher)
	began := time.Now()
	mustExec(t, other, `INSERT INTO tasks VALUES (2)`) // queues behind the join
	t.Logf("the application waited %s for a join that waits itself", time.Since(began).Round(time.Millisecond))
	mustExec(t, long, `COMMIT`)
	if err := <-joined; err != nil {
		t.Errorf("the join failed although the way was free: %v", err)
	}
}

// TestGeneratedColumnsDontBreakTheApplication: with FULL, PostgreSQL 18 refuses UPDATE unless they are published.
func TestGeneratedColumnsDontBreakTheApplication(t *testing.T) {
	t.Parallel()
	_, conn := database(t, `CREATE TABLE g (id int PRIMARY KEY, v int, twice int GENERATED ALWAYS AS (v * 2) STORED)`)
	install(t, conn, "public.g")
	mustExec(t, conn, `INSERT INTO g VALUES (1, 2)`, `UPDATE g SET v = 3`, `DELETE FROM g`)
	c := loadTables(t, conn, "public.g")
	if !c.Tables[0].Columns[2].Generated || strings.Contains(c.Tables[0].Shape(), "twice") {
		t.Errorf("the generated column isn't left out: %s", c.Tables[0].Shape())
	}
}

func TestExecuteNamesItsStepInErrors(t *testing.T) {
	t.Parallel()
	_, conn := database(t)
	err := Execute(t.Context(), conn, Step{What: "let public.x join", Statements: []string{`ALTER TABLE nowhere REPLICA IDENTITY FULL`}})
	var pg *pgconn.PgError
	if !errors.As(err, &pg) || !strings.Contains(err.Error(), "let public.x join") {
		t.Errorf("error %v", err)
	}
}

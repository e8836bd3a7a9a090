package migrate

import (
	"context"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/fstest"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/internal/pgserver"
)

func TestMain(m *testing.M) { os.Exit(pgserver.Main(m)) }

func connection(t *testing.T, dsn string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

func files(pairs ...string) fstest.MapFS {
	out := fstest.MapFS{}
	for i := 0; i < len(pairs); i += 2 {
		out[pairs[i]] = &fstest.MapFile{Data: []byte(pairs[i+1])}
	}
	return out
}

func applied(t *testing.T, conn *pgx.Conn) string {
	t.Helper()
	var s string
	if err := conn.QueryRow(t.Context(), `SELECT coalesce(string_agg(part || '/' || name, ' ' ORDER BY part, name), '') FROM walgate.migrations`).Scan(&s); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestUpAppliesEachFileOnceAndInOrder(t *testing.T) {
	t.Parallel()
	conn := connection(t, pgserver.ForTest(t).Database(t))
	first := files("002_b.sql", `INSERT INTO walgate.a VALUES (2); INSERT INTO walgate.a VALUES (3)`, "001_a.sql", `CREATE TABLE walgate.a (n int)`, "README", `not SQL`)
	for range 2 {
		if err := Up(t.Context(), conn, "log", first); err != nil {
			t.Fatal(err)
		}
	}
	first["003_c.sql"] = &fstest.MapFile{Data: []byte(`INSERT INTO walgate.a VALUES (4)`)}
	if err := Up(t.Context(), conn, "log", first); err != nil {
		t.Fatal(err)
	}
	if err := Up(t.Context(), conn, "source", files("001_a.sql", `CREATE TABLE walgate.b (n int)`)); err != nil {
		t.Errorf("another part with a file of the same name: %v", err)
	}
	var n int
	if err := conn.QueryRow(t.Context(), `SELECT count(*) FROM walgate.a`).Scan(&n); err != nil || n != 3 {
		t.Errorf("%d rows, want 3 (%v)", n, err)
	}
	if got := applied(t, conn); got != "log/001_a.sql log/002_b.sql log/003_c.sql source/001_a.sql" {
		t.Errorf("applied %s", got)
	}
}

func TestFailedFileLeavesNothingAndIsNamed(t *testing.T) {
	t.Parallel()
	conn := connection(t, pgserver.ForTest(t).Database(t))
	broken := files("001_a.sql", `CREATE TABLE walgate.a (n int)`, "002_b.sql", `CREATE TABLE walgate.b (n int); SELECT 1/0`)
	if err := Up(t.Context(), conn, "log", broken); err == nil || !strings.Contains(err.Error(), "002_b.sql") {
		t.Errorf("error %v, want one that names 002_b.sql", err)
	}
	if got := applied(t, conn); got != "log/001_a.sql" {
		t.Errorf("applied %s", got)
	}
	broken["002_b.sql"] = &fstest.MapFile{Data: []byte(`CREATE TABLE walgate.b (n int)`)}
	if err := Up(t.Context(), conn, "log", broken); err != nil {
		t.Errorf("after mending the file: %v", err)
	}
}

func TestInstancesMayStartTogether(t *testing.T) {
	t.Parallel()
	dsn := pgserver.ForTest(t).Database(t)
	fsys := files("001_a.sql", `CREATE TABLE walgate.a (n int)`, "002_b.sql", `INSERT INTO walgate.a VALUES (1)`)
	var wg sync.WaitGroup
	for range 6 {
		conn := connection(t, dsn)
		wg.Go(func() {
			if err := Up(t.Context(), conn, "log", fsys); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	var n int
	if err := connection(t, dsn).QueryRow(t.Context(), `SELECT count(*) FROM walgate.a`).Scan(&n); err != nil || n != 1 {
		t.Errorf("%d rows, want 1 (%v)", n, err)
	}
}

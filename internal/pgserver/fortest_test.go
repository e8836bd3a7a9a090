package pgserver

import (
	"testing"

	"github.com/jackc/pgx/v5"
)

func TestDatabasesAreSeparateAndDropped(t *testing.T) {
	t.Parallel()
	s := ForTest(t)
	var name string
	t.Run("use", func(t *testing.T) {
		a, b := s.Database(t), s.Database(t)
		exec1(t, a, "CREATE TABLE only_here ()")
		if query[bool](t, b, "SELECT to_regclass('only_here') IS NOT NULL") {
			t.Error("one test's table shows in another database")
		}
		exec1(t, a, "SELECT pg_create_logical_replication_slot('dropped_with_' || left(md5(current_database()), 8), 'pgoutput')")
		name = query[string](t, a, "SELECT current_database()::text")
		conn, err := pgx.Connect(t.Context(), a)
		if err != nil {
			t.Fatal(err)
		}
		// Still connected when the database is dropped, as a test that fails half way leaves it.
		if _, err := conn.Exec(t.Context(), "BEGIN"); err != nil {
			t.Fatal(err)
		}
	})
	if query[bool](t, s.DSN("postgres"), "SELECT EXISTS (SELECT FROM pg_database WHERE datname = '"+name+"')") {
		t.Errorf("database %s is still there after its test", name)
	}
	if query[bool](t, s.DSN("postgres"), "SELECT EXISTS (SELECT FROM pg_replication_slots WHERE database = '"+name+"')") {
		t.Errorf("database %s left its slot", name)
	}
}

func TestForTestSharesOneServer(t *testing.T) {
	t.Parallel()
	first := ForTest(t)
	if second := ForTest(t); first != second {
		t.Error("two calls started two servers")
	}
}

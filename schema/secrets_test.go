package schema

import (
	"bytes"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/walgate/walgate/internal/pgserver"
)

// TestSigningKey: everybody has the key that Migrate made, and, where it was deleted, one and the same new one.
func TestSigningKey(t *testing.T) {
	t.Parallel()
	pool, err := pgxpool.New(t.Context(), pgserver.ForTest(t).Database(t))
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	if _, err := SigningKey(t.Context(), pool); err == nil {
		t.Error("a key without walgate's tables")
	}
	conn, err := pool.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Release()
	if err := Migrate(t.Context(), conn.Conn()); err != nil {
		t.Fatal(err)
	}
	together := func() []byte {
		var keys [8][]byte
		var wg sync.WaitGroup
		for i := range keys {
			wg.Go(func() {
				var err error
				if keys[i], err = SigningKey(t.Context(), pool); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		for _, k := range keys {
			if !bytes.Equal(k, keys[0]) || len(k) != 32 {
				t.Errorf("keys %x and %x", keys[0], k)
			}
		}
		return keys[0]
	}
	first := together()
	mustExec(t, conn.Conn(), `DELETE FROM walgate.secrets`)
	if second := together(); bytes.Equal(first, second) {
		t.Error("a deleted key is made anew as it was")
	}
	// Another instance is making it: its key is waited for and taken.
	mustExec(t, conn.Conn(), `DELETE FROM walgate.secrets`, `BEGIN`, `INSERT INTO walgate.secrets VALUES ('signing_key', 'theirs')`)
	got := make(chan []byte, 1)
	go func() {
		key, err := SigningKey(t.Context(), pool)
		if err != nil {
			t.Error(err)
		}
		got <- key
	}()
	for waiting := false; !waiting; {
		if err := pool.QueryRow(t.Context(), `SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%walgate.secrets%')`).Scan(&waiting); err != nil {
			t.Fatal(err)
		}
	}
	mustExec(t, conn.Conn(), `COMMIT`)
	if key := <-got; string(key) != "theirs" {
		t.Errorf("got %x, not the key that was being made", key)
	}
}

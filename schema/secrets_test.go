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
}

package schema

import (
	"context"
	"fmt"
	"strconv"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/internal/pgserver"
)

// BenchmarkPush locks and writes rows of a table of 100,000 in one transaction, as a push does; ns/row is what counts.
func BenchmarkPush(b *testing.B) {
	dsn := pgserver.ForTest(b).Database(b)
	pool := sourcePool(b, dsn)
	ctx := context.Background()
	if _, err := pool.Exec(ctx, `CREATE TABLE public.items (id int PRIMARY KEY, title text, n int, at timestamptz);
		INSERT INTO public.items SELECT i, 'title', i, now() FROM generate_series(1, 100000) i; ANALYZE public.items`); err != nil {
		b.Fatal(err)
	}
	table := loadTable(b, pool, "public.items")
	for _, rows := range []int{1, 50, 1000} {
		b.Run(strconv.Itoa(rows), func(b *testing.B) {
			next := 0
			for b.Loop() {
				err := inTx(b, pool, func(tx pgx.Tx) error {
					asks := make([]Ask, rows)
					for i := range asks {
						next = (next + 7919) % 100_000
						asks[i].Key = []string{strconv.Itoa(next + 1)}
						asks[i].Data = fmt.Appendf(nil, `{"title":"title %d","n":%[1]d,"at":"2026-01-01T00:00:00+00:00"}`, next)
					}
					found, err := LockRows(ctx, tx, table, asks)
					if err != nil {
						return err
					}
					writes := make([]Write, rows)
					for i, f := range found {
						writes[i] = Write{Table: table, Kind: Update, Key: f.Key, Data: asks[i].Data, Columns: []string{"title", "n", "at"}}
					}
					_, err = ExecWrites(ctx, tx, writes)
					return err
				})
				if err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*rows), "ns/row")
		})
	}
}

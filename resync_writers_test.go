package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/url"
	"slices"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/walgate/walgate/internal/pgserver"
)

const (
	resyncWriters = 8
	resyncRounds  = 3
	resyncKeys    = 200 // Few, so that writers meet on the same rows.
)

const resyncWritersSchema = resyncItems + `;
	CREATE TABLE notes (team integer, code text COLLATE "C", body text, PRIMARY KEY (team, code));
	INSERT INTO items SELECT i, 0, 'first' FROM generate_series(1, 100) i;
	INSERT INTO notes SELECT i % 5, 'code ' || i, 'first' FROM generate_series(1, 100) i`

const resyncWritersPolicy = resyncItemsPolicy + "  notes: {table: public.notes, scope: {team: claims.teams}}\n"

// What the caller with teams 1 and 3 may see.
const resyncWritersQuery = resyncItemsQuery + `
	UNION ALL SELECT 'notes/' || format('["%s","%s"]', team, code), row_to_json(notes)::text FROM notes WHERE team IN (1, 3)`

// pausedWriters are writers at full speed that stop between two transactions when asked to.
type pausedWriters struct {
	gate  sync.RWMutex // Held for reading by each writer during a transaction.
	count int          // Transactions committed; guarded by mu.
	mu    sync.Mutex
}

// write runs random transactions until ctx ends. Only failures that the application itself makes are let pass.
func (w *pausedWriters) write(ctx context.Context, dsn string, random *rand.Rand) error {
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	for ctx.Err() == nil {
		w.gate.RLock()
		_, err := conn.Exec(context.WithoutCancel(ctx), randomTransaction(random), pgx.QueryExecModeSimpleProtocol)
		w.gate.RUnlock()
		var pg *pgconn.PgError
		if errors.As(err, &pg) && (pg.Code == "23505" || pg.Code == "40P01") { // Unique violation, deadlock.
			if _, err := conn.Exec(context.WithoutCancel(ctx), `ROLLBACK`); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			return err
		}
		w.mu.Lock()
		w.count++
		w.mu.Unlock()
	}
	return nil
}

func randomTransaction(random *rand.Rand) string {
	sql := "BEGIN; SET LOCAL synchronous_commit = " + []string{"on", "off", "local"}[random.IntN(3)]
	for range 1 + random.IntN(4) {
		if random.IntN(4) == 0 {
			sql += "; SAVEPOINT a"
		}
		sql += "; " + randomStatement(random)
	}
	if random.IntN(10) == 0 {
		return sql + "; ROLLBACK"
	}
	return sql + "; COMMIT"
}

func randomStatement(random *rand.Rand) string {
	key, other, n, team := random.IntN(resyncKeys), random.IntN(resyncKeys), random.IntN(1000), random.IntN(5)
	switch random.IntN(9) {
	case 0, 1:
		return fmt.Sprintf(`INSERT INTO items VALUES (%d, %d, 'inserted') ON CONFLICT (id) DO UPDATE SET n = %d`, key, n, n)
	case 2:
		return fmt.Sprintf(`UPDATE items SET n = %d, body = repeat(md5('%d'), 100) WHERE id = %d`, n, n, key)
	case 3:
		return fmt.Sprintf(`DELETE FROM items WHERE id = %d`, key)
	case 4:
		return fmt.Sprintf(`UPDATE items SET id = %d WHERE id = %d AND NOT EXISTS (SELECT FROM items WHERE id = %d)`, other, key, other)
	case 5:
		return fmt.Sprintf(`INSERT INTO notes VALUES (%d, 'code %d', 'inserted %d') ON CONFLICT DO NOTHING`, team, key, n)
	case 6:
		return fmt.Sprintf(`UPDATE notes SET team = %d WHERE code = 'code %d' AND NOT EXISTS (SELECT FROM notes WHERE team = %d AND code = 'code %d')`, team, key, team, key)
	case 7:
		return fmt.Sprintf(`DELETE FROM notes WHERE code = 'code %d'`, key)
	default:
		return fmt.Sprintf(`UPDATE notes SET body = 'changed %d' WHERE code = 'code %d'`, n, key)
	}
}

// TestFullUnderWriters: many resyncs of all kinds at once with writers at full speed; each, with the pull from its L,
// gives the table.
func TestFullUnderWriters(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	dsn := pgserver.ForTest(t).Database(t)
	g := startResyncGateway(t, dsn, resyncWritersSchema, resyncWritersPolicy)
	conn := connect(t, dsn)
	w := &pausedWriters{}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, resyncWriters)
	for i := range resyncWriters {
		go func() { ended <- w.write(ctx, dsn, rand.New(rand.NewPCG(seed, uint64(i)))) }()
	}
	queries := []string{"limit=1000", "limit=7", "limit=all", "limit=61&collections=notes,items"}
	merged := resyncReplica{}
	mergedLast, _ := g.full(t, "limit=all", merged, nil)
	for range resyncRounds {
		replicas, lasts := []resyncReplica{}, []string{}
		for _, query := range queries {
			replica := resyncReplica{}
			last, _ := g.full(t, query, replica, nil)
			replicas, lasts = append(replicas, replica), append(lasts, last)
		}
		mergedLast, _ = g.full(t, "limit=50&since="+url.QueryEscape(mergedLast), merged, nil)
		w.gate.Lock() // The writers pause.
		resyncLogged(t, conn)
		for i, replica := range slices.Concat(replicas, []resyncReplica{merged}) {
			from := mergedLast
			if i < len(lasts) {
				from = lasts[i]
			}
			last, ok := g.pull(t, from, replica)
			if !ok {
				t.Fatalf("pull from L of %q demands a full resync", slices.Concat(queries, []string{"since"})[i])
			}
			replica.requireTable(t, conn, resyncWritersQuery)
			if i == len(lasts) {
				mergedLast = last
			}
		}
		w.gate.Unlock()
	}
	cancel()
	for range resyncWriters {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	t.Logf("%d transactions were committed meanwhile", w.count)
}

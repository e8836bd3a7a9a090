package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/internal/badlink"
	"github.com/walgate/walgate/internal/pgserver"
)

// TestConvergencePush is the convergence test of clients that write. Devices edit what they hold while they are offline,
// each table under another conflict policy, and push: in batches, late, in any order, twice, with answers that are lost and a
// gateway that is killed, while the application writes the same rows. At the end every replica is the table; every
// acknowledged change was committed, and every change at most once; nothing that was rejected is there; and the model says
// the same of each outcome and each row that a push has written, from the rows' history alone, which the application
// keeps by a trigger.
//
// Seeds are chosen as in TestConvergence.
func TestConvergencePush(t *testing.T) {
	t.Parallel()
	first, last := seedsToRun(t)
	for seed := first; seed <= last; seed++ {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			t.Parallel()
			convergePushing(t, seed)
		})
	}
}

const pushDocuments = 25 // keys of each table

// draftsSQL makes the history's table and the function that keeps it.
const draftsSQL = matrixFunctionSQL + `
CREATE SEQUENCE revisions;
CREATE TABLE history (seq bigserial PRIMARY KEY, xid xid8 NOT NULL, "table" text NOT NULL, id text NOT NULL, new jsonb, claims text);
CREATE FUNCTION number_revision() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN new.rev = nextval('revisions'); RETURN new; END $$;
CREATE FUNCTION keep_history() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
	INSERT INTO history (xid, "table", id, new, claims) VALUES (pg_current_xact_id(), TG_TABLE_NAME, coalesce(new.id, old.id), to_jsonb(new), nullif(current_setting('request.jwt.claims', true), ''));
	RETURN NULL; END $$;
`

const draftsTableSQL = `CREATE TABLE %[1]s (id text PRIMARY KEY, owner_id text NOT NULL, title text, body text, n int, rev bigint, deleted_at timestamptz);
CREATE TRIGGER number_revision BEFORE INSERT OR UPDATE ON %[1]s FOR EACH ROW EXECUTE FUNCTION number_revision();
CREATE TRIGGER keep_history AFTER INSERT OR UPDATE OR DELETE ON %[1]s FOR EACH ROW EXECUTE FUNCTION keep_history();
`

// draftsRowsSQL comes once the gateway runs: rows that it has never seen can't be brought back.
const draftsRowsSQL = `INSERT INTO %s (id, owner_id, title, n) SELECT 'k' || g, 'u' || g %% 3, 'first ' || g, g FROM generate_series(0, %d, 2) g;
`

// pushConvergence is one seed's run.
type pushConvergence struct {
	*convergence
	policies map[string]modelPolicy // by table; sees is each device's own
	tables   []string
	devices  []*pusher
	ledger   *pushLedger
}

func convergePushing(t *testing.T, seed uint64) {
	began := time.Now()
	v := &pushConvergence{convergence: &convergence{t: t, seed: seed, faults: map[string]int{}}, policies: map[string]modelPolicy{}}
	defer func() { v.report(began) }()
	v.begin(t)
	deadly := deadlyFaults
	if seed%4 != 0 { // a slot that is dropped takes knowledge with it, which makes the model's verdict milder
		deadly = deadly[:len(deadly)-1]
	}
	cards := deck(v.rng(0), faults, deadly, deadly)
	for round := range uint64(convergenceRounds) {
		ctx, cancel := context.WithTimeout(t.Context(), convergenceRound)
		v.run(ctx, v.rng(round+1), &cards)
		cancel()
		if !t.Failed() {
			v.settle(fmt.Sprintf("round %d", round))
		}
		if t.Failed() {
			return
		}
	}
	v.ledger.verify(v)
}

func (v *pushConvergence) begin(t *testing.T) {
	ctx := t.Context()
	v.server = pgserver.StartForTest(t, pgserver.Options{Settings: map[string]string{"deadlock_timeout": "50ms"}})
	v.dsn = v.server.Database(t)
	v.storage = v.dsn
	if v.seed%2 == 1 {
		v.storage = v.server.Database(t)
	}
	sql, rows, collections := draftsSQL, "", ""
	for i, conflict := range matrixConflicts {
		p := modelPolicy{key: "id", columns: []string{"owner_id", "title", "body", "n", "rev", "deleted_at"}, conflict: conflict, onDeleted: matrixDeletes[(i+int(v.seed))%3], resolve: bothTitles}
		name, yaml, soft := fmt.Sprintf("drafts_%d", i), conflict, ""
		if conflict == "function" {
			yaml = "{function: public.both_titles}"
		}
		if (i+int(v.seed/3))%2 == 0 {
			p.soft, soft = "deleted_at", "soft_delete: {column: deleted_at}, "
		}
		v.policies[name] = p
		v.tables = append(v.tables, name)
		sql += fmt.Sprintf(draftsTableSQL, name)
		rows += fmt.Sprintf(draftsRowsSQL, name, pushDocuments-1)
		collections += fmt.Sprintf("  %s: {table: public.%[1]s, scope: {owner_id: claims.sub}, %swrite: {roles: [editor], columns: [title, body, n], set: {owner_id: claims.sub}}, conflict: %s, on_deleted: %s}\n",
			name, soft, yaml, p.onDeleted)
	}
	must(t, v.ask(ctx, nil, sql))
	replication, log, source := badlink.To(t, v.dsn), badlink.To(t, v.storage), badlink.To(t, v.dsn)
	v.links = []*badlink.Link{replication, log, source, source}
	head, _, _ := strings.Cut(convergenceConfig, "collections:\n")
	var cfg *Config
	v.gateway, cfg = newGatewayProcess(t, fmt.Sprintf("database: {url: %q, replication_url: %q}\nstorage: {url: %q}\n",
		source.DSN(t, v.dsn), replication.DSN(t, v.dsn), log.DSN(t, v.storage))+head+"push: {echo_timeout: 300ms}\ncollections:\n"+collections)
	v.ledger = &pushLedger{t: t}
	for i, sub := range []string{"u0", "u0", "u1", "u1", "u2"} {
		rng := v.rng(1000 + uint64(i))
		name := fmt.Sprintf("device-%d", i)
		c := newSyncClient(t, cfg, v.gateway.base, name, fmt.Sprintf(`{"sub":%q,"roles":["editor"]}`, sub), rng)
		c.names, c.device = v.tables, name
		v.clients = append(v.clients, c)
		v.devices = append(v.devices, &pusher{syncClient: c, v: v, rng: rng})
	}
	must(t, v.gateway.start(ctx))
	must(t, v.ask(ctx, nil, rows))
}

// run lets application, devices and chaos loose until ctx ends.
func (v *pushConvergence) run(ctx context.Context, rng *rand.Rand, cards *[]fault) {
	var all sync.WaitGroup
	for range 2 {
		w := &writer{t: v.t, dsn: v.dsn, rng: rand.New(rand.NewPCG(rng.Uint64(), 0)), commits: &v.commits}
		all.Go(func() { v.write(ctx, w) })
	}
	for _, d := range v.devices {
		all.Go(func() { d.run(ctx) })
	}
	all.Go(func() { *cards = v.chaos(ctx, rng, *cards, 400*time.Millisecond) })
	all.Wait()
}

// write is the application, which writes slowly enough for pushes without a conflict.
func (v *pushConvergence) write(ctx context.Context, w *writer) {
	defer func() {
		if w.conn != nil {
			w.conn.Close(context.WithoutCancel(ctx))
		}
	}()
	for ; ctx.Err() == nil; pause(ctx, upTo(w.rng, 30*time.Millisecond)) {
		if w.connect(ctx) != nil {
			continue // the server is down
		}
		if err := v.transaction(ctx, w); err != nil && ctx.Err() == nil && !expectedOfWriter(err) {
			v.t.Errorf("the application's statement failed: %v", err)
			return
		}
	}
}

// transaction writes a few documents, each of them once.
func (v *pushConvergence) transaction(ctx context.Context, w *writer) error {
	tx, err := w.conn.Begin(ctx)
	if err != nil {
		return err
	}
	defer tx.Rollback(context.WithoutCancel(ctx))
	table := v.tables[w.rng.IntN(len(v.tables))]
	for _, k := range w.rng.Perm(pushDocuments)[:1+w.rng.IntN(3)] {
		s := one(`INSERT INTO `+table+` (id, owner_id, title, n) VALUES ($1, $2, $3, 1) ON CONFLICT (id) DO UPDATE SET n = excluded.n`, fmt.Sprint("k", k), fmt.Sprint("u", w.rng.IntN(3)), w.word())
		switch id := fmt.Sprint("k", k); w.rng.IntN(10) {
		case 0:
			s = one(`DELETE FROM `+table+` WHERE id = $1`, id)
		case 1:
			s = one(`UPDATE `+table+` SET owner_id = $2 WHERE id = $1`, id, fmt.Sprint("u", w.rng.IntN(3)))
		case 2:
			s = one(`UPDATE `+table+` SET deleted_at = CASE WHEN deleted_at IS NULL THEN now() END WHERE id = $1`, id)
		case 3, 4, 5:
			s = one(`UPDATE `+table+` SET title = $2 WHERE id = $1`, id, w.word())
		case 6, 7:
			s = one(`UPDATE `+table+` SET body = $2, n = $3 WHERE id = $1`, id, w.word(), w.rng.IntN(3))
		}
		if _, err := tx.Exec(ctx, s[0].sql, s[0].args...); err != nil {
			return err
		}
	}
	if w.rng.IntN(8) == 0 { // the row stays locked for a while
		pause(ctx, upTo(w.rng, 150*time.Millisecond))
	}
	if err := tx.Commit(ctx); err != nil {
		return err
	}
	w.commits.Add(1)
	return nil
}

// settle lets every device send what is left, catch up, and compares.
func (v *pushConvergence) settle(when string) {
	ctx, cancel := context.WithTimeout(v.t.Context(), convergenceLimit)
	defer cancel()
	var all sync.WaitGroup
	for _, d := range v.devices {
		all.Go(func() {
			for len(d.queue) > 0 && ctx.Err() == nil && !v.t.Failed() {
				if !d.send(ctx, 0, 0) {
					pause(ctx, 20*time.Millisecond)
				}
			}
			d.lookAway(ctx)
		})
	}
	all.Wait()
	for _, d := range v.devices {
		all.Go(func() {
			for last := error(nil); !v.t.Failed(); pause(ctx, 50*time.Millisecond) {
				err := d.catchUp(ctx)
				if err == nil {
					if err = v.compare(ctx, d); err == nil {
						return
					}
				}
				if ctx.Err() != nil || !errors.Is(err, errAway) && !errors.Is(err, errDiffers) {
					d.broken("%s: no convergence: %v, before %v", when, err, last)
					return
				}
				last = err
			}
		})
	}
	all.Wait()
}

// compare holds a device's replica against the tables.
func (v *pushConvergence) compare(ctx context.Context, d *pusher) error {
	conn, err := pgx.Connect(ctx, v.dsn)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if _, err := conn.Exec(ctx, "SET timezone = 'UTC'"); err != nil {
		return err
	}
	for _, table := range v.tables {
		where := "owner_id = '" + d.caller.sub + "'"
		if v.policies[table].soft != "" {
			where += " AND deleted_at IS NULL"
		}
		rows, err := conn.Query(ctx, "SELECT id, row_to_json(t)::text FROM "+table+" t WHERE "+where)
		if err != nil {
			return err
		}
		want, have := map[string]string{}, map[string]string{}
		var id, doc string
		if _, err := pgx.ForEachRow(rows, []any{&id, &doc}, func() error { want[id] = doc; return nil }); err != nil {
			return err
		}
		for id, doc := range d.replica.documents[table] {
			have[id] = string(doc)
		}
		if !reflect.DeepEqual(want, have) {
			return fmt.Errorf("%w: %s is\n   %v\n  want\n   %v", errDiffers, table, have, want)
		}
	}
	return nil
}

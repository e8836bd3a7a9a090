package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/internal/badlink"
	"github.com/walgate/walgate/internal/pgserver"
)

const (
	convergenceSeedsEnv = "WALGATE_TEST_SEEDS" // so many seeds, or a range such as 200..299
	convergenceSeeds    = 2
	convergenceRounds   = 3
	convergenceRound    = 3 * time.Second
	convergenceWriters  = 5
	convergenceLimit    = 90 * time.Second // for clients to hold what SELECT returns, once writes have stopped
	convergenceSecret   = "0123456789abcdef0123456789abcdef"
)

// TestConvergence holds invariant 9: clients that follow the protocol end with exactly what SELECT returns under their
// policy, whatever happened in between; and on the way no client sees versions go back, half a transaction, or a row
// that it may not see.
//
// What the application, the clients and the chaos do follows from the seed; how they interleave doesn't, so a seed that
// failed may have to run a few times. WALGATE_TEST_SEEDS=200 runs seeds 1 to 200, 200..299 those, and 7..7 or
// -run 'TestConvergence/seed=7' that one. Each seed logs a line of JSON that says what it did. Seeds run in parallel, as
// many as -parallel says.
func TestConvergence(t *testing.T) {
	t.Parallel()
	first, last := seedsToRun(t)
	for seed := first; seed <= last; seed++ {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			t.Parallel()
			converge(t, seed)
		})
	}
}

func seedsToRun(t *testing.T) (first, last uint64) {
	text := os.Getenv(convergenceSeedsEnv)
	if named := regexp.MustCompile(`seed=(\d+)`).FindStringSubmatch(flag.Lookup("test.run").Value.String()); named != nil {
		text = named[1] + ".." + named[1]
	}
	if text == "" {
		return 1, convergenceSeeds
	}
	from, to, ranged := strings.Cut(text, "..")
	if !ranged {
		from, to = "1", text
	}
	first, err := strconv.ParseUint(from, 10, 64)
	last, err2 := strconv.ParseUint(to, 10, 64)
	if err = errors.Join(err, err2); err != nil {
		t.Fatalf("%s: %v", convergenceSeedsEnv, err)
	}
	return first, last
}

// convergence is one seed's run.
type convergence struct {
	t       *testing.T
	seed    uint64
	server  *pgserver.Server // of the application
	store   *pgserver.Server // of the log, where that is another one
	dsn     string           // of the application, without a link
	storage string           // of the log, without a link
	links   []*badlink.Link  // between gateway and databases: replication, log, and everything else of the source
	gateway *gatewayProcess
	clients []*syncClient
	commits atomic.Int64
	pace    time.Duration // pause of a writer and a client between two of their steps
	tables  sync.Mutex    // held while a table isn't there, and while the gateway starts

	altering sync.Mutex  // held while a table is altered, and while the slot is made
	torn     atomic.Bool // transactions may arrive in parts until the next settling

	counting sync.Mutex
	faults   map[string]int // what went wrong, by kind
}

func (v *convergence) rng(stream uint64) *rand.Rand { return rand.New(rand.NewPCG(v.seed, stream)) }

func (v *convergence) count(what string) {
	v.counting.Lock()
	defer v.counting.Unlock()
	v.faults[what]++
}

func converge(t *testing.T, seed uint64) {
	began := time.Now()
	v := &convergence{t: t, seed: seed, faults: map[string]int{}}
	defer func() { v.report(began) }()
	v.begin(t)
	cards := deck(v.rng(0), faults, deadlyFaults)
	for round := range uint64(convergenceRounds) {
		began := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), convergenceRound)
		rng := v.rng(round + 1)
		v.run(ctx, round, rng.IntN(3) > 0, func(ctx context.Context) { cards = v.chaos(ctx, rng, cards, 400*time.Millisecond) })
		cancel()
		ran := time.Now()
		if !t.Failed() {
			v.settle(fmt.Sprintf("round %d", round))
		}
		if t.Failed() {
			return
		}
		t.Logf("round %d ran %s and settled in %s", round, ran.Sub(began).Round(time.Millisecond), time.Since(ran).Round(time.Millisecond))
	}
}

// report logs what a seed did, for machines.
func (v *convergence) report(began time.Time) {
	clients := map[string]int{}
	for _, c := range v.clients {
		for name, n := range c.counts {
			clients[name] += n
		}
	}
	summary, err := json.Marshal(map[string]any{"seed": v.seed, "ok": !v.t.Failed(), "seconds": int(time.Since(began).Seconds()),
		"commits": v.commits.Load(), "faults": v.faults, "clients": clients})
	if err != nil {
		v.t.Error(err)
	}
	v.t.Logf("%s", summary)
	if v.t.Failed() {
		v.t.Logf("replay with go test -run '^%s$' .", strings.ReplaceAll(v.t.Name(), "/", "$/^"))
	}
}

// begin makes the application's tables, the gateway and the clients.
func (v *convergence) begin(t *testing.T) {
	ctx := t.Context()
	v.server = pgserver.StartForTest(t, pgserver.Options{Settings: map[string]string{"deadlock_timeout": "50ms"}})
	v.dsn = v.server.Database(t)
	if err := v.ask(ctx, nil, convergenceSQL); err != nil {
		t.Fatal(err)
	}
	v.storage = v.dsn // the log beside the tables, in another database, or on another server
	switch v.seed % 3 {
	case 1:
		v.storage = v.server.Database(t)
	case 2:
		v.store = pgserver.StartForTest(t, pgserver.Options{})
		v.storage = v.store.Database(t)
	}
	replication, log, source := badlink.To(t, v.dsn), badlink.To(t, v.storage), badlink.To(t, v.dsn)
	v.links = []*badlink.Link{replication, log, source}
	var cfg *Config
	v.gateway, cfg = newGatewayProcess(t, fmt.Sprintf("database: {url: %q, replication_url: %q}\nstorage: {url: %q}\n",
		source.DSN(t, v.dsn), replication.DSN(t, v.dsn), log.DSN(t, v.storage))+convergenceConfig)
	for i, text := range convergenceClaims {
		c := newSyncClient(t, cfg, v.gateway.base, fmt.Sprint(i), text, v.rng(1000+uint64(i)))
		c.names, c.whole, c.pace = c.caller.collections(), v.wholePairs, v.pace
		v.clients = append(v.clients, c)
	}
	if err := v.gateway.start(ctx); err != nil {
		t.Fatal(err)
	}
}

// run lets application, clients and chaos loose until ctx ends. Tables change in some rounds only: the resyncs that follow
// would hide what was missed before.
func (v *convergence) run(ctx context.Context, round uint64, alter bool, chaos func(context.Context)) {
	var all sync.WaitGroup
	for i := range uint64(convergenceWriters) {
		w := &writer{t: v.t, dsn: v.dsn, rng: v.rng(100*(round+1) + i), commits: &v.commits, count: v.count, round: round, tables: &v.tables, altering: &v.altering, torn: &v.torn, pace: v.pace}
		if i == 0 && alter {
			w.role = migrating
		} else if i == 1 {
			w.role = lingering
		}
		all.Go(func() { w.run(ctx) })
	}
	for _, c := range v.clients {
		all.Go(func() { c.run(ctx) })
	}
	all.Go(func() { chaos(ctx) })
	all.Wait()
}

// settle lets every client catch up and compares. It waits for equality, for the catalog's changes are found by polling.
func (v *convergence) settle(when string) {
	ctx, cancel := context.WithTimeout(v.t.Context(), convergenceLimit)
	defer cancel()
	var all sync.WaitGroup
	for _, c := range v.clients {
		all.Go(func() {
			for last := error(nil); ; {
				err := c.catchUp(ctx)
				if err == nil {
					if err = v.compare(ctx, c); err == nil {
						return
					}
				}
				if ctx.Err() != nil {
					c.broken("%s: no convergence within %s: %v", when, convergenceLimit, last)
					return
				}
				if !errors.Is(err, errAway) && !errors.Is(err, errDiffers) {
					c.broken("%s: %v", when, err)
					return
				}
				last = err
				pause(ctx, 100*time.Millisecond)
			}
		})
	}
	all.Wait()
	v.torn.Store(false)
}

var errDiffers = errors.New("the replica differs from SELECT")

// compare holds a client's replica against what SELECT returns under its policy.
func (v *convergence) compare(ctx context.Context, c *syncClient) error {
	conn, err := pgx.Connect(ctx, v.dsn)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	return compareReplica(ctx, conn, c)
}

func compareReplica(ctx context.Context, conn *pgx.Conn, c *syncClient) error {
	if _, err := conn.Exec(ctx, "SET timezone = 'UTC'; SET datestyle = 'ISO'; SET extra_float_digits = 1"); err != nil {
		return err
	}
	for _, name := range c.names {
		want, err := oracle(ctx, conn, c.caller, name)
		if err != nil {
			return fmt.Errorf("oracle of %s: %w", name, err)
		}
		have := c.replica.documents[name]
		for id, doc := range want {
			if got, ok := have[id]; !ok {
				return fmt.Errorf("%w: %s %s is missing (%d of %d are there): %.300s", errDiffers, name, id, len(have), len(want), doc)
			} else if !sameDocument(got, doc) {
				return fmt.Errorf("%w: %s %s is\n   %.600s\n  want\n   %.600s", errDiffers, name, id, got, doc)
			}
		}
		for id, doc := range have {
			if _, ok := want[id]; !ok {
				return fmt.Errorf("%w: %s %s is there but should not be: %.300s", errDiffers, name, id, doc)
			}
		}
	}
	return nil
}

// oracle selects what the caller must hold of a collection.
func oracle(ctx context.Context, conn *pgx.Conn, caller syncCaller, collection string) (map[string][]byte, error) {
	rows, err := conn.Query(ctx, `SELECT attname::text, format_type(atttypid, NULL) FROM pg_attribute
		WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum`, collection)
	if err != nil {
		return nil, err
	}
	columns, err := pgx.CollectRows(rows, func(r pgx.CollectableRow) (c [2]string, err error) { return c, r.Scan(&c[0], &c[1]) })
	if err != nil {
		return nil, err
	}
	if rows, err = conn.Query(ctx, caller.oracleSQL(collection, columns), pgx.QueryExecModeExec); err != nil {
		return nil, err
	}
	want := map[string][]byte{}
	var id, doc string
	_, err = pgx.ForEachRow(rows, []any{&id, &doc}, func() error {
		want[id] = []byte(doc)
		return nil
	})
	return want, err
}

// sameDocument compares byte for byte. A nullable column added later is absent from documents that no change has
// touched since, which means null.
func sameDocument(got, want []byte) bool {
	if bytes.Equal(got, want) {
		return true
	}
	g, w := members(got), members(want)
	for _, m := range w {
		if len(g) > 0 && g[0].name == m.name && bytes.Equal(g[0].value, m.value) {
			g = g[1:]
		} else if !strings.HasPrefix(m.name, "extra_") || string(m.value) != "null" {
			return false
		}
	}
	return len(g) == 0
}

type member struct {
	name  string
	value json.RawMessage
}

// members lists an object's members in their order; nil if it is none.
func members(object []byte) (list []member) {
	d := json.NewDecoder(bytes.NewReader(object))
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return nil
	}
	for d.More() {
		name, err := d.Token()
		text, ok := name.(string)
		if err != nil || !ok {
			return nil
		}
		var value json.RawMessage
		if err := d.Decode(&value); err != nil {
			return nil
		}
		list = append(list, member{text, value})
	}
	if _, err := d.Token(); err != nil && !errors.Is(err, io.EOF) {
		return nil
	}
	return list
}

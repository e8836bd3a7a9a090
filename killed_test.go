package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/internal/failpoint"
	"github.com/walgate/walgate/internal/pgserver"
)

// longEnv makes tests that are short by default take their time.
const longEnv = "WALGATE_TEST_LONG"

const killedConfig = `
auto_init: true
http: {listen: "127.0.0.1:%[1]d"}
limits: {requests_per_second: 100000, burst: 100000}
auth: {jwt: {secret: %[2]q}}
log: {format: text}
collections:
  docs: {table: public.docs, scope: {owner_id: claims.sub}}
  more: {table: public.more, scope: {owner_id: claims.sub}}
`

// death is one kill: the gateway ends at the hit-th passage of the point.
type death struct {
	at  failpoint.Point
	hit int
}

// TestKilledAtEveryStep kills the gateway with SIGKILL at every step of its path, from the first start on, while an
// application writes small, large and interleaved transactions. After each death the log holds a prefix of what the
// application committed, every transaction whole, once, in commit order and under its own xid; versions rise; and the slot
// confirms no more than the log holds. At the end the log holds everything, in the history that it began with, and a client
// that pulled and streamed through all of it holds what SELECT returns without ever having been told to start anew.
func TestKilledAtEveryStep(t *testing.T) {
	t.Parallel()
	server := pgserver.StartForTest(t, pgserver.Options{})
	dsn := server.Database(t)
	k := newKilling(t, dsn, dsn, fmt.Sprintf("database: {url: %q}\n", dsn))
	for _, d := range firstDeaths {
		k.die(d)
		if d.at == failpoint.SlotMade && !k.slotMadeTwice { // nothing is logged yet: the slot may go once more
			k.slotMadeTwice = true
			k.query(nil, `SELECT pg_drop_replication_slot('walgate')`)
			k.app.committed = nil // what was written while the slot was there goes with it
		}
	}
	if err := k.gateway.start(t.Context()); err != nil {
		t.Fatal(err)
	}
	k.compare() // between two deaths there is hardly time for a first full resync
	if err := k.gateway.end(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	k.client.told = true
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var following sync.WaitGroup
	defer following.Wait()
	defer cancel()
	following.Go(func() { k.client.run(ctx) })
	rounds := 1
	if os.Getenv(longEnv) != "" {
		rounds = 20
	}
	for range rounds {
		for _, d := range k.deaths() {
			k.die(d)
		}
	}
	if err := k.gateway.start(t.Context()); err != nil {
		t.Fatal(err)
	}
	k.write(nil)
	k.awaitLogged()
	cancel()
	following.Wait()
	if n := k.check(); n != len(k.app.committed) {
		t.Fatalf("the log holds %d of %d transactions", n, len(k.app.committed))
	}
	k.compare()
	t.Logf("%d deaths, %d transactions, client %v", k.died, len(k.app.committed), k.client.counts)
}

// firstDeaths are those of a first start.
var firstDeaths = []death{
	{failpoint.TableJoins, 1}, {failpoint.TableJoins, 3}, {failpoint.SlotMissing, 1}, {failpoint.SlotMissing, 1},
	{failpoint.SlotMade, 1}, {failpoint.SlotMade, 1}, {failpoint.SlotTaken, 1}, {failpoint.LogClaiming, 1},
	{failpoint.LogClaimed, 1}, {failpoint.HistoryNoted, 1},
}

// deaths are those of a gateway with a log, each step at its first passage and at a later one, most of them within a large
// transaction.
func (k *killing) deaths() []death {
	list := []death{{failpoint.SlotTaken, 1}, {failpoint.LogClaiming, 1}, {failpoint.LogClaimed, 1}, {failpoint.HistoryNoted, 1}}
	for _, d := range []death{{failpoint.Received, 8000}, {failpoint.Decoded, 8000}, {failpoint.HandedOver, 9}, {failpoint.Appended, 7},
		{failpoint.Committing, 5}, {failpoint.CommitSent, 5}, {failpoint.Committed, 5}, {failpoint.Announced, 5}, {failpoint.Acknowledging, 1}, {failpoint.Acknowledged, 1}} {
		list = append(list, death{d.at, 1}, death{d.at, 2 + k.rng.IntN(d.hit)})
	}
	k.rng.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	return list
}

// killing is a gateway that dies again and again, and what the application knows of its own writes.
type killing struct {
	t             *testing.T
	conn          *pgx.Conn // the test's own look at the database
	store         *pgx.Conn // and at the log's, which may be the same
	app           *ledger
	gateway       *gatewayProcess
	client        *syncClient
	log           *changelog.Log
	rng           *rand.Rand
	died          int
	slotMadeTwice bool

	checked int               // transactions of the application that were found in the log
	seen    changelog.Version // the last of their versions
	history string
}

// newKilling prepares a source, whose log is at storage, and a gateway that reaches the two as its URLs say.
func newKilling(t *testing.T, dsn, storage, urls string) *killing {
	ctx := t.Context()
	k := &killing{t: t, rng: rand.New(rand.NewPCG(3, 3))}
	k.conn, k.store = connect(t, dsn), connect(t, storage)
	if _, err := k.conn.Exec(ctx, ledgerSQL); err != nil {
		t.Fatal(err)
	}
	k.app = &ledger{t: t, conn: connect(t, dsn), other: connect(t, dsn), rng: k.rng}
	var err error
	if k.log, err = changelog.Open(ctx, storage, 4); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.log.Close)
	var cfg *Config
	k.gateway, cfg = newGatewayProcess(t, urls+killedConfig)
	k.client = newSyncClient(t, cfg, k.gateway.base, "all", `{"sub":"u0","roles":[]}`, rand.New(rand.NewPCG(3, 4)))
	k.client.names = []string{"docs"}
	return k
}

// die starts the gateway, writes until it has died at the point, and checks what it left.
func (k *killing) die(d death) {
	k.t.Helper()
	if err := k.gateway.launchToDie(d.at, d.hit); err != nil {
		k.t.Fatal(err)
	}
	k.write(&d)
	k.died++
	k.check()
	if k.t.Failed() {
		k.t.Fatalf("after the death at %s:%d, the %dth", d.at, d.hit, k.died)
	}
}

// write lets the application write. With a death it goes on until that has come, at the pace of the log.
func (k *killing) write(d *death) {
	k.t.Helper()
	began := time.Now()
	for {
		if k.slotExists() { // what is written before isn't logged
			k.app.burst()
		}
		if d == nil {
			return
		}
		if k.awaitDeathOrLog() {
			return
		}
		if time.Since(began) > convergenceLimit {
			k.t.Fatalf("the gateway did not die at %s:%d within %s", d.at, d.hit, convergenceLimit)
		}
	}
}

func (k *killing) slotExists() bool {
	n := 0
	k.query(&n, `SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'walgate'`)
	return n > 0
}

// awaitDeathOrLog waits until the gateway has died, which it says, or the log has everything, or for a while.
func (k *killing) awaitDeathOrLog() bool {
	k.t.Helper()
	tick, enough := time.NewTicker(5*time.Millisecond), time.After(200*time.Millisecond)
	defer tick.Stop()
	for {
		died, err := k.gateway.killedItself()
		if err != nil {
			k.t.Fatal(err)
		}
		if died {
			return true
		}
		if n, ok := k.loggedTransactions(); ok && n == len(k.app.committed) {
			return false
		}
		select {
		case <-tick.C:
		case <-enough:
			return false
		}
	}
}

func (k *killing) awaitLogged() {
	k.t.Helper()
	deadline := time.After(convergenceLimit)
	for n := 0; n < len(k.app.committed); n, _ = k.loggedTransactions() {
		select {
		case <-deadline:
			k.t.Fatalf("the log has %d of %d transactions after %s", n, len(k.app.committed), convergenceLimit)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// loggedTransactions counts what the log has; false: there is no log yet.
func (k *killing) loggedTransactions() (n int, exists bool) {
	k.stored(&exists, `SELECT to_regclass('walgate.checkpoint') IS NOT NULL`)
	if exists {
		k.stored(&n, `SELECT count(*) FROM walgate.transactions`)
	}
	return n, exists
}

// query reads one value of the source, nil for none.
func (k *killing) query(into any, sql string) {
	k.t.Helper()
	k.ask(k.conn, into, sql)
}

// stored reads one value of the log's database.
func (k *killing) stored(into any, sql string) {
	k.t.Helper()
	k.ask(k.store, into, sql)
}

func (k *killing) ask(conn *pgx.Conn, into any, sql string) {
	k.t.Helper()
	rows, err := conn.Query(k.t.Context(), sql)
	if err != nil {
		k.t.Fatalf("%s: %v", sql, err)
	}
	defer rows.Close()
	if rows.Next() && into != nil {
		err = rows.Scan(into)
	}
	if rows.Close(); err != nil || rows.Err() != nil {
		k.t.Fatalf("%s: %v, %v", sql, err, rows.Err())
	}
}

// check holds the log against what the application committed and returns how many of its transactions are logged.
func (k *killing) check() int {
	k.t.Helper()
	if _, ok := k.loggedTransactions(); !ok {
		return 0
	}
	confirmed, logged := int64(0), int64(1)<<62 // read in this order: the log may only be ahead
	k.query(&confirmed, `SELECT (confirmed_flush_lsn - '0/0')::int8 FROM pg_replication_slots WHERE slot_name = 'walgate'`)
	k.stored(&logged, `SELECT (lsn - '0/0')::int8 FROM walgate.checkpoint`)
	if confirmed > logged {
		k.t.Errorf("the slot confirms %s, but the log ends at %s", changelog.LSN(confirmed), changelog.LSN(logged))
	}
	var list []loggedTx
	for since, more := k.seen, true; more; {
		p, err := k.log.ReadAll(k.t.Context(), since, 1<<62, 20000, 64<<20)
		if err == changelog.ErrNotInitialised {
			return 0
		} else if err != nil {
			k.t.Fatal(err)
		}
		if k.history == "" {
			k.history = p.Head.History
		} else if k.history != p.Head.History {
			k.t.Errorf("the history changed from %s to %s", k.history, p.Head.History)
		}
		list = k.gather(list, p.Entries)
		since, more = p.Last, p.More
	}
	k.match(list)
	return k.checked
}

// loggedTx is a transaction as the log has it.
type loggedTx struct {
	tx      changelog.Version
	xid     uint64
	changes []string
}

// gather appends entries to the transactions that they belong to, and checks that versions rise.
func (k *killing) gather(list []loggedTx, entries []changelog.Entry) []loggedTx {
	for _, e := range entries {
		if e.Version <= k.seen {
			k.t.Errorf("version %d comes after %d", e.Version, k.seen)
		}
		k.seen = e.Version
		if n := len(list); n == 0 || list[n-1].tx != e.Tx {
			list = append(list, loggedTx{tx: e.Tx})
			k.stored(&list[n].xid, fmt.Sprintf(`SELECT CASE count(*) WHEN 1 THEN min(xid) ELSE -count(*) END FROM walgate.transactions WHERE tx = %d`, e.Tx))
		}
		last := &list[len(list)-1]
		last.changes = append(last.changes, fmt.Sprintf("%c %s", e.Op, e.DocID))
	}
	return list
}

// match compares the logged transactions with those that the application committed next.
func (k *killing) match(list []loggedTx) {
	for _, have := range list {
		if k.checked == len(k.app.committed) {
			k.t.Errorf("the log holds transaction %d of %d changes, which the application never committed or which is there twice", have.xid, len(have.changes))
			return
		}
		want := k.app.committed[k.checked]
		if have.xid != want.xid || !equalLists(have.changes, want.changes) {
			k.t.Errorf("at transaction %d the log holds %d with %d changes (%.80v); committed was %d with %d (%.80v)", k.checked,
				have.xid, len(have.changes), have.changes, want.xid, len(want.changes), want.changes)
			return
		}
		k.checked++
	}
}

func equalLists(a, b []string) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

// compare lets the client catch up and holds it against the table.
func (k *killing) compare() {
	k.t.Helper()
	ctx, cancel := context.WithTimeout(k.t.Context(), convergenceLimit)
	defer cancel()
	for err := errAway; err != nil; {
		if err = k.client.catchUp(ctx); err != nil && ctx.Err() != nil {
			k.t.Fatalf("the client can't catch up: %v\n  its last steps:\n  %s\n  in all: %v", err, strings.Join(k.client.trail, "\n  "), k.client.counts)
		}
	}
	if err := compareReplica(ctx, k.conn, k.client); err != nil {
		k.t.Error(err)
	}
	for what, n := range k.client.counts {
		if strings.HasPrefix(what, "resync") {
			k.t.Errorf("the client was told to start anew: %d × %s", n, what)
		}
	}
}

package changelog

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/internal/pgserver"
	"github.com/walgate/walgate/internal/redisserver"
)

func TestMain(m *testing.M) { os.Exit(pgserver.MainThen(m, redisserver.CloseShared)) }

// newLog returns a migrated log in a database of its own, and that database's connection string.
func newLog(t testing.TB) (*Log, string) {
	t.Helper()
	dsn := pgserver.ForTest(t).Database(t)
	l, err := Open(t.Context(), dsn, 4)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	if err := l.Migrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	return l, dsn
}

var testSource = Server{System: "7000000000000000001", Timeline: 1}

// testClaim is the claim of a leader of one collection, whose slot stands at LSN 0/10.
func testClaim() Claim {
	return Claim{Source: testSource, SourceTime: time.Now(), SlotLSN: 16, SourceEnd: 1 << 40, Collections: []ClaimedCollection{testCollection("tasks")}}
}

func testCollection(name string) ClaimedCollection {
	return ClaimedCollection{Name: name, Fingerprint: "f1", Shape: "shape 1", Retention: 30 * 24 * time.Hour, Empty: true,
		Keep: func(string) bool { return false }}
}

// lead claims the log and returns its appender, closed at cleanup.
func lead(t testing.TB, l *Log, c Claim) (*Appender, *Claimed) {
	t.Helper()
	a, claimed, err := l.NewAppender(t.Context(), NewMemoryBus(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.Close)
	return a, claimed
}

// restart claims the log again after the first start, with the slot where it was.
func restart(t testing.TB, l *Log, change func(*Claim)) (*Appender, *Claimed) {
	t.Helper()
	c := testClaim()
	if change != nil {
		change(&c)
	}
	return lead(t, l, c)
}

func scope(n byte) [16]byte { return [16]byte{15: n} }

// upsert is an entry with a small document.
func upsert(v, tx Version, sc byte, id string) Entry {
	return Entry{Version: v, Tx: tx, Scope: scope(sc), Collection: 1, Op: 'u', DocID: []byte(id), Data: fmt.Appendf(nil, `{"id":%q}`, id)}
}

// transaction is a whole source transaction in one piece; its entries share one version each.
func transaction(lsn LSN, entries ...Entry) Piece {
	p := Piece{LSN: lsn, Final: true, Entries: entries, Xid: uint64(lsn), Size: 64}
	if n := len(entries); n > 0 {
		p.Tx, p.Version = entries[0].Tx, entries[n-1].Version
	}
	for i := range entries {
		p.Size += len(entries[i].Data) + 100
	}
	return p
}

// appendNow appends pieces in one call and fails the test if that fails.
func appendNow(t testing.TB, a *Appender, pieces ...Piece) {
	t.Helper()
	if err := a.append(t.Context(), pieces); err != nil {
		t.Fatalf("append: %v", err)
	}
}

func mustHead(t testing.TB, l *Log) *Head {
	t.Helper()
	h, err := l.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// documents returns what a read of everything in scopes gives, as "op id", and fails unless all fits one page.
func documents(t testing.TB, l *Log, scopes ...byte) []string {
	t.Helper()
	r := Request{Limit: 10000, MaxBytes: 64 << 20}
	for _, s := range scopes {
		r.Scopes = append(r.Scopes, scope(s))
	}
	p := mustRead(t, l, r)
	if p.More || p.Partial {
		t.Fatalf("page of everything: more %v, partial %v", p.More, p.Partial)
	}
	return names(p)
}

func mustRead(t testing.TB, l *Log, r Request) *Page {
	t.Helper()
	p, err := l.Read(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func names(p *Page) []string {
	out := []string{}
	for i := range p.Entries {
		out = append(out, fmt.Sprintf("%c %s", p.Entries[i].Op, p.Entries[i].DocID))
	}
	return out
}

// session opens a connection that is closed at cleanup.
func session(t testing.TB, dsn string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

func mustExec(t testing.TB, conn *pgx.Conn, statements ...string) {
	t.Helper()
	for _, sql := range statements {
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
}

func scan[T any](t testing.TB, conn *pgx.Conn, sql string, args ...any) T {
	t.Helper()
	var v T
	if err := conn.QueryRow(t.Context(), sql, args...).Scan(&v); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return v
}

package changelog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

func TestAppendStoresEntriesAsGiven(t *testing.T) {
	t.Parallel()
	l, _ := newLog(t)
	a, c := restart(t, l, nil)
	v := c.Version + 1
	want := []Entry{
		{Version: v, Tx: v, Scope: scope(1), Collection: 1, Op: 'u', DocID: []byte("é'\\"), Data: []byte("{\"a\":\"\\n\",\n \"b\":1.10}"), Guard: []byte{0, 1, 255}, Changed: []byte{5}},
		{Version: v + 1, Tx: v, Scope: scope(1), Collection: 1, Op: 'd', DocID: []byte(`["7","en"]`)},
		{Version: v + 2, Tx: v, Scope: scope(1), Collection: 1, Op: 'l', DocID: []byte(""), Guard: []byte{}, Changed: []byte{}},
	}
	appendNow(t, a, transaction(100, want...))
	p := mustRead(t, l, Request{Scopes: [][16]byte{scope(1)}, Limit: 10, MaxBytes: 1000})
	same := func(a, b Entry) bool {
		return a.Version == b.Version && a.Tx == b.Tx && a.Scope == b.Scope && a.Collection == b.Collection && a.Op == b.Op && bytes.Equal(a.DocID, b.DocID) &&
			bytes.Equal(a.Data, b.Data) && bytes.Equal(a.Guard, b.Guard) && (a.Guard == nil) == (b.Guard == nil) && bytes.Equal(a.Changed, b.Changed) && (a.Changed == nil) == (b.Changed == nil)
	}
	if !slices.EqualFunc(p.Entries, want, same) {
		t.Errorf("read %+v\nwant %+v", p.Entries, want)
	}
	if a.Logged() != 100 || p.Head.LSN != 100 || p.Head.Version != v+2 {
		t.Errorf("logged %s, head %+v; want LSN 0/64 and version %d", a.Logged(), p.Head, v+2)
	}
}

// TestAppendGroupsWaitingTransactions: everything that waits goes in one log transaction and one announcement; alone, a
// transaction goes at once.
func TestAppendGroupsWaitingTransactions(t *testing.T) {
	t.Parallel()
	l, _ := newLog(t)
	a, c := restart(t, l, nil)
	sub := a.bus.Subscribe(t.Context())
	var took []int
	done := make(chan struct{}, 1)
	a.OnAppended = func(d Appended) { took = append(took, d.Transactions); done <- struct{}{} }
	q := NewQueue(1 << 20)
	put := func(i int) {
		v := c.Version + Version(i)
		q.TryPut(transaction(LSN(100+i), upsert(v, v, 1, fmt.Sprint(i))))
	}
	for i := 1; i <= 20; i++ {
		put(i)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- a.Run(ctx, q) }()
	<-done
	put(21)
	<-done
	cancel()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(took, []int{20, 1}) {
		t.Errorf("log transactions held %v source transactions, want [20 1]", took)
	}
	last := c.Version
	for range took {
		b := <-sub
		if b.Prev != last || b.Omitted || b.Last <= last || b.History != c.History {
			t.Errorf("announced %+v after version %d", b, last)
		}
		last = b.Last
	}
	if got := documents(t, l, 1); len(got) != 21 {
		t.Errorf("%d documents, want 21: %v", len(got), got)
	}
}

// lossyConn loses the server's answer to a commit, and the connection with it.
type lossyConn struct {
	net.Conn
	lose *atomic.Bool
	sent atomic.Bool // pgx reads and writes from two goroutines
}

func (c *lossyConn) Write(b []byte) (int, error) {
	if c.lose.Load() && bytes.Contains(b, []byte("; COMMIT")) {
		c.sent.Store(true)
	}
	return c.Conn.Write(b)
}

func (c *lossyConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b) // so the server has committed
	if c.sent.Load() && err == nil {
		c.Conn.Close()
		return 0, io.ErrUnexpectedEOF
	}
	return n, err
}

// TestAppendIsExactlyOnceOverCrashes cuts the connection at the two places that matter and replays the stream as the next
// leader gets it: from the slot, skipping what the checkpoint says is logged.
func TestAppendIsExactlyOnceOverCrashes(t *testing.T) {
	t.Parallel()
	for _, after := range []bool{false, true} {
		t.Run(map[bool]string{false: "between COPY and commit", true: "right after the commit"}[after], func(t *testing.T) {
			t.Parallel()
			l, dsn := newLog(t)
			var lose atomic.Bool
			cfg, err := pgxpool.ParseConfig(dsn)
			if err != nil {
				t.Fatal(err)
			}
			cfg.ConnConfig.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
				conn, err := (&net.Dialer{}).DialContext(ctx, network, addr)
				return &lossyConn{Conn: conn, lose: &lose}, err
			}
			lossy := &Log{}
			if lossy.pool, err = pgxpool.NewWithConfig(t.Context(), cfg); err != nil {
				t.Fatal(err)
			}
			defer lossy.Close()
			a, c := restart(t, lossy, nil)
			v := c.Version
			stream := []Piece{
				transaction(100, upsert(v+1, v+1, 1, "a")),
				transaction(200, upsert(v+2, v+2, 1, "b"), upsert(v+3, v+2, 1, "c")),
				transaction(300, upsert(v+4, v+4, 1, "d")),
			}
			appendNow(t, a, stream[0])
			if after {
				lose.Store(true)
				err = a.append(t.Context(), stream[1:2])
			} else {
				begun := stream[1]
				begun.Final = false
				appendNow(t, a, begun)
				mustExec(t, session(t, dsn), fmt.Sprintf(`SELECT pg_terminate_backend(%d, 10000)`, a.conn.PgConn().PID()))
				err = a.append(t.Context(), []Piece{{LSN: 200, Final: true, Tx: v + 2, Version: v + 3}})
			}
			if err == nil {
				t.Fatal("the append succeeded over a broken connection")
			}
			if a.Logged() != 100 {
				t.Errorf("after a failure the appender calls %s logged, want what was acknowledged, 0/64", a.Logged())
			}
			lose.Store(false)
			b, again := restart(t, l, nil)
			if want := map[bool]LSN{false: 100, true: 200}[after]; again.LSN != want || again.NewHistory != "" || again.History != c.History {
				t.Errorf("the next leader starts at %s with new history %q, want %s in the same history", again.LSN, again.NewHistory, want)
			}
			for _, p := range stream {
				if p.LSN > again.LSN {
					appendNow(t, b, p)
				}
			}
			if got := documents(t, l, 1); !slices.Equal(got, []string{"u a", "u b", "u c", "u d"}) {
				t.Errorf("the log holds %v", got)
			}
		})
	}
}

// TestDeposedLeaderWritesNothing: invariant "one writer". The second claim fences the first appender in every state.
func TestDeposedLeaderWritesNothing(t *testing.T) {
	t.Parallel()
	for _, state := range []string{"idle", "in a transaction", "checkpoint only", "raise"} {
		t.Run(state, func(t *testing.T) {
			t.Parallel()
			l, dsn := newLog(t)
			first, c := restart(t, l, nil)
			v := c.Version + 1
			p := transaction(100, upsert(v, v, 1, "stray"))
			switch state {
			case "in a transaction":
				p.Final = false
				appendNow(t, first, p)
				p = Piece{LSN: 100, Final: true, Tx: v, Version: v}
			case "checkpoint only":
				p = Piece{LSN: 100, Final: true, Version: v}
			case "raise":
				p = Piece{LSN: 100, Final: true, Version: v, Raises: []Raise{{Collection: c.Collections[0].ID, Version: v, Reason: "x"}}}
			}
			second, _ := restart(t, l, nil)
			q := NewQueue(1000)
			q.TryPut(p)
			err := first.Run(t.Context(), q)
			if err == nil || state != "in a transaction" && !errors.Is(err, ErrDeposed) { // there the second one has ended its session, which would hold up others
				t.Errorf("the deposed appender ended with %v, want ErrDeposed", err)
			}
			first.Close()
			if h := mustHead(t, l); h.LSN != 16 || h.Version != c.Version || h.Collections[0].Floor != 0 {
				t.Errorf("the deposed leader moved the log: %+v", h)
			}
			if n := scan[int](t, session(t, dsn), `SELECT (SELECT count(*) FROM walgate.changes) + (SELECT count(*) FROM walgate.transactions)`); n != 0 {
				t.Errorf("the deposed leader left %d rows", n)
			}
			appendNow(t, second, transaction(100, upsert(v, v, 1, "mine")))
			if got := documents(t, l, 1); !slices.Equal(got, []string{"u mine"}) {
				t.Errorf("the log holds %v", got)
			}
		})
	}
}

func TestCheckpointOnlyPieceMovesOnlyTheCheckpoint(t *testing.T) {
	t.Parallel()
	l, dsn := newLog(t)
	a, c := restart(t, l, nil)
	appendNow(t, a, Piece{LSN: 5000, Final: true, Version: c.Version})
	if h := mustHead(t, l); h.LSN != 5000 || h.Version != c.Version || a.Logged() != 5000 {
		t.Errorf("head %+v, logged %s", h, a.Logged())
	}
	conn := session(t, dsn)
	if n := scan[int](t, conn, `SELECT count(*) FROM pg_inherits WHERE inhparent = 'walgate.changes'::regclass`); n != 0 {
		t.Errorf("%d partitions were made for nothing", n)
	}
}

func TestRaisesKeepTheirText(t *testing.T) {
	t.Parallel()
	l, dsn := newLog(t)
	a, c := restart(t, l, nil)
	id := c.Collections[0].ID
	const odd = `it's \ "odd" $1 %s; DROP TABLE x; --` + "\n\té"
	appendNow(t, a, Piece{LSN: 100, Final: true, Version: c.Version + 2, Raises: []Raise{
		{Collection: id, Version: c.Version + 2, Reason: odd, Shape: "shape " + odd, SetStopped: true, Stopped: "stopped " + odd}}})
	st := mustHead(t, l).Collection(id)
	if st.Floor != c.Version+2 || st.FloorReason != odd || st.Shape != "shape "+odd || st.Stopped != "stopped "+odd {
		t.Errorf("stored %+v", st)
	}
	for _, setting := range []string{"on", "off"} {
		conn := session(t, dsn)
		mustExec(t, conn, "SET standard_conforming_strings = "+setting, "SET escape_string_warning = off")
		rows, err := conn.PgConn().Exec(t.Context(), "SELECT"+quote(odd)).ReadAll()
		if err != nil || string(rows[0].Rows[0][0]) != odd {
			t.Errorf("standard_conforming_strings %s: %v (%v)", setting, rows, err)
		}
	}
	// Without a version the floor stays; a stop is lifted by an empty text.
	appendNow(t, a, Piece{LSN: 101, Final: true, Version: c.Version + 3, Raises: []Raise{{Collection: id, SetStopped: true}}})
	if st := mustHead(t, l).Collection(id); st.Stopped != "" || st.Floor != c.Version+2 || st.FloorReason != odd {
		t.Errorf("after lifting the stop: %+v", st)
	}
}

// TestReadersNeverSeePartOfATransaction appends one transaction in many pieces while readers look.
func TestReadersNeverSeePartOfATransaction(t *testing.T) {
	t.Parallel()
	l, dsn := newLog(t)
	a, c := restart(t, l, nil)
	const pieces, each = 30, 200
	v := c.Version
	tx := v + 1
	for i := range pieces {
		p := Piece{Tx: tx, Xid: 9}
		for range each {
			v++
			p.Entries = append(p.Entries, upsert(v, tx, 1, fmt.Sprint(v)))
		}
		p.Version = v
		if i == pieces-1 {
			p.Final, p.LSN = true, 1000
		}
		if h := mustHead(t, l); h.Version != c.Version || h.LSN != 16 {
			t.Fatalf("after %d of %d pieces the head is %+v", i, pieces, h)
		}
		if got := documents(t, l, 1); len(got) != 0 {
			t.Fatalf("after %d of %d pieces a reader sees %d entries", i, pieces, len(got))
		}
		if first, _, _, err := l.FirstInvisible(t.Context(), 5, nil); err != nil || first != 0 {
			t.Fatalf("after %d of %d pieces the transaction is listed as %d (%v)", i, pieces, first, err)
		}
		appendNow(t, a, p)
	}
	if got := documents(t, l, 1); len(got) != pieces*each {
		t.Errorf("%d entries, want %d", len(got), pieces*each)
	}
	if n := scan[int](t, session(t, dsn), `SELECT count(DISTINCT xmin::text) FROM walgate.changes`); n != 1 {
		t.Errorf("one source transaction became %d log transactions", n)
	}
}

func TestLargeBatchIsAnnouncedByItsPositionOnly(t *testing.T) {
	t.Parallel()
	l, _ := newLog(t)
	a, c := restart(t, l, nil)
	sub := a.bus.Subscribe(t.Context())
	v := c.Version + 1
	data := []byte(`"` + strings.Repeat("x", announceLimit) + `"`)
	p := transaction(100, Entry{Version: v, Tx: v, Scope: scope(1), Collection: 1, Op: 'u', DocID: []byte("big"), Data: data})
	appendNow(t, a, p)
	appendNow(t, a, transaction(101, upsert(v+1, v+1, 1, "small")))
	if b := <-sub; !b.Omitted || b.Entries != nil || b.Prev != c.Version || b.Last != v {
		t.Errorf("a batch of %d bytes was announced with omitted %v and %d entries", p.Size, b.Omitted, len(b.Entries))
	}
	if b := <-sub; b.Omitted || len(b.Entries) != 1 || b.Prev != v {
		t.Errorf("the next one: %+v", b)
	}
}

// TestAppendCommitsDurably: whatever the database's default, what is called logged is on disk.
func TestAppendCommitsDurably(t *testing.T) {
	t.Parallel()
	l, dsn := newLog(t)
	conn := session(t, dsn)
	for set, want := range map[string]string{"off": "on", "local": "on", "remote_apply": "remote_apply"} {
		mustExec(t, conn, fmt.Sprintf("ALTER DATABASE %s SET synchronous_commit = %s", conn.Config().Database, set))
		a, _ := restart(t, l, nil)
		if got := scan[string](t, a.conn, "SHOW synchronous_commit"); got != want {
			t.Errorf("database default %s: the appender commits with %s, want %s", set, got, want)
		}
	}
}

func BenchmarkAppend(b *testing.B) {
	for _, group := range []int{1, 100, 2000} {
		b.Run(fmt.Sprintf("transactions=%d", group), func(b *testing.B) {
			l, _ := newLog(b)
			a, c := lead(b, l, testClaim())
			clock, lsn := NewClock(c.Version), LSN(100)
			data := []byte(`{"id":1,"title":"` + strings.Repeat("x", 180) + `"}`)
			pieces := make([]Piece, group)
			b.ReportAllocs()
			b.SetBytes(int64(group * len(data)))
			for b.Loop() {
				for i := range pieces {
					v := clock.Next(time.Now().UnixMilli())
					lsn++
					pieces[i] = transaction(lsn, Entry{Version: v, Tx: v, Scope: scope(byte(i)), Collection: 1, Op: 'u', DocID: []byte("1"), Data: data})
				}
				if err := a.append(b.Context(), pieces); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(group)*float64(b.N)/b.Elapsed().Seconds(), "tx/s")
		})
	}
}

// TestGiantRowLeavesNoBuffer: what a giant row needed isn't kept.
func TestGiantRowLeavesNoBuffer(t *testing.T) {
	t.Parallel()
	l, _ := newLog(t)
	a, c := restart(t, l, nil)
	e := upsert(c.Version+1, c.Version+1, 1, "giant")
	e.Data = append(append([]byte(`"`), bytes.Repeat([]byte("x"), bufferKept)...), '"')
	appendNow(t, a, transaction(100, e))
	if n := cap(a.buf); n > bufferKept {
		t.Errorf("a buffer of %d bytes is kept", n)
	}
	if len(a.entries) > 0 {
		t.Error("entries are kept after their announcement")
	}
	p := mustRead(t, l, Request{Scopes: [][16]byte{scope(1)}, Limit: 10, MaxBytes: 1000})
	if len(p.Entries) != 1 || len(p.Entries[0].Data) != bufferKept+2 {
		t.Errorf("%d entries", len(p.Entries))
	}
}

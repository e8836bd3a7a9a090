package changelog

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/internal/badlink"
	"github.com/walgate/walgate/internal/pgserver"
)

const (
	testPatience = 400 * time.Millisecond
	// noticed bounds how long the watchdog may take with that patience, on a slow machine.
	noticed = 10 * time.Second
)

// linkedLog is a log that is reached over a link, and an appender of it that runs.
type linkedLog struct {
	*Log
	link    *badlink.Link
	dsn     string // without the link
	queue   *Queue
	claimed *Claimed
	next    int
	ended   chan error // brings what Run returned

	mu  sync.Mutex
	why []string
}

func newLinkedLog(t *testing.T) *linkedLog {
	t.Helper()
	dsn := pgserver.ForTest(t).Database(t)
	l := &linkedLog{link: badlink.To(t, dsn), dsn: dsn}
	var err error
	if l.Log, err = Open(t.Context(), l.link.DSN(t, dsn), 4); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	t.Cleanup(func() { l.link.Cut() }) // else the pool takes leave of dead connections for 15 s
	if err := l.Migrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	l.Patience = testPatience
	l.OnWaiting = func(why string) {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.why = append(l.why, why)
	}
	l.lead(t)
	return l
}

// lead claims the log and runs its appender, as often as it is called.
func (l *linkedLog) lead(t *testing.T) {
	t.Helper()
	a, claimed, err := l.NewAppender(t.Context(), NewMemoryBus(), testClaim())
	if err != nil {
		t.Fatal(err)
	}
	l.queue, l.claimed, l.ended = NewQueue(64<<20), claimed, make(chan error, 1)
	ctx, cancel := context.WithCancel(context.Background())
	ended := l.ended
	var running sync.WaitGroup
	running.Go(func() { ended <- a.Run(ctx, l.queue) })
	t.Cleanup(func() {
		cancel()
		running.Wait()
		a.Close()
	})
}

func (l *linkedLog) told() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.why, "\n")
}

// put hands a transaction of one row to the appender.
func (l *linkedLog) put(data int) LSN {
	l.next++
	v := l.claimed.Version + Version(l.next)
	e := upsert(v, v, 1, fmt.Sprint(l.next))
	if data > 0 {
		e.Data = fmt.Appendf(nil, `{"x":%q}`, strings.Repeat("x", data))
	}
	lsn := LSN(1000 + l.next)
	l.queue.TryPut(transaction(lsn, e))
	return lsn
}

// until polls; it fails when the appender ends meanwhile, or after 30 s.
func (l *linkedLog) until(t *testing.T, what string, done func() bool) {
	t.Helper()
	deadline, tick := time.After(30*time.Second), time.NewTicker(5*time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-tick.C:
		case err := <-l.ended:
			t.Fatalf("the appender ended before %s: %v", what, err)
		case <-deadline:
			t.Fatalf("waited 30s in vain until %s; told: %s", what, l.told())
		}
	}
}

func (l *linkedLog) logged(t *testing.T, direct *pgx.Conn, lsn LSN) func() bool {
	return func() bool {
		var at LSN
		if err := direct.QueryRow(t.Context(), `SELECT lsn - '0/0'::pg_lsn FROM walgate.checkpoint`).Scan((*pgLSN)(&at)); err != nil {
			t.Fatal(err)
		}
		return at >= lsn
	}
}

// TestAppendOnADeadConnection: the connection to the log's database dies without a word, in each way that it can. The
// append ends in bounded time and says why; the next appender takes over although the server still knows the old one, and
// nothing is held by that one.
func TestAppendOnADeadConnection(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		die  func(*badlink.Link)
		size int // of the row that meets the dead connection
		why  string
	}{
		"nothing passes at all":              {(*badlink.Link).Stall, 0, "can't be asked"},
		"no answer comes back":               {(*badlink.Link).StallAnswers, 0, "can't be asked"},
		"this connection alone":              {(*badlink.Link).Strand, 0, "itself waits for the gateway"},
		"in the middle of a row of 16 MB":    {(*badlink.Link).Strand, 16 << 20, "itself waits for the gateway"},
		"its session was ended, unnoticed":   {func(l *badlink.Link) { l.Strand() }, -1, "ended the session"},
		"nothing passes, in a row of 16 MB ": {(*badlink.Link).Stall, 16 << 20, "can't be asked"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newLinkedLog(t)
			direct := session(t, l.dsn)
			l.until(t, "the first row is logged", l.logged(t, direct, l.put(0)))
			tc.die(l.link)
			if tc.size < 0 {
				mustExec(t, direct, `SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE application_name = 'walgate append' AND datname = current_database()`)
			}
			last := l.put(max(0, tc.size))
			select {
			case err := <-l.ended:
				if err == nil || !strings.Contains(err.Error(), tc.why) {
					t.Errorf("the append ended with: %v\nwant: %s", err, tc.why)
				}
			case <-time.After(noticed):
				t.Fatalf("an append on a dead connection hangs; told: %s", l.told())
			}
			l.link.Resume()
			l.lead(t)
			if l.claimed.NewHistory != "" {
				t.Errorf("a new history began: %s", l.claimed.NewHistory)
			}
			if l.claimed.LSN < last {
				l.until(t, "the row is logged", l.logged(t, direct, l.put(0)))
			}
		})
	}
}

// TestPredecessorIsEnded: what a leader that died in the middle of a transaction left open in the log's database ends with
// the next one's claim.
func TestPredecessorIsEnded(t *testing.T) {
	t.Parallel()
	l := newLinkedLog(t)
	direct := session(t, l.dsn)
	p := transaction(2000, upsert(l.claimed.Version+1, l.claimed.Version+1, 1, "half"))
	p.Final = false
	l.queue.TryPut(p)
	const stuck = `SELECT FROM pg_stat_activity WHERE application_name = 'walgate append' AND datname = current_database() AND state = 'idle in transaction'`
	count := func() (n int) {
		if err := direct.QueryRow(t.Context(), `SELECT count(*) FROM (`+stuck+`) s`).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	l.until(t, "half a transaction is in the database, and nothing under way", func() bool {
		var still bool
		if err := direct.QueryRow(t.Context(), `SELECT EXISTS (`+stuck+` AND clock_timestamp() - state_change > interval '0.5 s')`).Scan(&still); err != nil {
			t.Fatal(err)
		}
		return still
	})
	l.link.Strand()
	l.until(t, "it is older than a slot's hand-over", func() bool {
		var old bool
		if err := direct.QueryRow(t.Context(), `SELECT clock_timestamp() - min(xact_start) > interval '5.1 s' FROM pg_stat_activity WHERE application_name = 'walgate append' AND datname = current_database()`).Scan(&old); err != nil {
			t.Fatal(err)
		}
		return old
	})
	l.lead(t)
	l.until(t, "the old session is gone", func() bool { return count() == 0 })
}

// TestAppendBehindALock: a call that rightly waits is waited for, however long, and says for whom.
func TestAppendBehindALock(t *testing.T) {
	t.Parallel()
	l := newLinkedLog(t)
	direct, holder := session(t, l.dsn), session(t, l.dsn)
	mustExec(t, holder, `BEGIN; SELECT FROM walgate.checkpoint FOR UPDATE`)
	lsn := l.put(0)
	want := fmt.Sprintf("pid %d of the change log's database holds a lock", holder.PgConn().PID())
	l.until(t, "it is told often enough to be far beyond a dead connection", func() bool { return strings.Count(l.told(), want) >= 8 })
	mustExec(t, holder, `ROLLBACK`)
	l.until(t, "the row is logged", l.logged(t, direct, lsn))
	l.until(t, "it is told that it's over", func() bool { return strings.HasSuffix(l.told(), "\n") })
}

// TestAppendOverASlowLink: far slower than the watchdog's patience, but something arrives all the time.
func TestAppendOverASlowLink(t *testing.T) {
	t.Parallel()
	l := newLinkedLog(t)
	direct := session(t, l.dsn)
	l.link.Slow(1 << 20)
	lsn := l.put(5 << 20)
	l.until(t, "a large row is logged over a slow link", l.logged(t, direct, lsn))
	if !strings.Contains(l.told(), "slow") {
		t.Errorf("a slow append isn't told: %q", l.told())
	}
}

// TestConnectingIsBounded: a database that accepts connections and says nothing must not take the pool's places for good.
func TestConnectingIsBounded(t *testing.T) {
	t.Parallel()
	dsn := pgserver.ForTest(t).Database(t)
	link := badlink.To(t, dsn)
	l, err := Open(t.Context(), link.DSN(t, dsn)+"&connect_timeout=1", 2)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	t.Cleanup(func() { link.Cut() })
	plain, err := Open(t.Context(), dsn, 1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(plain.Close)
	if d := plain.pool.Config().ConnConfig.ConnectTimeout; d <= 0 || d > time.Minute {
		t.Errorf("without connect_timeout in the URL it is %s", d)
	}
	link.Stall()
	for range 2 {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		if _, err := l.Head(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("the head of a stalled log: %v", err)
		}
		cancel()
	}
	link.Strand() // what connects now never gets an answer, also when the network is back
	link.Resume()
	ctx, cancel := context.WithTimeout(t.Context(), noticed)
	defer cancel()
	if err := l.Migrate(ctx); err != nil {
		t.Errorf("the pool is lost to connections that never came to be: %v", err)
	}
}

// TestPoolOfDeadConnections: idle connections that died without a word cost a read at most their pings.
func TestPoolOfDeadConnections(t *testing.T) {
	t.Parallel()
	l := newLinkedLog(t)
	if _, err := l.Head(t.Context()); err != nil {
		t.Fatal(err)
	}
	l.link.Strand()
	idle := time.Now().Add(1100 * time.Millisecond) // a connection that was used within the last second isn't pinged
	l.until(t, "it is idle for more than a second", func() bool { return time.Now().After(idle) })
	ctx, cancel := context.WithTimeout(t.Context(), noticed)
	defer cancel()
	if _, err := l.Head(ctx); err != nil {
		t.Errorf("read after the pool's connections died: %v", err)
	}
}

// TestTransactionMayRest: the next row of a transaction may be long on its way, so nothing ends the log's open transaction
// meanwhile, while a read that its gateway forgot ends soon.
func TestTransactionMayRest(t *testing.T) {
	t.Parallel()
	l, dsn := newLog(t)
	conn := session(t, dsn)
	mustExec(t, conn, fmt.Sprintf("ALTER DATABASE %s SET idle_in_transaction_session_timeout = 100", conn.Config().Database))
	a, _ := restart(t, l, nil)
	const show = "SHOW idle_in_transaction_session_timeout"
	if got := scan[string](t, a.conn, show); got != "0" {
		t.Errorf("the appender's transaction ends after %s, want never", got)
	}
	var got string
	if err := l.pool.QueryRow(t.Context(), show).Scan(&got); err != nil || got != "1min" {
		t.Errorf("a reader's transaction ends after %s, want 1min (%v)", got, err)
	}
}

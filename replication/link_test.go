package replication

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/internal/badlink"
)

// quick is the stream's times for tests that wait for them.
var quick = timing{sender: time.Second, status: 200 * time.Millisecond, stall: 2 * time.Second, idle: time.Second, slot: 500 * time.Millisecond}

// longTests says whether tests that are short by default shall take their time.
func longTests() bool { return os.Getenv("WALGATE_TEST_LONG") != "" }

// newLinked returns a source that the gateway reaches over a link.
func newLinked(t *testing.T, o setup) (*source, *badlink.Link) {
	t.Helper()
	o.dsn = newDatabase(t)
	link := badlink.To(t, o.dsn)
	o.linked = link.DSN(t, o.dsn) + "&connect_timeout=2"
	s := newSource(t, o)
	t.Cleanup(func() { link.Cut() }) // before the pool's: it takes leave of dead connections for 15 s
	return s, link
}

// insert adds n rows, each in a transaction of its own, and returns what should be logged of all rows so far.
func (s *source) insert(n int) (want string) {
	s.t.Helper()
	s.exec(fmt.Sprintf(`DO $$BEGIN FOR i IN 1..%d LOOP INSERT INTO items SELECT count(*) + 1 FROM items; COMMIT; END LOOP; END$$`, n))
	var all []string
	for i := range query[int](s, `SELECT count(*) FROM items`) {
		all = append(all, fmt.Sprintf("u %d", i+1))
	}
	return strings.Join(all, ", ")
}

// walsender is the pid of the process that serves the slot, 0 for none.
func (s *source) walsender() int {
	s.t.Helper()
	return query[int](s, `SELECT coalesce((SELECT active_pid FROM pg_replication_slots WHERE slot_name = $1), 0)`, s.slot)
}

func TestReplicationConnectionCut(t *testing.T) {
	t.Parallel()
	s, link := newLinked(t, setup{timing: quick})
	history := s.settle().History
	for range 3 {
		before := s.stats.Reconnects.Load()
		s.insert(20)
		if link.Cut() == 0 {
			t.Fatal("there was nothing to cut")
		}
		s.insert(20)
		s.await("it reconnects", func() bool { leading, _, _ := s.stats.State(); return leading && s.stats.Reconnects.Load() > before })
	}
	s.expect(0, s.insert(1))
	if h := s.settle(); h.History != history {
		t.Error("a new history began for a broken connection")
	}
}

// TestReplicationConnectionStalled: nothing passes, and nobody says so. Both sides notice in bounded time: the gateway shows
// it, and the server frees the slot, though the database switches its own timeout off. When the network is back, or where
// only the old connection is dead, everything goes on, once and in order.
func TestReplicationConnectionStalled(t *testing.T) {
	// Not parallel: its times are short, and a machine that is busy with other tests would break connections by itself.
	for name, tc := range map[string]struct {
		stall func(*badlink.Link)
		stays bool // the network stays away until it is mended
	}{
		"both ways":          {(*badlink.Link).Stall, true},
		"to the server":      {(*badlink.Link).StallRequests, true},
		"from the server":    {(*badlink.Link).StallAnswers, true},
		"old connections":    {(*badlink.Link).Strand, false},
		"both, then cut off": {func(l *badlink.Link) { l.Stall(); l.Cut() }, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, link := newLinked(t, setup{timing: quick, before: `DO $$BEGIN EXECUTE format('ALTER DATABASE %I SET wal_sender_timeout = 0', current_database()); END$$;`})
			s.insert(3)
			history, old, reconnects := s.settle().History, s.walsender(), s.stats.Reconnects.Load()
			if old == 0 {
				t.Fatal("no walsender")
			}
			began := time.Now()
			tc.stall(link)
			s.insert(3)
			s.await("the gateway notices", func() bool { return s.stats.Reconnects.Load() > reconnects })
			s.await("the old walsender is gone", func() bool { return s.walsender() != old })
			t.Logf("noticed on both sides after %s", time.Since(began).Round(100*time.Millisecond))
			if leading, why, _ := s.stats.State(); tc.stays && (leading || why == "") {
				t.Errorf("leading %v, shown: %q", leading, why)
			}
			want := s.insert(3)
			link.Resume()
			s.await("it leads again", func() bool { leading, _, _ := s.stats.State(); return leading })
			s.expect(0, want)
			if h := s.settle(); h.History != history {
				t.Error("a new history began for a stalled connection")
			}
		})
	}
}

// TestReplicationConnectionSlow: far slower than the application writes, and one row takes longer to arrive than the
// silence of a dead connection. Statuses go on, nothing times out, nothing piles up in the gateway, and it catches up.
func TestReplicationConnectionSlow(t *testing.T) {
	// Not parallel: its times are short, and a machine that is busy with other tests would break connections by itself.
	s, link := newLinked(t, setup{timing: quick, before: `ALTER TABLE items ALTER body SET STORAGE EXTERNAL;`})
	s.insert(3)
	s.settle()
	sender, reconnects := s.walsender(), s.stats.Reconnects.Load()
	peak := s.watchMemory()
	const rate = 300 << 10
	link.Slow(rate)
	s.exec(`INSERT INTO items SELECT 4, '', '', repeat('x', $1)`, 4*int(quick.stall/time.Second)*rate/2) // four times a silence's half
	s.exec(`INSERT INTO items SELECT n, '', '', repeat('x', 1000) FROM generate_series(5, 20000) n`)
	began := time.Now()
	var replied time.Time
	for time.Since(began) < 3*quick.stall {
		before := replied
		s.await("another status arrives", func() bool {
			replied = query[time.Time](s, `SELECT coalesce((SELECT reply_time FROM pg_stat_replication WHERE pid = $1), 'epoch')`, sender)
			return replied.After(before)
		})
		if now := s.walsender(); now != sender {
			t.Fatalf("walsender %d, was %d\n%s", now, sender, s.logged)
		}
	}
	if n := s.stats.Rows.Load(); n > 1000 {
		t.Fatalf("%d rows arrived: the link wasn't slow", n)
	}
	link.Slow(0)
	s.settle()
	s.await("all rows are logged", func() bool { return s.stats.Rows.Load() == 20000 })
	if n := s.stats.Reconnects.Load(); n != reconnects {
		t.Errorf("%d reconnects on a slow network\n%s", n-reconnects, s.logged)
	}
	s.checkMemory(peak())
}

// watchMemory returns a function that ends the watch and says by how many bytes the heap had grown at most.
func (s *source) watchMemory() (peak func() int64) {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	first, most := int64(m.HeapInuse), int64(0)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				runtime.ReadMemStats(&m)
				most = max(most, int64(m.HeapInuse)-first)
			}
		}
	}()
	return func() int64 {
		close(stop)
		<-stopped
		return most
	}
}

// checkMemory judges only where this is the one test that runs, for the heap is everybody's.
func (s *source) checkMemory(grown int64) {
	s.t.Helper()
	s.t.Logf("the heap grew by %d MB", grown>>20)
	if longTests() && grown > 96<<20 {
		s.t.Error("it isn't flat")
	}
}

// TestSlowLog: the append stands still far longer than the server waits for a status ("gateway slow for an hour"). The same
// walsender goes on, what it was told stays where the log is, the queue is full and no fuller, and who holds it up is said.
func TestSlowLog(t *testing.T) {
	// Not parallel: its times are short, and a machine that is busy with other tests would break connections by itself.
	o := setup{timing: quick, patience: 300 * time.Millisecond}
	hold := 6 * quick.sender
	if longTests() {
		o, hold = setup{}, 2*time.Minute
	}
	s := newSource(t, o)
	s.insert(3)
	s.settle()
	sender, reconnects := s.walsender(), s.stats.Reconnects.Load()
	holder := s.connect()
	if _, err := holder.Exec(t.Context(), `BEGIN; SELECT FROM walgate.checkpoint FOR UPDATE`); err != nil {
		t.Fatal(err)
	}
	peak := s.watchMemory()
	_, held := s.acknowledged()
	const rows = 40_000 // 40 MB, five times the queue
	s.exec(`INSERT INTO items SELECT n, '', '', repeat('x', 1000) FROM generate_series(4, $1) n`, rows/2)
	for i := range 20 {
		s.exec(`INSERT INTO items SELECT n, '', '', repeat('x', 1000) FROM generate_series($1::int, $1::int + $2::int - 1) n`, rows/2+1+i*rows/40, rows/40)
	}
	began := time.Now()
	var replied time.Time
	for time.Since(began) < hold {
		before := replied
		s.await("another status arrives", func() bool {
			replied = query[time.Time](s, `SELECT coalesce((SELECT reply_time FROM pg_stat_replication WHERE pid = $1), 'epoch')`, sender)
			return replied.After(before)
		})
		if now := s.walsender(); now != sender {
			t.Fatalf("walsender %d, was %d\n%s", now, sender, s.logged)
		}
		if flushed, _ := s.acknowledged(); flushed > held {
			t.Fatalf("acknowledged %s while the log stood at %s", flushed, held)
		}
	}
	if n := s.stats.QueueBytes.Load(); n < queueBytes/2 || n > queueBytes+1<<20 {
		t.Errorf("%d bytes are said to wait in the queue, want about %d", n, queueBytes)
	}
	if why, want := s.stats.Waiting(), fmt.Sprintf("pid %d ", holder.PgConn().PID()); !strings.Contains(why, want) {
		t.Errorf("shown: %q, want that %s holds it up", why, want)
	}
	if silent := time.Since(time.Unix(0, s.stats.WireNanos.Load())); silent > 2*quick.stall && !longTests() {
		t.Errorf("the source is said to be silent for %s", silent)
	}
	if n := s.stats.Reconnects.Load(); n != reconnects { // afterwards a busy disk may cost one, with the sender's short time
		t.Errorf("%d reconnects because of a slow log\n%s", n-reconnects, s.logged)
	}
	if _, err := holder.Exec(t.Context(), `ROLLBACK`); err != nil {
		t.Fatal(err)
	}
	s.settle()
	s.await("all rows are logged", func() bool { return query[int](s, `SELECT count(*) FROM walgate.changes`) >= rows })
	s.checkMemory(peak())
	s.await("nothing is said to wait", func() bool { return s.stats.Waiting() == "" })
}

// TestBusyNeighbours: while the published tables are silent, other tables and another database write. The slot lets go of
// their WAL: what is acknowledged and what the server must keep both advance.
func TestBusyNeighbours(t *testing.T) {
	t.Parallel()
	often := quick
	often.idle = 300 * time.Millisecond
	s := newSource(t, setup{timing: often, before: `CREATE TABLE noise (n int, body text)`})
	other := newSourceConn(t, newDatabase(t))
	other.exec(`CREATE TABLE noise (n int, body text)`)
	s.settle()
	before := s.settle()
	for _, busy := range []*source{s, other} {
		for range 2 {
			busy.exec(`INSERT INTO noise SELECT n, repeat('x', 500) FROM generate_series(1, 5000) n`)
			target := query[int64](s, `SELECT (pg_current_wal_flush_lsn() - '0/0')::int8`)
			s.await("the slot has passed its neighbour's WAL", func() bool {
				return query[int64](s, `SELECT (confirmed_flush_lsn - '0/0')::int8 FROM pg_replication_slots WHERE slot_name = $1`, s.slot) >= target
			})
			// What the server must keep moves with the records of running transactions, which a checkpoint writes.
			s.await("the server need not keep its neighbour's WAL", func() bool {
				busy.exec(`CHECKPOINT`)
				return query[int64](s, `SELECT (restart_lsn - '0/0')::int8 FROM pg_replication_slots WHERE slot_name = $1`, s.slot) >= target
			})
		}
	}
	if h, err := s.log.Head(t.Context()); err != nil || h.Version != before.Version {
		t.Errorf("version %d, want %d still: nothing of ours was written (%v)", h.Version, before.Version, err)
	}
}

// TestLogsDatabaseIsSilent: the log is on another server, and nothing passes to it any more, or only the old connections
// are dead. Nothing is acknowledged that isn't logged, the reason is shown in bounded time, and it heals by itself.
func TestLogsDatabaseIsSilent(t *testing.T) {
	t.Parallel()
	for name, stall := range map[string]func(*badlink.Link){
		"both ways": (*badlink.Link).Stall, "from the log": (*badlink.Link).StallAnswers, "to the log": (*badlink.Link).StallRequests,
		"old connections": (*badlink.Link).Strand, "refused": (*badlink.Link).Down,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			storage := newDatabase(t)
			link := badlink.To(t, storage)
			s := newSource(t, setup{timing: quick, patience: 500 * time.Millisecond, storage: link.DSN(t, storage) + "&connect_timeout=2"})
			t.Cleanup(func() { link.Cut() })
			s.insert(3)
			before, reconnects := s.settle(), s.stats.Reconnects.Load()
			stall(link)
			began := time.Now()
			s.insert(3)
			s.await("the gateway notices", func() bool { return s.stats.Reconnects.Load() > reconnects })
			t.Logf("noticed after %s: %s", time.Since(began).Round(100*time.Millisecond), first(s.stats.State))
			if name != "old connections" {
				if _, why, _ := s.stats.State(); !strings.Contains(why, "change log") {
					t.Errorf("shown: %q", why)
				}
				flushed := changelog.LSN(query[int64](s, `SELECT (confirmed_flush_lsn - '0/0')::int8 FROM pg_replication_slots WHERE slot_name = $1`, s.slot))
				logged := newSourceConn(t, storage)
				if at := changelog.LSN(query[int64](logged, `SELECT (lsn - '0/0')::int8 FROM walgate.checkpoint`)); flushed > at {
					t.Errorf("acknowledged %s, but the log ends at %s", flushed, at)
				}
			}
			lag := func() int64 { _, _, slot := s.stats.State(); return slot.LagBytes }
			at := lag()
			s.exec(`SELECT pg_logical_emit_message(false, 'neighbour', repeat('x', 1000000))`)
			if name != "old connections" { // else it may lead again
				s.await("the slot's lag is watched although nothing reads from it", func() bool { return lag() > at+900_000 })
			}
			want := s.insert(3)
			link.Up()
			link.Resume()
			s.await("it leads again", func() bool { leading, _, _ := s.stats.State(); return leading })
			s.expect(0, want)
			if h := s.settle(); h.History != before.History {
				t.Error("a new history began although the log was only away")
			}
		})
	}
}

// first returns the error of a state.
func first(state func() (bool, string, SlotHealth)) string {
	_, why, _ := state()
	return why
}

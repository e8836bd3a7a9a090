package replication

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/internal/pgserver"
)

// acknowledged returns the newest of what the server was told, and what is durable in the log, read in that order: so the
// second may only be ahead.
func (s *source) acknowledged() (flushed, logged changelog.LSN) {
	s.t.Helper()
	flushed = changelog.LSN(query[int64](s, `SELECT greatest((SELECT max(flush_lsn - '0/0') FROM pg_stat_replication r JOIN pg_replication_slots p ON p.active_pid = r.pid WHERE slot_name = $1),
		(SELECT confirmed_flush_lsn - '0/0' FROM pg_replication_slots WHERE slot_name = $1), 0)::int8`, s.slot))
	h, err := s.log.Head(s.t.Context())
	s.ok(err)
	return flushed, h.LSN
}

// TestFlushNeverPassesLogged: invariant 3, under load and with the appender held up.
func TestFlushNeverPassesLogged(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{})
	check := func() changelog.LSN {
		t.Helper()
		flushed, logged := s.acknowledged()
		if flushed > logged {
			t.Fatalf("acknowledged %s, but the log ends at %s", flushed, logged)
		}
		return flushed
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	writer := s.connect()
	wg.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			if _, err := writer.Exec(context.Background(), `INSERT INTO items VALUES ($1, 'a', repeat('x', 500)) ON CONFLICT (id) DO UPDATE SET title = excluded.title || $1`, i%1000); err != nil {
				t.Error(err)
				return
			}
		}
	})
	began := check()
	s.await("the slot has moved under load", func() bool { return check() > began+100_000 })

	// Held up: the checkpoint row is locked, so nothing can be called logged, while statuses and keepalives go on.
	holder := s.connect()
	if _, err := holder.Exec(t.Context(), `BEGIN; SELECT 1 FROM walgate.checkpoint FOR UPDATE`); err != nil {
		t.Fatal(err)
	}
	_, held := s.acknowledged()
	statuses := time.Now().Add(3 * statusInterval)
	s.await("three statuses were sent", func() bool {
		if flushed := check(); flushed > held {
			t.Fatalf("acknowledged %s while the appender was held at %s", flushed, held)
		}
		return time.Now().After(statuses)
	})
	if _, err := holder.Exec(t.Context(), `ROLLBACK`); err != nil {
		t.Fatal(err)
	}
	s.await("the slot goes on", func() bool { return check() > held })
	cancel()
	wg.Wait()
}

// TestIdleSourceIsAcknowledged: WAL of other tables and other databases must not be held back, though nothing is logged.
func TestIdleSourceIsAcknowledged(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{timing: quick, before: `CREATE TABLE noise (n int)`})
	s.settle()
	other := newSourceConn(t, pgserver.ForTest(t).Database(t))
	other.exec(`CREATE TABLE noise (n int)`)
	before := s.settle()
	for _, busy := range []*source{s, other} {
		busy.exec(`INSERT INTO noise SELECT generate_series(1, 2000)`)
		target := changelog.LSN(query[int64](s, `SELECT (pg_current_wal_flush_lsn() - '0/0')::int8`))
		s.await("the slot has passed its neighbour's WAL", func() bool {
			flushed, logged := s.acknowledged()
			if flushed > logged {
				t.Fatalf("acknowledged %s, but the log ends at %s", flushed, logged)
			}
			return flushed >= target
		})
	}
	if h, err := s.log.Head(t.Context()); err != nil || h.Version != before.Version {
		t.Errorf("version %d, want %d still: nothing of ours was written (%v)", h.Version, before.Version, err)
	}
}

func newSourceConn(t testing.TB, dsn string) *source {
	s := &source{t: t, dsn: dsn, logged: &logBuffer{}}
	s.conn = s.connect()
	return s
}

// TestEmptyTransactionsWriteNothing: transactions without rows of ours cause no write into the log.
func TestEmptyTransactionsWriteNothing(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{before: `CREATE TABLE noise (n int)`})
	s.exec(`INSERT INTO items VALUES (1)`)
	s.settle()
	appends := s.bus.Subscribe(t.Context())
	began := time.Now()
	for i := range 200 {
		s.exec(`INSERT INTO noise VALUES ($1)`, i)
		s.exec(`BEGIN; SAVEPOINT a; INSERT INTO items VALUES (2); ROLLBACK TO a; COMMIT`)
	}
	passed := changelog.LSN(query[int64](s, `SELECT (pg_current_wal_flush_lsn() - '0/0')::int8`))
	s.await("they were received", func() bool { return changelog.LSN(s.stats.Received.Load()) >= passed })
	if n := query[int](s, `SELECT count(DISTINCT tx) FROM walgate.transactions`); n != 1 {
		t.Errorf("%d transactions recorded, want the one that wrote a row", n)
	}
	if n, most := len(appends), 1+int(time.Since(began)/idlePersist); n > most {
		t.Errorf("400 empty transactions caused %d writes into the log, want %d for the idle position", n, most)
	}
	s.exec(`INSERT INTO items VALUES (3)`)
	s.expect(0, "u 1, u 3")
}

// TestFastShutdownIsNotDelayed: the server waits for its walsenders until all WAL is acknowledged.
func TestFastShutdownIsNotDelayed(t *testing.T) {
	t.Parallel()
	for _, where := range []string{"same server", "other server"} {
		t.Run(where, func(t *testing.T) {
			t.Parallel()
			server := pgserver.StartForTest(t, pgserver.Options{})
			o := setup{dsn: server.DSN("postgres"), before: `CREATE TABLE noise (n int);`}
			if where == "other server" {
				o.storage = pgserver.ForTest(t).Database(t)
			}
			s := newSource(t, o)
			s.exec(`INSERT INTO items VALUES (1)`)
			s.settle()
			s.exec(`INSERT INTO noise SELECT generate_series(1, 1000)`)
			if err := server.Stop(t.Context()); err != nil {
				t.Fatal(err)
			}
			if text := readFile(t, server.LogPath()); !strings.Contains(text, "database system is shut down") {
				t.Errorf("the server did not stop in order:\n%s", text)
			}
			if err := server.Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
			s.conn = s.connect()
			s.exec(`INSERT INTO items VALUES (2)`)
			s.expect(0, "u 1, u 2")
		})
	}
}

// TestSenderTimeoutOfTheDatabase: whatever the database says, off or shorter than our statuses come, our own start-up
// parameter holds: neither a quiet time nor a log that stands still ends the connection. That a dead one ends by it is
// TestReplicationConnectionStalled's.
func TestSenderTimeoutOfTheDatabase(t *testing.T) {
	t.Parallel()
	for _, setting := range []string{"0", "100ms"} {
		t.Run(setting, func(t *testing.T) {
			t.Parallel()
			s := newSource(t, setup{timing: quick, before: fmt.Sprintf(`DO $$BEGIN EXECUTE format('ALTER DATABASE %%I SET wal_sender_timeout = %q', current_database()); END$$;`, setting)})
			s.exec(`INSERT INTO items VALUES (1)`)
			s.settle()
			reconnects, sender := s.stats.Reconnects.Load(), s.walsender()
			quiet := time.Now().Add(quick.stall + 2*quick.status)
			s.await("a dead connection would have been noticed", func() bool { return time.Now().After(quiet) })
			holder := s.connect()
			if _, err := holder.Exec(t.Context(), `BEGIN; SELECT FROM walgate.checkpoint FOR UPDATE`); err != nil {
				t.Fatal(err)
			}
			s.exec(`INSERT INTO items VALUES (2)`)
			held := time.Now().Add(quick.sender + 2*quick.status)
			s.await("the sender's timeout has passed while the log stands still", func() bool { return time.Now().After(held) })
			if _, err := holder.Exec(t.Context(), `ROLLBACK`); err != nil {
				t.Fatal(err)
			}
			s.expect(0, "u 1, u 2")
			if n := s.stats.Reconnects.Load(); n != reconnects || s.walsender() != sender {
				t.Errorf("%d reconnects\n%s", n-reconnects, s.logged)
			}
		})
	}
}

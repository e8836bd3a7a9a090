package replication

import (
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/internal/badlink"
	"github.com/walgate/walgate/policies"
)

// otherReader reads the slot as another instance does, but for the server's time limit, which doesn't bind it.
func (s *source) otherReader() *pgconn.PgConn {
	s.t.Helper()
	conn, err := connect(s.t.Context(), s.dsn, "UTF8", 0)
	s.ok(err)
	s.t.Cleanup(func() { conn.Conn().Close() })
	s.ok(start(s.t.Context(), conn, s.slot, s.watcher.publications))
	return conn
}

// TestSilentLeaderIsEnded: an instance stands still, and the server doesn't notice. One that waits ends its walsender. One
// that writes a status now and then is alive, however long nothing else comes of it.
func TestSilentLeaderIsEnded(t *testing.T) {
	t.Parallel()
	for name, alive := range map[string]bool{"silent": false, "alive": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSource(t, setup{timing: quick})
			before := s.settle()
			s.stop()
			s.unread()
			confirmed := changelog.LSN(query[int64](s, `SELECT (confirmed_flush_lsn - '0/0')::int8 FROM pg_replication_slots WHERE slot_name = $1`, s.slot))
			other := s.otherReader()
			if alive {
				stop := reassure(other, confirmed, quick.status)
				s.launch()
				s.says("the holder is named", "application walgate")
				patience := time.Now().Add(2 * silence * quick.sender)
				s.await("it has waited for twice the time", func() bool { return s.walsender() != int(other.PID()) || time.Now().After(patience) })
				if s.walsender() != int(other.PID()) {
					t.Errorf("a living walsender was ended\nlog:\n%s", s.logged)
				}
				stop()
				other.Conn().Close()
			} else {
				s.launch()
			}
			s.await("the leader takes over", s.leads)
			if ended := strings.Contains(s.logged.String(), "ended the walsender"); ended == alive {
				t.Errorf("ended: %t\nlog:\n%s", ended, s.logged)
			}
			s.exec(`INSERT INTO items VALUES (1)`)
			s.expect(before.Version, "u 1")
			if n := strings.Count(s.logged.String(), "another process holds the slot"); n != 1 {
				t.Errorf("that it waits was logged %d times", n)
			}
		})
	}
}

// TestClaimOutlastsTheWalsender: the log is taken over behind a lock that lasts longer than the server waits for a word.
func TestClaimOutlastsTheWalsender(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{timing: quick})
	s.stop()
	s.unread()
	s.exec(`BEGIN; LOCK TABLE walgate.checkpoint IN ROW EXCLUSIVE MODE`)
	s.launch()
	look := newSourceConn(t, s.dsn)
	var walsender int
	s.await("the slot is taken", func() bool {
		walsender = query[int](look, `SELECT coalesce((SELECT active_pid FROM pg_replication_slots WHERE slot_name = $1), 0)`, s.slot)
		return walsender != 0
	})
	patience := time.Now().Add(2 * quick.sender)
	s.await("it has waited for twice the server's time", func() bool { return time.Now().After(patience) })
	s.exec(`ROLLBACK`)
	s.await("it leads", s.leads)
	if now := s.walsender(); now != walsender {
		t.Errorf("process %d reads the slot, want %d still", now, walsender)
	}
}

// TestStartBehindLocks: tables are locked while the log begins. Those that aren't, and are empty, are from the beginning all
// the same; where the log has begun, nobody looks at any.
func TestStartBehindLocks(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{
		before: `CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY); CREATE TABLE c (id int PRIMARY KEY); INSERT INTO c VALUES (1);`,
		specs:  map[string]policies.Spec{"a": {Table: "a"}, "b": {Table: "b"}, "c": {Table: "c"}},
	})
	s.stop()
	s.unread()
	s.exec(`DELETE FROM walgate.checkpoint; DELETE FROM walgate.collections; DELETE FROM walgate.source`)
	s.exec(`BEGIN; LOCK TABLE a IN ACCESS EXCLUSIVE MODE`)
	s.start()
	for name, want := range map[string]string{"a": "new collection", "b": "from the beginning", "c": "new collection"} {
		if c := s.collection(name); c.FloorReason != want {
			t.Errorf("collection %s: %s, want %s", name, c.FloorReason, want)
		}
	}
	s.stop()
	l := NewLeader(Options{Watcher: s.watcher})
	for _, c := range l.claimed(t.Context(), nil, map[string]bool{"a": true, "b": true, "c": true}) { // nil: it would not survive a look
		if c.Empty {
			t.Errorf("collection %s counts as empty", c.Name)
		}
	}
	s.exec(`ROLLBACK`)
}

// TestLeaderThatCannotReachTheLog: its log goes silent while it leads. It lets go of the slot in bounded time, to one that
// reaches the log, and doesn't take it again before it can use it.
func TestLeaderThatCannotReachTheLog(t *testing.T) {
	t.Parallel()
	storage := newDatabase(t)
	link := badlink.To(t, storage)
	s := newSource(t, setup{timing: quick, patience: 500 * time.Millisecond, storage: link.DSN(t, storage) + "&connect_timeout=2"})
	t.Cleanup(func() { link.Cut() })
	s.insert(1)
	before := s.settle()
	near := *s // another instance, by another way to the log
	log, err := changelog.Open(t.Context(), storage, 4)
	s.ok(err)
	t.Cleanup(log.Close)
	near.log, near.logged = log, &logBuffer{}
	near.launch()
	near.says("it waits", "is held by process")
	link.Stall()
	want := s.insert(2)
	near.await("the other one takes over", near.leads)
	near.expect(0, want)
	near.stop()
	near.unread()
	tries := s.stats.Reconnects.Load()
	near.await("the first one has tried again", func() bool {
		if s.walsender() != 0 {
			t.Fatalf("it holds the slot, and can't reach the log\nlog:\n%s", s.logged)
		}
		return s.stats.Reconnects.Load() > tries+1
	})
	link.Resume()
	s.await("it leads again", s.leads)
	if h := s.settle(); h.History != before.History {
		t.Error("a new history began although nothing was lost")
	}
}

// TestWaitingEndsBackOff: how often this instance failed says nothing about the time when the slot, that another one held
// meanwhile, comes free: it doesn't sleep then as after its own failures.
func TestWaitingEndsBackOff(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{timing: quick})
	s.stop()
	s.unread()
	pauses := func() []string {
		var found []string
		for line := range strings.Lines(s.logged.String()) {
			if _, pause, ok := strings.Cut(line, "pause="); ok && strings.Contains(line, "trying again") {
				found = append(found, strings.TrimSpace(pause))
			}
		}
		return found
	}
	s.exec(`ALTER TABLE walgate.checkpoint RENAME TO away`)
	s.launch()
	s.await("its pauses have grown", func() bool { return len(pauses()) >= 4 })
	var other *pgconn.PgConn
	s.await("another instance has the slot", func() bool {
		conn, err := connect(t.Context(), s.dsn, "UTF8", 0)
		s.ok(err)
		if start(t.Context(), conn, s.slot, s.watcher.publications) != nil { // it has it at the moment
			conn.Conn().Close()
			return false
		}
		other = conn
		return true
	})
	s.says("it waits", "is held by process")
	before := pauses()
	other.Conn().Close()
	s.await("it fails again", func() bool { return len(pauses()) > len(before) })
	if next := pauses()[len(before)]; before[3] != "400ms" || next != "50ms" {
		t.Errorf("the pauses were %s, and %s when it had waited", before, next)
	}
	s.exec(`ALTER TABLE walgate.away RENAME TO checkpoint`)
	s.await("it leads", s.leads)
}

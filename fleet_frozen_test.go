package main

import (
	"syscall"
	"testing"
	"time"

	"github.com/walgate/walgate/internal/pgserver"
)

// TestFrozenLeaderAmongThree: the leader stands still for longer than the server waits for it, amid small writes or in the
// middle of a large transaction that the walsender can't get rid of. One of the others takes over. The leader wakes with its
// connection to the source still up and full of changes: it may not append them. Nothing is lost or doubled, and it serves.
func TestFrozenLeaderAmongThree(t *testing.T) {
	t.Parallel()
	for name, large := range map[string]bool{"amid small writes": false, "within a large transaction": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := pgserver.StartForTest(t, pgserver.Options{})
			f := newFleet(t, server, server.DSN("postgres"), nil) // the log is reached directly
			leader, history := f.leader(), historyOf(f.absent)
			link := f.links[0]
			if leader != f.all[0] {
				t.Fatal("the first gateway isn't the leader")
			}
			f.door.Turn(t, f.all[1].base)
			stop, end := f.write(), f.during()
			resyncEventually(t, "writes are under way", func() bool { return f.logHolds(firstWritten + 20) })
			if large {
				stop()
				f.exec(`INSERT INTO docs SELECT n, 'u0', repeat(md5(n::text), 30) FROM generate_series($1::int, $1 + 39999) n`, firstWritten+f.written)
				f.written += 40000
				resyncEventually(t, "the walsender streams", func() bool {
					return sourceQuery[bool](f.followedSource, `SELECT coalesce((SELECT sent_lsn > '0/0' AND state IN ('streaming', 'catchup') FROM pg_stat_replication WHERE application_name = 'walgate'), false)`)
				})
			}
			epoch, froze := f.epoch(), time.Now()
			must(t, leader.cmd.Process.Signal(syscall.SIGSTOP))
			link.StallAnswers() // what is on its way stays so, and so does the end of the connection
			if !large {
				resyncEventually(t, "more is written", func() bool { return time.Since(froze) > time.Second })
				stop()
			}
			resyncEventually(t, "another one takes over", func() bool { return f.epoch() > epoch })
			t.Logf("taken over after %s", time.Since(froze).Round(10*time.Millisecond))
			f.arrives(froze)
			resyncEventually(t, "seven seconds are over", func() bool { return time.Since(froze) > 7*time.Second })
			must(t, leader.cmd.Process.Signal(syscall.SIGCONT))
			// It finds its connection gone, or, where it first appends what it had read, that it was deposed.
			resyncEventually(t, "it says why it stopped", func() bool { return leader.says("replication stopped; trying again") > 0 })
			link.Resume()
			resyncEventually(t, "it waits again", func() bool { return leader.says("another process holds the slot") > 0 })
			f.arrives(froze)
			end()
			f.absent.base = leader.base
			f.settle(f.present, f.absent)
			f.audit()
			f.unbroken(history)
			if now := f.epoch(); now != epoch+1 {
				t.Errorf("epoch %d after %d", now, epoch)
			}
		})
	}
}

// logHolds says whether the log holds a written row.
func (f *fleet) logHolds(id int) (holds bool) {
	f.t.Helper()
	resyncScan(f.t, f.conn, []any{&holds}, `SELECT EXISTS (SELECT FROM walgate.changes WHERE doc_id = $1::int::text)`, id)
	return holds
}

package main

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/walgate/walgate/internal/pgserver"
)

// clock is the one of a server, to be set.
type clock struct {
	t    *testing.T
	path string
}

// newClock returns a clock and the environment of a server that goes by it: Debian's faketime has the library.
func newClock(t *testing.T) (*clock, []string) {
	t.Helper()
	found, err := filepath.Glob("/usr/lib/*/faketime/libfaketime.so.1")
	if err != nil || len(found) == 0 {
		t.Fatalf("libfaketime isn't installed: apt-get install faketime (%v)", err)
	}
	dir, err := os.MkdirTemp("", "walgate-clock-") // t.TempDir is closed to the server's user
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	must(t, os.Chmod(dir, 0o755))
	c := &clock{t, filepath.Join(dir, "offset")}
	c.set("+0")
	return c, []string{"LD_PRELOAD=" + found[0], "FAKETIME_TIMESTAMP_FILE=" + c.path, "FAKETIME_NO_CACHE=1", "FAKETIME_DONT_FAKE_MONOTONIC=1"}
}

// set moves the clock to so far from the true time.
func (c *clock) set(offset string) {
	c.t.Helper()
	next := c.path + ".next"
	must(c.t, os.WriteFile(next, []byte(offset+"\n"), 0o644))
	must(c.t, os.Rename(next, c.path)) // a reader sees the old or the new
}

// TestClocksJump: the source's clock is minutes ahead of the log's, jumps forth and back by an hour while a leader follows it
// and between two, and versions rise all the same; nobody has to begin anew. In the long form a leader stands still while the
// source's clock goes back, by which it would hold the slot for another hour.
func TestClocksJump(t *testing.T) {
	t.Parallel()
	clock, env := newClock(t)
	server := pgserver.StartForTest(t, pgserver.Options{Env: env})
	clock.set("+7m")
	f := newFleet(t, server, pgserver.ForTest(t).Database(t), nil)
	if ahead := sourceQuery[float64](f.followedSource, `SELECT extract(epoch FROM clock_timestamp())::float8`) - float64(time.Now().Unix()); ahead < 400 || ahead > 440 {
		t.Fatalf("the source's clock is %.0f s ahead, want seven minutes", ahead)
	}
	history := historyOf(f.absent)
	stop, end := f.write(), f.during()
	await := func() {
		t.Helper()
		stop()
		f.arrives(time.Now())
		stop = f.write()
	}
	for _, kill := range []bool{false, true} {
		for _, offset := range []string{"-53m", "+67m", "+7m"} {
			clock.set(offset)
			if kill {
				leader := f.leader()
				f.door.Turn(t, f.others(leader)[0].base)
				must(t, leader.end(syscall.SIGKILL))
				f.leader()
				must(t, leader.start(t.Context()))
			}
			await()
		}
	}
	if os.Getenv(longEnv) != "" {
		leader, epoch := f.leader(), f.epoch()
		f.door.Turn(t, f.others(leader)[0].base)
		must(t, leader.cmd.Process.Signal(syscall.SIGSTOP))
		began := time.Now()
		clock.set("-53m")
		resyncEventually(t, "another one leads", func() bool { return f.epoch() > epoch })
		t.Logf("a leader that stood still while the clock went back was ended after %s", time.Since(began))
		must(t, leader.cmd.Process.Signal(syscall.SIGCONT))
		await()
	}
	stop()
	end()
	f.settle(f.present, f.absent)
	f.audit()
	f.unbroken(history)
}

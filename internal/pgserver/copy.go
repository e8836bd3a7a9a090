package pgserver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"testing"

	"github.com/jackc/pgx/v5"
)

// errRunning says that files were to be copied from, or over, a server that runs.
var errRunning = errors.New("the server runs: stop it, or let it crash, before its files are copied")

// Save copies the files of the stopped server into dir, which must not exist, as a snapshot of its disk would.
func (s *Server) Save(dir string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.process != nil && s.process.running() {
		return errRunning
	}
	return copyTree(dir, s.dataDir())
}

// Restore puts what Save copied in place of the stopped server's files; Restart then starts it from there.
func (s *Server) Restore(dir string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.process != nil && s.process.running() {
		return errRunning
	}
	if err := os.RemoveAll(s.dataDir()); err != nil {
		return err
	}
	if err := copyTree(s.dataDir(), dir); err != nil {
		return err
	}
	return chownTree(s.dataDir(), runAs())
}

// Copy says what to make of saved files.
type Copy struct {
	// From is what Save copied.
	From string
	// DropSlots leaves the replication slots out, as a base backup does.
	DropSlots bool
	// StandbyOf makes the copy a streaming standby of that server.
	StandbyOf *Server
	// Recover ends recovery of the copy as that of a base backup with an archive ends: on a new timeline.
	Recover bool
	// Settings are further server settings.
	Settings map[string]string
	// Install is the set of binaries to use; the zero value means any of the files' major version.
	Install Install
}

// StartCopyForTest is StartCopy for this test alone.
func StartCopyForTest(t testing.TB, c Copy) *Server {
	t.Helper()
	o, err := c.options()
	if err != nil {
		t.Fatal(err)
	}
	return StartForTest(t, o)
}

// StartCopy starts another server on a copy of saved files, with fsync off. A standby is ready once it answers, whatever it
// has replayed by then. The caller must call Close.
func StartCopy(ctx context.Context, c Copy) (*Server, error) {
	o, err := c.options()
	if err != nil {
		return nil, err
	}
	o.Fast = true
	return Start(ctx, o)
}

func (c Copy) options() (o Options, err error) {
	o = Options{Install: c.Install, Settings: maps.Clone(c.Settings), fill: c.fill}
	if o.Settings == nil {
		o.Settings = map[string]string{}
	}
	if o.Major, err = clusterMajor(c.From); err != nil {
		return o, err
	}
	if c.StandbyOf != nil && o.Settings["primary_conninfo"] == "" {
		o.Settings["primary_conninfo"] = c.StandbyOf.DSN("")
	}
	if c.Recover {
		o.Settings["restore_command"] = "false"
		o.Settings["hot_standby"] = "off" // nobody is let in before recovery has ended
	}
	return o, nil
}

// fill makes the new server's data directory of the saved files.
func (c Copy) fill(data string) error {
	if err := copyTree(data, c.From); err != nil {
		return err
	}
	if c.DropSlots {
		slots, err := filepath.Glob(filepath.Join(data, "pg_replslot", "*"))
		for _, slot := range slots {
			err = errors.Join(err, os.RemoveAll(slot))
		}
		if err != nil {
			return err
		}
	}
	if err := chownTree(data, runAs()); err != nil {
		return err
	}
	switch {
	case c.StandbyOf != nil:
		return writeSignal(data, "standby.signal")
	case c.Recover:
		return writeSignal(data, "recovery.signal")
	}
	return nil
}

// Promote makes a standby a primary, on a new timeline, and waits until it is one.
func (s *Server) Promote(ctx context.Context) error {
	return s.maintain(ctx, func(ctx context.Context, conn *pgx.Conn) error {
		var done bool
		if err := conn.QueryRow(ctx, `SELECT pg_promote(true, 30)`).Scan(&done); err != nil || !done {
			return fmt.Errorf("promote the standby: in time %t: %w", done, err)
		}
		return nil
	})
}

// Follow makes the stopped server a standby of the other, which must hold all that this one has; Restart starts it so.
func (s *Server) Follow(to *Server) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.process != nil && s.process.running() {
		return errRunning
	}
	s.options.Settings = maps.Clone(s.options.Settings)
	if s.options.Settings == nil {
		s.options.Settings = map[string]string{}
	}
	s.options.Settings["primary_conninfo"] = to.DSN("")
	return writeSignal(s.dataDir(), "standby.signal")
}

// writeSignal leaves the file that tells a server how to start.
func writeSignal(data, name string) error {
	path := filepath.Join(data, name)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return err
	}
	return chownTree(path, runAs())
}

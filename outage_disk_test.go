package main

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/internal/pgserver"
)

// smallDisk is a place for the log's database that can be filled up.
type smallDisk struct {
	t           *testing.T
	dir         string // a file system of its own; empty where this process may not mount one
	fill, empty func()
}

// newSmallDisk makes one; a server that is to use it must be started later, to be stopped before.
func newSmallDisk(t *testing.T) *smallDisk {
	t.Helper()
	dir, err := os.MkdirTemp("", "walgate-disk-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := mountSmall(t, dir, "64m"); errors.Is(err, errors.ErrUnsupported) || errors.Is(err, os.ErrPermission) {
		dir = ""
	} else if err != nil {
		t.Fatal(err)
	}
	return &smallDisk{t: t, dir: dir}
}

// database makes one on the disk; without a disk, PostgreSQL will answer as it does on a full one, by a trigger.
func (d *smallDisk) database(server *pgserver.Server) (dsn string) {
	t, dir := d.t, d.dir
	t.Helper()
	if dir == "" {
		dsn = server.Database(t)
		d.byTrigger(connect(t, dsn))
		return dsn
	}
	space := filepath.Join(dir, "space")
	if err := os.Mkdir(space, 0o700); err != nil {
		t.Fatal(err)
	}
	owner, err := os.Stat(filepath.Dir(server.LogPath()))
	if err != nil {
		t.Fatal(err)
	}
	as := owner.Sys().(*syscall.Stat_t)
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chown(space, int(as.Uid), int(as.Gid))); err != nil {
		t.Fatal(err)
	}
	admin := connect(t, server.DSN("postgres"))
	resyncExec(t, admin, "CREATE TABLESPACE small LOCATION '"+space+"'")
	resyncExec(t, admin, "CREATE DATABASE log TABLESPACE small")
	ballast := filepath.Join(dir, "ballast")
	d.fill = func() {
		var free syscall.Statfs_t
		if err := syscall.Statfs(dir, &free); err != nil {
			t.Fatal(err)
		}
		const room = 1 << 20
		if err := os.WriteFile(ballast, make([]byte, max(0, int64(free.Bavail)*int64(free.Bsize)-room)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	d.empty = func() {
		if err := os.Remove(ballast); err != nil {
			t.Fatal(err)
		}
	}
	return server.DSN("log")
}

func (d *smallDisk) byTrigger(conn *pgx.Conn) {
	d.t.Log("this process may not mount a file system: a trigger says that the disk is full")
	d.fill = func() {
		resyncExec(d.t, conn, `CREATE FUNCTION no_space() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN
			RAISE EXCEPTION USING ERRCODE = 'disk_full', MESSAGE = 'could not extend file: No space left on device'; END$$`)
		resyncExec(d.t, conn, `CREATE TRIGGER no_space BEFORE INSERT ON walgate.changes EXECUTE FUNCTION no_space()`)
	}
	d.empty = func() { resyncExec(d.t, conn, `DROP FUNCTION no_space CASCADE`) }
}

// TestLogsDiskIsFull: PostgreSQL can't extend the log's tables any more. Nothing is acknowledged that isn't logged, /readyz
// says what is the matter and what to do, reads go on, and with room again it heals by itself, with every transaction once.
func TestLogsDiskIsFull(t *testing.T) {
	t.Parallel()
	disk := newSmallDisk(t)
	o := newOutage(t, disk.database)
	disk.fill()
	for tries := 0; ; tries++ {
		o.app.burst()
		why := o.health().Problems["replication"]
		if strings.Contains(why, "53100") {
			if !strings.Contains(why, "disk of the change log's database is full") || !strings.Contains(why, "make room") {
				t.Errorf("/readyz says: %s", why)
			}
			break
		}
		if tries > 200 {
			t.Fatal("the disk doesn't fill up")
		}
	}
	for range 3 { // it is tried again and again, and leaves nothing half done
		tried := o.metric("walgate_reconnects_total")
		o.app.small()
		o.until("it was tried again", func() bool { return o.metric("walgate_reconnects_total") > tried })
		o.check()
	}
	if n := o.metric("walgate_leading"); n != 0 {
		t.Errorf("walgate_leading is %g", n)
	}
	if status, _, body := o.pull(); status != http.StatusOK {
		t.Errorf("a pull while the log can't grow: %d %s", status, body)
	}
	if o.checked == len(o.app.committed) {
		t.Error("everything was logged: the disk was never full")
	}
	disk.empty()
	o.healed()
}

// metric reads one value of /metrics.
func (o *outage) metric(name string) (v float64) {
	o.t.Helper()
	res, err := http.Get(o.gateway.base + "/metrics")
	if err != nil {
		o.t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		o.t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if _, err := fmt.Sscanf(line, name+" %g", &v); err == nil {
			return v
		}
	}
	o.t.Fatalf("no metric %s", name)
	return 0
}

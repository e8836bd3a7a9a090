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

	"github.com/walgate/walgate/internal/pgserver"
)

// smallDisk is a file system of its own, which can be filled up.
type smallDisk struct {
	t   *testing.T
	dir string // empty where this process may not mount one
}

// newSmallDisk makes one; a server that is to use it must be started later, to be stopped before.
func newSmallDisk(t *testing.T, size string) *smallDisk {
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
	if err := mountSmall(t, dir, size); errors.Is(err, errors.ErrUnsupported) || errors.Is(err, os.ErrPermission) {
		dir = ""
	} else if err != nil {
		t.Fatal(err)
	}
	return &smallDisk{t: t, dir: dir}
}

func (d *smallDisk) ballast() string { return filepath.Join(d.dir, "ballast") }

// fill leaves room for so many bytes.
func (d *smallDisk) fill(room int64) {
	d.t.Helper()
	var free syscall.Statfs_t
	if err := syscall.Statfs(d.dir, &free); err != nil {
		d.t.Fatal(err)
	}
	if err := os.WriteFile(d.ballast(), make([]byte, max(0, int64(free.Bavail)*int64(free.Bsize)-room)), 0o600); err != nil {
		d.t.Fatal(err)
	}
}

func (d *smallDisk) empty() {
	d.t.Helper()
	if err := os.Remove(d.ballast()); err != nil {
		d.t.Fatal(err)
	}
}

// database makes one on the disk.
func (d *smallDisk) database(server *pgserver.Server) (dsn string) {
	d.t.Helper()
	space := filepath.Join(d.dir, "space")
	owner, err := os.Stat(filepath.Dir(server.LogPath()))
	if err == nil {
		as := owner.Sys().(*syscall.Stat_t)
		err = errors.Join(os.Mkdir(space, 0o700), os.Chown(space, int(as.Uid), int(as.Gid)))
	}
	if err != nil {
		d.t.Fatal(err)
	}
	admin := connect(d.t, server.DSN("postgres"))
	resyncExec(d.t, admin, "CREATE TABLESPACE small LOCATION '"+space+"'")
	resyncExec(d.t, admin, "CREATE DATABASE log TABLESPACE small")
	return server.DSN("log")
}

// TestLogsDiskIsFull: PostgreSQL can't extend the log's tables any more. Nothing is acknowledged that isn't logged, /readyz
// says what is the matter and what to do, reads go on, and with room again it heals by itself, with every transaction once.
func TestLogsDiskIsFull(t *testing.T) {
	t.Parallel()
	disk := newSmallDisk(t, "64m")
	storage := pgserver.StartForTest(t, pgserver.Options{})
	fill, empty := func() { disk.fill(1 << 20) }, disk.empty
	var dsn string
	if disk.dir != "" {
		dsn = disk.database(storage)
	} else {
		t.Log("this process may not mount a file system: a trigger says what PostgreSQL says on a full one")
		dsn = storage.Database(t)
		conn := connect(t, dsn)
		fill = func() {
			resyncExec(t, conn, `CREATE FUNCTION no_space() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN
				RAISE EXCEPTION USING ERRCODE = 'disk_full', MESSAGE = 'could not extend file: No space left on device'; END$$`)
			resyncExec(t, conn, `CREATE TRIGGER no_space BEFORE INSERT ON walgate.changes EXECUTE FUNCTION no_space()`)
		}
		empty = func() { resyncExec(t, conn, `DROP FUNCTION no_space CASCADE`) }
	}
	o := newOutage(t, storage, dsn)
	fill()
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
	empty()
	o.healed()
}

// TestLogsServerDiskIsFull: the disk of the log's whole server is full, its WAL included, at which PostgreSQL ends itself.
// Once somebody has made room and started it again, all is well.
func TestLogsServerDiskIsFull(t *testing.T) {
	t.Parallel()
	disk := newSmallDisk(t, "256m")
	if disk.dir == "" && os.Getenv("CI") != "" {
		t.Fatal("needs to mount a file system: run as root")
	} else if disk.dir == "" {
		t.Skip("needs to mount a file system; TestLogsDiskIsFull has a way without, and TestLogAway a server that ends")
	}
	storage := pgserver.StartForTest(t, pgserver.Options{Dir: filepath.Join(disk.dir, "server"), Settings: map[string]string{"max_wal_size": "1GB", "min_wal_size": "32MB", "checkpoint_timeout": "1h"}})
	o := newOutage(t, storage, storage.Database(t))
	disk.fill(14 << 20) // less than a segment of WAL
	admin := connect(t, storage.DSN("postgres"))
	for tries := 0; ; tries++ {
		o.app.small()
		if _, err := admin.Exec(t.Context(), `SELECT pg_logical_emit_message(false, 'test', 'x'), pg_switch_wal()`); err != nil {
			t.Logf("the server: %v", err)
			break
		}
		if tries > 50 {
			t.Fatal("the disk doesn't fill up")
		}
	}
	o.app.burst()
	o.until("/readyz says so", func() bool {
		h := o.health()
		return !h.Leading && strings.Contains(h.Problems["replication"], "change log") && strings.Contains(h.Problems["change_log"], "doesn't answer")
	})
	t.Logf("/readyz: %v", o.health().Problems)
	o.pullAway()
	o.app.burst()
	disk.empty()
	if err := storage.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	o.store = connect(t, o.logDSN)
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

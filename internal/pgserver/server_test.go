package pgserver

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// eachInstall runs the test on every major version of this machine.
func eachInstall(t *testing.T, test func(t *testing.T, install Install)) {
	t.Parallel()
	installs, err := Find(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	seen := map[int]bool{}
	for _, install := range installs {
		if seen[install.Major] {
			continue
		}
		seen[install.Major] = true
		t.Run(strconv.Itoa(install.Major), func(t *testing.T) {
			t.Parallel()
			test(t, install)
		})
	}
}

func query[T any](t *testing.T, dsn, sql string) T {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	rows, err := conn.Query(t.Context(), sql)
	if err != nil {
		t.Fatal(err)
	}
	value, err := pgx.CollectExactlyOneRow(rows, pgx.RowTo[T])
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return value
}

func exec1(t *testing.T, dsn, sql string) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	if _, err := conn.Exec(t.Context(), sql); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

func TestStartedServerDecodesLogically(t *testing.T) {
	eachInstall(t, func(t *testing.T, install Install) {
		s := StartForTest(t, Options{Install: install, Settings: map[string]string{"application_name": "it's"}})
		if got := query[string](t, s.DSN("postgres"), "SHOW server_version_num"); got[:2] != strconv.Itoa(s.Version()) {
			t.Errorf("server version %s, want %d", got, s.Version())
		}
		if got := query[string](t, s.DSN("postgres"), "SHOW wal_level"); got != "logical" {
			t.Errorf("wal_level %s, want logical", got)
		}
		if got := query[string](t, s.DSN("postgres"), "SHOW fsync"); got != "off" {
			t.Errorf("fsync %s, want off in a fast server", got)
		}
		exec1(t, s.DSN("postgres"), "SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
	})
}

func TestCrashKeepsCommittedRowsAndPort(t *testing.T) {
	eachInstall(t, func(t *testing.T, install Install) {
		s := StartForTest(t, Options{Install: install})
		dsn, port := s.DSN("postgres"), s.Port()
		exec1(t, dsn, "CREATE TABLE kept AS SELECT 42 AS n")
		if err := s.Crash(); err != nil {
			t.Fatal(err)
		}
		if _, err := net.Dial("tcp", s.address()); err == nil {
			t.Error("a crashed server still accepts connections")
		}
		if err := s.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := query[int](t, dsn, "SELECT n FROM kept"); got != 42 || s.Port() != port {
			t.Errorf("after the crash: row %d on port %d, want 42 on %d", got, s.Port(), port)
		}
		text, err := os.ReadFile(s.LogPath())
		if err != nil || !strings.Contains(string(text), "automatic recovery in progress") {
			t.Errorf("the server log tells of no recovery, so it was no crash (%v):\n%s", err, text)
		}
	})
}

func TestStopLeavesNoProcessAndDataForRestart(t *testing.T) {
	eachInstall(t, func(t *testing.T, install Install) {
		s := StartForTest(t, Options{Install: install})
		exec1(t, s.DSN("postgres"), "CREATE TABLE kept AS SELECT 1 AS n")
		pid := s.process.cmd.Process.Pid
		if err := s.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := s.Stop(t.Context()); err != nil {
			t.Errorf("stopping a stopped server: %v", err)
		}
		if err := syscall.Kill(pid, 0); err != syscall.ESRCH {
			t.Errorf("process %d after Stop: %v, want that there is none", pid, err)
		}
		if err := s.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		query[int](t, s.DSN("postgres"), "SELECT n FROM kept")
	})
}

func TestTwoServersSideBySide(t *testing.T) {
	t.Parallel()
	a, b := StartForTest(t, Options{}), StartForTest(t, Options{Fresh: true})
	if a.Port() == b.Port() {
		t.Errorf("both servers have port %d", a.Port())
	}
	const id = "SELECT system_identifier FROM pg_control_system()"
	if x, y := query[int64](t, a.DSN("postgres"), id), query[int64](t, b.DSN("postgres"), id); x == y {
		t.Errorf("a Fresh server has the system identifier of the template, %d", x)
	}
}

func TestPasswordIsRequired(t *testing.T) {
	t.Parallel()
	s := StartForTest(t, Options{Password: "s3cret/with:signs@"})
	query[int](t, s.DSN("postgres"), "SELECT 1")
	open := fmt.Sprintf("postgres://postgres:wrong@%s/postgres?sslmode=disable", s.address())
	if conn, err := pgx.Connect(t.Context(), open); err == nil {
		conn.Close(t.Context())
		t.Error("a wrong password was let in")
	}
}

func TestKeptDirectoryIsUsedAgain(t *testing.T) {
	t.Parallel()
	base, err := os.MkdirTemp("", "walgate-kept-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(base) })
	if err := os.Chmod(base, 0o755); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(base, "deeper", "server")
	first := StartForTest(t, Options{Dir: dir})
	exec1(t, first.DSN("postgres"), "CREATE TABLE kept AS SELECT 7 AS n")
	if err := first.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	again := StartForTest(t, Options{Dir: dir})
	if got := query[int](t, again.DSN("postgres"), "SELECT n FROM kept"); got != 7 {
		t.Errorf("second run on the directory reads %d, want 7", got)
	}
}

func TestBadSettingFailsWithTheServersWords(t *testing.T) {
	t.Parallel()
	install, err := TestInstall(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_, err = Start(t.Context(), Options{Install: install, Fast: true, Settings: map[string]string{"no_such_setting": "1"}})
	if err == nil || !strings.Contains(err.Error(), "no_such_setting") {
		t.Errorf("error %v, want the server's own words about no_such_setting", err)
	}
}

func TestUnreachableDirectoryIsExplained(t *testing.T) {
	t.Parallel()
	user := &account{name: "somebody", uid: 54321, gid: 54321}
	dir := t.TempDir()
	closed := filepath.Join(dir, "closed")
	if err := os.Mkdir(closed, 0o700); err != nil {
		t.Fatal(err)
	}
	err := checkReachable(user, closed)
	if err == nil || !strings.Contains(err.Error(), "somebody") || !strings.Contains(err.Error(), "chmod o+x") {
		t.Errorf("error %v, want one that names the user and the way out", err)
	}
}

// helperEnv makes the test binary start a server and then wait to be killed.
const helperEnv = "WALGATE_PGSERVER_HELPER"

func TestHelperProcess(t *testing.T) {
	if os.Getenv(helperEnv) == "" {
		return
	}
	s, err := Start(context.Background(), Options{Dir: os.Getenv(helperEnv), Fast: true})
	if err != nil {
		t.Fatal(err)
	}
	fmt.Println("pid", s.process.cmd.Process.Pid)
	select {}
}

func TestServerDiesWithItsParent(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "walgate-orphan-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	parent := exec.Command(os.Args[0], "-test.run=^TestHelperProcess$")
	parent.Env = append(os.Environ(), helperEnv+"="+filepath.Join(dir, "server"))
	out, err := parent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	pid := readPid(t, out)
	if err := parent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = parent.Wait() // Killed: its error is expected.
	awaitGone(t, pid)
}

func readPid(t *testing.T, out interface{ Read([]byte) (int, error) }) int {
	t.Helper()
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if text, ok := strings.CutPrefix(lines.Text(), "pid "); ok {
			pid, err := strconv.Atoi(text)
			if err != nil {
				t.Fatal(err)
			}
			return pid
		}
	}
	t.Fatal("the helper process ended without starting a server")
	return 0
}

// awaitGone waits until the process has ended; as an orphan it may stay a zombie, which counts as ended.
func awaitGone(t *testing.T, pid int) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	for poll := time.NewTicker(10 * time.Millisecond); ; {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || strings.Contains(string(stat), ") Z ") {
			poll.Stop()
			return
		}
		select {
		case <-poll.C:
		case <-deadline:
			t.Fatalf("PostgreSQL, process %d, outlived the process that started it", pid)
		}
	}
}

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/walgate/walgate/internal/pgserver"
	"github.com/walgate/walgate/internal/ports"
)

const refuseTable = `CREATE TABLE IF NOT EXISTS items (id int PRIMARY KEY, v int)`

// applicationGoesOn runs the application's statements.
func applicationGoesOn(t *testing.T, dsn string) {
	t.Helper()
	resyncExec(t, connect(t, dsn), `INSERT INTO items VALUES (1, 1); UPDATE items SET v = 2; DELETE FROM items`)
}

// TestServersRefused: a server that can't be a source is refused with what to set in it.
func TestServersRefused(t *testing.T) {
	t.Parallel()
	server := pgserver.StartForTest(t, pgserver.Options{Settings: map[string]string{"wal_level": "replica", "max_replication_slots": "1", "max_wal_senders": "1"}})
	dsn := server.DSN("postgres")
	resyncExec(t, connect(t, dsn), refuseTable)
	path := refuseConfig(t, dsn, "", resyncItemsPolicy)
	requireRefused(t, path, path+`:2:|database.url: found a server with wal_level = replica, expected wal_level = logical; ALTER SYSTEM SET wal_level = logical; then restart`)
	applicationGoesOn(t, dsn)

	set := func(sql string) {
		t.Helper()
		resyncExec(t, connect(t, dsn), sql)
		if err := server.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	set(`ALTER SYSTEM SET wal_level = logical`)
	resyncExec(t, connect(t, dsn), `SELECT pg_create_physical_replication_slot('other')`)
	_, err := walgate(t, "init", "--config", path)
	if err == nil || !strings.Contains(err.Error(), "max_replication_slots = 2") {
		t.Errorf("init without a free slot: %v", err)
	}
	applicationGoesOn(t, dsn)

	resyncExec(t, connect(t, dsn), `SELECT pg_drop_replication_slot('other')`)
	sender, err := connectReplication(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	if _, err = walgate(t, "init", "--config", path); err == nil || !strings.Contains(err.Error(), "max_wal_senders") {
		t.Errorf("init without a free walsender: %v", err)
	}
	applicationGoesOn(t, dsn)
	if err := sender.Close(t.Context()); err != nil {
		t.Error(err)
	}

	set(`ALTER SYSTEM SET synchronous_commit = local`) // or the application would wait for a standby that isn't there
	for _, names := range []string{"*", "a, WalGate", "ANY 1 (walgate)"} {
		resyncExec(t, connect(t, dsn), `ALTER SYSTEM SET synchronous_standby_names = '`+names+`'`)
		resyncExec(t, connect(t, dsn), `SELECT pg_reload_conf()`)
		resyncEventually(t, "the setting is in force", func() bool {
			var now string
			resyncScan(t, connect(t, dsn), []any{&now}, `SHOW synchronous_standby_names`)
			return now == names
		})
		requireRefused(t, path, `synchronous_standby_names = '`+names+`', which includes walgate|name the standbys`)
	}
	applicationGoesOn(t, dsn)
	set(`ALTER SYSTEM RESET ALL`)
	set(`ALTER SYSTEM SET wal_level = logical`)

	other := server.DSN("template1")
	requireRefused(t, refuseConfig(t, dsn, fmt.Sprintf("  replication_url: %q\n", other), resyncItemsPolicy), `config.yaml:3:|database.replication_url: found database template1|the same database of the same server`)
	if err := os.WriteFile(filepath.Join(filepath.Dir(server.LogPath()), "data", "standby.signal"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	requireRefused(t, path, `found a standby|expected the primary|target_session_attrs=read-write`)
}

// TestOldServerRefused: versions before 14 lack what is read from the catalog, so the first look at the server ends it.
func TestOldServerRefused(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			if err := playOldServer(conn); err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Error(err)
			}
		}
	}()
	cfg := &Config{}
	cfg.Database.URL = DSN("postgres://u@" + listener.Addr().String() + "/d?sslmode=disable")
	faults := checkServer(t.Context(), cfg, toServe, slog.New(slog.DiscardHandler))
	if err := listener.Close(); err != nil {
		t.Error(err)
	}
	<-ended
	if len(faults) != 1 || faults[0].Got != "PostgreSQL 13.99" || faults[0].Want != "PostgreSQL 14 or newer" {
		t.Errorf("faults %+v", faults)
	}
}

// playOldServer answers one connection's first query as PostgreSQL 13 would.
func playOldServer(conn net.Conn) error {
	defer conn.Close()
	b := pgproto3.NewBackend(conn, conn)
	if _, err := b.ReceiveStartupMessage(); err != nil {
		return err
	}
	b.Send(&pgproto3.AuthenticationOk{})
	b.Send(&pgproto3.ParameterStatus{Name: "standard_conforming_strings", Value: "on"})
	b.Send(&pgproto3.ParameterStatus{Name: "client_encoding", Value: "UTF8"})
	b.Send(&pgproto3.BackendKeyData{ProcessID: 7, SecretKey: []byte{0, 0, 0, 1}})
	b.Send(&pgproto3.ReadyForQuery{TxStatus: 'I'})
	if err := b.Flush(); err != nil {
		return err
	}
	for {
		m, err := b.Receive()
		if err != nil {
			return err
		}
		if _, ok := m.(*pgproto3.Query); !ok {
			return nil
		}
		answer := []string{"130099", "13.99", "f", "logical", "7", "", "now", "d"}
		types := []uint32{23, 25, 16, 25, 23, 25, 25, 25}
		var fields []pgproto3.FieldDescription
		var row pgproto3.DataRow
		for i, a := range answer {
			fields = append(fields, pgproto3.FieldDescription{Name: []byte("c"), DataTypeOID: types[i]})
			row.Values = append(row.Values, []byte(a))
		}
		b.Send(&pgproto3.RowDescription{Fields: fields})
		b.Send(&row)
		b.Send(&pgproto3.CommandComplete{CommandTag: []byte("SELECT 1")})
		b.Send(&pgproto3.ReadyForQuery{TxStatus: 'I'})
		if err := b.Flush(); err != nil {
			return err
		}
	}
}

// TestPoolersRefused: PgBouncer between walgate and the source is found out, whatever it pools, whether it complains about
// settings or swallows them, and whether it is in the way of queries or of replication.
func TestPoolersRefused(t *testing.T) {
	t.Parallel()
	server := pgserver.ForTest(t)
	dsn := server.Database(t)
	resyncExec(t, connect(t, dsn), refuseTable)
	const hidden = "ignore_startup_parameters = jit, extra_float_digits, IntervalStyle, bytea_output, lc_monetary, quote_all_identifiers, search_path, row_security, tcp_keepalives_idle, tcp_keepalives_interval, tcp_keepalives_count, idle_in_transaction_session_timeout, statement_timeout, lock_timeout"
	for _, mode := range []string{"transaction", "session"} {
		for name, more := range map[string]string{"": "", " that swallows settings": hidden} {
			pooled := startPgBouncer(t, server, dsn, "pool_mode = "+mode+"\n"+more)
			t.Run("queries/"+mode+name, func(t *testing.T) {
				path := refuseConfig(t, pooled, fmt.Sprintf("  replication_url: %q\n", dsn), resyncItemsPolicy)
				requireRefused(t, path, path+`:2:|database.url: found a connection through a pooler|expected a direct connection to PostgreSQL; put the host and port of the server itself`)
			})
			t.Run("replication/"+mode+name, func(t *testing.T) {
				path := refuseConfig(t, dsn, fmt.Sprintf("  replication_url: %q\n", pooled), resyncItemsPolicy)
				requireRefused(t, path, path+`:3:|database.replication_url: found a connection through a pooler|expected a direct connection to PostgreSQL`)
			})
		}
	}
	applicationGoesOn(t, dsn)
}

// startPgBouncer runs PgBouncer before the database and returns the connection string through it.
func startPgBouncer(t *testing.T, server *pgserver.Server, dsn, settings string) string {
	t.Helper()
	binary, err := exec.LookPath("pgbouncer")
	if err != nil {
		binary = "/usr/sbin/pgbouncer" // Debian's place, which isn't in everybody's path
	}
	port, release, err := ports.Reserve()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(release)
	path := filepath.Join(t.TempDir(), "pgbouncer.ini")
	text := fmt.Sprintf("[databases]\n* = host=127.0.0.1 port=%d\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = %d\nunix_socket_dir =\nauth_type = any\n%s\n", server.Port(), port, settings)
	text = strings.Replace(text, "* = host=127.0.0.1", "* = user=postgres host=127.0.0.1", 1)
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	args := []string{path}
	if os.Getuid() == 0 {
		args = []string{"-u", "nobody", path} // it refuses to run as root
	}
	log, err := os.Create(path + ".log")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary, args...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatalf("%v: the tests need PgBouncer: apt-get install pgbouncer", err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // killed
		_ = log.Close()
		if text, err := os.ReadFile(path + ".log"); err == nil && t.Failed() {
			t.Logf("PgBouncer's log:\n%s", text)
		}
	})
	through := strings.Replace(dsn, fmt.Sprintf(":%d/", server.Port()), fmt.Sprintf(":%d/", port), 1)
	resyncEventually(t, "PgBouncer answers", func() bool {
		conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			return false
		}
		return conn.Close() == nil
	})
	return through
}

// connectReplication takes a walsender.
func connectReplication(ctx context.Context, dsn string) (*pgconn.PgConn, error) {
	return pgconn.Connect(ctx, dsn+"&replication=database")
}

package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/golang-jwt/jwt/v5"
	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/internal/pgserver"
)

const commandSecret = "0123456789abcdef0123456789abcdef"

// walgate runs the command line and returns what it printed.
func walgate(t *testing.T, args ...string) (stdout string, err error) {
	t.Helper()
	c := newCommand()
	var out, log bytes.Buffer
	c.SetOut(&out)
	c.SetErr(&log)
	c.SetArgs(args)
	err = c.ExecuteContext(t.Context())
	return out.String(), err
}

// commandConfig writes a configuration for a new database with one table and returns its path and a connection.
func commandConfig(t *testing.T, slot string) (path string, conn *pgx.Conn) {
	t.Helper()
	dsn := pgserver.ForTest(t).Database(t)
	conn, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(t.Context()) })
	if _, err := conn.Exec(t.Context(), `CREATE TABLE tasks (id int PRIMARY KEY, owner text)`); err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(t.TempDir(), "config.yaml")
	text := fmt.Sprintf("database: {url: %q}\nreplication: {slot: %s}\nauth: {jwt: {secret: %q}}\ncollections: {tasks: {table: public.tasks, scope: {owner: claims.sub}}}\n", dsn, slot, commandSecret)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path, conn
}

func TestInitAndUninstall(t *testing.T) {
	t.Parallel()
	path, conn := commandConfig(t, "command_init")
	state := func() (s string) {
		err := conn.QueryRow(t.Context(), `SELECT concat((SELECT count(*) FROM pg_publication), ' ', (SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'command_init'), ' ',
			(SELECT relreplident FROM pg_class WHERE oid = 'tasks'::regclass), ' ', to_regnamespace('walgate') IS NOT NULL)`).Scan(&s)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	if _, err := walgate(t, "serve", "--config", path); err == nil || !strings.Contains(err.Error(), "walgate init") {
		t.Errorf("serve on an unprepared source: %v", err)
	}
	sql, err := walgate(t, "init", "--print-sql", "--config", path)
	if err != nil || !strings.Contains(sql, `LOCK TABLE ONLY "public"."tasks" IN SHARE ROW EXCLUSIVE MODE`) || !strings.Contains(sql, "pg_create_logical_replication_slot") {
		t.Errorf("print-sql: %v\n%s", err, sql)
	}
	if got := state(); got != "0 0 d f" {
		t.Errorf("printing altered the source: %s", got)
	}
	for range 2 {
		if _, err := walgate(t, "init", "--config", path); err != nil {
			t.Fatal(err)
		}
		if got := state(); got != "2 1 f t" {
			t.Errorf("after init: %s", got)
		}
	}
	if _, err := walgate(t, "uninstall", "--config", path); err != nil {
		t.Fatal(err)
	}
	if got := state(); got != "0 0 d f" {
		t.Errorf("after uninstall: %s", got)
	}
}

func TestTokenCommand(t *testing.T) {
	t.Parallel()
	path, _ := commandConfig(t, "command_token")
	out, err := walgate(t, "token", "--config", path, "--sub", "ana", "--role", "editor", "--claim", "org_id=7", "--claim", "teams=[1,2]", "--claim", "name=7a")
	if err != nil {
		t.Fatal(err)
	}
	claims := jwt.MapClaims{}
	if _, err := jwt.ParseWithClaims(strings.TrimSuffix(out, "\n"), claims, func(*jwt.Token) (any, error) { return []byte(commandSecret), nil }); err != nil {
		t.Fatalf("%v: %q", err, out)
	}
	if got := fmt.Sprintf("%v %v %v %v %v", claims["sub"], claims["roles"], claims["org_id"], claims["teams"], claims["name"]); got != "ana [editor] 7 [1 2] 7a" {
		t.Errorf("claims %s", got)
	}
}

func TestWrongUsage(t *testing.T) {
	t.Parallel()
	path, _ := commandConfig(t, "command_usage")
	for _, args := range [][]string{{"foo"}, {"serve", "now"}, {"token", "--config", path}, {"token", "--config", path, "--sub", "a", "--claim", "x"}, {"serve", "--colour"}, {"serve", "--config", path + ".none"}} {
		_, err := walgate(t, args...)
		var usage *usageError
		if !errors.As(err, &usage) {
			t.Errorf("%v: %v is no wrong usage", args, err)
		}
	}
}

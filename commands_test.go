package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
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
	if sql, err := walgate(t, "init", "--print-sql", "--config", path); err != nil || strings.Contains(sql, "pg_create_logical_replication_slot") {
		t.Errorf("print-sql on a prepared source: %v\n%s", err, sql)
	}
	if _, err := conn.Exec(t.Context(), `INSERT INTO walgate.files (attachment_id, event_id, state, storage_key, size, content_type, sha256, subject) VALUES ('photo', 1, 'u', 'walgate/00/00', 5000, 'image/png', '', 'ana')`); err != nil {
		t.Fatal(err)
	}
	if _, err := walgate(t, "uninstall", "--config", path); err == nil || !strings.Contains(err.Error(), "files of attachments are kept (1, 5.0 kB)") {
		t.Errorf("uninstall where files are kept: %v", err)
	}
	if got := state(); got != "2 1 f t" {
		t.Errorf("after it was refused: %s", got)
	}
	if _, err := walgate(t, "uninstall", "--forget-files", "--config", path); err != nil {
		t.Fatal(err)
	}
	if got := state(); got != "0 0 d f" {
		t.Errorf("after uninstall: %s", got)
	}
}

// TestPrintedRights: what --print-sql prints is all that the role of database.url, which owns nothing, lacks.
func TestPrintedRights(t *testing.T) {
	t.Parallel()
	path, conn := commandConfig(t, "command_rights")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	role := "gateway_" + strings.ToLower(rand.Text()[:8])
	if _, err := conn.Exec(t.Context(), "CREATE ROLE "+role+" LOGIN"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := conn.Exec(context.WithoutCancel(t.Context()), "DROP OWNED BY "+role+"; DROP ROLE "+role); err != nil {
			t.Error(err)
		}
	})
	s := strings.Replace(string(text), "postgres://postgres", "postgres://"+role, 1)
	s = strings.Replace(s, "scope: {owner: claims.sub}", "scope: {owner: claims.sub}, write: {operations: [insert, delete]}", 1)
	if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
		t.Fatal(err)
	}
	sql, err := walgate(t, "init", "--print-sql", "--config", path)
	if err != nil || !strings.Contains(sql, "GRANT SELECT, INSERT, DELETE ON") || !strings.Contains(sql, "ALTER ROLE \""+role+"\" REPLICATION") {
		t.Fatalf("%v\n%s", err, sql)
	}
	if _, err := conn.PgConn().Exec(t.Context(), sql).ReadAll(); err != nil {
		t.Fatalf("%v\n%s", err, sql)
	}
	defer func() {
		if _, err := conn.Exec(t.Context(), `SELECT pg_drop_replication_slot('command_rights')`); err != nil {
			t.Error(err)
		}
	}()
	if _, err := walgate(t, "init", "--config", path); err != nil {
		t.Errorf("after what was printed: %v", err)
	}
	if sql, err := walgate(t, "init", "--print-sql", "--config", path); err != nil || strings.Contains(sql, "REPLICATION;") || strings.Contains(sql, "GRANT SELECT, INSERT, DELETE ON \"public") {
		t.Errorf("what is there is printed again: %v\n%s", err, sql)
	}
}

// TestNotConnected: a database that refuses is told with its key's place and what to do.
func TestNotConnected(t *testing.T) {
	t.Parallel()
	path, _ := commandConfig(t, "command_connect")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	url := regexp.MustCompile(`url: "[^"]*"`)
	dsn := strings.Trim(strings.TrimPrefix(url.FindString(string(text)), "url: "), `"`)
	for to, want := range map[string]string{
		regexp.MustCompile(`/[a-z0-9_]+(\?|$)`).ReplaceAllString(dsn, "/nowhere$1"): `database "nowhere" does not exist`,
		"postgres://postgres@127.0.0.1:1/x?sslmode=disable":                         "see that PostgreSQL runs there",
	} {
		if err := os.WriteFile(path, url.ReplaceAll(text, fmt.Appendf(nil, "url: %q", to)), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := walgate(t, "init", "--config", path)
		if err == nil || !strings.Contains(err.Error(), path+":1: database.url: found a server that") || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", to, err)
		}
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

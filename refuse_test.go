package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/internal/pgserver"
)

// refuseConfig writes a configuration; extra are further lines, collections the YAML of the collections.
func refuseConfig(t *testing.T, dsn, extra, collections string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.yaml")
	text := fmt.Sprintf("database:\n  url: %q\n%sreplication: {slot: refused_%s}\nhttp: {listen: \"127.0.0.1:0\"}\nauth: {jwt: {secret: %q}}\ncollections:\n%s",
		dsn, extra, strings.ToLower(rand.Text()[:10]), commandSecret, collections)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// refuseWait ends a command that wasn't refused.
const refuseWait = 20 * time.Second

// requireRefused runs init and serve and requires every text in the errors of both; | separates texts.
func requireRefused(t *testing.T, path, want string) {
	t.Helper()
	for _, command := range []string{"init", "serve"} {
		ctx, cancel := context.WithTimeout(t.Context(), refuseWait)
		c := newCommand()
		c.SetOut(io.Discard)
		c.SetErr(io.Discard)
		c.SetArgs([]string{command, "--config", path})
		err := c.ExecuteContext(ctx)
		cancel()
		for _, text := range strings.Split(want, "|") {
			if err == nil || !strings.Contains(err.Error(), text) {
				t.Errorf("%s doesn't say %q: %v", command, text, err)
			}
		}
	}
}

// TestCollectionsRefused: what can't be synced is refused, all of it at once, each with its place and the remedy; and the
// application's own statements go on as before, on the tables refused and on those that are fine.
func TestCollectionsRefused(t *testing.T) {
	t.Parallel()
	dsn := pgserver.ForTest(t).Database(t)
	conn := connect(t, dsn)
	resyncExec(t, conn, `CREATE EXTENSION file_fdw; CREATE SERVER files FOREIGN DATA WRAPPER file_fdw;
		CREATE COLLATION loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
		CREATE TABLE fine (id int PRIMARY KEY, v int);
		CREATE TABLE no_key (id int, v int); CREATE TABLE nullable_key (id int UNIQUE, v int);
		CREATE TABLE partial_key (id int NOT NULL, v int); CREATE UNIQUE INDEX ON partial_key (id) WHERE v > 0;
		CREATE UNLOGGED TABLE not_logged (id int PRIMARY KEY, v int);
		CREATE VIEW a_view AS SELECT * FROM fine; CREATE MATERIALIZED VIEW a_matview AS SELECT 1 AS id;
		CREATE FOREIGN TABLE a_foreign (id int) SERVER files OPTIONS (filename '/dev/null');
		CREATE TABLE parts (id int PRIMARY KEY, v int) PARTITION BY RANGE (id); CREATE TABLE a_partition PARTITION OF parts DEFAULT;
		CREATE TABLE loose_scope (id int PRIMARY KEY, v int, owner text COLLATE loose); CREATE TABLE outside (id int PRIMARY KEY, v int, owner int);
		CREATE TABLE out_of_line (id int PRIMARY KEY, v int, body text); CREATE TABLE late_key (id int PRIMARY KEY DEFERRABLE, v int)`)
	path := refuseConfig(t, dsn, "", `  fine: {table: fine}
  no_key: {table: no_key}
  nullable_key: {table: nullable_key}
  partial_key: {table: partial_key}
  not_logged: {table: not_logged}
  a_view: {table: a_view}
  a_matview: {table: a_matview}
  a_foreign: {table: a_foreign}
  a_partition: {table: a_partition}
  system: {table: pg_catalog.pg_class}
  schemas: {table: information_schema.sql_features}
  missing: {table: finne}
  loose_scope: {table: loose_scope, scope: {owner: claims.sub}}
  outside_scope: {table: outside, scope: {owner: claims.sub}, replica_identity: default}
  out_of_line: {table: out_of_line, replica_identity: default}
  late_key: {table: late_key, replica_identity: default}
`)
	requireRefused(t, path, path+`:8:|public.no_key, which has no primary key|documents are named by the key: add one|public.nullable_key, which has no|public.partial_key, which has no|`+
		`public.not_logged, an unlogged table|SET LOGGED|a_view, a view|name the table below|a_matview, a materialised view|a_foreign, a foreign table|a_partition, a partition|at its root|`+
		`pg_catalog.pg_class, a system table|information_schema.sql_features|did you mean public.fine?|not deterministic|scope column owner outside the key|use full|column body that may be stored out of line|deferrable primary key`)
	for _, table := range []string{"fine", "no_key", "nullable_key", "partial_key", "not_logged", "parts", "loose_scope", "outside", "out_of_line", "late_key"} {
		resyncExec(t, conn, strings.ReplaceAll(`INSERT INTO $T (id, v) VALUES (1, 1); UPDATE $T SET v = 2; DELETE FROM $T`, "$T", table))
	}
	var left int
	if resyncScan(t, conn, []any{&left}, `SELECT (SELECT count(*) FROM pg_publication) + (SELECT count(*) FROM pg_class WHERE relreplident <> 'd' AND relnamespace = 'public'::regnamespace AND relkind = 'r')`); left != 0 {
		t.Errorf("refusing left %d things behind", left)
	}
}

// TestRightsRefused: a role that lacks rights is told each of them with the statement that gives it; the statements mend
// it, in any case but the application's statements work before and after.
func TestRightsRefused(t *testing.T) {
	t.Parallel()
	server := pgserver.ForTest(t)
	role, owner := "refused_"+strings.ToLower(rand.Text()[:10]), "owner_"+strings.ToLower(rand.Text()[:10])
	admin := connect(t, server.DSN("postgres"))
	resyncExec(t, admin, `CREATE ROLE `+role+` LOGIN; CREATE ROLE `+owner)
	t.Cleanup(func() { dropRole(t, server.DSN("postgres"), role+", "+owner) })
	dsn := server.Database(t)
	conn := connect(t, dsn)
	resyncExec(t, conn, fmt.Sprintf(`CREATE TABLE plain (id int PRIMARY KEY, v int); CREATE TABLE hidden (id int PRIMARY KEY, v int); ALTER TABLE plain OWNER TO %[1]s; ALTER TABLE hidden OWNER TO %[1]s;
		ALTER TABLE hidden ENABLE ROW LEVEL SECURITY; ALTER TABLE hidden FORCE ROW LEVEL SECURITY; GRANT SELECT ON hidden TO %[2]s`, owner, role))
	u, err := url.Parse(dsn)
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.User(role)
	path := refuseConfig(t, u.String(), "", "  plain: {table: plain}\n  hidden: {table: hidden}\n")
	application := func() {
		resyncExec(t, conn, `INSERT INTO plain VALUES (1, 1); UPDATE plain SET v = 2; DELETE FROM plain; INSERT INTO hidden VALUES (1, 1); UPDATE hidden SET v = 2; DELETE FROM hidden`)
	}
	var database string
	resyncScan(t, conn, []any{&database}, `SELECT current_database()`)
	missing := []string{
		fmt.Sprintf(`ALTER ROLE %q REPLICATION;`, role),
		fmt.Sprintf(`GRANT SELECT ON "public"."plain" TO %q;`, role),
		fmt.Sprintf(`ALTER ROLE %q BYPASSRLS;`, role),
		fmt.Sprintf(`GRANT CREATE ON DATABASE %q TO %q;`, database, role),
		fmt.Sprintf(`GRANT %q TO %q;`, owner, role),
	}
	for len(missing) > 0 {
		_, err := walgate(t, "init", "--config", path)
		for _, statement := range missing {
			if err == nil || !strings.Contains(err.Error(), strings.TrimSuffix(statement, ";")) {
				t.Errorf("init doesn't say %s: %v", statement, err)
			}
		}
		if t.Failed() {
			return
		}
		application()
		resyncExec(t, conn, missing[0])
		missing = missing[1:]
	}
	if _, err := walgate(t, "init", "--config", path); err != nil {
		t.Errorf("init with all rights: %v", err)
	}
	application()
	resyncExec(t, conn, fmt.Sprintf(`ALTER ROLE %q NOBYPASSRLS; REVOKE SELECT ON plain FROM %[2]q, %[1]q; REVOKE %[2]q FROM %[1]q; REVOKE INSERT ON walgate.pushes FROM %[1]q`, role, owner))
	_, err = walgate(t, "serve", "--config", path) // nothing grants what it lacks, so it ends
	for _, text := range []string{"BYPASSRLS", `GRANT SELECT ON "public"."plain" TO`, "may not read and write walgate.pushes", path + ":7:"} {
		if err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("serve doesn't say %q: %v", text, err)
		}
	}
	resyncExec(t, conn, fmt.Sprintf(`DELETE FROM walgate.migrations WHERE name = '002_pushes.sql'; ALTER PUBLICATION walgate_events DROP TABLE walgate.pushes;
		ALTER PUBLICATION walgate_events OWNER TO CURRENT_USER; ALTER SCHEMA walgate OWNER TO CURRENT_USER; GRANT USAGE ON SCHEMA walgate TO %q`, role)) // as a DBA left it to an older walgate
	_, err = walgate(t, "init", "--config", path)
	for _, text := range []string{"GRANT USAGE, CREATE ON SCHEMA walgate TO", "without walgate.pushes"} {
		if err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("init doesn't say %q: %v", text, err)
		}
	}
	if _, err := walgate(t, "uninstall", "--config", refuseConfig(t, dsn, "", "  plain: {table: plain}\n")); err != nil {
		t.Error(err)
	}
	dropSlots(t, conn)
}

// dropSlots drops what slots a test's database has.
func dropSlots(t *testing.T, conn *pgx.Conn) {
	t.Helper()
	resyncExec(t, conn, `SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = current_database() AND NOT active`)
}

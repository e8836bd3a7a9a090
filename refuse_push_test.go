package main

import (
	"crypto/rand"
	"fmt"
	"net/url"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/internal/pgserver"
)

// pushFixture is a database with roles of its own; gateway is the one of database.url, which has all rights to prepare.
type pushFixture struct {
	t                      *testing.T
	dsn                    string // of the gateway
	conn                   *pgx.Conn
	gateway, writer, other string
}

func newPushFixture(t *testing.T) *pushFixture {
	t.Helper()
	server := pgserver.ForTest(t)
	suffix := strings.ToLower(rand.Text()[:10])
	f := &pushFixture{t: t, gateway: "gateway_" + suffix, writer: "writer_" + suffix, other: "other_" + suffix}
	resyncExec(t, connect(t, server.DSN("postgres")), fmt.Sprintf(`CREATE ROLE %s LOGIN REPLICATION BYPASSRLS; CREATE ROLE %s; CREATE ROLE %s`, f.gateway, f.writer, f.other))
	t.Cleanup(func() { dropRole(t, server.DSN("postgres"), f.gateway+", "+f.writer+", "+f.other) })
	dsn := server.Database(t)
	f.conn = connect(t, dsn)
	var database string
	resyncScan(t, f.conn, []any{&database}, `SELECT current_database()`)
	f.exec(`REVOKE ALL ON SCHEMA public FROM public; GRANT ALL ON SCHEMA public TO $GATEWAY; GRANT CREATE ON DATABASE ` + pgx.Identifier{database}.Sanitize() + ` TO $GATEWAY`)
	u, err := url.Parse(dsn)
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.User(f.gateway)
	f.dsn = u.String()
	return f
}

func (f *pushFixture) names(text string) string {
	return strings.NewReplacer("$GATEWAY", f.gateway, "$WRITER", f.writer, "$OTHER", f.other).Replace(text)
}

func (f *pushFixture) exec(sql string) {
	f.t.Helper()
	resyncExec(f.t, f.conn, f.names(sql))
}

// init runs init and returns what it says; role is push.role, empty for none.
func (f *pushFixture) init(role, collections string) string {
	f.t.Helper()
	if role != "" {
		collections += fmt.Sprintf("push: {role: %q}\n", role)
	}
	path := refuseConfig(f.t, f.dsn, "", collections)
	_, err := walgate(f.t, "init", "--config", path)
	if err == nil {
		if _, err := walgate(f.t, "uninstall", "--config", path); err != nil {
			f.t.Errorf("uninstall: %v", err)
		}
		return ""
	}
	return strings.ReplaceAll(err.Error(), path, "config.yaml")
}

// requireSaid requires the faults, and no others: each line is within one, | separates texts of one fault.
func (f *pushFixture) requireSaid(got, want string) {
	f.t.Helper()
	lines := strings.Split(got, "\n")[1:]
	wanted := strings.Split(strings.TrimSpace(f.names(want)), "\n")
	if len(lines) != len(wanted) {
		f.t.Errorf("%d faults, want %d:\n%s", len(lines), len(wanted), got)
		return
	}
	for i, w := range wanted {
		for _, text := range strings.Split(strings.TrimSpace(w), "|") {
			if !strings.Contains(lines[i], text) {
				f.t.Errorf("%s\ndoesn't say %s", lines[i], text)
			}
		}
	}
}

// TestPushRoleRefused: a role that can't write what clients push, or that is above the application's row-level security, is
// refused, with all that is wrong at once and the statements that mend it.
func TestPushRoleRefused(t *testing.T) {
	t.Parallel()
	f := newPushFixture(t)
	f.exec(`CREATE SCHEMA app; GRANT USAGE ON SCHEMA app TO $GATEWAY;
		CREATE TABLE app.all_rights (id int PRIMARY KEY, v int); CREATE TABLE app.by_column (id int PRIMARY KEY, v int, w int, owner int);
		CREATE TABLE app.marked (id int PRIMARY KEY, v int, gone bool); CREATE TABLE app.secured (id int PRIMARY KEY, v int); CREATE TABLE app.read_only (id int PRIMARY KEY, v int);
		ALTER TABLE app.secured ENABLE ROW LEVEL SECURITY; ALTER TABLE app.secured OWNER TO $WRITER;
		ALTER TABLE app.read_only ENABLE ROW LEVEL SECURITY; ALTER TABLE app.read_only OWNER TO $OTHER; GRANT $OTHER TO $WRITER;
		ALTER TABLE app.all_rights OWNER TO $GATEWAY; ALTER TABLE app.by_column OWNER TO $GATEWAY; ALTER TABLE app.marked OWNER TO $GATEWAY; GRANT $WRITER TO $GATEWAY;
		CREATE FUNCTION app.merge(jsonb, jsonb, jsonb) RETURNS jsonb LANGUAGE sql AS 'SELECT $2'; REVOKE ALL ON FUNCTION app.merge FROM public;
		CREATE FUNCTION app.short(jsonb, jsonb) RETURNS jsonb LANGUAGE sql AS 'SELECT $2'; CREATE FUNCTION app.json(jsonb, jsonb, jsonb) RETURNS json LANGUAGE sql AS 'SELECT $2::json';
		CREATE FUNCTION app.many(jsonb, jsonb, jsonb) RETURNS SETOF jsonb LANGUAGE sql AS 'SELECT $2'; CREATE FUNCTION app.step(jsonb, jsonb, jsonb, jsonb) RETURNS jsonb LANGUAGE sql AS 'SELECT $2';
		CREATE AGGREGATE app.agg(jsonb, jsonb, jsonb) (SFUNC = app.step, STYPE = jsonb)`)
	const collections = `  all_rights: {table: app.all_rights, write: {roles: [editor]}, conflict: {function: app.merge}}
  by_column: {table: app.by_column, write: {operations: [insert, update], columns: [v], set: {owner: claims.sub}}, conflict: {function: app.mergee}}
  marked: {table: app.marked, soft_delete: {column: gone}, write: {operations: [delete]}, conflict: {function: app.short}}
  read_only: {table: app.read_only, conflict: {function: app.nothing_like_it}}
  secured: {table: app.secured, write: {operations: [delete]}, conflict: {function: app.json}}
`
	bad := f.init(f.writer, collections)
	f.requireSaid(bad, `
config.yaml:7: collections.all_rights.write|app.all_rights, where role $WRITER lacks rights|GRANT USAGE ON SCHEMA "app" TO "$WRITER"; GRANT SELECT, INSERT, UPDATE, DELETE ON "app"."all_rights" TO "$WRITER";
config.yaml:7: collections.all_rights.conflict.function|app.merge, which role $WRITER may not call|GRANT USAGE ON SCHEMA "app" TO "$WRITER"; GRANT EXECUTE ON FUNCTION "app"."merge"(jsonb, jsonb, jsonb) TO "$WRITER";
config.yaml:8: collections.by_column.write|GRANT SELECT, INSERT, UPDATE ON "app"."by_column" TO "$WRITER";
config.yaml:8: collections.by_column.conflict.function|found app.mergee, which doesn't exist|did you mean app.merge?
config.yaml:9: collections.marked.write|GRANT SELECT, UPDATE ON "app"."marked" TO "$WRITER";
config.yaml:9: collections.marked.conflict.function|found app.short(jsonb, jsonb) RETURNS jsonb, expected a function (current jsonb, incoming jsonb, base jsonb) RETURNS jsonb
config.yaml:12: push.role|role $WRITER, which owns app.read_only|ALTER TABLE "app"."read_only" FORCE ROW LEVEL SECURITY;
config.yaml:10: collections.read_only.conflict.function|app.nothing_like_it, which doesn't exist|CREATE FUNCTION "app"."nothing_like_it"(current jsonb
config.yaml:12: push.role|role $WRITER, which owns app.secured|ALTER TABLE "app"."secured" FORCE ROW LEVEL SECURITY;
config.yaml:11: collections.secured.write|app.secured, where role $WRITER lacks rights|GRANT USAGE ON SCHEMA "app" TO "$WRITER";
config.yaml:11: collections.secured.conflict.function|found app.json(jsonb, jsonb, jsonb) RETURNS json,`)
	if t.Failed() {
		return
	}
	f.exec(`GRANT USAGE ON SCHEMA app TO $WRITER; GRANT SELECT, INSERT, UPDATE, DELETE ON app.all_rights TO $WRITER; GRANT EXECUTE ON FUNCTION app.merge(jsonb, jsonb, jsonb) TO $WRITER;
		GRANT SELECT ON app.by_column TO $WRITER; GRANT INSERT (id, v), UPDATE (w) ON app.by_column TO $WRITER; GRANT SELECT, DELETE ON app.marked TO $WRITER;
		ALTER TABLE app.read_only FORCE ROW LEVEL SECURITY; ALTER TABLE app.secured FORCE ROW LEVEL SECURITY`)
	mended := strings.NewReplacer("app.mergee", "app.merge", "app.short", "app.many", "app.nothing_like_it", "app.agg", "app.json", "app.merge").Replace(collections)
	f.requireSaid(f.init(f.writer, mended), `
config.yaml:8: collections.by_column.write|GRANT INSERT, UPDATE ON "app"."by_column" TO "$WRITER";
config.yaml:9: collections.marked.write|GRANT UPDATE ON "app"."marked" TO "$WRITER";
config.yaml:9: collections.marked.conflict.function|RETURNS SETOF jsonb,
config.yaml:10: collections.read_only.conflict.function|found app.agg(jsonb, jsonb, jsonb) RETURNS jsonb,`)
	f.exec(`GRANT INSERT (owner), UPDATE (v) ON app.by_column TO $WRITER; GRANT UPDATE (gone) ON app.marked TO $WRITER`)
	mended = strings.NewReplacer("app.many", "app.merge", "app.agg", "app.merge").Replace(mended)
	if said := f.init(f.writer, mended); said != "" {
		t.Errorf("with all rights: %s", said)
	}
}

// TestPushRoleMustHoldPolicies: a role that isn't there, that database.url's may not become, or for which no row-level security
// holds at all.
func TestPushRoleMustHoldPolicies(t *testing.T) {
	t.Parallel()
	f := newPushFixture(t)
	f.exec(`CREATE TABLE items (id int PRIMARY KEY, v int); ALTER TABLE items OWNER TO $GATEWAY; ALTER TABLE items ENABLE ROW LEVEL SECURITY;
		GRANT ALL ON items TO $WRITER; GRANT USAGE ON SCHEMA public TO $WRITER`)
	const collections = "  items: {table: items, write: {roles: [editor]}}\n"
	f.requireSaid(f.init(f.writer+"x", collections), `config.yaml:8: push.role: found role $WRITERx, which doesn't exist|did you mean $WRITER?`)
	f.requireSaid(f.init("like no other", collections), `config.yaml:8: push.role: found role like no other, which doesn't exist|CREATE ROLE "like no other" NOLOGIN`)
	said := f.init(f.writer, collections)
	f.requireSaid(said, `config.yaml:8: push.role: found role $WRITER, which role $GATEWAY of database.url may not become|GRANT "$WRITER" TO "$GATEWAY"`)
	f.exec(said[strings.Index(said, "GRANT "):])
	if said := f.init(f.writer, collections); said != "" {
		t.Errorf("once it may: %s", said)
	}
	for _, attribute := range []string{"SUPERUSER", "BYPASSRLS"} {
		f.exec(`ALTER ROLE $WRITER ` + attribute)
		f.requireSaid(f.init(f.writer, collections), `config.yaml:8: push.role: found role $WRITER, which |`+attribute[:5]+`|NOSUPERUSER NOBYPASSRLS`)
		f.exec(`ALTER ROLE $WRITER NO` + attribute)
	}
	var version int
	if resyncScan(t, f.conn, []any{&version}, `SELECT current_setting('server_version_num')::int`); version >= 160000 {
		f.exec(`REVOKE $WRITER FROM $GATEWAY; GRANT $WRITER TO $GATEWAY WITH SET FALSE`)
		said := f.init(f.writer, collections)
		f.requireSaid(said, `may not become|WITH SET TRUE`)
		f.exec(said[strings.Index(said, "GRANT "):])
		if said := f.init(f.writer, collections); said != "" {
			t.Errorf("once it may: %s", said)
		}
	}
}

// TestWritingPastRowSecurityRefused: without push.role, the role of database.url writes; where it is above the table's row-level
// security, a collection that clients write is refused.
func TestWritingPastRowSecurityRefused(t *testing.T) {
	t.Parallel()
	f := newPushFixture(t)
	f.exec(`CREATE TABLE plain (id int PRIMARY KEY, v int); CREATE TABLE secured (id int PRIMARY KEY, v int); CREATE TABLE foreigners (id int PRIMARY KEY, v int);
		ALTER TABLE plain OWNER TO $GATEWAY; ALTER TABLE secured OWNER TO $GATEWAY; ALTER TABLE secured ENABLE ROW LEVEL SECURITY;
		ALTER TABLE foreigners OWNER TO $OTHER; GRANT $OTHER TO $GATEWAY; GRANT USAGE ON SCHEMA public TO $WRITER; GRANT ALL ON plain, secured TO $WRITER`)
	const plain, secured = "  plain: {table: plain, write: {roles: [editor]}}\n", "  secured: {table: secured, write: {roles: [editor]}}\n"
	const want = `config.yaml:8: collections.secured.write: found public.secured, whose row-level security role $GATEWAY of database.url is above, as it |set push.role`
	f.requireSaid(f.init("", plain+secured), want+"|has BYPASSRLS")
	f.exec(`ALTER ROLE $GATEWAY SUPERUSER`)
	f.requireSaid(f.init("", plain+secured), want+"|is a superuser")
	f.exec(`ALTER ROLE $GATEWAY NOSUPERUSER NOBYPASSRLS`)
	f.requireSaid(f.init("", plain+secured), want+"|owns it")
	if said := f.init("", plain+"  secured: {table: secured}\n"); said != "" {
		t.Errorf("without write: %s", said)
	}
	f.exec(`GRANT $WRITER TO $GATEWAY`)
	if said := f.init(f.writer, plain+secured); said != "" {
		t.Errorf("with push.role: %s", said)
	}
	// Its own rights count too.
	f.exec(`ALTER ROLE $GATEWAY BYPASSRLS; REVOKE INSERT ON plain FROM $GATEWAY; REVOKE $WRITER FROM $GATEWAY`)
	f.requireSaid(f.init("", plain), `config.yaml:7: collections.plain.write: found public.plain, where role $GATEWAY lacks rights|GRANT INSERT ON "public"."plain" TO "$GATEWAY";`)
}

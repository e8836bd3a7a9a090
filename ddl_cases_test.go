package main

import (
	"crypto/rand"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/walgate/walgate/internal/pgserver"
)

// ddlColumnCases change columns and types.
var ddlColumnCases = []ddlCase{
	{name: "nullable_added", change: `ALTER TABLE $T ADD x int`},
	{name: "default_added", change: `ALTER TABLE $T ADD x int DEFAULT 7`, want: ddlResyncs},
	{name: "volatile_added", change: `ALTER TABLE $T ADD x float8 DEFAULT random()`, want: ddlResyncs},
	{name: "volatile_added_default_dropped", change: `ALTER TABLE $T ADD x float8 DEFAULT random(); ALTER TABLE $T ALTER x DROP DEFAULT`, want: ddlResyncs},
	{name: "column_dropped", change: `ALTER TABLE $T DROP note`, want: ddlResyncs},
	{name: "column_dropped_and_added", change: `ALTER TABLE $T DROP note, ADD note varchar(20)`, want: ddlResyncs},
	{name: "column_renamed", change: `ALTER TABLE $T RENAME note TO memo`, want: ddlResyncs},
	{name: "retyped_with_rewrite", change: `ALTER TABLE $T ALTER n TYPE bigint`, want: ddlResyncs},
	{name: "retyped_without_rewrite", change: `ALTER TABLE $T ALTER note TYPE text`, want: ddlResyncs},
	{name: "retyped_to_itself", change: `ALTER TABLE $T ALTER note TYPE varchar(20) USING upper(note)`, want: ddlResyncs},
	{name: "vacuum_full", change: `VACUUM FULL $T`},
	{name: "clustered", change: `CLUSTER $T USING $T_pkey`},
	{name: "truncated", change: `TRUNCATE $T`, want: ddlResyncs},
	{name: "constraints_changed", change: `ALTER TABLE $T ALTER owner SET NOT NULL, ALTER note SET DEFAULT 'new', ADD CHECK (n >= 0), ALTER note SET STATISTICS 5`},
	{name: "default_and_null_dropped", change: `ALTER TABLE $T ALTER n DROP NOT NULL; ALTER TABLE $T ALTER n SET DEFAULT 5`},
	{name: "generated_added", change: `ALTER TABLE $T ADD g int GENERATED ALWAYS AS (n * 2) STORED`},
	{name: "enum_value_added", create: ddlEnum, change: `ALTER TYPE $T_mood ADD VALUE 'new' BEFORE 'ok'` + "\n" + `INSERT INTO $T (id, mood) VALUES (50, 'new')`},
	{name: "enum_value_renamed", create: ddlEnum, change: `ALTER TYPE $T_mood RENAME VALUE 'ok' TO 'fine'`, want: ddlResyncs},
	{name: "enum_replaced", create: ddlEnum, want: ddlResyncs, change: `CREATE TYPE $T_new AS ENUM ('good', 'sad'); ALTER TABLE $T ALTER mood DROP DEFAULT, ALTER mood TYPE $T_new USING CASE mood WHEN 'ok' THEN 'good' ELSE 'sad' END::$T_new; DROP TYPE $T_mood`},
	{name: "enum_scope_value_added", policy: `scope: {mood: claims.sub}`, where: `mood::text = 'ana'`, want: ddlResyncs,
		create: `CREATE TYPE $T_mood AS ENUM ('sad', 'ok'); CREATE TABLE $T (id int PRIMARY KEY, owner text, n int NOT NULL DEFAULT 0, mood $T_mood)`,
		change: `ALTER TYPE $T_mood ADD VALUE 'ana'` + "\n" + `INSERT INTO $T (id, mood) SELECT g, 'ana' FROM generate_series(1, 20) g`},
	{name: "domain_altered", create: `CREATE DOMAIN $T_d AS text; CREATE TABLE $T (id int PRIMARY KEY, owner text, n int NOT NULL DEFAULT 0, d $T_d); INSERT INTO $T SELECT g, 'ana', g, 'quiet' FROM generate_series(1, 20) g`,
		change: `ALTER DOMAIN $T_d ADD CHECK (value <> 'bad'); ALTER DOMAIN $T_d SET DEFAULT 'x'`},
	{name: "composite_attribute_added", create: ddlComposite, change: `ALTER TYPE $T_pair ADD ATTRIBUTE c int`, want: ddlResyncs},
	{name: "composite_attribute_renamed", create: ddlComposite, change: `ALTER TYPE $T_pair RENAME ATTRIBUTE a TO z`, want: ddlResyncs},
	{name: "composite_attribute_dropped", create: ddlComposite, change: `ALTER TYPE $T_pair DROP ATTRIBUTE b`, want: ddlResyncs},
}

const (
	ddlEnum = `CREATE TYPE $T_mood AS ENUM ('sad', 'ok'); CREATE TABLE $T (id int PRIMARY KEY, owner text, n int NOT NULL DEFAULT 0, mood $T_mood DEFAULT 'sad');
		INSERT INTO $T SELECT g, 'ana', g, 'ok' FROM generate_series(1, 20) g`
	ddlComposite = `CREATE TYPE $T_pair AS (a int, b text); CREATE TABLE $T (id int PRIMARY KEY, owner text, n int NOT NULL DEFAULT 0, p $T_pair);
		INSERT INTO $T SELECT g, 'ana', g, row(g, 'x'::text)::$T_pair FROM generate_series(1, 20) g`
	ddlUndo = `|or correct the collection`
)

// ddlPolicyCases change what a policy, a key or a table's name rests on.
var ddlPolicyCases = []ddlCase{
	{name: "scope_renamed", policy: `scope: {region: claims.sub}`, create: ddlRegion, change: `ALTER TABLE $T RENAME region TO area`, want: ddlStops, reason: `region|a column of public.$T` + ddlUndo, heal: `ALTER TABLE $T RENAME area TO region`, where: `region = 'ana'`},
	{name: "scope_dropped", policy: `scope: {region: claims.sub}`, create: ddlRegion, change: `ALTER TABLE $T DROP region`, want: ddlStops, reason: `region|a column of public.$T` + ddlUndo, heal: `ALTER TABLE $T ADD region text DEFAULT 'ana'`, where: `region = 'ana'`},
	{name: "scope_retyped", policy: `scope: {region: claims.sub}`, create: ddlRegion, change: `ALTER TABLE $T ALTER region TYPE varchar(9)`, want: ddlResyncs, where: `region = 'ana'`},
	{name: "scope_retyped_badly", policy: `scope: {region: claims.sub}`, create: ddlRegion, change: `ALTER TABLE $T ALTER region DROP DEFAULT, ALTER region TYPE jsonb USING to_jsonb(region)`, want: ddlStops, reason: `region, a jsonb|a column of type` + ddlUndo,
		heal: `ALTER TABLE $T ALTER region TYPE text USING region #>> '{}'; ALTER TABLE $T ALTER region SET DEFAULT 'ana'`, where: `region = 'ana'`},
	{name: "two_faults", policy: `scope: {region: claims.sub}, columns: {exclude: [secret]}`, create: ddlRegion + `; ALTER TABLE $T ADD secret text`, change: `ALTER TABLE $T DROP secret, DROP CONSTRAINT $T_pkey`, want: ddlStops, reason: `no primary key|columns.exclude` + ddlUndo, heal: `ALTER TABLE $T ADD secret text, ADD PRIMARY KEY (id)`, where: `region = 'ana'`, exclude: "secret"},
	{name: "where_dropped", policy: `where: "row.region == 'ana'"`, create: ddlRegion, change: `ALTER TABLE $T DROP region`, want: ddlStops, reason: `region` + ddlUndo, heal: `ALTER TABLE $T ADD region text DEFAULT 'ana'`, where: `region = 'ana'`},
	{name: "excluded_dropped", policy: `columns: {exclude: [region]}`, create: ddlRegion, change: `ALTER TABLE $T DROP region`, want: ddlStops, reason: `columns.exclude|region` + ddlUndo, heal: `ALTER TABLE $T ADD region text DEFAULT 'ana'`, exclude: "region"},
	{name: "excluded_renamed", policy: `columns: {exclude: [region]}`, create: ddlRegion, change: `ALTER TABLE $T RENAME region TO area`, want: ddlStops, reason: `columns.exclude|region` + ddlUndo, heal: `ALTER TABLE $T RENAME area TO region`, exclude: "region"},
	{name: "key_dropped", change: `ALTER TABLE $T DROP CONSTRAINT $T_pkey`, want: ddlStops, reason: `no primary key|add one`, heal: `ALTER TABLE $T ADD PRIMARY KEY (id)`},
	{name: "key_of_other_columns", change: `ALTER TABLE $T DROP CONSTRAINT $T_pkey, ADD PRIMARY KEY (n)`, want: ddlResyncs, key: "n::text", create: ddlTable,
		write: `INSERT INTO $T (id, n, owner) SELECT $I, $I, 'ana' WHERE NOT EXISTS (SELECT FROM $T WHERE id = $I)` + "\n" + `UPDATE $T SET owner = 'bob' || owner WHERE id = $I` + "\n" + `DELETE FROM $T WHERE id = $I - 5`},
	{name: "key_widened", change: `ALTER TABLE $T ALTER id TYPE bigint`, want: ddlResyncs},
	{name: "key_made_deferrable", change: `ALTER TABLE $T DROP CONSTRAINT $T_pkey, ADD PRIMARY KEY (id) DEFERRABLE` + "\n" + `UPDATE $T SET id = id + 1 WHERE id < 20 AND id > 9`, want: ddlResyncs, create: ddlTable + `; DELETE FROM $T WHERE id = 20; INSERT INTO $T VALUES (-1)`},
	{name: "table_renamed", change: `ALTER TABLE $T RENAME TO $T_2`, want: ddlStops, reason: `public.$T` + ddlUndo, heal: `ALTER TABLE $T_2 RENAME TO $T`, may: "42P01"},
	{name: "table_moved", change: `CREATE SCHEMA $T_s; ALTER TABLE $T SET SCHEMA $T_s`, want: ddlStops, reason: `public.$T` + ddlUndo, heal: `ALTER TABLE $T_s.$T SET SCHEMA public`, may: "42P01"},
	{name: "table_dropped", change: `DROP TABLE $T`, want: ddlStops, reason: `public.$T` + ddlUndo, may: "42P01",
		heal: strings.ReplaceAll(ddlTable, "\n", " ") + "\n" + `ALTER TABLE $T REPLICA IDENTITY FULL; ALTER PUBLICATION walgate ADD TABLE ONLY $T; GRANT SELECT ON $T TO $ROLE`},
	{name: "table_recreated", change: `DROP TABLE $T; CREATE TABLE $T (id bigint PRIMARY KEY, owner text, n int NOT NULL DEFAULT 0)`, want: ddlStops, reason: `$T is not in publication|walgate init`,
		heal: `INSERT INTO $T (id) VALUES (1)` + "\n" + `ALTER TABLE $T REPLICA IDENTITY FULL; ALTER PUBLICATION walgate ADD TABLE ONLY $T; GRANT SELECT ON $T TO $ROLE`},
	{name: "table_swapped", change: `CREATE TABLE $T_2 (LIKE $T INCLUDING ALL); INSERT INTO $T_2 SELECT id, owner, n, 'copy' FROM $T; ALTER TABLE $T RENAME TO $T_3; ALTER TABLE $T_2 RENAME TO $T`, want: ddlStops, reason: `$T is not in publication|walgate init`,
		heal: `ALTER TABLE $T REPLICA IDENTITY FULL; ALTER PUBLICATION walgate ADD TABLE ONLY $T; GRANT SELECT ON $T TO $ROLE`},
	{name: "child_added", change: `CREATE TABLE $T_child (more int) INHERITS ($T); INSERT INTO $T_child (id, owner) VALUES (70, 'ana')`},
	{name: "became_partition", change: `ALTER TABLE $T ALTER id SET NOT NULL; CREATE TABLE $T_root (LIKE $T INCLUDING ALL) PARTITION BY RANGE (id); ALTER TABLE $T_root ATTACH PARTITION $T FOR VALUES FROM (-10) TO (100000)`, want: ddlStops, reason: `a partition|at its root`,
		heal: `ALTER TABLE $T_root DETACH PARTITION $T`},
	{name: "virtual_generated_added", major: 18, change: `ALTER TABLE $T ADD v int GENERATED ALWAYS AS (n * 2) VIRTUAL`, want: ddlStops, reason: `virtual generated column v`, heal: `ALTER TABLE $T DROP v`, may: "42P10"},
}

const ddlRegion = `CREATE TABLE $T (id int PRIMARY KEY, owner text, n int NOT NULL DEFAULT 0, region text DEFAULT 'ana');
	INSERT INTO $T SELECT g, 'ana', g FROM generate_series(1, 20) g`

// ddlOutsideCases are what somebody does to what walgate installed, and to who may read.
var ddlOutsideCases = []ddlCase{
	{name: "unpublished", change: `ALTER PUBLICATION walgate DROP TABLE $T`, want: ddlStops, reason: `$T is not in publication walgate|walgate init`, heal: `ALTER PUBLICATION walgate ADD TABLE ONLY $T`},
	{name: "unpublished_for_a_moment", change: `ALTER PUBLICATION walgate DROP TABLE $T; UPDATE $T SET note = 'missed' WHERE id = 1; ALTER PUBLICATION walgate ADD TABLE ONLY $T`, want: ddlResyncs},
	{name: "identity_default", change: `ALTER TABLE $T REPLICA IDENTITY DEFAULT`, want: ddlStops, reason: `REPLICA IDENTITY FULL|walgate init`, heal: `ALTER TABLE $T REPLICA IDENTITY FULL`},
	{name: "identity_default_quietly", quiet: true, change: `ALTER TABLE $T REPLICA IDENTITY DEFAULT` + "\n" + `UPDATE $T SET note = 'missed' WHERE id = 1`, want: ddlStops, reason: `REPLICA IDENTITY FULL|walgate init`, heal: `ALTER TABLE $T REPLICA IDENTITY FULL`},
	{name: "identity_default_for_a_moment", quiet: true, change: `ALTER TABLE $T REPLICA IDENTITY DEFAULT; UPDATE $T SET note = 'missed' WHERE id = 1; ALTER TABLE $T REPLICA IDENTITY FULL`, want: ddlResyncs},
	{name: "identity_nothing", change: `ALTER TABLE $T REPLICA IDENTITY NOTHING`, want: ddlStops, reason: `REPLICA IDENTITY FULL|walgate init`, heal: `ALTER TABLE $T REPLICA IDENTITY FULL`, may: "55000"},
	{name: "identity_index", change: `ALTER TABLE $T REPLICA IDENTITY USING INDEX $T_pkey`, want: ddlStops, reason: `REPLICA IDENTITY FULL|walgate init`, heal: `ALTER TABLE $T REPLICA IDENTITY FULL`},
	{name: "rls_enabled", change: `ALTER TABLE $T ENABLE ROW LEVEL SECURITY`, want: ddlImpaired, reason: `row-level security|BYPASSRLS`, heal: `ALTER TABLE $T DISABLE ROW LEVEL SECURITY`},
	{name: "select_revoked", change: `REVOKE SELECT ON $T FROM CURRENT_USER, $ROLE`, want: ddlImpaired, reason: `GRANT SELECT ON "public"."$T" TO`, heal: `GRANT SELECT ON $T TO $ROLE, CURRENT_USER`},
	{name: "column_list", major: 15, change: `ALTER PUBLICATION walgate DROP TABLE $T; ALTER PUBLICATION walgate ADD TABLE ONLY $T (id, n)`, want: ddlStops, reason: `column list|walgate init`, heal: `ALTER PUBLICATION walgate DROP TABLE $T; ALTER PUBLICATION walgate ADD TABLE ONLY $T`, may: "42P10"},
	{name: "row_filter", major: 15, change: `ALTER PUBLICATION walgate DROP TABLE $T; ALTER PUBLICATION walgate ADD TABLE ONLY $T WHERE (n > 3)`, want: ddlStops, reason: `row filter|walgate init`, heal: `ALTER PUBLICATION walgate DROP TABLE $T; ALTER PUBLICATION walgate ADD TABLE ONLY $T`},
}

// TestTablesChangeWhileServed changes many tables, each in its own way, while an application writes to them and clients
// follow them: what can go on goes on; what can't stops one collection with its reason and heals with the cause; everybody
// ends with what SELECT returns. The gateway has no more rights than it needs.
func TestTablesChangeWhileServed(t *testing.T) {
	t.Parallel()
	role := "ddl_" + strings.ToLower(rand.Text()[:10])
	server := pgserver.ForTest(t)
	admin := connect(t, server.DSN("postgres"))
	resyncExec(t, admin, `CREATE ROLE `+role+` LOGIN REPLICATION`)
	t.Cleanup(func() { dropRole(t, server.DSN("postgres"), role) }) // after the database
	app := server.Database(t)
	cases := slices.Concat(ddlColumnCases, ddlPolicyCases, ddlOutsideCases)
	cases = slices.DeleteFunc(cases, func(c ddlCase) bool { return c.major > server.Version() })
	for i := range cases {
		cases[i].change, cases[i].heal = strings.ReplaceAll(cases[i].change, "$ROLE", role), strings.ReplaceAll(cases[i].heal, "$ROLE", role)
	}
	u, err := url.Parse(app)
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.User(role)
	g := startDDLGateway(t, app, u.String(), false, cases, func(path string) {
		sql, err := walgate(t, "init", "--print-sql", "--config", path)
		if err != nil {
			t.Fatal(err)
		}
		resyncExec(t, connect(t, app), sql)
	})
	g.runAll(cases)
}

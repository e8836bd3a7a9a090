package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/walgate/walgate/internal/pgserver"
)

const ddlParts = `CREATE TABLE $T (id int PRIMARY KEY, owner text, n int NOT NULL DEFAULT 0, note varchar(20)) PARTITION BY RANGE (id);
	CREATE TABLE $T_1 PARTITION OF $T FOR VALUES FROM (0) TO (10); CREATE TABLE $T_2 PARTITION OF $T FOR VALUES FROM (10) TO (1000); CREATE TABLE $T_d PARTITION OF $T DEFAULT;
	INSERT INTO $T SELECT g, 'ana', g, 'quiet' FROM generate_series(1, 20) g; INSERT INTO $T SELECT g, 'ana', g, 'rest' FROM generate_series(2000, 2005) g`

// ddlPreparedCases run where the gateway may prepare the source itself (auto_init): what it may mend needs nobody else.
var ddlPreparedCases = []ddlCase{
	{name: "attached", create: ddlParts, want: ddlResyncs, change: `CREATE TABLE $T_b (note varchar(20), gone int, n int NOT NULL, owner text, id int NOT NULL); ALTER TABLE $T_b DROP gone; INSERT INTO $T_b SELECT 'old', g, 'ana', g FROM generate_series(3000, 3003) g; ALTER TABLE $T ATTACH PARTITION $T_b FOR VALUES FROM (3000) TO (4000)` +
		"\n" + `UPDATE $T SET n = n + 1 WHERE id = 3001` + "\n" + `DELETE FROM $T WHERE id = 3002`},
	{name: "detached", create: ddlParts, want: ddlResyncs, change: `ALTER TABLE $T DETACH PARTITION $T_1` + "\n" + `UPDATE $T_1 SET note = 'gone'`},
	{name: "detached_concurrently", create: ddlParts + `; ALTER TABLE $T DETACH PARTITION $T_d; DROP TABLE $T_d`, want: ddlResyncs, change: `ALTER TABLE $T DETACH PARTITION $T_1 CONCURRENTLY` + "\n" + `UPDATE $T_1 SET note = 'gone'`},
	{name: "reattached", create: ddlParts, want: ddlResyncs, change: `ALTER TABLE $T DETACH PARTITION $T_1; UPDATE $T_1 SET note = 'unseen'; ALTER TABLE $T ATTACH PARTITION $T_1 FOR VALUES FROM (0) TO (10)`},
	{name: "leaf_created", create: ddlParts, want: ddlResyncs, change: `CREATE TABLE $T_b PARTITION OF $T FOR VALUES FROM (3000) TO (4000); INSERT INTO $T VALUES (3000, 'ana', 1)` + "\n" + `UPDATE $T SET n = n + 1 WHERE id = 3000`},
	{name: "leaf_dropped", create: ddlParts, want: ddlResyncs, change: `DROP TABLE $T_1`},
	{name: "leaf_truncated", create: ddlParts, want: ddlResyncs, change: `TRUNCATE $T_1`},
	{name: "leaf_rewritten", create: ddlParts, change: `VACUUM FULL $T_1`},
	{name: "default_split", create: ddlParts, want: ddlResyncs, change: `ALTER TABLE $T DETACH PARTITION $T_d; CREATE TABLE $T_b PARTITION OF $T FOR VALUES FROM (2000) TO (2003); INSERT INTO $T SELECT id, owner, n, 'moved' FROM $T_d WHERE id < 2003; DELETE FROM $T_d WHERE id < 2003; ALTER TABLE $T ATTACH PARTITION $T_d DEFAULT` +
		"\n" + `UPDATE $T SET note = 'again' WHERE id IN (2001, 2004)`},
	{name: "subpartitioned", create: ddlParts, want: ddlResyncs, change: `CREATE TABLE $T_b PARTITION OF $T FOR VALUES FROM (3000) TO (4000) PARTITION BY RANGE (id); CREATE TABLE $T_bb PARTITION OF $T_b FOR VALUES FROM (3000) TO (3500); INSERT INTO $T VALUES (3000, 'ana', 1)` + "\n" + `UPDATE $T SET n = n + 1 WHERE id = 3000` + "\n" + `UPDATE $T SET id = 9 WHERE id = 3000 AND NOT EXISTS (SELECT FROM $T WHERE id = 9)`},
	{name: "root_retyped", create: ddlParts, want: ddlResyncs, change: `ALTER TABLE $T ALTER note TYPE varchar(20) USING upper(note)`},
	{name: "foreign_leaf", create: ddlParts, want: ddlStops, reason: `$T_f is a foreign table|another server`, change: `CREATE EXTENSION IF NOT EXISTS file_fdw; CREATE SERVER $T_s FOREIGN DATA WRAPPER file_fdw; ALTER TABLE $T DROP CONSTRAINT $T_pkey; CREATE FOREIGN TABLE $T_f PARTITION OF $T FOR VALUES FROM (5000) TO (6000) SERVER $T_s OPTIONS (filename '/dev/null')`,
		heal: `DROP FOREIGN TABLE $T_f; ALTER TABLE $T ADD PRIMARY KEY (id)`},
	{name: "unlogged_leaf", create: ddlParts, want: ddlStops, reason: `$T_u is unlogged|SET LOGGED`, change: `CREATE UNLOGGED TABLE $T_u PARTITION OF $T FOR VALUES FROM (5000) TO (6000)`, heal: `DROP TABLE $T_u`},
	{name: "recreated", want: ddlResyncs, change: `DROP TABLE $T; CREATE TABLE $T (id int PRIMARY KEY, owner text, n int NOT NULL DEFAULT 0); INSERT INTO $T SELECT g, 'bob' FROM generate_series(1, 30) g`},
	{name: "made_anew_of_another_form", want: ddlResyncs, change: `DROP TABLE $T; CREATE TABLE $T (n int NOT NULL DEFAULT 0, owner varchar(9), id bigint PRIMARY KEY); INSERT INTO $T (id) SELECT g FROM generate_series(1, 30) g`},
	{name: "taken_out", want: ddlResyncs, change: `ALTER PUBLICATION walgate DROP TABLE $T` + "\n" + `UPDATE $T SET note = 'unseen' WHERE id = 1`},
	{name: "identity_lost", quiet: true, want: ddlResyncs, change: `ALTER TABLE $T REPLICA IDENTITY DEFAULT; UPDATE $T SET note = 'unseen' WHERE id = 1`},
	{name: "filtered", major: 15, want: ddlResyncs, change: `ALTER PUBLICATION walgate DROP TABLE $T; ALTER PUBLICATION walgate ADD TABLE ONLY $T WHERE (n > 3); UPDATE $T SET note = 'unseen' WHERE id = 1`},
	{name: "keyless_for_a_while", want: ddlStops, reason: `no primary key`, change: `ALTER TABLE $T DROP CONSTRAINT $T_pkey`, heal: `ALTER TABLE $T ADD PRIMARY KEY (id)`},
}

// TestPartitionsChangeWhileServed changes partitions, and what the gateway may mend by itself.
func TestPartitionsChangeWhileServed(t *testing.T) {
	t.Parallel()
	server := pgserver.ForTest(t)
	var cases []ddlCase
	for _, c := range ddlPreparedCases {
		if c.major <= server.Version() {
			cases = append(cases, c)
		}
	}
	app := server.Database(t)
	startDDLGateway(t, app, app, true, cases, func(string) {}).runAll(cases)
}

// TestPublicationChangesWhileServed: what somebody does to the whole publication stops what it concerns, says so, and
// after walgate init everybody ends with what SELECT returns.
func TestPublicationChangesWhileServed(t *testing.T) {
	t.Parallel()
	server := pgserver.ForTest(t)
	cases := []ddlCase{{name: "plain"}, {name: "parts", create: ddlParts}}
	app := server.Database(t)
	g := startDDLGateway(t, app, app, false, cases, func(path string) {
		if _, err := walgate(t, "init", "--config", path); err != nil {
			t.Fatal(err)
		}
	})
	conn := connect(t, app)
	clients := map[string][]*ddlClient{}
	for _, c := range cases {
		for _, stream := range []bool{false, true} {
			client, stop := g.newClient(t.Context(), c.name, stream)
			clients[c.name] = append(clients[c.name], client)
			defer func() {
				if err := stop(); err != nil {
					t.Error(err)
				}
			}()
		}
	}
	const missed = `UPDATE plain SET n = n + 1 WHERE id = 1; UPDATE parts SET n = n + 1 WHERE id IN (1, 11)`
	const all = `publish = 'insert, update, delete, truncate'`
	const made = `CREATE PUBLICATION walgate FOR TABLE ONLY plain, ONLY witness, ONLY sentinel, parts`
	for _, step := range []struct {
		name, sql string
		stops     map[string]string // collections, and what /readyz says
		heal      string            // SQL before walgate init; "-" for neither
	}{
		{"publishes inserts only", `ALTER PUBLICATION walgate SET (publish = 'insert')` + "\n" + missed, map[string]string{"plain": "doesn't publish update, delete, truncate", "parts": "run walgate init"}, ``},
		{"publishes inserts only for a moment", `ALTER PUBLICATION walgate SET (publish = 'insert'); ` + missed + `; ALTER PUBLICATION walgate SET (` + all + `)`, nil, `-`},
		{"publishes via the root", `ALTER PUBLICATION walgate SET (publish_via_partition_root = true)` + "\n" + missed, map[string]string{"parts": "publish_via_partition_root"}, ``},
		{"is dropped", `DROP PUBLICATION walgate` + "\n" + missed, map[string]string{"plain": "publication walgate is missing", "parts": "run walgate init"}, ``},
		{"is made anew at once", `DROP PUBLICATION walgate; ` + missed + `; ` + made, nil, `-`},
		{"is for all tables", `DROP PUBLICATION walgate; CREATE PUBLICATION walgate FOR ALL TABLES` + "\n" + missed, map[string]string{"plain": "plain is not in publication walgate", "parts": "run walgate init"}, `DROP PUBLICATION walgate`},
	} {
		t.Run(step.name, func(t *testing.T) {
			ctx := context.Background()
			concerned := step.stops
			if concerned == nil {
				concerned = map[string]string{"plain": "", "parts": ""}
			}
			before := map[*ddlClient]int{}
			for name := range concerned {
				for _, client := range clients[name] {
					resyncEventually(t, "the clients have begun", func() bool { return client.snapshot().cursor != "" })
					before[client] = client.snapshot().resyncs
				}
			}
			if err := g.exec(ctx, conn, step.sql); err != nil {
				t.Fatal(err)
			}
			for name, why := range step.stops {
				if err := eventually(ctx, "/readyz says of "+name+": "+why, func() bool { return strings.Contains(g.problem("collection "+name), why) }); err != nil {
					t.Fatalf("%v: it says %q", err, g.problem("collection "+name))
				}
			}
			resyncExec(t, conn, missed) // the application's own statements don't suffer
			if step.heal != "-" {
				resyncExec(t, conn, step.heal)
				if _, err := walgate(t, "init", "--config", g.path); err != nil {
					t.Fatal(err)
				}
			}
			for client, resyncs := range before {
				if err := eventually(ctx, "a client of "+client.collection+" resynchronises", func() bool { return client.snapshot().resyncs > resyncs }); err != nil {
					t.Fatalf("%v\n%s", err, client.story())
				}
			}
			resyncExec(t, conn, `UPDATE plain SET note = note || '.' WHERE id = 2; UPDATE parts SET note = note || '.' WHERE id IN (2, 12)`)
			for _, c := range cases {
				if err := errors.Join(g.converges(ctx, c, conn, clients[c.name]), eventually(ctx, "/readyz is content", func() bool { return g.problem("collection "+c.name) == "" })); err != nil {
					t.Fatal(err, fmt.Sprint(clients[c.name][0].story(), clients[c.name][1].story()))
				}
			}
		})
	}
}

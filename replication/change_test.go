package replication

import (
	"strings"
	"testing"
	"time"

	"github.com/walgate/walgate/policies"
)

// TestTableChanges alters the table while rows flow. Rows after the change have its form, nothing stops for good, and the
// floor rises exactly where documents that clients hold look different now.
func TestTableChanges(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		sql    string
		raised bool
		data   string // of the row inserted afterwards
	}{
		"nullable column added": {`ALTER TABLE items ADD extra int`, false, `{"id":2,"owner":null,"title":null,"body":null,"m":"sad","extra":null}`},
		"column with a default": {`ALTER TABLE items ADD extra int DEFAULT 7`, true, `{"id":2,"owner":null,"title":null,"body":null,"m":"sad","extra":7}`},
		"column dropped":        {`ALTER TABLE items DROP title`, true, `{"id":2,"owner":null,"body":null,"m":"sad"}`},
		"column renamed":        {`ALTER TABLE items RENAME title TO headline`, true, `{"id":2,"owner":null,"headline":null,"body":null,"m":"sad"}`},
		"column retyped":        {`ALTER TABLE items ALTER title TYPE varchar(50)`, true, `{"id":2,"owner":null,"title":null,"body":null,"m":"sad"}`},
		"enum value renamed":    {`ALTER TYPE mood RENAME VALUE 'sad' TO 'blue'`, true, `{"id":2,"owner":null,"title":null,"body":null,"m":"blue"}`},
		"enum value added":      {`ALTER TYPE mood ADD VALUE 'new'`, false, `{"id":2,"owner":null,"title":null,"body":null,"m":"sad"}`},
		"table renamed schema stays": {`COMMENT ON TABLE items IS 'nothing that matters'; ALTER TABLE items ALTER title SET STATISTICS 5`, false,
			`{"id":2,"owner":null,"title":null,"body":null,"m":"sad"}`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSource(t, setup{specs: itemsSpec(), every: 50 * time.Millisecond, before: `CREATE TYPE mood AS ENUM ('sad', 'ok');` + itemsTable + `ALTER TABLE items ADD m mood;`})
			s.exec(`INSERT INTO items (id, m) VALUES (1, 'ok')`)
			before := s.settle().Version
			s.exec(tc.sql)
			s.exec(`INSERT INTO items (id, m) SELECT 2, (enum_range(NULL::mood))[1]`)
			if tc.raised {
				s.awaitRaise("items", before)
			}
			s.settle()
			s.ok(s.watcher.Reload(t.Context()))
			es := s.entries(before)
			if len(es) != 1 || string(es[0].Data) != tc.data {
				t.Errorf("logged %d entries, %s; want %s\n%s", len(es), es[len(es)-1].Data, tc.data, s.logged)
			}
			c := s.collection("items")
			if (c.Floor > before) != tc.raised || c.Stopped != "" {
				t.Errorf("floor %d (%s), stopped %q; version was %d", c.Floor, c.FloorReason, c.Stopped, before)
			}
		})
	}
}

func TestDroppedAndRecreatedTable(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{every: 50 * time.Millisecond, autoInit: true})
	s.exec(`INSERT INTO items VALUES (1)`)
	before := s.settle().Version
	s.exec(`DROP TABLE items`)
	s.await("the collection is stopped", func() bool { return s.collection("items").Stopped != "" })
	s.exec(itemsTable)
	s.await("the new table is published", func() bool {
		return query[bool](s, `SELECT EXISTS (SELECT FROM pg_publication_rel WHERE prrelid = 'items'::regclass)`)
	})
	s.await("the collection goes on", func() bool { return s.collection("items").Stopped == "" })
	s.exec(`INSERT INTO items VALUES (2)`)
	s.await("the new row is logged", func() bool { return strings.HasSuffix(s.changes(before), "u 2") })
	if c := s.collection("items"); c.Floor <= before {
		t.Errorf("floor %d (%s), want above %d", c.Floor, c.FloorReason, before)
	}
}

// TestReplicaIdentityChangedBehindOurBack: without FULL changes can't be followed, so the collection stops and says why;
// set right, it goes on and its clients resynchronise.
func TestReplicaIdentityChangedBehindOurBack(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{before: itemsTable + notesTable, specs: twoTables(), every: 50 * time.Millisecond})
	s.exec(`INSERT INTO items VALUES (1)`)
	before := s.settle().Version
	s.exec(`ALTER TABLE items REPLICA IDENTITY DEFAULT`)
	s.exec(`UPDATE items SET title = 'x'`)
	s.await("the collection is stopped", func() bool { return strings.Contains(s.collection("items").Stopped, "REPLICA IDENTITY FULL") })
	s.exec(`INSERT INTO notes VALUES (1)`)
	s.expect(before, "u 1")
	if s.collection("notes").Stopped != "" {
		t.Error("the other collection stopped too")
	}
	s.exec(`ALTER TABLE items REPLICA IDENTITY FULL`)
	s.exec(`UPDATE items SET title = 'y'`)
	c := s.awaitRaise("items", before)
	s.await("the collection goes on", func() bool { return s.collection("items").Stopped == "" })
	s.exec(`UPDATE items SET title = 'z'`)
	s.await("its rows are logged again", func() bool {
		es := s.entries(c.Floor)
		return len(es) > 0 && strings.Contains(string(es[len(es)-1].Data), `"z"`)
	})
}

// TestPartitions: leaves are one collection, also one that is attached later.
func TestPartitions(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{autoInit: true, every: 50 * time.Millisecond, specs: map[string]policies.Spec{"parts": {Table: "parts"}}, before: `
		CREATE TABLE parts (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
		CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (100);
		CREATE TABLE other_order (v text, gone int, id int NOT NULL PRIMARY KEY); ALTER TABLE other_order DROP gone;`})
	s.exec(`INSERT INTO parts VALUES (1, 'a'); UPDATE parts SET v = 'b'`)
	s.expect(0, "u 1, u 1")
	before := s.settle().Version
	s.exec(`ALTER TABLE parts ATTACH PARTITION other_order FOR VALUES FROM (100) TO (200)`)
	s.awaitRaise("parts", before)
	s.await("the new leaf has FULL", func() bool {
		return query[string](s, `SELECT relreplident::text FROM pg_class WHERE relname = 'other_order'`) == "f"
	})
	before = s.settle().Version
	s.exec(`INSERT INTO parts VALUES (101, 'c')`)
	s.exec(`UPDATE parts SET v = 'd' WHERE id = 101`)
	s.exec(`UPDATE parts SET id = 50 WHERE id = 101`) // moves to the other leaf
	s.exec(`DELETE FROM parts WHERE id = 50`)
	s.expect(before, "u 101, u 101, d 101, u 50, d 50")
	if es := s.entries(before); string(es[1].Data) != `{"id":101,"v":"d"}` {
		t.Errorf("a row of a leaf with another order of columns became %s", es[1].Data)
	}
	before = s.settle().Version
	s.exec(`TRUNCATE other_order`)
	s.awaitRaise("parts", before)
}

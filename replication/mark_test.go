package replication

import (
	"reflect"
	"strings"
	"testing"

	"github.com/walgate/walgate/changelog"
)

// marksIn returns the marks of the whole log after a version, with their places taken out.
func (s *source) marksIn(since changelog.Version) (marks []changelog.Push) {
	s.t.Helper()
	p, err := s.log.ReadAll(s.t.Context(), since, 1<<52, 10000, 64<<20)
	s.ok(err)
	for _, m := range p.Pushes {
		marks = append(marks, m.Push)
	}
	return marks
}

const (
	markSQL   = `INSERT INTO walgate.pushes (subject, client_id) VALUES ('ana', 'phone');`
	localsSQL = `INSERT INTO walgate.pushes (subject, client_id, locals) VALUES ('ana', 'phone', '[{"collection":"items","doc_id":"3","local_id":"mine"}]');`
)

// TestPushesAreMarked: what walgate.pushes says of a transaction comes with its changes, wherever in it the mark stands, and
// nothing else of schema walgate is ever seen.
func TestPushesAreMarked(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{})
	s.exec(`INSERT INTO items VALUES (1)`)
	s.exec(`BEGIN; ` + markSQL + ` INSERT INTO items SELECT 3 FROM generate_series(1, 1);
		INSERT INTO walgate.outcomes (subject, client_id, change_id, hash, push_id, outcome) VALUES ('ana', 'phone', 'c', '', 1, '{}');
		INSERT INTO walgate.local_ids (subject, client_id, collection, local_id, doc_id, push_id) VALUES ('ana', 'phone', 'items', 'mine', '3', 1); ` + localsSQL + ` COMMIT`)
	s.exec(`BEGIN; ` + markSQL + ` UPDATE items SET id = 30 WHERE id = -1; COMMIT`) // changes nothing
	s.exec(`BEGIN; ` + markSQL + ` INSERT INTO items SELECT n FROM generate_series(1001, 9000) n; COMMIT`)
	s.exec(`BEGIN; ` + markSQL + ` ROLLBACK`)
	s.exec(`UPDATE walgate.pushes SET subject = 'eve'; DELETE FROM walgate.pushes WHERE id > 3`)
	s.exec(`INSERT INTO items VALUES (2)`)
	head := s.settle()
	ana := changelog.Push{Subject: "ana", ClientID: "phone"}
	want := []changelog.Push{ana, ana, ana}
	want[0].ID, want[1].ID, want[2].ID = 1, 3, 4
	want[0].Locals = []changelog.Local{{Collection: "items", DocID: "3", LocalID: "mine"}}
	if got := s.marksIn(0); !reflect.DeepEqual(got, want) {
		t.Errorf("marks %+v\nwant %+v", got, want)
	}
	es := s.entries(0)
	if len(es) != 8003 {
		t.Fatalf("%d changes are logged, want 8003", len(es))
	}
	pushed, err := s.log.Pushed(t.Context(), []int64{1, 3, 4})
	s.ok(err)
	first, empty, large := pushed[0], pushed[1], pushed[2]
	if first.Tx != es[1].Tx || first.Last != es[1].Version || len(first.Changes) != 1 || first.Changes[0].DocID != "3" {
		t.Errorf("the first push is %+v, its change %+v", first, es[1])
	}
	if empty.Tx <= first.Last || empty.Last != empty.Tx || len(empty.Changes) != 0 || large.Tx <= empty.Tx || head.Version < empty.Tx {
		t.Errorf("a push that changed nothing is %+v, between %+v and %+v; the head is %d", empty, first.Last, large.Tx, head.Version)
	}
	if large.Tx != es[2].Tx || large.Last != es[8001].Version || len(large.Changes) != 8000 {
		t.Errorf("the large push is from %d to %d of %d changes, want from %d to %d", large.Tx, large.Last, len(large.Changes), es[2].Tx, es[8001].Version)
	}
}

// TestLoggedPushesAreSkipped: what comes again from the slot marks nothing a second time.
func TestLoggedPushesAreSkipped(t *testing.T) {
	t.Parallel()
	s, pieces := bareStream(nil)
	s.seq.logged = 100
	s.ok(t, s.relation(t.Context(), pushesRelation()))
	for _, c := range []struct {
		begins, end changelog.LSN
		want        int
	}{{90, 100, 0}, {100, 110, 1}} {
		*pieces = nil
		s.seq.begin(&message{kind: msgBegin, xid: 9, begins: c.begins})
		m := insert(row("5", "ana", "phone", "~"))
		m.relation = 200
		s.ok(t, s.change(t.Context(), &m))
		logged, err := s.seq.commit(&message{kind: msgCommit, end: c.end})
		s.ok(t, err)
		if len(*pieces) != c.want || logged != (c.want == 1) {
			t.Errorf("a push whose commit begins at %d: %+v", c.begins, *pieces)
		}
	}
	if p := (*pieces)[0]; p.Push == nil || p.Push.ID != 5 || p.Tx == 0 || p.Version != p.Tx || !p.Final {
		t.Errorf("handed over %+v of %+v", p, p.Push)
	}
	s.seq.begin(&message{kind: msgBegin, xid: 10, begins: 120})
	if logged, err := s.seq.commit(&message{kind: msgCommit, end: 130}); logged || err != nil {
		t.Errorf("the mark outlived its transaction (%v)", err)
	}
}

func pushesRelation() *relation {
	r := &relation{oid: 200, schema: "walgate", name: "pushes", identity: 'd'}
	for _, name := range []string{"id", "subject", "client_id", "locals"} {
		r.columns = append(r.columns, relationColumn{name: name, typ: 25})
	}
	return r
}

func (s *stream) ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestUnreadableMarksStopNothing: of a table that somebody altered. The rows of such a push are logged all the same.
func TestUnreadableMarksStopNothing(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{})
	s.exec(`ALTER TABLE walgate.pushes RENAME client_id TO device`)
	s.exec(`BEGIN; INSERT INTO walgate.pushes (subject, device) VALUES ('ana', 'phone'); INSERT INTO items VALUES (1); COMMIT`)
	s.exec(`ALTER TABLE walgate.pushes RENAME device TO client_id`)
	s.exec(`BEGIN; INSERT INTO walgate.pushes (subject, client_id, locals) VALUES ('ana', 'phone', '{"no":"list"}'); INSERT INTO items VALUES (2); COMMIT`)
	s.exec(`BEGIN; ` + markSQL + ` INSERT INTO items VALUES (3); COMMIT`)
	s.settle()
	s.expect(0, "u 1, u 2, u 3")
	if got := s.marksIn(0); len(got) != 1 || got[0].ID != 3 {
		t.Errorf("marks %+v", got)
	}
	if n := strings.Count(s.logged.String(), "a push was not recognised"); n != 2 {
		t.Errorf("%d of 2 marks that can't be read were logged:\n%s", n, s.logged)
	}
}

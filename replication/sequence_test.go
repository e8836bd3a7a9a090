package replication

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/schema"
)

// textTable is table 100 with an integer key, an owner and two texts; its columns' attnums have gaps.
func textTable() *schema.Table {
	text := &schema.Type{OID: 25, Name: "text"}
	number := &schema.Type{OID: 23, Name: "integer", Kind: schema.KindNumber}
	c := func(name string, num int16, typ *schema.Type) schema.Column {
		return schema.Column{Name: name, Num: num, Type: typ, Deterministic: true}
	}
	return &schema.Table{OID: 100, Schema: "public", Name: "items", Kind: 'r', Persistence: 'p', Key: []int{0}, Identity: 'f',
		Columns: []schema.Column{c("id", 1, number), c("owner", 3, text), c("title", 4, text), c("body", 17, text)}}
}

// bareTarget binds textTable to its own layout.
func bareTarget(t testing.TB) *target {
	t.Helper()
	target, _ := filteredTarget(t, "")
	return target
}

// filteredTarget is bareTarget with a filter.
func filteredTarget(t testing.TB, where string) (*target, *policies.Set) {
	t.Helper()
	table := textTable()
	set, faults := policies.Compile(map[string]policies.Spec{"items": {Table: "items", Where: where, Scope: []map[string]string{{"owner": "claims.sub"}}}},
		func(_, name string) *schema.Table { return table }, []string{"public.items"})
	if len(faults) > 0 {
		t.Fatal(faults)
	}
	out := &target{relation: &relation{oid: 100, schema: "public", name: "items", identity: 'f'}, collection: set.Collections[0], id: 7, guarded: set.Collections[0].HasGuard()}
	for _, c := range table.Columns {
		out.relation.columns = append(out.relation.columns, relationColumn{name: c.Name, typ: c.Type.OID})
		out.attnums = append(out.attnums, c.Num)
	}
	var err error
	if out.binding, err = out.collection.Bind(table.Columns); err != nil {
		t.Fatal(err)
	}
	return out, set
}

// bareStream is a stream without a server; pieces are collected.
func bareStream(tg *target) (*stream, *[]changelog.Piece) {
	logger := slog.New(slog.NewTextHandler(io.Discard, nil))
	var pieces []changelog.Piece
	seq := &sequencer{clock: changelog.NewClock(0), targets: map[uint32]*target{}, stats: &Stats{}, log: logger,
		put: func(p changelog.Piece) error { pieces = append(pieces, p); return nil }}
	if tg != nil {
		seq.targets[100] = tg
	}
	s := &stream{seq: seq, queue: changelog.NewQueue(1 << 20), logged: func() changelog.LSN { return 0 }, stats: seq.stats, log: logger,
		resolve: func(context.Context, *relation) (*target, error) { return tg, nil }}
	return s, &pieces
}

// row makes a row of texts; "~" is NULL and "=" an unchanged value.
func row(values ...string) schema.Row {
	var r schema.Row
	for _, v := range values {
		switch v {
		case "~":
			r = append(r, nil)
		case "=":
			r = append(r, unchangedTOAST)
		default:
			r = append(r, []byte(v))
		}
	}
	return r
}

// run sequences messages as one transaction committed at the given time.
func run(t testing.TB, s *stream, pieces *[]changelog.Piece, commit time.Time, messages ...message) ([]changelog.Entry, error) {
	t.Helper()
	*pieces = nil
	s.seq.begin(&message{kind: msgBegin, xid: 9, commit: commit, begins: 50})
	for i := range messages {
		m := &messages[i]
		m.relation = 100
		if err := s.seq.change(s.seq.targets[100], m); err != nil {
			return nil, err
		}
	}
	if _, err := s.seq.commit(&message{kind: msgCommit, end: 60}); err != nil {
		return nil, err
	}
	var all []changelog.Entry
	for i, p := range *pieces {
		all = append(all, p.Entries...)
		if last := i == len(*pieces)-1; p.Final != last || (p.LSN == 60) != last || p.Xid != 9 {
			t.Errorf("piece %d of %d: %+v", i, len(*pieces), p)
		}
	}
	for i := range all {
		if all[i].Tx != all[0].Tx || all[i].Tx > all[i].Version || i > 0 && all[i].Version < all[i-1].Version {
			t.Errorf("entry %d: version %d of transaction %d after %d", i, all[i].Version, all[i].Tx, all[max(0, i-1)].Version)
		}
	}
	return all, nil
}

func brief(es []changelog.Entry) string {
	var out []string
	for _, e := range es {
		out = append(out, fmt.Sprintf("%c %s %s%s", e.Op, e.DocID, e.Data, map[bool]string{true: fmt.Sprintf(" %x", e.Changed)}[e.Changed != nil]))
	}
	return strings.Join(out, " | ")
}

func insert(r schema.Row) message { return message{kind: msgInsert, new: r} }
func remove(r schema.Row) message { return message{kind: msgDelete, oldKind: 'O', old: r} }
func change(old, now schema.Row) message {
	return message{kind: msgUpdate, oldKind: 'O', old: old, new: now}
}

func TestSequence(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		in   []message
		want string
	}{
		"insert":   {[]message{insert(row("1", "ana", "t", "~"))}, `u 1 {"id":1,"owner":"ana","title":"t","body":null}`},
		"delete":   {[]message{remove(row("1", "ana", "t", "~"))}, `d 1 `},
		"nobody's": {[]message{insert(row("1", "~", "t", "~"))}, ``},
		"changed bits": {[]message{change(row("1", "ana", "t", "b"), row("1", "ana", "~", "c"))},
			`u 1 {"id":1,"owner":"ana","title":null,"body":"c"} 080001`},
		"nothing changed": {[]message{change(row("1", "ana", "t", "b"), row("1", "ana", "t", "b"))},
			`u 1 {"id":1,"owner":"ana","title":"t","body":"b"} 000000`},
		"empty is not null": {[]message{change(row("1", "ana", "~", "b"), row("1", "ana", "", "b"))},
			`u 1 {"id":1,"owner":"ana","title":"","body":"b"} 080000`},
		"unchanged TOAST is filled in": {[]message{change(row("1", "ana", "t", "long"), row("1", "ana", "new", "="))},
			`u 1 {"id":1,"owner":"ana","title":"new","body":"long"} 080000`},
		"key change": {[]message{change(row("1", "ana", "t", "b"), row("2", "ana", "t", "b"))},
			`d 1  | u 2 {"id":2,"owner":"ana","title":"t","body":"b"}`},
		"delete and insert are one upsert": {[]message{remove(row("1", "ana", "t", "b")), insert(row("1", "ana", "n", "b"))},
			`u 1 {"id":1,"owner":"ana","title":"n","body":"b"}`},
		"delete, insert, delete": {[]message{remove(row("1", "ana", "t", "b")), insert(row("1", "ana", "n", "b")), remove(row("1", "ana", "n", "b"))},
			`u 1 {"id":1,"owner":"ana","title":"n","body":"b"} | d 1 `},
		"delete and insert of two": {[]message{remove(row("1", "ana", "t", "b")), remove(row("2", "ana", "t", "b")), insert(row("1", "ana", "n", "b"))},
			`d 2  | u 1 {"id":1,"owner":"ana","title":"n","body":"b"}`},
		"keys swapped": {[]message{change(row("1", "ana", "a", "~"), row("9", "ana", "a", "~")), change(row("2", "ana", "b", "~"), row("1", "ana", "b", "~")), change(row("9", "ana", "a", "~"), row("2", "ana", "a", "~"))},
			`u 9 {"id":9,"owner":"ana","title":"a","body":null} | u 1 {"id":1,"owner":"ana","title":"b","body":null} | d 9  | u 2 {"id":2,"owner":"ana","title":"a","body":null}`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, pieces := bareStream(bareTarget(t))
			got, err := run(t, s, pieces, time.Now(), tc.in...)
			if err != nil || brief(got) != tc.want {
				t.Errorf("%v\ngot  %s\nwant %s", err, brief(got), tc.want)
			}
		})
	}
}

func TestScopeMoveIsLeaveAndEnterAtOneVersion(t *testing.T) {
	t.Parallel()
	s, pieces := bareStream(bareTarget(t))
	got, err := run(t, s, pieces, time.Now(), change(row("1", "ana", "t", "~"), row("1", "bob", "t", "~")))
	if err != nil || len(got) != 2 || got[0].Version != got[1].Version || got[0].Scope == got[1].Scope {
		t.Fatalf("%v: %s", err, brief(got))
	}
	// So is a delete and an insert elsewhere within one transaction.
	got, err = run(t, s, pieces, time.Now(), remove(row("1", "ana", "t", "~")), insert(row("1", "bob", "t", "~")))
	if err != nil || len(got) != 2 || got[0].Version != got[1].Version || got[0].Scope == got[1].Scope {
		t.Errorf("%v: %s", err, brief(got))
	}
}

// TestWhoNeverSawARowDoesNotLearnThatItLeft: the row enters bob's scope and fails his filter in one change. It passed the
// filter before, but not in a scope of his.
func TestWhoNeverSawARowDoesNotLearnThatItLeft(t *testing.T) {
	t.Parallel()
	target, set := filteredTarget(t, "row.title == claims.title")
	s, pieces := bareStream(target)
	got, err := run(t, s, pieces, time.Now(), change(row("1", "ana", "t", "~"), row("1", "bob", "u", "~")))
	if err != nil || len(got) != 2 {
		t.Fatalf("%v: %s", err, brief(got))
	}
	for subject, want := range map[string]bool{"ana": true, "bob": false} {
		caller, err := set.NewCaller(subject, nil, map[string]any{"sub": subject, "title": "t"})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range got {
			if policies.ScopeKey(e.Scope) != caller.Scopes(target.collection)[0] {
				continue
			}
			if op, seen, err := target.collection.Judge(policies.Op(e.Op), e.Guard, caller); seen != want || err != nil {
				t.Errorf("%s is told %c: %v (%v), want %v", subject, op, seen, err, want)
			}
		}
	}
}

func TestUnchangedTOASTWithoutOldRowIsAnError(t *testing.T) {
	t.Parallel()
	s, pieces := bareStream(bareTarget(t))
	for _, m := range []message{
		{kind: msgUpdate, new: row("1", "ana", "t", "=")},
		{kind: msgUpdate, oldKind: 'K', old: row("1", "~", "~", "~"), new: row("1", "ana", "t", "=")},
	} {
		if _, err := run(t, s, pieces, time.Now(), m); err == nil || !strings.Contains(err.Error(), "column body") || !strings.Contains(err.Error(), "REPLICA IDENTITY FULL") {
			t.Errorf("error %v, want one that names column and remedy", err)
		}
	}
	if _, err := run(t, s, pieces, time.Now(), insert(row("1", "ana"))); err == nil {
		t.Error("a row of two columns was taken for one of four")
	}
}

func TestVersionsFollowCommitTimeAndNeverGoBack(t *testing.T) {
	t.Parallel()
	s, pieces := bareStream(bareTarget(t))
	now := time.Now().Truncate(time.Millisecond)
	last := changelog.Version(0)
	for i, at := range []time.Time{now, now, now.Add(-time.Hour), now.Add(time.Second), now.Add(-24 * time.Hour)} {
		got, err := run(t, s, pieces, at, insert(row("1", "ana", "t", "~")), insert(row("2", "ana", "t", "~")))
		if err != nil || got[0].Version <= last {
			t.Fatalf("transaction %d has version %d after %d (%v)", i, got[0].Version, last, err)
		}
		if (i == 0 || i == 3) && !got[0].Version.Time().Equal(at) {
			t.Errorf("transaction %d is stamped %s, committed %s", i, got[0].Version.Time(), at)
		}
		last = got[1].Version
	}
}

func TestPiecesAreBounded(t *testing.T) {
	t.Parallel()
	for name, size := range map[string]int{"many small rows": 10, "large rows": 40 << 10} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, pieces := bareStream(bareTarget(t))
			title := strings.Repeat("x", size)
			const rows = 5000
			s.seq.begin(&message{kind: msgBegin, xid: 9, commit: time.Now(), begins: 50})
			entries, heaviest := 0, 0
			s.seq.put = func(p changelog.Piece) error {
				*pieces = append(*pieces, changelog.Piece{Final: p.Final})
				entries += len(p.Entries)
				bytes := 0
				for _, e := range p.Entries {
					bytes += len(e.Data)
				}
				if heaviest = max(heaviest, bytes); len(p.Entries) > pieceEntries || p.Size < bytes {
					t.Errorf("a piece of %d entries, %d bytes said to be %d", len(p.Entries), bytes, p.Size)
				}
				return nil
			}
			for i := range rows {
				m := insert(row(fmt.Sprint(i), "ana", title, "~"))
				if i%2 == 1 { // deletes are remembered, which must not grow either
					m = remove(row(fmt.Sprint(i), "ana", title, "~"))
				}
				if err := s.seq.change(s.seq.targets[100], &m); err != nil {
					t.Fatal(err)
				}
				if len(s.seq.deleted) > pieceEntries {
					t.Fatalf("%d deleted rows are remembered", len(s.seq.deleted))
				}
			}
			if _, err := s.seq.commit(&message{kind: msgCommit, end: 60}); err != nil {
				t.Fatal(err)
			}
			if entries != rows || heaviest > pieceBytes+2*size+200 || len(*pieces) < 3 {
				t.Errorf("%d entries in %d pieces, the heaviest of %d bytes", entries, len(*pieces), heaviest)
			}
		})
	}
}

func TestLoggedTransactionsAreSkipped(t *testing.T) {
	t.Parallel()
	s, _ := bareStream(bareTarget(t))
	s.seq.logged = 60
	for begins, skip := range map[changelog.LSN]bool{59: true, 60: false, 61: false} {
		s.seq.begin(&message{kind: msgBegin, commit: time.Now(), begins: begins})
		if s.seq.skipping != skip {
			t.Errorf("transaction whose commit record is at %s, log at %s: skipped %v", begins, s.seq.logged, s.seq.skipping)
		}
	}
}

func TestXidWidening(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		near := rapid.OneOf(rapid.Uint64Range(1<<31, 1<<40), rapid.Uint64Range(1<<32-1000, 1<<32+1000), rapid.Uint64Range(0, 1000)).Draw(t, "near")
		w := xidWidener{near: near}
		for range 20 {
			away := rapid.OneOf(rapid.Int64Range(-1000, 1000), rapid.Int64Range(-(1<<31)+1, 1<<31-1)).Draw(t, "away")
			id := int64(w.near) + away
			if id < 0 {
				continue
			}
			if got := w.widen(uint32(id)); got != uint64(id) {
				t.Fatalf("near %d, %d was widened to %d, want %d", near, uint32(id), got, id)
			}
		}
	})
}

// TestGiantRowsLeaveNoBuffers: a giant row's memory goes with its piece, and its document isn't copied.
func TestGiantRowsLeaveNoBuffers(t *testing.T) {
	t.Parallel()
	s, pieces := bareStream(bareTarget(t))
	giant := strings.Repeat("x", 4*giantBytes)
	got, err := run(t, s, pieces, time.Now(), insert(row("1", "ana", giant, "~")), change(row("1", "ana", giant, "~"), row("1", "ana", giant, "2")), insert(row("3", "ana", "y", "~")))
	if err != nil || len(got) != 3 || len(got[0].Data) < len(giant) {
		t.Fatalf("%d entries, %v", len(got), err)
	}
	if n := cap(s.seq.scratch); n >= giantBytes {
		t.Errorf("a buffer of %d bytes is kept for the next row", n)
	}
	if n := cap(s.seq.arena); n > arenaChunk {
		t.Errorf("the next rows share %d bytes with the giant one", n)
	}
}

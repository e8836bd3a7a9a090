package replication

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/schema"
)

// namingTarget is bareTarget whose titles name attachments, with a fill that is done.
func namingTarget(t testing.TB) *target {
	t.Helper()
	tg, table := bareTarget(t), textTable()
	set, faults := policies.Compile(map[string]policies.Spec{"items": {Table: "items", Where: `row.body != "hidden"`, Scope: []map[string]string{{"owner": "claims.sub"}},
		Attachments: []policies.AttachmentSpec{{Column: "title"}}}}, func(_, _ string) *schema.Table { return table }, []string{"public.items"})
	if len(faults) > 0 {
		t.Fatal(faults)
	}
	var err error
	tg.collection, tg.fill = set.Collections[0], &fill{id: 3, done: true}
	if tg.binding, err = tg.collection.Bind(table.Columns); err != nil {
		t.Fatal(err)
	}
	return tg
}

// inShort writes references as "+file/document", with - for those that are taken away and ~ for documents out of sight.
func inShort(t testing.TB, tg *target, refs []changelog.Reference) string {
	t.Helper()
	names := map[[16]byte]string{}
	for _, f := range []string{"f1", "f2"} {
		names[policies.AttachmentKey([]byte(f))] = f
	}
	for d := range 4 {
		names[policies.DocumentKey(tg.id, []byte(fmt.Sprint(d)))] = fmt.Sprint(d)
	}
	var out []string
	for _, r := range refs {
		sign := "+"
		if r.Removed {
			sign = "-"
		} else if r.Fill != tg.fill.id {
			t.Errorf("fill %d, want %d", r.Fill, tg.fill.id)
		}
		if r.Version == 0 {
			t.Error("a reference has no version")
		}
		out = append(out, sign+names[r.Attachment]+"/"+names[r.Document])
	}
	slices.SortStableFunc(out, func(a, b string) int { return strings.Compare(a[:1], b[:1]) * -1 }) // what goes first
	return strings.Join(out, " ")
}

// TestReferencesOfChanges: what each kind of change says of references; while the fill isn't done, everything that a document
// may hold is replaced.
func TestReferencesOfChanges(t *testing.T) {
	t.Parallel()
	update := func(old, now schema.Row) message { return message{kind: msgUpdate, oldKind: 'O', old: old, new: now} }
	remove := func(old schema.Row) message { return message{kind: msgDelete, oldKind: 'O', old: old} }
	one, two := row("1", "ana", "f1", ""), row("1", "ana", "f2", "")
	for name, c := range map[string]struct {
		messages    []message
		want, whole string // once the fill is done, and before
	}{
		"insert":                  {[]message{insert(one)}, "+f1/1", "+f1/1"},
		"another column":          {[]message{update(one, row("1", "ana", "f1", "x"))}, "", "-f1/1 +f1/1"},
		"another file":            {[]message{update(one, two)}, "-f1/1 +f2/1", "-f1/1 -f2/1 +f2/1"},
		"another scope":           {[]message{update(one, row("1", "bob", "f1", ""))}, "-f1/1 +f1/1", "-f1/1 -f1/1 +f1/1"},
		"another key":             {[]message{update(one, row("2", "ana", "f1", ""))}, "-f1/1 +f1/2", "-f1/1 +f1/2"},
		"delete":                  {[]message{remove(one)}, "-f1/1", "-f1/1"},
		"delete and insert":       {[]message{remove(one), insert(row("1", "ana", "f1", ""))}, "-f1/1 +f1/1", "-f1/1 +f1/1"},
		"delete and insert other": {[]message{remove(one), insert(two)}, "-f1/1 +f2/1", "-f1/1 +f2/1"},
		"out of line, unchanged":  {[]message{update(one, row("1", "ana", "=", "x"))}, "", "-f1/1 +f1/1"},
		"hidden insert":           {[]message{insert(row("1", "ana", "f1", "hidden"))}, "+f1/1", "+f1/1"},
		"no id":                   {[]message{insert(row("1", "ana", "not an id", ""))}, "", ""},
		"null":                    {[]message{insert(row("1", "ana", "~", ""))}, "", ""},
	} {
		for _, done := range []bool{true, false} {
			tg := namingTarget(t)
			tg.fill.done = done
			s, pieces := bareStream(tg)
			messages := slices.Clone(c.messages)
			for i := range messages {
				messages[i].new = slices.Clone(messages[i].new)
			}
			entries, err := run(t, s, pieces, time.UnixMilli(1_900_000_000_000), messages...)
			s.ok(t, err)
			var refs []changelog.Reference
			for _, p := range *pieces {
				refs = append(refs, p.References...)
			}
			want := c.want
			if !done {
				want = c.whole
			}
			if got := inShort(t, tg, refs); got != want {
				t.Errorf("%s, done %v: %s, want %s", name, done, got, want)
			}
			hidden := name == "hidden insert"
			if hidden != (len(entries) == 0) && len(refs) > 0 {
				t.Errorf("%s: %d entries", name, len(entries))
			}
			if _, ok := tg.fill.hidden[policies.DocumentKey(tg.id, []byte("1"))]; ok != (hidden && !done) {
				t.Errorf("%s, done %v: remembered out of sight: %v", name, done, ok)
			}
			if last := (*pieces)[len(*pieces)-1]; len(refs) > 0 && (last.Tx == 0 || !last.Final) {
				t.Errorf("%s: handed over %+v", name, last)
			}
		}
	}
}

// TestStepsOfFills: a raise begins a new fill in its place, an overtaken step is left out, and rows that changed out of sight
// are taken out of a step, or all of it where they are too many.
func TestStepsOfFills(t *testing.T) {
	t.Parallel()
	tg := namingTarget(t)
	s, _ := bareStream(tg)
	seq := s.seq
	seq.fills, seq.lastFill = map[int32]*fill{tg.id: tg.fill}, 5
	var began []fill
	seq.onFill = func(_ int32, f fill) { began = append(began, f) }
	seq.raise(changelog.Raise{Collection: tg.id, Shape: "same documents"})
	seq.raise(changelog.Raise{Collection: 99, Reason: "has no attachments"})
	if len(seq.piece.Fills) != 0 {
		t.Fatalf("began %+v", seq.piece.Fills)
	}
	seq.raise(changelog.Raise{Collection: tg.id, Reason: "truncated"})
	if f := seq.piece.Fills; len(f) != 1 || !f[0].Start || f[0].Fill != 6 || f[0].Version <= seq.piece.Raises[2].Version || tg.fill.done || len(began) != 1 || began[0].id != 6 {
		t.Fatalf("began %+v, told %+v", f, began)
	}
	document := func(n int) [16]byte { return policies.DocumentKey(tg.id, []byte(fmt.Sprint(n))) }
	rows := func() (out []changelog.FillRow) {
		for n := range 4 {
			out = append(out, changelog.FillRow{Document: document(n), References: make([]changelog.Reference, 1)})
		}
		return out
	}
	if p := seq.place(changelog.FillStep{Fill: 3, Collection: tg.id, Rows: rows()}, nil); !p.overtaken || len(seq.piece.Fills) != 1 {
		t.Errorf("an overtaken step: %+v", p)
	}
	tg.fill.hide(document(2))
	if p := seq.place(changelog.FillStep{Fill: 6, Collection: tg.id, Rows: rows()}, nil); p.version != seq.clock.Last() || p.dropped {
		t.Errorf("placed %+v", p)
	}
	placed := seq.piece.Fills[1].Rows
	if len(placed) != 3 || placed[2].Document != document(3) || placed[0].Version == 0 || placed[0].Version >= placed[1].Version {
		t.Errorf("rows %+v", placed)
	}
	for n := range hiddenMost + 10 {
		tg.fill.hide(document(n))
	}
	if len(tg.fill.hidden) > hiddenMost+1 {
		t.Errorf("%d documents are remembered", len(tg.fill.hidden))
	}
	if p := seq.place(changelog.FillStep{Fill: 6, Collection: tg.id, Rows: rows()}, nil); !p.dropped || len(seq.piece.Fills) != 2 {
		t.Errorf("after too many changes: %+v", p)
	}
	if p := seq.place(changelog.FillStep{Fill: 6, Collection: tg.id, Done: true}, nil); p.dropped || !tg.fill.done {
		t.Errorf("the last step: %+v", p)
	}
}

package policies

import (
	"maps"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/walgate/walgate/schema"
)

// pairModel is a row with what a naive reading of it gives.
type pairModel struct {
	row   schema.Row
	pairs map[Pair]bool
}

func modelOfPairs() *Collection {
	find, all := catalog(everything())
	set, _ := Compile(map[string]Spec{"tasks": {
		Table: "public.tasks", Scope: []map[string]string{{"owner_id": "claims.sub"}, {"team_id": "claims.team"}},
		Where: "!row.archived", SoftDelete: "deleted_at",
		Attachments: []AttachmentSpec{{Column: "title"}, {Column: "tags"}, {Column: "meta", Path: "$.p[*]"}, {Column: "package", Pattern: "i[0-9]"}},
	}}, find, all)
	return set.ByName("tasks")
}

// drawPairs draws a row, or none, and reads it naively: its ids are known from the lists that made its texts, its scopes from
// an insert of the row as it would be if it were visible.
func drawPairs(t *rapid.T, b *Binding, name string) pairModel {
	m := pairModel{pairs: map[Pair]bool{}}
	if rapid.IntRange(0, 5).Draw(t, name+" none") == 0 {
		return m
	}
	ids := map[string]bool{}
	list := func(column string) (texts []string) {
		texts = rapid.SliceOfN(rapid.SampledFrom([]string{"i1", "i2", "i3", "i4"}), 0, 4).Draw(t, name+" "+column)
		for _, id := range texts {
			ids[id] = true
		}
		return texts
	}
	tab := b.Collection.Table
	m.row = row(tab, "id=1", "tags={"+strings.Join(list("tags"), ",")+"}", "package=see "+strings.Join(list("package"), ", "))
	set := func(column, text string) { m.row[tab.Column(column)] = []byte(text) }
	if p := list("meta"); len(p) > 0 {
		set("meta", `{"q": "i9", "p": ["`+strings.Join(p, `", "`)+`"]}`)
	}
	if one := list("title"); len(one) > 0 {
		set("title", one[0])
		for _, id := range one[1:] {
			set("package", string(m.row[tab.Column("package")])+" "+id)
		}
	}
	for _, column := range []string{"owner_id", "team_id"} {
		if text := rapid.SampledFrom([]string{"", "1", "2"}).Draw(t, name+" "+column); text != "" {
			set(column, text)
		}
	}
	set("archived", "f")
	effects, err := b.Route(nil, nil, m.row)
	if err != nil {
		t.Fatal(err)
	}
	hidden := len(effects) == 0
	if hidden {
		effects = []Effect{{Scope: b.Collection.everyone}}
	}
	if rapid.IntRange(0, 3).Draw(t, name+" archived") == 0 {
		set("archived", "t")
		hidden = true
	}
	if rapid.IntRange(0, 3).Draw(t, name+" deleted") == 0 {
		set("deleted_at", "2024-01-01 00:00:00+00")
		hidden = true
	}
	for _, e := range effects {
		scope := e.Scope
		if hidden {
			scope = HiddenScope(scope)
		}
		for id := range ids {
			m.pairs[Pair{Attachment: AttachmentKey([]byte(id)), Scope: scope}] = true
		}
	}
	return m
}

// TestAppendReferencesAsSets: what is taken away and added is the difference of two sets, each pair once; with whole,
// everything is taken away before all of new is added.
func TestAppendReferencesAsSets(t *testing.T) {
	t.Parallel()
	b := bind(t, modelOfPairs())
	rapid.Check(t, func(t *rapid.T) {
		old, new := drawPairs(t, b, "old"), drawPairs(t, b, "new")
		if rapid.IntRange(0, 3).Draw(t, "same references") == 0 && old.row != nil && new.row != nil {
			for _, column := range []string{"title", "tags", "meta", "package"} {
				i := b.Collection.Table.Column(column)
				old.row[i] = new.row[i]
			}
			old.pairs = appended(t, b, nil, old.row, false) // what an insert adds is held against the model elsewhere
		}
		if rapid.IntRange(0, 5).Draw(t, "same row") == 0 {
			old = new
		}
		whole := rapid.Bool().Draw(t, "whole")
		if _, err := b.Route(nil, old.row, new.row); err != nil {
			t.Fatal(err)
		}
		removed, added := map[Pair]bool{}, map[Pair]bool{}
		for _, p := range b.AppendReferences(nil, old.row, new.row, whole) {
			into, bare := added, Pair{Attachment: p.Attachment, Scope: p.Scope}
			if p.Removed {
				into = removed
				if len(added) > 0 {
					t.Fatal("a pair is taken away after one was added")
				}
			}
			if into[bare] {
				t.Fatalf("%v twice", bare)
			}
			into[bare] = true
		}
		wantRemoved, wantAdded := map[Pair]bool{}, map[Pair]bool{}
		for p := range old.pairs {
			if whole || !new.pairs[p] {
				wantRemoved[p] = true
			}
		}
		for p := range new.pairs {
			if whole {
				wantRemoved[p] = true
			}
			if whole || !old.pairs[p] {
				wantAdded[p] = true
			}
		}
		if !maps.Equal(removed, wantRemoved) || !maps.Equal(added, wantAdded) {
			t.Fatalf("removed %v\nwant %v\nadded %v\nwant %v", removed, wantRemoved, added, wantAdded)
		}
	})
}

func appended(t *rapid.T, b *Binding, old, new schema.Row, whole bool) map[Pair]bool {
	if _, err := b.Route(nil, old, new); err != nil {
		t.Fatal(err)
	}
	out := map[Pair]bool{}
	for _, p := range b.AppendReferences(nil, old, new, whole) {
		out[p] = true
	}
	return out
}

// TestMergedInsert: a delete and an insert that became one upsert give all pairs of the new row.
func TestMergedInsert(t *testing.T) {
	t.Parallel()
	b := bind(t, modelOfPairs())
	r := row(b.Collection.Table, "id=1", "title=i1", "owner_id=1", "archived=f")
	if _, err := b.Route(nil, r, r); err != nil {
		t.Fatal(err)
	}
	if got := b.AppendReferences(nil, nil, r, false); len(got) != 1 || got[0].Removed {
		t.Errorf("got %+v, want one pair added", got)
	}
	if got := b.AppendReferences(nil, r[:1], r, false); len(got) != 1 || got[0].Removed {
		t.Errorf("with an old row of another layout: %+v", got)
	}
}

// TestAppendReferencesAllocatesNothing isn't parallel: it counts allocations.
func TestAppendReferencesAllocatesNothing(t *testing.T) {
	c := compileOne(t, everything(), Spec{Scope: []map[string]string{{"owner_id": "claims.sub"}}, Attachments: []AttachmentSpec{{Column: "title"}}})
	b := bind(t, c)
	old, new := row(c.Table, "id=1", "title=a", "owner_id=1"), row(c.Table, "id=1", "title=b", "owner_id=2")
	pairs := make([]Pair, 0, 8)
	for _, rows := range [][2]schema.Row{{nil, new}, {old, new}, {old, old}, {old, nil}} {
		if _, err := b.Route(nil, rows[0], rows[1]); err != nil {
			t.Fatal(err)
		}
		if n := testing.AllocsPerRun(100, func() { pairs = b.AppendReferences(pairs[:0], rows[0], rows[1], false) }); n > 0 {
			t.Errorf("%v allocations", n)
		}
	}
}

func BenchmarkAppendReferences(b *testing.B) {
	c := func(spec AttachmentSpec) *Binding {
		find, all := catalog(everything())
		set, _ := Compile(map[string]Spec{"tasks": {Table: "tasks", Attachments: []AttachmentSpec{spec}}}, find, all)
		bound, err := set.ByName("tasks").Bind(everything().Columns)
		if err != nil {
			b.Fatal(err)
		}
		return bound
	}
	tab := everything()
	document := `{"title": "` + strings.Repeat("x", 200) + `", "photos": [{"id": "photo-1"}, {"id": "photo-2"}], "size": {"w": 1, "h": 2}}`
	one := row(tab, "id=1", "title=photo-1", "meta="+document, "tags={photo-1,photo-2}")
	other := row(tab, "id=1", "title=photo-3", "meta="+strings.Replace(document, "photo-1", "photo-3", 1), "tags={photo-1,photo-3}")
	for _, bench := range []struct {
		name     string
		spec     AttachmentSpec
		old, new schema.Row
	}{
		{"insert", AttachmentSpec{Column: "title"}, nil, one},
		{"update", AttachmentSpec{Column: "title"}, one, other},
		{"unchanged", AttachmentSpec{Column: "title"}, one, one},
		{"unchanged json", AttachmentSpec{Column: "meta", Path: "$.photos[*].id"}, one, one},
		{"insert json", AttachmentSpec{Column: "meta", Path: "$.photos[*].id"}, nil, one},
		{"update json", AttachmentSpec{Column: "meta", Path: "$.photos[*].id"}, one, other},
		{"pattern", AttachmentSpec{Column: "meta", Pattern: "photo-[0-9]+"}, nil, one},
		{"update array", AttachmentSpec{Column: "tags"}, one, other},
	} {
		b.Run(bench.name, func(b *testing.B) {
			bound := c(bench.spec)
			if _, err := bound.Route(nil, bench.old, bench.new); err != nil {
				b.Fatal(err)
			}
			var pairs []Pair
			b.ReportAllocs()
			for b.Loop() {
				pairs = bound.AppendReferences(pairs[:0], bench.old, bench.new, false)
			}
		})
	}
}

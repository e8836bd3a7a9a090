package policies

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/walgate/walgate/schema"
)

func TestBindNamesMissingColumns(t *testing.T) {
	t.Parallel()
	spec := scopedSpec()
	spec.Where, spec.SoftDelete = "row.n4 > 0", "archived"
	c := compileOne(t, everything(), spec)
	_, err := c.Bind([]schema.Column{col("title", tText), col("mood", tEnum)})
	if err == nil || !strings.Contains(err.Error(), "columns archived, feeling, id, n4, owner_id, team_id of public.tasks") {
		t.Errorf("got %v", err)
	}
}

func TestBindRefusesARenamedExcludedColumn(t *testing.T) {
	t.Parallel()
	c := compileOne(t, table(1, "notes", col("id", tInt4), col("secret", tText)), Spec{Columns: ColumnsSpec{Exclude: []string{"secret"}}})
	for _, tc := range []struct {
		cols []schema.Column
		ok   bool
	}{
		{[]schema.Column{col("id", tInt4), col("secret", tText)}, true},
		{[]schema.Column{col("id", tInt4)}, true}, // dropped, or left out of a SELECT list
		{[]schema.Column{col("id", tInt4), col("secret", tText), col("added", tText)}, true},
		{[]schema.Column{col("id", tInt4), col("hidden", tText)}, false},
	} {
		if _, err := c.Bind(tc.cols); (err == nil) != tc.ok {
			t.Errorf("layout %v: %v", tc.cols, err)
		}
	}
	if _, err := c.Bind([]schema.Column{{Name: "id"}}); err == nil {
		t.Error("a column without a type is bound")
	}
}

func TestAppendDocID(t *testing.T) {
	t.Parallel()
	tab := table(1, "words", col("lang", tText), col("n", tInt4), col("x", tText))
	single, composite := *tab, *tab
	composite.Key = []int{1, 0}
	excluded := Spec{Columns: ColumnsSpec{Exclude: []string{"lang", "n"}}}
	r := row(tab, `lang=e"n`, "n=7")
	for want, tab := range map[string]*schema.Table{`e"n`: &single, `["7","e\"n"]`: &composite} {
		got, err := bind(t, compileOne(t, tab, excluded)).AppendDocID([]byte(">"), r)
		if err != nil || string(got) != ">"+want {
			t.Errorf("got %s, %v; want %s", got, err, want)
		}
	}
	b := bind(t, compileOne(t, &composite, Spec{}))
	for name, r := range map[string]schema.Row{"NULL key": row(tab, "n=7"), "short row": r[:2], "no row": nil} {
		if got, err := b.AppendDocID([]byte(">"), r); err == nil || string(got) != ">" {
			t.Errorf("%s: got %s, %v; want an error", name, got, err)
		}
	}
}

func TestAppendDocument(t *testing.T) {
	t.Parallel()
	gen := col("sum", tInt4)
	gen.Generated = true
	tab := table(1, "notes", col("id", tInt8), col("secret", tText), col(`we"ird`, tText), gen, col("ok", tBool))
	b := bind(t, compileOne(t, tab, Spec{Columns: ColumnsSpec{Exclude: []string{"secret"}}, Lossless: true}))
	r := row(tab, "id=9007199254740993", "secret=s", "we\"ird=a\nb", "sum=3")
	got, err := b.AppendDocument([]byte(">"), r)
	if want := `>{"id":"9007199254740993","we\"ird":"a\nb","ok":null}`; err != nil || string(got) != want {
		t.Errorf("got %s, %v; want %s", got, err, want)
	}
	got, err = b.AppendDocument([]byte(">"), row(tab, "id=1", "ok=perhaps"))
	if err == nil || !strings.Contains(err.Error(), "column ok") || string(got) != ">" {
		t.Errorf("got %s, %v; want an error that names the column", got, err)
	}

	// The layout may be a partition's or of another time: columns come in the table's order, then those added since, and
	// generated ones are known by the catalog where the layout can't say.
	plain := gen
	plain.Generated = false
	later, err := b.Collection.Bind([]schema.Column{col("added", tJSON), plain, col("secret", tText), col("id", tInt8)})
	if err != nil {
		t.Fatal(err)
	}
	got, err = later.AppendDocument(nil, schema.Row{[]byte(`{"a": 1}`), []byte("3"), []byte("s"), []byte("1")})
	if want := `{"id":"1","added":{"a": 1}}`; err != nil || string(got) != want {
		t.Errorf("got %s, %v; want %s", got, err, want)
	}
	none := bind(t, compileOne(t, table(2, "bare", col("id", tInt8)), Spec{Columns: ColumnsSpec{Exclude: []string{"id"}}}))
	if got, err := none.AppendDocument(nil, schema.Row{[]byte("1")}); err != nil || string(got) != "{}" {
		t.Errorf("no columns: got %s, %v", got, err)
	}
}

// routeSpec scopes by owner or by team and mood.
func routeSpec() Spec {
	return Spec{Scope: []map[string]string{{"owner_id": "claims.sub"}, {"team_id": "claims.team", "mood": "claims.mood"}}}
}

// TestRoute names scopes by the claims that select them: an upper-case letter is the owner, a lower-case one the team
// and mood.
func TestRoute(t *testing.T) {
	t.Parallel()
	static, softBool, softTime := routeSpec(), routeSpec(), routeSpec()
	static.Where = "row.n4 > 0"
	softBool.SoftDelete, softTime.SoftDelete = "archived", "deleted_at"
	softTime.Where = "row.n4 > 0"
	for _, tc := range []struct {
		name     string
		spec     Spec
		old, new string // column=text, separated by spaces; "-": no row
		want     string
		err      string
	}{
		{"insert", routeSpec(), "-", "owner_id=A team_id=1 mood=sad", "1:u+ A:u+", ""},
		{"insert, nobody's", routeSpec(), "-", "team_id=1", "", ""},
		{"update in place", routeSpec(), "owner_id=A title=x", "owner_id=A title=y", "A:u", ""},
		{"owner changes", routeSpec(), "owner_id=A team_id=1 mood=sad", "owner_id=B team_id=1 mood=sad", "1:u B:u+ A:l", ""},
		{"owner becomes NULL", routeSpec(), "owner_id=A", "id=1", "A:l", ""},
		{"NULL becomes owner", routeSpec(), "id=1", "owner_id=A", "A:u+", ""},
		{"half of a scope changes", routeSpec(), "team_id=1 mood=sad", "team_id=1 mood=happy", "1happy:u+ 1:l", ""},
		{"delete", routeSpec(), "owner_id=A team_id=1 mood=sad", "-", "1:d A:d", ""},
		{"filter turns true", static, "owner_id=A n4=0", "owner_id=A n4=1", "A:u+", ""},
		{"filter turns false", static, "owner_id=A n4=1", "owner_id=A n4=0", "A:l", ""},
		{"filter stays false", static, "owner_id=A n4=0", "owner_id=B n4=-1", "", ""},
		{"filter false, then deleted", static, "owner_id=A n4=0", "-", "", ""},
		{"filter true, then deleted", static, "owner_id=A n4=1", "-", "A:d", ""},
		{"filter fails after", static, "owner_id=A n4=1", "owner_id=A", "A:l", "NULL"},
		{"filter fails before", static, "owner_id=A", "owner_id=A n4=1", "A:u+", "NULL"},
		{"filter fails on both sides", static, "owner_id=A", "owner_id=A title=x", "", "NULL"},
		{"soft delete", softBool, "owner_id=A archived=f", "owner_id=A archived=t", "A:d", ""},
		{"soft delete and move", softBool, "owner_id=A", "owner_id=B archived=t", "A:d", ""},
		{"resurrect", softBool, "owner_id=A archived=t", "owner_id=A archived=f", "A:u+", ""},
		{"soft-deleted, then deleted", softBool, "owner_id=A archived=t", "-", "", ""},
		{"soft-deleted and changed", softBool, "owner_id=A archived=t", "owner_id=B archived=t", "", ""},
		{"soft delete by time", softTime, "owner_id=A n4=1", "owner_id=A n4=1 deleted_at=2026-05-02", "A:d", ""},
		{"soft delete of what the filter hid", softTime, "owner_id=A n4=0", "owner_id=A n4=0 deleted_at=2026-05-02", "", ""},
		{"soft-deleted rows aren't filtered", softTime, "-", "owner_id=A deleted_at=2026-05-02", "", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			c := compileOne(t, everything(), tc.spec)
			names := map[ScopeKey]string{}
			for name, text := range map[string]string{"A": `{"sub":"A"}`, "B": `{"sub":"B"}`, "1": `{"team":1,"mood":"sad"}`, "1happy": `{"team":1,"mood":"happy"}`} {
				names[callerOf(t, c, text).Scopes(c)[0]] = name
			}
			effects, err := bind(t, c).Route(nil, side(c.Table, tc.old), side(c.Table, tc.new))
			var got []string
			for _, e := range effects {
				s := fmt.Sprintf("%s:%c", names[e.Scope], e.Op)
				if e.Entered {
					s += "+"
				}
				got = append(got, s)
			}
			if s := strings.Join(got, " "); s != tc.want {
				t.Errorf("got %s; want %s", s, tc.want)
			}
			if (err == nil) != (tc.err == "") || err != nil && !strings.Contains(err.Error(), tc.err) {
				t.Errorf("error %v; want %q", err, tc.err)
			}
		})
	}
}

func side(tab *schema.Table, text string) schema.Row {
	if text == "-" {
		return nil
	}
	return row(tab, strings.Fields("id=1 "+text)...)
}

func TestRouteOfRowThatDoesNotFit(t *testing.T) {
	t.Parallel()
	b := bind(t, compileOne(t, everything(), routeSpec()))
	whole := row(b.Collection.Table, "owner_id=A")
	effects, err := b.Route(nil, whole, whole[:3])
	if err == nil || len(effects) != 1 || effects[0].Op == Upsert {
		t.Errorf("got %v, %v; want the row to be gone, with an error", effects, err)
	}
}

func TestRouteToEverybody(t *testing.T) {
	t.Parallel()
	c := compileOne(t, everything(), Spec{})
	effects, err := bind(t, c).Route(nil, nil, row(c.Table, "id=1"))
	if err != nil || len(effects) != 1 || effects[0] != (Effect{Scope: c.everyone, Op: Upsert, Entered: true}) {
		t.Errorf("got %v, %v", effects, err)
	}
}

func TestDocumentIsJSON(t *testing.T) {
	t.Parallel()
	tab := everything()
	b := bind(t, compileOne(t, tab, Spec{}))
	got, err := b.AppendDocument(nil, benchmarkRow(tab))
	if err != nil || !json.Valid(got) {
		t.Errorf("got %s, %v", got, err)
	}
}

func benchmarkRow(tab *schema.Table) schema.Row {
	return row(tab, "id=7001", "owner_id=0a0b0c0d-0000-4000-8000-00000000000f", "team_id=12", "archived=f",
		"title=Buy milk and bread on the way home", "n4=42", "d=2026-05-02", "price=10.50", `meta={"a": [1, 2]}`, "mood=sad", "tags={a,b}")
}

func BenchmarkRoute(b *testing.B) {
	for name, spec := range map[string]Spec{
		"scope":       {Scope: []map[string]string{{"owner_id": "claims.sub"}}},
		"two scopes":  routeSpec(),
		"where":       {Scope: []map[string]string{{"owner_id": "claims.sub"}}, Where: "!row.archived && row.n4 < 100"},
		"costed":      {Scope: []map[string]string{{"owner_id": "claims.sub"}}, Where: "row.title.contains('milk')"},
		"soft delete": {Scope: []map[string]string{{"owner_id": "claims.sub"}}, SoftDelete: "deleted_at"},
	} {
		b.Run(name, func(b *testing.B) {
			bound := bind(b, compileOne(b, everything(), spec))
			old, new := benchmarkRow(bound.Collection.Table), benchmarkRow(bound.Collection.Table)
			new[bound.Collection.Table.Column("n4")] = []byte("43")
			var effects []Effect
			b.ReportAllocs()
			for b.Loop() {
				var err error
				if effects, err = bound.Route(effects[:0], old, new); err != nil || len(effects) == 0 {
					b.Fatal(effects, err)
				}
			}
		})
	}
}

func BenchmarkAppendDocument(b *testing.B) {
	bound := bind(b, compileOne(b, everything(), Spec{}))
	r := benchmarkRow(bound.Collection.Table)
	var doc []byte
	b.ReportAllocs()
	for b.Loop() {
		var err error
		if doc, err = bound.AppendDocument(doc[:0], r); err != nil {
			b.Fatal(err)
		}
	}
	b.SetBytes(int64(len(doc)))
}

func BenchmarkJudge(b *testing.B) {
	c := compileOne(b, everything(), Spec{Where: "row.n4 <= claims.level"})
	caller := callerOf(b, c, `{"level":50}`)
	guard := bind(b, c).AppendGuard(nil, nil, benchmarkRow(c.Table))
	b.ReportAllocs()
	for b.Loop() {
		if _, ok, err := c.Judge(Upsert, guard, caller); !ok || err != nil {
			b.Fatal(ok, err)
		}
	}
}

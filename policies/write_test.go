package policies

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/walgate/walgate/schema"
)

func writeTable() *schema.Table {
	tab := everything()
	gen := col("sum", tInt4)
	gen.Generated = true
	tab.Columns = append(tab.Columns, gen)
	return tab
}

func TestCompileNamesFaultsOfWriteRules(t *testing.T) {
	t.Parallel()
	find, all := catalog(writeTable())
	for _, tc := range []struct {
		name string
		spec Spec
		want []string // "path: text in got, want and hint"
	}{
		{"all of it", Spec{Write: &WriteSpec{Roles: []string{"editor"}, Operations: []string{"insert", "delete"}, Columns: []string{"title", "meta"},
			Set: map[string]string{"owner_id": "claims.sub"}, Check: "size(row.title) < 200 && row.owner_id == claims.sub"}, Conflict: "merge", OnDeleted: "delete_wins"}, nil},
		{"nothing said", Spec{Write: &WriteSpec{}}, nil},
		{"function", Spec{Conflict: Function, ConflictFunction: "app.resolve"}, nil},
		{"names", Spec{Conflict: "merg", OnDeleted: "delete_win"}, []string{".conflict: did you mean merge?", ".on_deleted: did you mean delete_wins?"}},
		{"names like nothing", Spec{Conflict: "x", OnDeleted: "y"}, []string{".conflict: {function: schema.name}", ".on_deleted: resurrect_on_update, reject_update, delete_wins"}},
		{"function without a name", Spec{Conflict: Function}, []string{".conflict.function: schema.name"}},
		{"function without a schema", Spec{Conflict: Function, ConflictFunction: "resolve"}, []string{`.conflict.function: "resolve"`}},
		{"empty lists", Spec{Write: &WriteSpec{Roles: []string{}, Operations: []string{}, Columns: []string{}, Set: map[string]string{}}},
			[]string{".write.roles: an empty list", ".write.operations: for all three", ".write.set: no column", ".write.columns: operations without insert"}},
		{"roles", Spec{Write: &WriteSpec{Roles: []string{"a", ""}}}, []string{".write.roles.1: the name of a role"}},
		{"operations", Spec{Write: &WriteSpec{Operations: []string{"upsert", "delte", "insert"}}}, []string{".write.operations.0: name both", ".write.operations.1: did you mean delete?"}},
		{"columns", Spec{SoftDelete: "deleted_at", Write: &WriteSpec{Columns: []string{"titel", "id", "sum", "deleted_at", "owner_id"}, Set: map[string]string{"owner_id": "claims.sub"}}},
			[]string{".write.columns.0: did you mean title?", ".write.columns.1: a key column", ".write.columns.2: a generated column", ".write.columns.3: the soft_delete column", ".write.columns.4: takes from a claim"}},
		{"set", Spec{SoftDelete: "deleted_at", Write: &WriteSpec{Set: map[string]string{"ownerid": "claims.sub", "id": "claims.sub", "sum": "claims.s", "deleted_at": "claims.d", "title": "claim.sub"}}},
			[]string{".write.set.deleted_at: the soft_delete column", ".write.set.id: scope says", ".write.set.ownerid: did you mean owner_id?", ".write.set.sum: a generated column", ".write.set.title: did you mean claims.sub?"}},
		{"check", Spec{Write: &WriteSpec{Check: "row.titel == ''"}}, []string{".write.check: did you mean title?"}},
		{"check gives int", Spec{Write: &WriteSpec{Check: "row.id"}}, []string{".write.check: which gives int"}},
		{"check syntax", Spec{Write: &WriteSpec{Check: "row.id =="}}, []string{".write.check: Syntax error"}},
		{"check of the whole row", Spec{Write: &WriteSpec{Check: "row == claims.row"}}, []string{".write.check: row can't be used as a whole"}},
		{"check generated", Spec{Write: &WriteSpec{Check: "row.sum > 0"}}, []string{".write.check: generated"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			tc.spec.Table = "public.tasks"
			set, faults := Compile(map[string]Spec{"tasks": tc.spec}, find, all)
			if len(faults) != len(tc.want) || (set == nil) != (len(tc.want) > 0) {
				t.Fatalf("faults %+v; want %d", faults, len(tc.want))
			}
			for i, f := range faults {
				path, text, _ := strings.Cut(tc.want[i], ": ")
				if f.Path != "collections.tasks"+path || !strings.Contains(f.Got+"\n"+f.Want+"\n"+f.Hint, text) {
					t.Errorf("fault %+v; want %s", f, tc.want[i])
				}
			}
		})
	}
}

// TestConflictsAreCheckedWithoutATable: a wrong name shows together with a wrong table.
func TestConflictsAreCheckedWithoutATable(t *testing.T) {
	t.Parallel()
	find, all := catalog()
	if _, faults := Compile(map[string]Spec{"tasks": {Table: "none", Conflict: "none"}}, find, all); len(faults) != 2 {
		t.Errorf("faults %+v", faults)
	}
}

func TestWritable(t *testing.T) {
	t.Parallel()
	tab := writeTable()
	tab.Key = []int{0, 6}
	names := func(spec Spec) string {
		c := compileOne(t, tab, spec)
		var out []string
		for _, col := range tab.Columns {
			if c.Writable(col.Name) {
				out = append(out, col.Name)
			}
		}
		if c.Writable("unknown") {
			t.Error("a column that isn't there is writable")
		}
		return strings.Join(out, " ")
	}
	most := "team_id archived n4 u d f price meta mood feeling tags nums boxes odd name package"
	if got := names(Spec{Columns: ColumnsSpec{Exclude: []string{"title"}}, SoftDelete: "deleted_at", Write: &WriteSpec{Set: map[string]string{"owner_id": "claims.sub"}}}); got != most {
		t.Errorf("by default: %s\nwant %s", got, most)
	}
	if got := names(Spec{Columns: ColumnsSpec{Exclude: []string{"title"}}, Write: &WriteSpec{Columns: []string{"title", "n4"}}}); got != "title n4" {
		t.Errorf("as listed: %s", got)
	}
	if got := names(Spec{}); got != "" {
		t.Errorf("without write: %s", got)
	}
	c := compileOne(t, tab, Spec{Columns: ColumnsSpec{Exclude: []string{"title"}}, SoftDelete: "archived"})
	if c.Shown("title") || c.Shown("sum") || c.Shown("unknown") || !c.Shown("id") || !c.Shown("archived") {
		t.Error("Shown is not what documents have")
	}
	if name, boolean := c.SoftDelete(); name != "archived" || !boolean {
		t.Errorf("soft delete by %s, %v", name, boolean)
	}
	if name, boolean := compileOne(t, tab, Spec{SoftDelete: "deleted_at"}).SoftDelete(); name != "deleted_at" || boolean {
		t.Errorf("soft delete by %s, %v", name, boolean)
	}
	if name, _ := compileOne(t, tab, Spec{}).SoftDelete(); name != "" {
		t.Errorf("soft delete by %s", name)
	}
}

func TestMayWrite(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		write *WriteSpec
		roles []string
		want  string // operations
	}{
		{nil, []string{"editor"}, ""},
		{&WriteSpec{}, nil, "insert update upsert delete"},
		{&WriteSpec{Roles: []string{"editor", "admin"}}, nil, ""},
		{&WriteSpec{Roles: []string{"editor", "admin"}}, []string{"reader", "Editor"}, ""},
		{&WriteSpec{Roles: []string{"editor", "admin"}}, []string{"reader", "admin"}, "insert update upsert delete"},
		{&WriteSpec{Operations: []string{"insert"}}, nil, "insert upsert"},
		{&WriteSpec{Operations: []string{"update"}}, nil, "update upsert"},
		{&WriteSpec{Operations: []string{"delete"}}, nil, "delete"},
		{&WriteSpec{Operations: []string{"delete"}, Roles: []string{"editor"}}, []string{"reader"}, ""},
	} {
		c := compileOne(t, everything(), Spec{Write: tc.write})
		caller := callerOf(t, c, `{}`, tc.roles...)
		var got []string
		for _, op := range []Operation{PushInsert, PushUpdate, PushUpsert, PushDelete, "truncate"} {
			if c.MayWrite(caller, op) {
				got = append(got, string(op))
			}
			if c.MayWrite(nil, op) {
				t.Errorf("nobody may %s", op)
			}
		}
		if strings.Join(got, " ") != tc.want {
			t.Errorf("%+v with roles %v: may %v, want %s", tc.write, tc.roles, got, tc.want)
		}
	}
}

func TestInsertValues(t *testing.T) {
	t.Parallel()
	c := compileOne(t, everything(), Spec{Write: &WriteSpec{Set: map[string]string{"owner_id": "claims.sub", "team_id": "claims.org.id", "meta": "claims.org", "tags": "claims.tags"}}})
	full := `{"sub":"a\"<b","org":{"id":9007199254740993,"x":null},"tags":["x",null],"other":1}`
	got, err := c.InsertValues(callerOf(t, c, full))
	texts := map[string]string{}
	for name, value := range got {
		texts[name] = string(value)
	}
	if want := `map[meta:{"id":9007199254740993,"x":null} owner_id:"a\"\u003cb" tags:["x",null] team_id:9007199254740993]`; err != nil || fmt.Sprint(texts) != want {
		t.Errorf("got %v, %v; want %s", texts, err, want)
	}
	if got := string(callerOf(t, c, full).ClaimsJSON()); got != `{"org":{"id":9007199254740993,"x":null},"other":1,"sub":"a\"\u003cb","tags":["x",null]}` {
		t.Errorf("all claims: %s", got)
	}
	for _, claims := range []string{`{}`, `{"sub":"a","org":{"id":1}}`, `{"sub":null,"org":{"id":1},"tags":[]}`, `{"sub":"a","org":{},"tags":[]}`, `{"sub":"a","org":7,"tags":[]}`,
		`{"sub":["a"],"org":{"id":1},"tags":[]}`, `{"sub":"a","org":{"id":{"x":1}},"tags":[]}`} {
		if got, err := c.InsertValues(callerOf(t, c, claims)); !errors.Is(err, ErrClaimMissing) || got != nil {
			t.Errorf("%s: got %s, %v", claims, got, err)
		}
	}
	none := compileOne(t, everything(), Spec{Write: &WriteSpec{}})
	if got, err := none.InsertValues(callerOf(t, none, `{}`)); err != nil || len(got) > 0 {
		t.Errorf("without set: %v, %v", got, err)
	}
}

func TestInScope(t *testing.T) {
	t.Parallel()
	spec := scopedSpec()
	spec.Where, spec.SoftDelete, spec.Write = "row.n4 > 0", "deleted_at", &WriteSpec{Roles: []string{"writer"}}
	spec.Read.Roles = []string{"reader"}
	c := compileOne(t, everything(), spec)
	b := bind(t, c)
	inside, outside := row(c.Table, "id=1", "owner_id=ana", "team_id=1"), row(c.Table, "id=1", "owner_id=bob", "team_id=1")
	deleted := row(c.Table, "id=1", "owner_id=ana", "team_id=1", "deleted_at=2026-05-02")
	const claims = `{"sub":"ana","teams":[1],"t":1,"all":[7]}`
	for _, roles := range []string{"reader", "writer"} {
		caller := callerOf(t, c, claims, roles)
		if !b.InScope(inside, caller) || !b.InScope(deleted, caller) {
			t.Errorf("a %s's own row is out of scope", roles)
		}
		if b.InScope(outside, caller) || b.InScope(nil, caller) || b.InScope(inside[:2], caller) {
			t.Errorf("a row that isn't the %s's is in scope", roles)
		}
	}
	stranger := callerOf(t, c, claims)
	if b.InScope(inside, stranger) || b.InScope(inside, nil) || b.InScope(inside, callerOf(t, compileOne(t, everything(), spec), claims, "reader")) {
		t.Error("who may neither read nor write has a row in scope")
	}
	writer := callerOf(t, c, claims, "writer")
	if predicate, _ := writer.ScopeSQL(c, 1); len(writer.Scopes(c)) > 0 || predicate != "false" {
		t.Error("who may only write reads")
	}
	if saw, _ := b.Sees(row(c.Table, "id=1", "owner_id=ana", "team_id=1", "n4=1"), writer); saw {
		t.Error("who may only write sees a row")
	}
	open := compileOne(t, everything(), Spec{Write: &WriteSpec{}})
	if !bind(t, open).InScope(inside, callerOf(t, open, `{}`)) {
		t.Error("a collection without scope has rows out of scope")
	}
}

func TestChecks(t *testing.T) {
	t.Parallel()
	tab := everything()
	c := compileOne(t, tab, Spec{Write: &WriteSpec{Check: "size(row.title) < 5 && row.owner_id == claims.sub"}})
	b := bind(t, c)
	caller := callerOf(t, c, `{"sub":"ana"}`)
	for _, tc := range []struct {
		row    schema.Row
		caller *Caller
		want   bool
		err    string
	}{
		{row(tab, "title=abcd", "owner_id=ana"), caller, true, ""},
		{row(tab, "title=abcde", "owner_id=ana"), caller, false, ""},
		{row(tab, "title=abcd", "owner_id=bob"), caller, false, ""},
		{row(tab, "owner_id=ana"), caller, false, "meets NULL"},
		{row(tab, "title=abcd", "owner_id=ana"), callerOf(t, c, `{}`), false, "claim is missing"},
		{row(tab, "title=abcd")[:3], caller, false, "its layout has"},
	} {
		got, err := b.Checks(tc.row, tc.caller)
		if got != tc.want || (err == nil) != (tc.err == "") || err != nil && !strings.Contains(err.Error(), tc.err) {
			t.Errorf("%s: got %v, %v", tc.row, got, err)
		}
	}
	if ok, err := bind(t, compileOne(t, tab, Spec{Write: &WriteSpec{}})).Checks(nil, caller); !ok || err != nil {
		t.Errorf("without a check: %v, %v", ok, err)
	}
	// A column that rows lost refuses writes, and stops no reading.
	lost := slices.DeleteFunc(slices.Clone(tab.Columns), func(c schema.Column) bool { return c.Name == "title" })
	b, err := c.Bind(lost)
	if err != nil {
		t.Fatal(err)
	}
	if ok, err := b.Checks(make(schema.Row, len(lost)), caller); ok || err == nil {
		t.Errorf("without a column: %v, %v", ok, err)
	}
}

// TestWriteRulesChangeNothingForReaders: neither fingerprint nor scope hash know them, so that nobody resynchronises.
func TestWriteRulesChangeNothingForReaders(t *testing.T) {
	t.Parallel()
	plain := compileOne(t, everything(), scopedSpec())
	spec := scopedSpec()
	spec.Conflict, spec.OnDeleted = Merge, DeleteWins
	spec.Write = &WriteSpec{Roles: []string{"w"}, Set: map[string]string{"title": "claims.x"}, Check: "claims.y == 1", Operations: []string{"insert"}, Columns: []string{"n4"}}
	writes := compileOne(t, everything(), spec)
	if writes.Fingerprint != plain.Fingerprint {
		t.Error("the fingerprint changes")
	}
	const claims = `{"sub":"ana","x":1,"y":1}`
	if callerOf(t, writes, claims, "w").ScopeHash != callerOf(t, plain, claims, "w").ScopeHash {
		t.Error("the scope hash changes")
	}
}

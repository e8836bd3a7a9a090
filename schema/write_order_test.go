package schema

import (
	"slices"
	"testing"
)

func TestForeignKeys(t *testing.T) {
	t.Parallel()
	_, conn := database(t, `CREATE TABLE parent (a int, "B" text, PRIMARY KEY (a, "B")); CREATE TABLE child (id int PRIMARY KEY, pb text, pa int) PARTITION BY RANGE (id)`,
		`CREATE TABLE child_1 PARTITION OF child FOR VALUES FROM (0) TO (9)`)
	before := loadTables(t, conn, "public.child").Tables[0].Shape()
	mustExec(t, conn, `ALTER TABLE child ADD CONSTRAINT fk FOREIGN KEY (pa, pb) REFERENCES parent (a, "B") DEFERRABLE`)
	c := loadTables(t, conn, "public.child", "public.parent")
	child := c.Table("public", "child")
	if len(child.ForeignKeys) != 1 {
		t.Fatalf("%+v", child.ForeignKeys)
	}
	fk := child.ForeignKeys[0]
	if fk.Name != "fk" || fk.Parent != c.Table("public", "parent").OID || !fk.Deferrable || !slices.Equal(fk.Columns, []string{"pa", "pb"}) || !slices.Equal(fk.ParentColumns, []string{"a", "B"}) {
		t.Errorf("%+v", fk)
	}
	if child.Shape() != before {
		t.Error("a foreign key changed the shape")
	}
}

func TestOrderChanges(t *testing.T) {
	t.Parallel()
	column := func(name string) Column { return Column{Name: name, Type: builtin[23]} }
	list := &Table{OID: 1, Columns: []Column{column("id"), column("up"), column("v")}, Key: []int{0}}
	item := &Table{OID: 2, Columns: []Column{column("id"), column("list")}, Key: []int{0}, ForeignKeys: []ForeignKey{{Columns: []string{"list"}, Parent: 1, ParentColumns: []string{"id"}}}}
	list.ForeignKeys = []ForeignKey{{Columns: []string{"up"}, Parent: 1, ParentColumns: []string{"id"}}}
	row := func(values ...string) (r Row) {
		for _, v := range values {
			r = append(r, []byte(v))
		}
		return r
	}
	change := func(t *Table, kind WriteKind, key, data string, row Row) Change {
		return Change{Table: t, Kind: kind, Key: []string{key}, Data: []byte(data), Row: row}
	}
	for name, c := range map[string]struct {
		changes []Change
		want    []int
	}{
		"unlinked": {[]Change{change(item, Insert, "1", `{"list":5}`, nil), change(list, Insert, "6", ``, nil)}, []int{0, 1}},
		"parent's insert moves ahead": {[]Change{change(item, Insert, "1", `{"list":5}`, nil), change(item, Insert, "2", `{"list":6}`, nil),
			change(list, Insert, "5", ``, nil)}, []int{2, 0, 1}},
		"child's update": {[]Change{change(item, Update, "1", `{"list":"5"}`, row("1", "4")), change(list, Insert, "5", ``, nil)}, []int{1, 0}},
		"child's delete moves ahead": {[]Change{change(list, Delete, "5", ``, row("5", "0", "0")), change(item, Insert, "9", `{}`, nil),
			change(item, Delete, "1", ``, row("1", "5"))}, []int{2, 0, 1}},
		"child moves away": {[]Change{change(list, Delete, "5", ``, row("5", "0", "0")), change(item, Update, "1", `{"list":6}`, row("1", "5"))}, []int{1, 0}},
		"one document": {[]Change{change(item, Insert, "1", `{"list":5}`, nil), change(item, Update, "1", `{}`, nil), change(list, Insert, "5", `{}`, nil),
			change(item, Delete, "1", ``, nil)}, []int{2, 0, 1, 3}},
		"a circle":  {[]Change{change(list, Insert, "1", `{"up":2}`, nil), change(list, Insert, "2", `{"up":3}`, nil), change(list, Insert, "3", `{"up":1}`, nil)}, []int{0, 1, 2}},
		"to itself": {[]Change{change(list, Insert, "1", `{"up":1}`, nil)}, []int{0}},
		"a chain":   {[]Change{change(list, Insert, "1", `{"up":2}`, nil), change(list, Insert, "2", `{"up":3}`, nil), change(list, Insert, "3", ``, nil)}, []int{2, 1, 0}},
		"null":      {[]Change{change(item, Insert, "1", `{"list":null}`, nil), {Table: list, Kind: Insert}}, []int{0, 1}},
	} {
		if got := OrderChanges(c.changes); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}

func FuzzParseDocID(f *testing.F) {
	one := &Table{Columns: make([]Column, 3), Key: []int{1}}
	two := &Table{Columns: make([]Column, 3), Key: []int{2, 0}}
	for _, s := range []string{"", "7", `["7","en"]`, `["\u00e9","\ud83d\ude00"]`, ` [ "a" , "b" ] `, `["a"]`, `["a",1]`, `["a","\u0000"]`, `["a","\ud800"]`, `["a","b"] x`, "[", "\xff", "a\x00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if key, err := ParseDocID(one, text); err == nil && (len(key) != 1 || key[0] != text) {
			t.Fatalf("%q became %q", text, key)
		}
		key, err := ParseDocID(two, text)
		if err != nil {
			return
		}
		again, err := ParseDocID(two, string(AppendDocID(nil, key)))
		if err != nil || len(key) != 2 || !slices.Equal(key, again) {
			t.Fatalf("%q became %q, and that %q (%v)", text, key, again, err)
		}
	})
}

func TestParseDocID(t *testing.T) {
	t.Parallel()
	two := &Table{Columns: make([]Column, 3), Key: []int{2, 0}}
	for text, want := range map[string][]string{`["7","en"]`: {"7", "en"}, `["\u00e9","\ud83d\ude00"]`: {"é", "😀"}, ` ["a" , "b"]`: {"a", "b"},
		`["a"]`: nil, `["a","b","c"]`: nil, `["a",1]`: nil, `["a",null]`: nil, `["a","\u0000"]`: nil, `["a","\ud800"]`: nil, `["a","b"]x`: nil, `a`: nil, ``: nil, "[\"a\",\"\xff\"]": nil} {
		key, err := ParseDocID(two, text)
		if !slices.Equal(key, want) || (err != nil) != (want == nil) {
			t.Errorf("%q: %q %v", text, key, err)
		}
	}
}

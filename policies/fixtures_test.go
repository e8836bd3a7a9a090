package policies

import (
	"encoding/json"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/walgate/walgate/schema"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	tText   = &schema.Type{OID: oidText, Name: "text"}
	tInt4   = &schema.Type{OID: oidInt4, Name: "integer", Kind: schema.KindNumber}
	tInt8   = &schema.Type{OID: oidInt8, Name: "bigint", Kind: schema.KindBigNumber}
	tInt2   = &schema.Type{OID: oidInt2, Name: "smallint", Kind: schema.KindNumber}
	tBool   = &schema.Type{OID: oidBool, Name: "boolean", Kind: schema.KindBool}
	tUUID   = &schema.Type{OID: oidUUID, Name: "uuid"}
	tDate   = &schema.Type{OID: oidDate, Name: "date", Kind: schema.KindDate}
	tTime   = &schema.Type{OID: oidTimestampTZ, Name: "timestamp with time zone", Kind: schema.KindTimestampTZ}
	tFloat  = &schema.Type{OID: oidFloat8, Name: "double precision", Kind: schema.KindNumber}
	tNum    = &schema.Type{OID: 1700, Name: "numeric", Kind: schema.KindBigNumber}
	tJSON   = &schema.Type{OID: 3802, Name: "jsonb", Kind: schema.KindJSON}
	tEnum   = &schema.Type{OID: 90001, Name: "mood", Labels: []string{"happy", "sad"}}
	tDomain = &schema.Type{OID: 90002, Name: "feeling", Base: tEnum}
	tTexts  = &schema.Type{OID: 1009, Name: "text[]", Kind: schema.KindArray, Elem: tText, Delim: ','}
	tInts   = &schema.Type{OID: 1016, Name: "bigint[]", Kind: schema.KindArray, Elem: tInt8, Delim: ','}
	tBox    = &schema.Type{OID: 1020, Name: "box[]", Kind: schema.KindArray, Elem: &schema.Type{OID: 603, Name: "box"}, Delim: ';'}
)

// table makes a permanent table from "name" and type pairs; the first column is the key.
func table(oid uint32, name string, cols ...schema.Column) *schema.Table {
	for i := range cols {
		cols[i].Num = int16(i + 1)
	}
	return &schema.Table{OID: oid, Schema: "public", Name: name, Kind: 'r', Persistence: 'p', Columns: cols, Key: []int{0}, Identity: 'f'}
}

func col(name string, t *schema.Type) schema.Column {
	return schema.Column{Name: name, Type: t, Deterministic: true}
}

// everything is a table with a column of each kind.
func everything() *schema.Table {
	return table(100, "tasks", col("id", tInt8), col("owner_id", tText), col("team_id", tInt8), col("archived", tBool),
		col("deleted_at", tTime), col("title", tText), col("n2", tInt2), col("n4", tInt4), col("u", tUUID), col("d", tDate),
		col("f", tFloat), col("price", tNum), col("meta", tJSON), col("mood", tEnum), col("feeling", tDomain), col("tags", tTexts),
		col("nums", tInts), col("boxes", tBox), col("odd name", tText), col("package", tText))
}

func catalog(tables ...*schema.Table) (func(string, string) *schema.Table, []string) {
	var all []string
	for _, t := range tables {
		all = append(all, t.String())
	}
	return func(namespace, name string) *schema.Table {
		for _, t := range tables {
			if t.Schema == namespace && t.Name == name {
				return t
			}
		}
		return nil
	}, all
}

func compileAll(t testing.TB, specs map[string]Spec, tables ...*schema.Table) *Set {
	t.Helper()
	find, all := catalog(tables...)
	set, faults := Compile(specs, find, all)
	for _, f := range faults {
		t.Errorf("unexpected fault %+v", f)
	}
	if set == nil {
		t.FailNow()
	}
	return set
}

func compileOne(t testing.TB, tab *schema.Table, spec Spec) *Collection {
	t.Helper()
	spec.Table = tab.String()
	return compileAll(t, map[string]Spec{"tasks": spec}, tab).ByName("tasks")
}

func bind(t testing.TB, c *Collection) *Binding {
	t.Helper()
	b, err := c.Bind(c.Table.Columns)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// row makes a row of the table from column=text pairs; other columns are NULL.
func row(tab *schema.Table, pairs ...string) schema.Row {
	r := make(schema.Row, len(tab.Columns))
	for _, p := range pairs {
		name, text, _ := strings.Cut(p, "=")
		r[tab.Column(name)] = []byte(text)
	}
	return r
}

func claims(t testing.TB, text string) map[string]any {
	t.Helper()
	d := json.NewDecoder(strings.NewReader(text))
	d.UseNumber()
	var m map[string]any
	if err := d.Decode(&m); err != nil {
		t.Fatal(err)
	}
	return m
}

func setOf(c *Collection) *Set {
	s := &Set{Collections: []*Collection{c}}
	s.collectNames()
	return s
}

func callerOf(t testing.TB, c *Collection, claimText string, roles ...string) *Caller {
	t.Helper()
	caller, err := setOf(c).NewCaller("sub", roles, claims(t, claimText))
	if err != nil {
		t.Fatal(err)
	}
	return caller
}

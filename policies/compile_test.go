package policies

import (
	"strings"
	"testing"
	"time"

	"github.com/walgate/walgate/schema"
)

func TestCompileNamesEveryFault(t *testing.T) {
	t.Parallel()
	gen := col("sum", tInt4)
	gen.Generated = true
	loose := col("nick", tText)
	loose.Deterministic = false
	toast := col("body", tText)
	toast.Toastable = true
	virtual := gen
	virtual.Name, virtual.Virtual = "twice", true
	full := everything()
	full.Columns = append(full.Columns, gen, loose, col("a.b", tText))
	like := func(oid uint32, name string, change func(*schema.Table)) *schema.Table {
		tab := table(oid, name, col("id", tInt4), col("owner", tText))
		change(tab)
		return tab
	}
	tables := []*schema.Table{
		full,
		like(1, "view", func(t *schema.Table) { t.Kind = 'v' }),
		like(2, "matview", func(t *schema.Table) { t.Kind = 'm' }),
		like(3, "foreign", func(t *schema.Table) { t.Kind = 'f' }),
		like(4, "sequence", func(t *schema.Table) { t.Kind = 'S' }),
		like(5, "unlogged", func(t *schema.Table) { t.Persistence = 'u' }),
		like(6, "temporary", func(t *schema.Table) { t.Persistence = 't' }),
		like(7, "part", func(t *schema.Table) { t.Partition = true }),
		like(8, "keyless", func(t *schema.Table) { t.Key = nil }),
		like(9, "genkey", func(t *schema.Table) { t.Columns[0].Generated = true }),
		like(10, "virtual", func(t *schema.Table) { t.Columns = append(t.Columns, virtual) }),
		like(11, "toast", func(t *schema.Table) { t.Columns = append(t.Columns, toast) }),
	}
	for _, tc := range []struct {
		name string
		spec Spec
		path string // after collections.tasks; "-" for none
		want string // within got, want and hint
	}{
		{"no table", Spec{}, ".table", "a table of the database"},
		{"unknown table", Spec{Table: "public.taks"}, ".table", "did you mean public.tasks?"},
		{"unknown bare table", Spec{Table: "task"}, ".table", "did you mean public.tasks?"},
		{"view", Spec{Table: "view"}, ".table", "a view"},
		{"materialised view", Spec{Table: "matview"}, ".table", "a materialised view"},
		{"foreign table", Spec{Table: "foreign"}, ".table", "a foreign table"},
		{"sequence", Spec{Table: "sequence"}, ".table", "kind 'S'"},
		{"unlogged", Spec{Table: "unlogged"}, ".table", "SET LOGGED"},
		{"temporary", Spec{Table: "temporary"}, ".table", "temporary"},
		{"partition", Spec{Table: "part"}, ".table", "at its root"},
		{"no key", Spec{Table: "keyless"}, ".table", "no primary key"},
		{"generated key", Spec{Table: "genkey"}, ".table", "key column id is generated"},
		{"exclude", Spec{Columns: ColumnsSpec{Exclude: []string{"title", "tite"}}}, ".columns.exclude.1", "did you mean title?"},
		{"excluded key and scope column", Spec{Columns: ColumnsSpec{Exclude: []string{"id", "owner_id"}}, Scope: []map[string]string{{"owner_id": "claims.sub"}}}, "-", ""},
		{"scope column", Spec{Scope: []map[string]string{{"ownerid": "claims.sub"}}}, ".scope.ownerid", "did you mean owner_id?"},
		{"scope in a list", Spec{Scope: []map[string]string{{"owner_id": "claims.sub"}, {"teamid": "claims.t"}}}, ".scope.1.teamid", "did you mean team_id?"},
		{"scope claim", Spec{Scope: []map[string]string{{"owner_id": "claim.sub"}}}, ".scope.owner_id", "did you mean claims.sub?"},
		{"scope constant", Spec{Scope: []map[string]string{{"owner_id": "'ana'"}}}, ".scope.owner_id", "claims.NAME"},
		{"nested claim", Spec{Scope: []map[string]string{{"owner_id": "claims.org.user-id"}}}, "-", ""},
		{"scope numeric", Spec{Scope: []map[string]string{{"price": "claims.p"}}}, ".scope.price", "a numeric"},
		{"scope float", Spec{Scope: []map[string]string{{"f": "claims.p"}}}, ".scope.f", "a double precision"},
		{"scope timestamp", Spec{Scope: []map[string]string{{"deleted_at": "claims.p"}}}, ".scope.deleted_at", "column of type"},
		{"scope array", Spec{Scope: []map[string]string{{"tags": "claims.p"}}}, ".scope.tags", "column of type"},
		{"scope collation", Spec{Scope: []map[string]string{{"nick": "claims.p"}}}, ".scope.nick", "not deterministic"},
		{"scope generated", Spec{Scope: []map[string]string{{"sum": "claims.p"}}}, ".scope.sum", "generated"},
		{"scope of domain over enum", Spec{Scope: []map[string]string{{"feeling": "claims.p"}}}, "-", ""},
		{"scope without columns", Spec{Scope: []map[string]string{{}}}, ".scope", "at least one column"},
		{"scope list without alternatives", Spec{Scope: []map[string]string{}}, ".scope", "at least one alternative"},
		{"where syntax", Spec{Where: "row.id =="}, ".where", "Syntax error"},
		{"where type", Spec{Where: "row.id == 'x'"}, ".where", "applied to '(int, string)'"},
		{"where gives int", Spec{Where: "row.id"}, ".where", "which gives int"},
		{"where gives dyn", Spec{Where: "claims.admin"}, ".where", "== true"},
		{"where column", Spec{Where: "!row.archivd"}, ".where", "did you mean archived?"},
		{"where generated", Spec{Where: "row.sum > 1"}, ".where", "generated"},
		{"where dotted column", Spec{Where: "row.`a.b` == ''"}, ".where", "without a dot"},
		{"where whole row", Spec{Where: "row != null"}, ".where", "row can't be used as a whole"},
		{"where row by index", Spec{Where: "row['id'] == 7"}, ".where", "row.COLUMN"},
		{"where has column", Spec{Where: "has(row.id)"}, ".where", "row.id != null"},
		{"where whole claims", Spec{Where: "size(claims) > 0"}, ".where", "constant names"},
		{"where computed claim", Spec{Where: "claims[row.title] == 1"}, ".where", "constant names"},
		{"where claims handed on", Spec{Where: "[claims].exists(c, c.admin)"}, ".where", "constant names"},
		{"where clock", Spec{Where: "now() > timestamp(row.deleted_at)"}, ".where", "undeclared reference to 'now'"},
		{"where other variable", Spec{Where: "old.id == 1"}, ".where", "undeclared reference to 'old'"},
		{"soft delete column", Spec{SoftDelete: "deleted"}, ".soft_delete", "did you mean deleted_at?"},
		{"soft delete type", Spec{SoftDelete: "title"}, ".soft_delete", "a text"},
		{"soft delete generated", Spec{SoftDelete: "sum"}, ".soft_delete", "bool"},
		{"identity", Spec{ReplicaIdentity: "index"}, ".replica_identity", `"full" or "default"`},
		{"identity with virtual column", Spec{Table: "virtual"}, ".replica_identity", "virtual generated column twice"},
		{"default identity with virtual column", Spec{Table: "virtual", ReplicaIdentity: "default"}, "-", ""},
		{"default identity, scope outside", Spec{Table: "virtual", ReplicaIdentity: "default", Scope: []map[string]string{{"owner": "claims.sub"}}}, ".replica_identity", "scope column owner"},
		{"default identity, where outside", Spec{Table: "virtual", ReplicaIdentity: "default", Where: "row.owner == ''"}, ".replica_identity", "where column owner"},
		{"default identity, scope inside", Spec{Table: "virtual", ReplicaIdentity: "default", Scope: []map[string]string{{"id": "claims.sub"}}}, "-", ""},
		{"default identity, soft delete outside", Spec{ReplicaIdentity: "default", SoftDelete: "archived"}, ".replica_identity", "soft_delete column archived"},
		{"default identity, toast", Spec{Table: "toast", ReplicaIdentity: "default"}, ".replica_identity", "column body"},
		{"retention", Spec{Retention: -time.Hour}, ".retention", "-1h"},
		{"empty role", Spec{Read: ReadSpec{Roles: []string{"a", ""}}}, ".read.roles.1", "an empty role"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			if tc.spec.Table == "" && tc.name != "no table" {
				tc.spec.Table = "public.tasks"
			}
			find, all := catalog(tables...)
			set, faults := Compile(map[string]Spec{"tasks": tc.spec}, find, all)
			if tc.path == "-" {
				if set == nil || len(faults) > 0 {
					t.Fatalf("faults %+v; want none", faults)
				}
				return
			}
			if set != nil || len(faults) != 1 {
				t.Fatalf("set %v, faults %+v; want one fault", set, faults)
			}
			f := faults[0]
			if f.Path != "collections.tasks"+tc.path || !strings.Contains(strings.Join([]string{f.Got, f.Want, f.Hint}, "\n"), tc.want) {
				t.Errorf("fault %+v; want %q at %q", f, tc.want, tc.path)
			}
		})
	}
}

func TestCompileReportsAllFaultsAtOnce(t *testing.T) {
	t.Parallel()
	find, all := catalog(everything())
	_, faults := Compile(map[string]Spec{
		"1st":  {Table: "tasks"},
		"b":    {Table: "tasks", Where: "row.x && row.y", SoftDelete: "z", Retention: -1, Scope: []map[string]string{{"q": "sub"}}},
		"none": {Table: "nothing_like_it", ReplicaIdentity: "full"},
	}, find, all)
	var paths []string
	for _, f := range faults {
		paths = append(paths, strings.TrimPrefix(f.Path, "collections."))
	}
	want := "1st b.retention b.soft_delete b.scope.q b.scope.q b.where b.where b.table none.table"
	if got := strings.Join(paths, " "); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestCompileFindsCollections(t *testing.T) {
	t.Parallel()
	parted := table(50, "parted", col("id", tInt4))
	parted.Kind = 'p'
	parted.Leaves = []schema.Leaf{{OID: 51}, {OID: 52}}
	set := compileAll(t, map[string]Spec{"zz": {Table: "tasks", Retention: time.Hour}, "aa": {Table: "public.parted"}}, everything(), parted)
	aa, zz := set.Collections[0], set.Collections[1]
	if aa.Name != "aa" || set.ByName("aa") != aa || set.ByName("zz") != zz || set.ByName("a") != nil {
		t.Error("ByName finds other collections than those compiled")
	}
	if set.ByTable(50) != aa || set.ByTable(52) != aa || set.ByTable(100) != zz || set.ByTable(1) != nil {
		t.Error("ByTable finds other collections than those compiled")
	}
	if aa.Retention != 30*24*time.Hour || zz.Retention != time.Hour {
		t.Errorf("retentions %v and %v", aa.Retention, zz.Retention)
	}
}

func TestFingerprint(t *testing.T) {
	t.Parallel()
	base := Spec{Scope: []map[string]string{{"owner_id": "claims.sub", "team_id": "claims.t"}, {"team_id": "claims.all"}},
		Read: ReadSpec{Roles: []string{"a", "b"}}, Where: "!row.archived"}
	print := func(tab *schema.Table, change func(*Spec)) string {
		s := base
		change(&s)
		return compileOne(t, tab, s).Fingerprint
	}
	first := print(everything(), func(*Spec) {})
	for name, change := range map[string]func(*Spec){
		"nothing":               func(*Spec) {},
		"order of alternatives": func(s *Spec) { s.Scope = []map[string]string{base.Scope[1], base.Scope[0], base.Scope[1]} },
		"order of roles":        func(s *Spec) { s.Read.Roles = []string{"b", "a", "b"} },
		"retention":             func(s *Spec) { s.Retention = time.Hour },
	} {
		if got := print(everything(), change); got != first {
			t.Errorf("%s changes the fingerprint", name)
		}
	}
	more := everything()
	more.Columns = append(more.Columns, schema.Column{Name: "added_later", Num: 99, Type: tJSON})
	if print(more, func(*Spec) {}) != first {
		t.Error("a column that the table gained changes the fingerprint; its shape says so already")
	}
	seen := map[string]string{first: "the base"}
	for name, change := range map[string]func(*Spec){
		"scope":       func(s *Spec) { s.Scope = s.Scope[:1] },
		"claim":       func(s *Spec) { s.Scope = []map[string]string{base.Scope[0], {"team_id": "claims.other"}} },
		"no scope":    func(s *Spec) { s.Scope = nil },
		"where":       func(s *Spec) { s.Where = "row.archived" },
		"roles":       func(s *Spec) { s.Read.Roles = []string{"a"} },
		"soft delete": func(s *Spec) { s.SoftDelete = "deleted_at" },
		"lossless":    func(s *Spec) { s.Lossless = true },
		"exclude":     func(s *Spec) { s.Columns.Exclude = []string{"title"} },
	} {
		got := print(everything(), change)
		if other, ok := seen[got]; ok {
			t.Errorf("%s has the fingerprint of %s", name, other)
		}
		seen[got] = name
	}
	for name, change := range map[string]func(*schema.Table){
		"table": func(t *schema.Table) { t.Name = "tasks2" },
		"key":   func(t *schema.Table) { t.Key = []int{0, 1} },
	} {
		tab := everything()
		change(tab)
		got := print(tab, func(*Spec) {})
		if other, ok := seen[got]; ok {
			t.Errorf("%s has the fingerprint of %s", name, other)
		}
		seen[got] = name
	}
}

func TestNearest(t *testing.T) {
	t.Parallel()
	among := []string{"owner_id", "team_id", "title", "archived"}
	for got, want := range map[string]string{
		"ownerid": "owner_id", "Title": "title", "tilte": "title", "archive": "archived", "created_at": "", "": "", "taem_id": "team_id",
	} {
		if near := Nearest(got, among); near != want {
			t.Errorf("Nearest(%q) = %q, want %q", got, near, want)
		}
	}
	if near := Nearest("x", nil); near != "" {
		t.Errorf("Nearest among none = %q", near)
	}
}

func FuzzCompileWhere(f *testing.F) {
	for _, s := range []string{"!row.archived", "row.id == claims.sub", "has(claims.a.b)", "row.meta.x[0] in row.tags", "`", "row.`odd name`",
		"[1,2].map(x, x * row.id).exists(row, row == 1)", "claims['a'] == claims.a", "\"\\u00ff\" == row.title", "{row.title: claims.x}"} {
		f.Add(s)
	}
	tab := everything()
	find, all := catalog(tab)
	r := row(tab, "id=1", "title=t", `meta={"x":[1]}`, "tags={a}", "archived=t")
	f.Fuzz(func(t *testing.T, where string) {
		set, faults := Compile(map[string]Spec{"c": {Table: "tasks", Where: where}}, find, all)
		if (set == nil) != (len(faults) > 0) {
			t.Fatalf("%q: set %v with faults %v", where, set, faults)
		}
		if set == nil {
			return
		}
		caller, err := set.NewCaller("s", nil, map[string]any{"sub": "s"})
		if err != nil {
			t.Fatal(err)
		}
		c := set.Collections[0]
		b, err := c.Bind(tab.Columns)
		if err != nil {
			t.Fatal(err)
		}
		saw, err := b.Sees(r, caller)
		if saw && err != nil {
			t.Fatalf("%q: visible with error %v", where, err)
		}
		op, ok, err := c.Judge(Upsert, b.AppendGuard(nil, nil, r), caller)
		if c.HasGuard() && (ok != saw || op == Upsert && ok && err != nil) {
			t.Fatalf("%q: Judge says %c %v (%v), Sees says %v", where, op, ok, err, saw)
		}
	})
}

package policies

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/walgate/walgate/schema"
)

var (
	tVarchar = &schema.Type{OID: oidVarchar, Name: "character varying"}
	tUUIDs   = &schema.Type{OID: 2951, Name: "uuid[]", Kind: schema.KindArray, Elem: tUUID, Delim: ','}
	tPlain   = &schema.Type{OID: 114, Name: "json", Kind: schema.KindJSON}
	tNick    = &schema.Type{OID: 90003, Name: "nick", Base: tVarchar}
	tNicks   = &schema.Type{OID: 90004, Name: "nick[]", Kind: schema.KindArray, Elem: tNick, Delim: ','}
)

func TestValidAttachmentID(t *testing.T) {
	t.Parallel()
	for id, want := range map[string]bool{
		"a": true, "A-b_c.9": true, "0": true, "-": true, "_": true, ".a": true, "a.": true, "a.b.c": true, "photo-1.jpg": true,
		strings.Repeat("x", 255): true, strings.Repeat("x", 256): false, "": false, ".": false, "..": false, "a..b": false, "...": false,
		"a/b": false, "/": false, `a\b`: false, "a b": false, "a%2fb": false, "é": false, "a\x00": false, "a\n": false, "a:b": false, "\xff": false,
	} {
		if ValidAttachmentID(id) != want {
			t.Errorf("%q: %v, want %v", id, !want, want)
		}
	}
}

// TestAttachmentKeysStay: the log holds these keys, so they never change; and none is another's.
func TestAttachmentKeysStay(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	for _, k := range []struct {
		name, want string
		got        [16]byte
	}{
		{"attachment", "b819d188700ebfe78d9974a5f049e799", AttachmentKey([]byte("photo-1.jpg"))},
		{"document", "7d504c620879db3e8e8b4fc0bab3211f", DocumentKey(7, []byte("42"))},
		{"its neighbour", "", DocumentKey(8, []byte("42"))},
		{"long document", "", DocumentKey(7, []byte(strings.Repeat("k", 5000)))},
		{"subject", "8f1f14961926481721501a31e752043e", [16]byte(SubjectScope("ana"))},
		{"device", "67d60285dd2a9628ec0b08ea272095d3", [16]byte(DeviceScope("ana", "phone"))},
		{"other split", "", [16]byte(DeviceScope("anap", "hone"))},
		{"device without name", "", [16]byte(DeviceScope("ana", ""))},
	} {
		got := fmt.Sprintf("%x", k.got)
		if k.want != "" && got != k.want || seen[got] || k.got == [16]byte{} {
			t.Errorf("%s: %s, want %s and no other's", k.name, got, k.want)
		}
		seen[got] = true
	}
}

func TestAttachmentFaults(t *testing.T) {
	t.Parallel()
	tab := everything()
	sum := col("sum", tText)
	sum.Generated = true
	tab.Columns = append(tab.Columns, sum, col("uuids", tUUIDs), col("nicks", tNicks), col("plain", tPlain))
	of := func(s ...AttachmentSpec) Spec { return Spec{Attachments: s} }
	for _, tc := range []struct {
		name string
		spec Spec
		path string // after collections.tasks; "-" for none
		want string // within got, want and hint
	}{
		{"every column that names ids", of(AttachmentSpec{Column: "title"}, AttachmentSpec{Column: "u"}, AttachmentSpec{Column: "n2"}, AttachmentSpec{Column: "n4"}, AttachmentSpec{Column: "id"},
			AttachmentSpec{Column: "tags"}, AttachmentSpec{Column: "nums"}, AttachmentSpec{Column: "uuids"}, AttachmentSpec{Column: "nicks"}), "-", ""},
		{"every way into json", of(AttachmentSpec{Column: "meta", Path: "$.a"}, AttachmentSpec{Column: "meta", Pattern: "a+"}, AttachmentSpec{Column: "plain", Path: "$"}, AttachmentSpec{Column: "title", Pattern: "a+"}), "-", ""},
		{"empty list", Spec{Attachments: []AttachmentSpec{}}, ".attachments", "leave attachments out"},
		{"no column", of(AttachmentSpec{Path: "$.a"}), ".attachments.0.column", "nothing"},
		{"unknown column", of(AttachmentSpec{Column: "title"}, AttachmentSpec{Column: "tite"}), ".attachments.1.column", "did you mean title?"},
		{"generated", of(AttachmentSpec{Column: "sum"}), ".attachments.0.column", "generated"},
		{"excluded", Spec{Columns: ColumnsSpec{Exclude: []string{"title"}}, Attachments: []AttachmentSpec{{Column: "title"}}}, ".attachments.0.column", "columns.exclude"},
		{"a number that is no id", of(AttachmentSpec{Column: "price"}), ".attachments.0.column", "a numeric"},
		{"boxes", of(AttachmentSpec{Column: "boxes"}), ".attachments.0.column", "box[]"},
		{"bare json", of(AttachmentSpec{Column: "meta"}), ".attachments.0", "without a path"},
		{"path in text", of(AttachmentSpec{Column: "title", Path: "$.a"}), ".attachments.0.column", "a json or jsonb column"},
		{"pattern in a list", of(AttachmentSpec{Column: "tags", Pattern: "a+"}), ".attachments.0.column", "text or varchar"},
		{"path and pattern", of(AttachmentSpec{Column: "meta", Path: "$.a", Pattern: "a+"}), ".attachments.0", "two entries"},
		{"bad path", of(AttachmentSpec{Column: "meta", Path: "$.a[?(@.b)]"}), ".attachments.0.path", "at its byte 5"},
		{"path without root", of(AttachmentSpec{Column: "meta", Path: "photos[*].id"}), ".attachments.0.path", "did you mean $.photos[*].id?"},
		{"bad pattern", of(AttachmentSpec{Column: "meta", Pattern: "(?=a)"}), ".attachments.0.pattern", "invalid or unsupported Perl syntax"},
		{"where over claims", Spec{Where: "row.owner_id == claims.sub", Attachments: []AttachmentSpec{{Column: "title"}}}, ".where", "say it with scope"},
		{"where over rows", Spec{Where: "!row.archived", Attachments: []AttachmentSpec{{Column: "title"}}}, "-", ""},
		{"default identity", Spec{ReplicaIdentity: "default", Attachments: []AttachmentSpec{{Column: "title"}}}, ".replica_identity", "the attachments column title outside the key"},
		{"default identity, in the key", Spec{ReplicaIdentity: "default", Attachments: []AttachmentSpec{{Column: "id"}}}, "-", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			find, all := catalog(tab)
			tc.spec.Table = tab.String()
			_, faults := Compile(map[string]Spec{"tasks": tc.spec}, find, all)
			if tc.path == "-" {
				if len(faults) > 0 {
					t.Errorf("faults %+v", faults)
				}
				return
			}
			if len(faults) != 1 || faults[0].Path != "collections.tasks"+tc.path || !strings.Contains(fmt.Sprint(faults[0]), tc.want) {
				t.Errorf("got %+v, want one at %s with %q", faults, tc.path, tc.want)
			}
		})
	}
}

// fingerprintWithout is that of a collection without attachments since before there were any.
const fingerprintWithout = "4f487ef238e2373d121abd8c9c18f5a203c13e8b9de1605dd96c723ccc473225"

// TestAttachmentFingerprint: what names attachments counts, however it is spelled; and to have none is as ever, or an
// upgrade would make every client start anew.
func TestAttachmentFingerprint(t *testing.T) {
	t.Parallel()
	of := func(s ...AttachmentSpec) string {
		return compileOne(t, everything(), Spec{Attachments: s}).Fingerprint
	}
	if got := of(); got != fingerprintWithout {
		t.Errorf("without attachments: %s, want %s as before there were any", got, fingerprintWithout)
	}
	a, b := AttachmentSpec{Column: "title"}, AttachmentSpec{Column: "meta", Path: "$.photos.*"}
	same := of(a, b)
	for _, other := range []string{of(b, a), of(a, b, a), of(a, AttachmentSpec{Column: "meta", Path: `$["photos"][*]`})} {
		if other != same {
			t.Error("the same places, another fingerprint")
		}
	}
	seen := map[string]bool{same: true}
	for _, s := range []string{of(), of(a), of(b), of(a, AttachmentSpec{Column: "meta", Path: "$..photos.*"}), of(a, AttachmentSpec{Column: "meta", Pattern: "$.photos.*"}),
		of(a, AttachmentSpec{Column: "meta", Path: "$.photos[0]"})} {
		if seen[s] {
			t.Error("other places, the same fingerprint")
		}
		seen[s] = true
	}
}

func TestReferencedIDs(t *testing.T) {
	t.Parallel()
	tab := everything()
	tab.Columns = append(tab.Columns, col("uuids", tUUIDs), col("nicks", tNicks), col("plain", tPlain), col("nick", tNick))
	const id = "0a0b0c0d-0000-4000-8000-00000000000f"
	for _, tc := range []struct{ spec, text, want string }{ // spec: column, path or /pattern
		{"title", "photo.jpg", "photo.jpg"}, {"title", "no id", ""}, {"title", "", ""}, {"title", "..", ""}, {"nick", "ana", "ana"},
		{"u", id, id}, {"id", "-7", "-7"}, {"n4", "12", "12"},
		{"tags", `{b,a,"c d","e\"f",NULL,b,"NULL"}`, "NULL a b"}, {"tags", `{}`, ""}, {"tags", `[0:1]={x,y}`, "x y"}, {"tags", `{{a,b},{c,"d"}}`, "a b c d"},
		{"tags", `{"a\\b",a.b,1e5,true,null,7}`, "1e5 7 a.b null true"}, {"tags", `{"a`, ""}, {"nums", `{3,NULL,-1}`, "-1 3"}, {"uuids", "{" + id + "}", id}, {"nicks", `{a,"b"}`, "a b"},
		{"meta $", `"a"`, "a"}, {"meta $", `17`, "17"}, {"meta $", `-17`, "-17"}, {"meta $", `1.5`, ""}, {"meta $", `1e3`, ""}, {"meta $", `null`, ""}, {"meta $", `true`, ""}, {"meta $", `"null"`, "null"},
		{"meta $", `["a", [2, ["c"]], {"d": "e"}, null]`, "2 a c"}, {"meta $", `{"a": "b"}`, ""},
		{"meta $.photos[*].id", `{"photos": [{"id": "a"}, {"id": 2, "x": "y"}, {"no": "z"}, "w", {"id": ["b", {"id": "c"}]}]}`, "2 a b"},
		{"meta $.photos[*].id", `{"photos": {"k": {"id": "a"}}}`, "a"}, {"meta $.photos[*]", `[{"photos": "a"}]`, ""},
		{"meta $.a.b", `{"a": {"b": "x", "c": "y"}, "b": "z"}`, "x"}, {"meta $['a b']['c.d'].e", `{"a b": {"c.d": {"e": "x"}}}`, "x"}, {`meta $["it's"]`, `{"it's": "x"}`, "x"}, {`meta $['it\'s']`, `{"it's": "x"}`, "x"},
		{"meta $.ключ", `{"ключ": "x"}`, "x"}, {"meta $[1]", `["a", "b", ["c"]]`, "b"}, {"meta $[2]", `["a", "b", ["c", ["d"]]]`, "c d"}, {"meta $[0]", `{"0": "a"}`, ""}, {"meta $.*", `{"a": "x", "b": ["y"], "c": {"d": "z"}}`, "x y"},
		{"meta $..id", `{"id": "a", "x": [{"id": "b"}, {"y": {"id": {"id": "c"}}}]}`, "a b c"}, {"meta $..x.id", `{"x": {"id": "a", "x": {"id": "b"}}, "id": "c"}`, "a b"}, {"meta $.x..[0]", `{"x": ["a", ["b", "c"]], "y": ["d"]}`, "a b"},
		{"meta $..*", `{"a": "x", "b": ["y", {"c": 3}]}`, "3 x y"},
		{"plain $.a", " {\n\"a\" : \"\\u0070hoto\" , \"a\":\"twice\"} ", "photo twice"}, {`plain $['a"b']`, `{"a\"b": "x", "a\u0022b": "y"}`, "x y"}, {"plain $.a", `{"a": "x\\ny", "\u0061": "z"}`, "z"}, {"plain $", `"\ud83d\ude00"`, ""},
		{"plain $.a", `{"b": {"a": "no", "c": ["}", "]", "\"", "\\"]}, "a": "x"}`, "x"},
		{"meta /img_[0-9]+", `{"a": "see img_1 and img_22.", "img_3": ["img_4", {"b": "ximg_5\n"}], "c": 5}`, "img_1 img_22 img_4 img_5"},
		{`meta /\bimg_\w+\b`, `"img_a\timg_b ximg_c"`, "img_a img_b"}, {"meta /x*", `"xx y x"`, "x xx"}, {"title /photo:[a-z]+", "photo:a", ""}, {"title /[a-z]+", "a bc a", "a bc"}, {"meta /[0-9]+", `[17, "18"]`, "18"},
		{"meta $", ``, ""}, {"meta $.a", `{"a":"x"`, "x"}, {"meta $.a", `{"a"`, ""}, {"meta $", `[`, ""}, {"meta $", `["a" "b"]`, "a"}, {"meta $.x", `{"y":]]]`, ""}, {"meta $", `"a\`, ""}, {"meta $", `"a\u00`, ""},
	} {
		column, rest, _ := strings.Cut(tc.spec, " ")
		spec := AttachmentSpec{Column: column, Path: rest}
		if pattern, ok := strings.CutPrefix(rest, "/"); ok {
			spec = AttachmentSpec{Column: column, Pattern: pattern}
		}
		b := bind(t, compileOne(t, tab, Spec{Attachments: []AttachmentSpec{spec}}))
		if got := strings.Join(b.ReferencedIDs(row(tab, column+"="+tc.text)), " "); got != tc.want {
			t.Errorf("%s of %s: got %q, want %q", tc.spec, tc.text, got, tc.want)
		}
		if got := b.ReferencedIDs(make(schema.Row, len(tab.Columns))); got != nil {
			t.Errorf("%s of NULL: %q", tc.spec, got)
		}
	}
}

// TestDeepJSON: what PostgreSQL takes is looked through to its end, what is deeper is passed over.
func TestDeepJSON(t *testing.T) {
	t.Parallel()
	tab := everything()
	b := bind(t, compileOne(t, tab, Spec{Attachments: []AttachmentSpec{{Column: "meta", Path: "$..id"}}}))
	for depth, want := range map[int]string{20_000: "a", 3_000_000: ""} {
		text := strings.Repeat(`{"x":[`, depth/2) + `{"id":"a"}` + strings.Repeat(`]}`, depth/2)
		if got := strings.Join(b.ReferencedIDs(row(tab, "meta="+text)), " "); got != want {
			t.Errorf("%d levels: %q, want %q", depth, got, want)
		}
	}
}

func TestAttachmentScopes(t *testing.T) {
	t.Parallel()
	files := []AttachmentSpec{{Column: "photo"}}
	tab := func(oid uint32, name string) *schema.Table {
		return table(oid, name, col("id", tInt4), col("owner", tText), col("photo", tText))
	}
	own := []map[string]string{{"owner": "claims.sub"}}
	set := compileAll(t, map[string]Spec{
		"read":    {Table: "read", Scope: own, Attachments: files},
		"public":  {Table: "public", Attachments: files, Read: ReadSpec{Roles: []string{"reader"}}},
		"written": {Table: "written", Scope: own, Attachments: files, Read: ReadSpec{Roles: []string{"reader"}}, Write: &WriteSpec{Roles: []string{"writer"}, Operations: []string{"update"}}},
		"deletes": {Table: "deletes", Attachments: files, Write: &WriteSpec{Operations: []string{"delete"}}},
		"plain":   {Table: "plain", Write: &WriteSpec{}},
	}, tab(1, "read"), tab(2, "public"), tab(3, "written"), tab(4, "deletes"), tab(5, "plain"))
	for _, tc := range []struct {
		claims     string
		roles      []string
		read, rest string // collections whose scopes are had
		upload     bool
	}{
		{`{"sub":"ana"}`, nil, "deletes read", "", false},
		{`{"sub":"ana"}`, []string{"reader"}, "deletes public read written", "", false},
		{`{"sub":"ana"}`, []string{"writer"}, "deletes read", "written", true},
		{`{"sub":"ana"}`, []string{"reader", "writer"}, "deletes public read written", "written", true},
		{`{}`, []string{"reader", "writer"}, "deletes public", "", false},
	} {
		caller, err := set.NewCaller("ana", tc.roles, claims(t, tc.claims))
		if err != nil {
			t.Fatal(err)
		}
		keys := func(names string) (out []ScopeKey) {
			for _, name := range strings.Fields(names) {
				out = append(out, caller.view(set.ByName(name)).keys...)
			}
			return out
		}
		if got := caller.ReadableScopes(); !reflect.DeepEqual(got, keys(tc.read)) {
			t.Errorf("%s %v reads %x, want those of %s", tc.claims, tc.roles, got, tc.read)
		}
		writable := keys(tc.rest)
		for _, key := range writable {
			writable = append(writable, HiddenScope(key))
		}
		if got := caller.WritableScopes(); !reflect.DeepEqual(got, writable) || caller.MayUpload() != tc.upload {
			t.Errorf("%s %v writes %x, want those of %q and their hidden rows'; uploads: %v", tc.claims, tc.roles, got, tc.rest, caller.MayUpload())
		}
	}
	var nobody *Caller
	if nobody.ReadableScopes() != nil || nobody.WritableScopes() != nil || nobody.MayUpload() {
		t.Error("nobody has scopes")
	}
	if !set.HasAttachments() || set.ByName("plain").HasAttachments() || !set.ByName("read").HasAttachments() {
		t.Error("who has attachments is told wrong")
	}
}

// TestBindNeedsReferenceColumns: rows that no longer have the column must not count as naming nothing.
func TestBindNeedsReferenceColumns(t *testing.T) {
	t.Parallel()
	c := compileOne(t, everything(), Spec{Attachments: []AttachmentSpec{{Column: "title"}}})
	cols := slices.DeleteFunc(slices.Clone(c.Table.Columns), func(c schema.Column) bool { return c.Name == "title" })
	if _, err := c.Bind(cols); err == nil || !strings.Contains(err.Error(), "title") {
		t.Errorf("bound without the column: %v", err)
	}
}

package policies

import (
	"strings"
	"testing"
)

func TestFilterSeesTypedColumns(t *testing.T) {
	t.Parallel()
	tab := everything()
	full := row(tab, "id=7", "owner_id=ana", "team_id=-3", "archived=f", "title=a \"b\"", "n2=2", "n4=4",
		"u=00000000-0000-0000-0000-00000000000a", "d=2026-05-02", "f=1.5", "price=10.50",
		`meta={"a":{"b":[1,2.5,null]},"big":9007199254740993,"on":true}`, "mood=happy", "feeling=sad",
		`tags={a,NULL,"b,\"c","NULL",x;y}`, "nums=[0:1]={1,2}", "boxes={(1,1),(0,0);(2,2),(1,1)}", "odd name=o", "package=p")
	for _, tc := range []struct {
		where string
		want  bool
		err   string
	}{
		{where: "row.id == 7 && row.team_id < 0 && row.n2 + row.n4 == 6", want: true},
		{where: "!row.archived", want: true},
		{where: "row.deleted_at == null", want: true},
		{where: "row.id != null && row.archived != null && row.tags != null", want: true},
		{where: `row.title == 'a "b"'`, want: true},
		{where: `row.u == "00000000-0000-0000-0000-00000000000a" && row.d >= "2026-01-01"`, want: true},
		{where: "row.f > 1.0 && row.f < 2.0", want: true},
		{where: `row.price == "10.50" && double(row.price) > 10.0`, want: true},
		{where: "row.meta.a.b[1] == 2.5 && row.meta.a.b[0] == 1 && row.meta.a.b[2] == null", want: true},
		{where: "row.meta.big == 9007199254740993", want: true},
		{where: "has(row.meta.on) && !has(row.meta.off) && row.meta.on", want: true},
		{where: `row.mood in ["happy"] && row.feeling == "sad"`, want: true},
		{where: `"b,\"c" in row.tags && "NULL" in row.tags && row.tags[1] == null && "x;y" in row.tags`, want: true},
		{where: "row.nums.exists(n, n == 2) && size(row.nums) == 2", want: true},
		{where: `row.boxes.startsWith("{(1")`, want: true},
		{where: "row.`odd name` == 'o' && row.package == 'p'", want: true},
		{where: "row.id == 8", want: false},
		{where: "row.deleted_at > '2026'", err: "an operator meets NULL"},
		{where: "row.meta.nothing == 1", err: "missing"},
		{where: "row.meta.a.b[9] == 1", err: "shorter"},
		{where: "1 / (row.id - 7) == 1", err: "divides by zero"},
		{where: "row.id + 9223372036854775807 > 0", err: "out of range"},
		{where: "int(row.title) == 1", err: "converted"},
		{where: "'a'.matches(row.title + '(')", err: "regular expression"},
	} {
		t.Run(tc.where, func(t *testing.T) {
			t.Parallel()
			b := bind(t, compileOne(t, tab, Spec{Where: tc.where}))
			got, err := b.passes(full, nil)
			if got != tc.want || (err == nil) != (tc.err == "") || err != nil && !strings.Contains(err.Error(), tc.err) {
				t.Errorf("got %v, %v; want %v, %q", got, err, tc.want, tc.err)
			}
			if err != nil && (strings.Contains(err.Error(), `a "b"`)) {
				t.Errorf("%v quotes the row", err)
			}
		})
	}
}

func TestFilterFailsClosedOnDamagedText(t *testing.T) {
	t.Parallel()
	tab := everything()
	for where, pair := range map[string]string{
		"row.id > 0 || row.id <= 0": "id=seven",
		"row.f == row.f":            "f=x",
		"row.meta == row.meta":      "meta={",
		"row.meta != 1":             "meta=1 2",
		"size(row.tags) >= 0":       "tags={a",
		"size(row.nums) >= 0":       "nums={x}",
		"size(row.nums) > 0":        "nums={1}}",
	} {
		b := bind(t, compileOne(t, tab, Spec{Where: where}))
		if got, err := b.passes(row(tab, pair), nil); got || err == nil {
			t.Errorf("%s of %s: got %v, %v; want an error", where, pair, got, err)
		}
	}
}

func TestFilterCost(t *testing.T) {
	t.Parallel()
	tab := everything()
	b := bind(t, compileOne(t, tab, Spec{Where: "row.nums.all(a, row.nums.all(b, a + b >= 0))"}))
	small := row(tab, "nums={1,2,3}")
	if got, err := b.passes(small, nil); !got || err != nil {
		t.Fatalf("small row: got %v, %v", got, err)
	}
	large := row(tab, "nums={"+strings.Repeat("1,", 1000)+"1}")
	got, err := b.passes(large, nil)
	if got || err == nil || !strings.Contains(err.Error(), "cost limit") {
		t.Fatalf("large row: got %v, %v; want the cost limit", got, err)
	}
}

func TestFilterNamesClaims(t *testing.T) {
	t.Parallel()
	tab := everything()
	c := compileOne(t, tab, Spec{Where: `claims.org.id == row.id || (has(claims.admin) && claims.admin == true) || row.team_id in claims["teams"]`})
	if got := strings.Join(c.filter.claims, " "); got != "admin org teams" {
		t.Fatalf("claims %q", got)
	}
	b := bind(t, c)
	r := row(tab, "id=7", "team_id=2")
	for text, want := range map[string]bool{
		`{"org":{"id":7}}`:                     true,
		`{"org":{"id":7.0}}`:                   true,
		`{"org":{"id":"7"},"teams":[]}`:        false,
		`{"org":{"id":8},"teams":[1,2]}`:       true,
		`{"org":{"id":8},"teams":["2"]}`:       false,
		`{"org":{"id":18446744073709551623}}`:  false,
		`{"admin":true}`:                       true,
		`{"admin":"true"}`:                     false,
		`{}`:                                   false,
		`{"org":null,"admin":true,"teams":[]}`: true,
	} {
		if got, _ := b.Sees(r, callerOf(t, c, text)); got != want {
			t.Errorf("%s: got %v, want %v", text, got, want)
		}
	}
}

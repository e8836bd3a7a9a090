package policies

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/walgate/walgate/schema"
)

func TestClaimsAreCanonicalised(t *testing.T) {
	t.Parallel()
	const id = "0a0b0c0d-0000-4000-8000-00000000000f"
	for _, tc := range []struct {
		typ   *schema.Type
		claim string // JSON
		want  string // texts of the column, joined by |
	}{
		{tInt2, `32767`, "32767"}, {tInt2, `32768`, ""}, {tInt4, `"-2147483648"`, "-2147483648"}, {tInt4, `2147483648`, ""},
		{tInt8, `9223372036854775807`, "9223372036854775807"}, {tInt8, `9223372036854775808`, ""}, {tInt8, `"007"`, "7"},
		{tInt8, `"-0"`, "0"}, {tInt8, `"+7"`, ""}, {tInt8, `7.0`, ""}, {tInt8, `7.5`, ""}, {tInt8, `1e3`, ""}, {tInt8, `" 7"`, ""}, {tInt8, `""`, ""}, {tInt8, `true`, ""},
		{tInt8, `"1_000"`, ""}, {tInt8, `"0x7"`, ""},
		{tUUID, `"0A0B0C0D-0000-4000-8000-00000000000F"`, id}, {tUUID, `"0a0b0c0d00004000800000000000000f"`, id},
		{tUUID, `"0a0b0c0d-0000-4000-8000-00000000000g"`, ""}, {tUUID, `"0a0b0c0d-0000-4000-80000-0000000000f"`, ""}, {tUUID, `"-"`, ""}, {tUUID, `7`, ""},
		{tBool, `true`, "t"}, {tBool, `false`, "f"}, {tBool, `"true"`, ""}, {tBool, `1`, ""}, {tBool, `null`, ""},
		{tDate, `"2024-02-29"`, "2024-02-29"}, {tDate, `"2023-02-29"`, ""}, {tDate, `"2024-2-9"`, ""}, {tDate, `"0000-01-01"`, ""}, {tDate, `"infinity"`, ""}, {tDate, `20240229`, ""},
		{tText, `"Ana"`, "Ana"}, {tText, `""`, ""}, {tText, `12.50`, "12.50"}, {tText, `true`, ""}, {tText, `null`, ""}, {tText, `{"a":1}`, ""}, {tText, `"a\u0000b"`, ""},
		{tEnum, `"sad"`, "sad"}, {tEnum, `"SAD"`, ""}, {tEnum, `1`, ""}, {tDomain, `"happy"`, "happy"},
		{tInt8, `[1,"2",2,null,"x",[3],1]`, "1|2"}, {tText, `["b","a","b"]`, "a|b"}, {tText, `[]`, ""},
	} {
		c := scopeColumn{claim: claimPath{"v"}, typ: tc.typ.Underlying()}
		got := strings.Join(c.canonicalValues(claims(t, `{"v":`+tc.claim+`}`)), "|")
		if got != tc.want {
			t.Errorf("%s as %s: got %q, want %q", tc.claim, tc.typ.Name, got, tc.want)
		}
	}
}

func TestClaimThatIsNoTextMatchesNothing(t *testing.T) {
	t.Parallel()
	c := scopeColumn{claim: claimPath{"v"}, typ: tText}
	if got := c.canonicalValues(map[string]any{"v": "a\xffb"}); got != nil {
		t.Errorf("invalid UTF-8 gives %q", got)
	}
	if got := c.canonicalValues(map[string]any{"v": ""}); len(got) != 1 || got[0] != "" {
		t.Errorf("the empty text gives %q; want itself", got)
	}
	if got := c.canonicalValues(nil); got != nil {
		t.Errorf("an absent claim gives %q", got)
	}
}

func scopedSpec() Spec {
	return Spec{Scope: []map[string]string{
		{"owner_id": "claims.sub"},
		{"team_id": "claims.org.teams", "mood": "claims.moods"},
		{"feeling": "claims.feel"},
	}}
}

func TestScopeSQL(t *testing.T) {
	t.Parallel()
	tab := everything()
	tab.Columns[1].Name = `own"er`
	spec := scopedSpec()
	spec.Scope[0] = map[string]string{`own"er`: "claims.sub"}
	c := compileOne(t, tab, spec)
	for claimText, want := range map[string]string{
		`{}`:                                 "false",
		`{"sub":null,"org":{"teams":[1,2]}}`: "false",
		`{"sub":"a\"\\b"}`:                   `("own""er" = ANY($3::text[])) {"a\"\\b"}`,
		`{"feel":"sad"}`:                     `("feeling"::mood = ANY($3::mood[])) {"sad"}`,
		`{"org":{"teams":[2,1]},"moods":["sad"]}`: `("mood" = ANY($3::mood[]) AND "team_id" = ANY($4::int8[])) {"sad"} {"1","2"}`,
		`{"sub":"x","org":{"teams":1},"moods":["sad","happy"]}`: `(("mood" = ANY($3::mood[]) AND "team_id" = ANY($4::int8[])) OR ("own""er" = ANY($5::text[]))) ` +
			`{"happy","sad"} {"1"} {"x"}`,
	} {
		predicate, args := callerOf(t, c, claimText).ScopeSQL(c, 3)
		if got := strings.Join(append([]string{predicate}, args...), " "); got != want {
			t.Errorf("%s:\ngot  %s\nwant %s", claimText, got, want)
		}
	}
	open := compileOne(t, everything(), Spec{Read: ReadSpec{Roles: []string{"reader"}}})
	if p, args := callerOf(t, open, `{}`, "reader").ScopeSQL(open, 1); p != "true" || args != nil {
		t.Errorf("no scope: %s %v", p, args)
	}
	if p, _ := callerOf(t, open, `{}`, "other").ScopeSQL(open, 1); p != "false" {
		t.Errorf("role missing: %s", p)
	}
}

func TestCallerScopes(t *testing.T) {
	t.Parallel()
	c := compileOne(t, everything(), scopedSpec())
	a := callerOf(t, c, `{"sub":"x","org":{"teams":[1,2,"2"]},"moods":["sad","happy"]}`)
	if n := len(a.Scopes(c)); n != 5 {
		t.Errorf("%d scopes, want 5", n)
	}
	if n := len(callerOf(t, c, `{"org":{"teams":[1]},"moods":[]}`).Scopes(c)); n != 0 {
		t.Errorf("%d scopes of an empty array, want none", n)
	}
	other := compileOne(t, everything(), scopedSpec())
	if n := len(a.Scopes(other)); n != 0 {
		t.Error("a caller sees the collections of another Set")
	}
	if p, _ := a.ScopeSQL(other, 1); p != "false" {
		t.Error("a caller selects from the collections of another Set")
	}
	open := compileOne(t, everything(), Spec{})
	if keys := callerOf(t, open, `{}`).Scopes(open); len(keys) != 1 || keys[0] != open.everyone {
		t.Errorf("scopes of an open collection: %x", keys)
	}
	if open.MayRead(nil) || len((*Caller)(nil).Scopes(open)) != 0 {
		t.Error("no caller may read")
	}
}

func TestScopeKeysDiffer(t *testing.T) {
	t.Parallel()
	seen := map[ScopeKey]string{}
	for _, collection := range []string{"a", "ab", ""} {
		for _, columns := range [][]string{{}, {"x"}, {"x", "y"}, {"xy"}, {"x", ""}} {
			var cols []scopeColumn
			for _, name := range columns {
				cols = append(cols, scopeColumn{name: name})
			}
			for _, values := range [][]string{{"", ""}, {"1", "2"}, {"12", ""}, {"", "12"}, {"1", "\x012"}} {
				text := scopePrefix(collection, cols)
				for i := range columns {
					text = appendSized(text, []byte(values[i]))
				}
				name := fmt.Sprintf("%q %q %q", collection, columns, values[:len(columns)])
				if other, ok := seen[hashScope(text)]; ok && other != name {
					t.Errorf("%s and %s share a key", name, other)
				}
				seen[hashScope(text)] = name
			}
		}
	}
}

func TestTooManyScopes(t *testing.T) {
	t.Parallel()
	numbers := func(n int) string {
		s := make([]string, n)
		for i := range s {
			s[i] = fmt.Sprint(i)
		}
		return "[" + strings.Join(s, ",") + "]"
	}
	two := compileAll(t, map[string]Spec{
		"a": {Table: "tasks", Scope: []map[string]string{{"team_id": "claims.t", "n4": "claims.n"}}},
		"b": {Table: "other", Scope: []map[string]string{{"n": "claims.t"}}, Read: ReadSpec{Roles: []string{"r"}}},
		"c": {Table: "third"},
	}, everything(), table(7, "other", col("id", tInt4), col("n", tInt4)), table(8, "third", col("id", tInt4)))
	for _, tc := range []struct {
		claims string
		role   string
		many   bool
	}{
		{`{"t":` + numbers(10) + `,"n":` + numbers(100) + `}`, "", false},
		{`{"t":` + numbers(10) + `,"n":` + numbers(100) + `}`, "r", true}, // 1000 and 10 more
		{`{"t":` + numbers(11) + `,"n":` + numbers(91) + `}`, "", true},
		{`{"t":` + numbers(1001) + `}`, "r", true},
		{`{"t":` + numbers(1000) + `}`, "r", false},
		{`{"t":` + numbers(5000) + `,"n":` + numbers(5000) + `}`, "", true},
	} {
		_, err := two.NewCaller("s", []string{tc.role}, claims(t, tc.claims))
		if errors.Is(err, ErrTooManyScopes) != tc.many {
			t.Errorf("role %q, claims of %d bytes: %v; want too many: %v", tc.role, len(tc.claims), err, tc.many)
		}
	}
}

func TestScopeHash(t *testing.T) {
	t.Parallel()
	set := compileAll(t, map[string]Spec{
		"a": {Table: "tasks", Scope: []map[string]string{{"team_id": "claims.org.teams"}}, Read: ReadSpec{Roles: []string{"x", "y"}}},
		"b": {Table: "other", Where: "claims.flags[0] == row.n"},
	}, everything(), table(7, "other", col("id", tInt4), col("n", tInt4)))
	hash := func(text string, roles ...string) string {
		c, err := set.NewCaller("s", roles, claims(t, text))
		if err != nil {
			t.Fatal(err)
		}
		return c.ScopeHash
	}
	base := hash(`{"org":{"teams":[1,2]},"flags":[1,2]}`, "x")
	part := compileAll(t, map[string]Spec{"b": set.ByName("b").Spec}, table(7, "other", col("id", tInt4), col("n", tInt4)))
	part.NameAs(set)
	if c, err := part.NewCaller("s", []string{"x"}, claims(t, `{"org":{"teams":[1,2]},"flags":[1,2]}`)); err != nil || c.ScopeHash != base {
		t.Errorf("with a collection left out the hash is %s (%v), want %s: its stopping would make all clients resynchronise", c.ScopeHash, err, base)
	}
	if base != "b5d91816" {
		t.Errorf("the hash is %s: clients hold cursors with the former one, and must all start anew", base)
	}
	for text, roles := range map[string][]string{
		`{"flags":[1,2],"org":{"teams":[1,2]}}`:                               {"x"},
		`{"org":{"teams":[2,1,1],"name":"q"},"flags":[1,2],"exp":3,"iat":[]}`: {"z", "x", "x"},
	} {
		if got := hash(text, roles...); got != base {
			t.Errorf("%s %v: hash %s, want %s", text, roles, got, base)
		}
	}
	seen := map[string]string{base: "the base"}
	for name, got := range map[string]string{
		"other teams":   hash(`{"org":{"teams":[1,3]},"flags":[1,2]}`, "x"),
		"no teams":      hash(`{"org":{},"flags":[1,2]}`, "x"),
		"null teams":    hash(`{"org":{"teams":null},"flags":[1,2]}`, "x"),
		"text teams":    hash(`{"org":{"teams":["1","2"]},"flags":[1,2]}`, "x"),
		"flags' order":  hash(`{"org":{"teams":[1,2]},"flags":[2,1]}`, "x"),
		"no flags":      hash(`{"org":{"teams":[1,2]}}`, "x"),
		"no role":       hash(`{"org":{"teams":[1,2]},"flags":[1,2]}`),
		"other role":    hash(`{"org":{"teams":[1,2]},"flags":[1,2]}`, "y"),
		"further role":  hash(`{"org":{"teams":[1,2]},"flags":[1,2]}`, "x", "y"),
		"nothing named": hash(`{}`),
	} {
		if other, ok := seen[got]; ok {
			t.Errorf("%s has the hash of %s", name, other)
		}
		seen[got] = name
	}
}

func TestScopedByCaller(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		spec Spec
		want bool
	}{
		{Spec{}, false},
		{Spec{Where: "!row.archived"}, false},
		{Spec{Where: "row.owner_id == claims.sub"}, true},
		{Spec{Read: ReadSpec{Roles: []string{"r"}}}, true},
		{scopedSpec(), true},
	} {
		if got := compileOne(t, everything(), tc.spec).ScopedByCaller(); got != tc.want {
			t.Errorf("%+v: %v", tc.spec, got)
		}
	}
}

func TestJudgeKey(t *testing.T) {
	t.Parallel()
	c := compileOne(t, everything(), Spec{Where: "claims.a == row.id || has(claims.b)"})
	set := setOf(c)
	var keys []string
	for _, text := range []string{`{"a":1}`, `{"a":1,"c":2}`, `{"a":2}`, `{"a":"1"}`, `{"a":1,"b":null}`, `{}`} {
		caller, err := set.NewCaller("s", nil, claims(t, text))
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, c.JudgeKey(caller))
	}
	if keys[0] != keys[1] {
		t.Error("a claim that the filter doesn't name changes the key")
	}
	slices.Sort(keys)
	if n := len(slices.Compact(keys)); n != 5 {
		t.Errorf("%d distinct keys, want 5", n)
	}
}

// TestTooManyScopesAreNotMade isn't parallel: it counts allocations.
func TestTooManyScopesAreNotMade(t *testing.T) {
	c := compileOne(t, everything(), Spec{Scope: []map[string]string{{"team_id": "claims.v", "n4": "claims.v"}}})
	set := setOf(c)
	values := make([]any, 400)
	for i := range values {
		values[i] = fmt.Sprint(i)
	}
	allocs := testing.AllocsPerRun(1, func() {
		if _, err := set.NewCaller("s", nil, map[string]any{"v": values}); !errors.Is(err, ErrTooManyScopes) {
			t.Errorf("got %v", err)
		}
	})
	if allocs > 10_000 {
		t.Errorf("%.0f allocations to refuse 160000 scopes: they were all made", allocs)
	}
}

// TestStoredForms fails where what the change log holds is no longer what this code writes and looks for.
func TestStoredForms(t *testing.T) {
	t.Parallel()
	c := compileOne(t, everything(), Spec{Scope: []map[string]string{{"owner_id": "claims.sub"}}, Where: "row.n4 <= claims.level || row.title == ''"})
	b := bind(t, c)
	r := row(c.Table, "owner_id=ana", "n4=5")
	effects, err := b.Route(nil, nil, r)
	if err != nil || len(effects) != 1 {
		t.Fatal(effects, err)
	}
	key := fmt.Sprintf("%x", effects[0].Scope)
	if want := "08ce84d0bdf7854f47e3a5e819418a8b"; key != want {
		t.Errorf("scope key %s, want %s", key, want)
	}
	guard := fmt.Sprintf("%x", b.AppendGuard(nil, row(c.Table, "title=", "n4=4"), r))
	if want := "03000235" + "01" + "0234"; guard != want {
		t.Errorf("guard %s, want %s", guard, want)
	}
}

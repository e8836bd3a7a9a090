package policies

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"testing"

	"pgregory.net/rapid"

	"github.com/walgate/walgate/schema"
)

// The model says by plain Go over plain values who sees what. It shares no code with the package.

type modelRow struct {
	Owner, Team, Level, Flag, Gone *string // PostgreSQL texts
}

type modelCaller struct {
	subs  []string
	teams []int
	level *int
	roles []string
}

type modelPolicy struct {
	spec Spec
	in   func(modelRow, modelCaller) bool // scopes
	pass func(modelRow, modelCaller) bool // filter; false where it can't be decided
	gone func(modelRow) bool
}

func is(text *string, want string) bool { return text != nil && *text == want }

func number(text *string) (int, bool) {
	if text == nil {
		return 0, false
	}
	n, err := strconv.Atoi(*text)
	return n, err == nil
}

func inTeams(r modelRow, c modelCaller) bool {
	n, ok := number(r.Team)
	return ok && slices.Contains(c.teams, n)
}

func owns(r modelRow, c modelCaller) bool { return r.Owner != nil && slices.Contains(c.subs, *r.Owner) }

var modelScopes = []struct {
	scope []map[string]string
	in    func(modelRow, modelCaller) bool
}{
	{nil, func(modelRow, modelCaller) bool { return true }},
	{[]map[string]string{{"owner": "claims.sub"}}, owns},
	{[]map[string]string{{"owner": "claims.sub", "team": "claims.org.teams"}}, func(r modelRow, c modelCaller) bool { return owns(r, c) && inTeams(r, c) }},
	{[]map[string]string{{"owner": "claims.sub"}, {"team": "claims.org.teams"}}, func(r modelRow, c modelCaller) bool { return owns(r, c) || inTeams(r, c) }},
}

var modelFilters = []struct {
	where string
	pass  func(modelRow, modelCaller) bool
}{
	{"", func(modelRow, modelCaller) bool { return true }},
	{"!row.flag", func(r modelRow, _ modelCaller) bool { return is(r.Flag, "f") }},
	{"row.level == null || row.level > 1", func(r modelRow, _ modelCaller) bool { n, ok := number(r.Level); return !ok || n > 1 }},
	{"row.level > 1 && row.flag == true", func(r modelRow, _ modelCaller) bool { n, ok := number(r.Level); return ok && n > 1 && is(r.Flag, "t") }},
	{"row.level <= claims.level", func(r modelRow, c modelCaller) bool {
		n, ok := number(r.Level)
		return ok && c.level != nil && n <= *c.level
	}},
	{"row.flag == true || (has(claims.level) && claims.level == 2)", func(r modelRow, c modelCaller) bool {
		return is(r.Flag, "t") || c.level != nil && *c.level == 2
	}},
	{"row.owner in claims.sub || row.level == claims.level", func(r modelRow, c modelCaller) bool {
		n, ok := number(r.Level)
		return owns(r, c) || ok && c.level != nil && n == *c.level
	}},
}

var modelSoft = []struct {
	column string
	gone   func(modelRow) bool
}{
	{"", func(modelRow) bool { return false }},
	{"flag", func(r modelRow) bool { return is(r.Flag, "t") }},
	{"gone", func(r modelRow) bool { return r.Gone != nil }},
}

func modelTable() *schema.Table {
	return table(1, "things", col("id", tInt4), col("owner", tText), col("team", tInt8), col("level", tInt4), col("flag", tBool), col("gone", tTime))
}

func drawPolicy(t *rapid.T) modelPolicy {
	scope := rapid.SampledFrom(modelScopes).Draw(t, "scope")
	filter := rapid.SampledFrom(modelFilters).Draw(t, "where")
	soft := rapid.SampledFrom(modelSoft).Draw(t, "soft delete")
	p := modelPolicy{in: scope.in, pass: filter.pass, gone: soft.gone}
	p.spec = Spec{Table: "things", Scope: scope.scope, Where: filter.where, SoftDelete: soft.column}
	if rapid.Bool().Draw(t, "roles") {
		p.spec.Read.Roles = []string{"reader", "editor"}
	}
	return p
}

func (p modelPolicy) sees(r *modelRow, c modelCaller) bool {
	allowed := len(p.spec.Read.Roles) == 0 || slices.Contains(c.roles, "reader")
	return allowed && r != nil && !p.gone(*r) && p.in(*r, c) && p.pass(*r, c)
}

func drawRow(t *rapid.T, label string) *modelRow {
	if rapid.IntRange(0, 5).Draw(t, label+" absent") == 0 {
		return nil
	}
	field := func(name string, values ...string) *string {
		if i := rapid.IntRange(-1, len(values)-1).Draw(t, label+" "+name); i >= 0 {
			return &values[i]
		}
		return nil
	}
	return &modelRow{field("owner", "a", "b", ""), field("team", "1", "2", "-3"), field("level", "1", "2", "3"),
		field("flag", "t", "f"), field("gone", "2026-05-02 00:00:00+00")}
}

func (r *modelRow) row() schema.Row {
	if r == nil {
		return nil
	}
	out := schema.Row{[]byte("1"), nil, nil, nil, nil, nil}
	for i, text := range []*string{r.Owner, r.Team, r.Level, r.Flag, r.Gone} {
		if text != nil {
			out[i+1] = []byte(*text)
		}
	}
	return out
}

// drawCaller also spells the claims, in one of the ways that mean the same.
func drawCaller(t *rapid.T) (modelCaller, map[string]any) {
	c := modelCaller{
		subs:  rapid.SliceOfN(rapid.SampledFrom([]string{"a", "b", "", "c"}), 0, 3).Draw(t, "sub"),
		teams: rapid.SliceOfN(rapid.SampledFrom([]int{1, 2, -3, 4}), 0, 3).Draw(t, "teams"),
	}
	subs, teams := []any{}, []any{nil}
	for _, s := range c.subs {
		subs = append(subs, s)
	}
	for _, n := range c.teams {
		if rapid.Bool().Draw(t, "as text") {
			teams = append(teams, fmt.Sprint(n))
		} else {
			teams = append(teams, json.Number(fmt.Sprint(n)))
		}
	}
	claims := map[string]any{"sub": subs, "org": map[string]any{"teams": teams}, "other": true}
	if n := rapid.IntRange(0, 3).Draw(t, "level"); n > 0 {
		c.level = &n
		claims["level"] = json.Number(fmt.Sprint(n))
	}
	if rapid.Bool().Draw(t, "reader") {
		c.roles = []string{"writer", "reader"}
	}
	return c, claims
}

// received is what a caller makes of a change's entries in its scopes: an upsert outweighs that the row left another.
func received(c *Collection, b *Binding, old, new schema.Row, caller *Caller) Op {
	effects, _ := b.Route(nil, old, new)
	var out Op
	for _, e := range effects {
		if !slices.Contains(caller.Scopes(c), e.Scope) {
			continue
		}
		before := old
		if e.Entered {
			before = nil
		}
		if op, ok, _ := c.Judge(e.Op, b.AppendGuard(nil, before, new), caller); ok && out != Upsert {
			out = op
		}
	}
	return out
}

func TestChangesMeanWhatVisibilityBeforeAndAfterSays(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		tab := modelTable()
		find, all := catalog(tab)
		p := drawPolicy(t)
		set, faults := Compile(map[string]Spec{"things": p.spec}, find, all)
		if set == nil {
			t.Fatalf("faults %+v", faults)
		}
		c := set.Collections[0]
		b, err := c.Bind(tab.Columns)
		if err != nil {
			t.Fatal(err)
		}
		for range 20 {
			old, new := drawRow(t, "old"), drawRow(t, "new")
			m, claims := drawCaller(t)
			caller, err := set.NewCaller("s", m.roles, claims)
			if err != nil {
				t.Fatal(err)
			}
			before, after := p.sees(old, m), p.sees(new, m)
			var want Op
			switch {
			case after:
				want = Upsert
			case before && (new == nil || p.gone(*new)):
				want = Delete
			case before:
				want = Leave
			}
			if got := received(c, b, old.row(), new.row(), caller); got != want {
				t.Fatalf("received %q, want %q: before %v, after %v", got, want, before, after)
			}
			if got := selected(t, b, new, caller); got != after {
				t.Fatalf("a snapshot shows the row: %v, want %v", got, after)
			}
		}
	})
}

// selected runs what a snapshot does: the predicate of ScopeSQL, read back from its text, and then Sees.
func selected(t *rapid.T, b *Binding, r *modelRow, caller *Caller) bool {
	if r == nil {
		return false
	}
	predicate, args := caller.ScopeSQL(b.Collection, 1)
	if !matches(t, predicate, args, r.row()) {
		return false
	}
	saw, _ := b.Sees(r.row(), caller)
	return saw
}

package policies

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/walgate/walgate/schema"
)

func decideTable() *schema.Table {
	gen := col("sum", tInt4)
	gen.Generated = true
	return table(1, "tasks", col("id", tInt4), col("a", tText), col("b", tText), col("c", tText), col("secret", tText), col("deleted_at", tTime), gen)
}

func decideSpec(conflict, deleted string, soft bool, operations ...string) Spec {
	s := Spec{Columns: ColumnsSpec{Exclude: []string{"secret"}}, Write: &WriteSpec{Operations: operations}, Conflict: conflict, OnDeleted: deleted}
	if soft {
		s.SoftDelete = "deleted_at"
	}
	if conflict == Function {
		s.ConflictFunction = "app.resolve"
	}
	return s
}

var actionNames = map[Action]string{DoNothing: "nothing", DoInsert: "insert", DoInsertImage: "insert image", DoUpdate: "update", DoUndelete: "undelete",
	DoDelete: "delete", DoSoftDelete: "soft-delete", DoResolve: "resolve"}

// told is a decision on one line: action [columns]: status code policy [columns in conflict] +doc.
func told(d Decision) string {
	s := actionNames[d.Action]
	if len(d.Write) > 0 {
		s += " " + strings.Join(d.Write, ",")
	}
	s += ": " + string(d.Status)
	for _, more := range []string{d.Code, d.Policy} {
		if more != "" {
			s += " " + more
		}
	}
	if d.Columns != nil {
		s += " [" + strings.Join(d.Columns, " ") + "]"
	}
	if d.Document {
		s += " +doc"
	}
	return s
}

// The conditions, each with what it means for data of a and b.
var conditions = map[string]struct {
	changed, equal []string
	all            bool
	columns        string // in conflict
	shared         string // of these, those of the data
	rest           string // data without them
}{
	"nothing":              {},
	"another":              {changed: []string{"c"}, columns: "c", rest: "a,b"},
	"another and hidden":   {changed: []string{"secret", "c"}, columns: "c", rest: "a,b"},
	"hidden":               {changed: []string{"secret"}, columns: "", rest: "a,b"},
	"same":                 {changed: []string{"a"}, columns: "a", shared: "a", rest: "b"},
	"both":                 {changed: []string{"c", "b"}, columns: "b c", shared: "b", rest: "a"},
	"to the same value":    {changed: []string{"a"}, equal: []string{"a"}},
	"one to the same":      {changed: []string{"a", "b"}, equal: []string{"b"}, columns: "a", shared: "a", rest: "b"},
	"all":                  {all: true, columns: "a b c deleted_at", shared: "a b"},
	"all, one to the same": {all: true, equal: []string{"b"}, columns: "a c deleted_at", shared: "a", rest: "b"},
	"all, both the same":   {all: true, equal: []string{"a", "b"}, columns: "c deleted_at", rest: "a,b"},
}

// decisions is the table of what becomes of a change: by operation and row state. CONFLICT and DELETED refer to the tables
// below, DEL is delete or soft-delete.
const decisions = `
insert | live            | nothing: rejected unique_violation +doc
insert | live, conflict  | nothing: rejected unique_violation +doc
insert | soft            | nothing: rejected unique_violation
insert | gone            | insert a,b: accepted
insert | never           | insert a,b: accepted
insert | foreign         | nothing: rejected unique_violation
update | live            | update a,b: accepted
update | live, conflict  | CONFLICT
update | soft            | DELETED
update | gone            | DELETED
update | never           | nothing: rejected not_found
update | foreign         | nothing: rejected not_found
upsert | live            | update a,b: accepted
upsert | live, conflict  | CONFLICT
upsert | soft            | DELETED
upsert | gone            | DELETED
upsert | never           | insert a,b: accepted
upsert | foreign         | nothing: rejected unique_violation
delete | live            | DEL: accepted
delete | live, conflict  | CONFLICT
delete | soft            | nothing: accepted
delete | gone            | nothing: accepted
delete | never           | nothing: accepted
delete | foreign         | nothing: accepted`

// conflicts: C stands for the columns in conflict, SHARED for those that the data names too, REST for the other data.
const conflicts = `
last_write_wins | write  | update a,b: conflict_resolved last_write_wins [C] +doc
client_wins     | write  | update a,b: conflict_resolved client_wins [C] +doc
server_wins     | write  | nothing: conflict_resolved server_wins [C] +doc
reject          | write  | nothing: rejected conflict reject [C] +doc
merge           | write  | update REST: conflict_resolved merge [SHARED] +doc
function        | write  | resolve: conflict_resolved function [C] +doc
last_write_wins | delete | DEL: conflict_resolved last_write_wins [C]
client_wins     | delete | DEL: conflict_resolved client_wins [C]
server_wins     | delete | nothing: conflict_resolved server_wins [C] +doc
merge           | delete | nothing: conflict_resolved merge [C] +doc
reject          | delete | nothing: rejected conflict reject [C] +doc
function        | delete | resolve: conflict_resolved function [C] +doc`

const deletions = `
resurrect_on_update | soft       | undelete a,b: conflict_resolved resurrect_on_update +doc
resurrect_on_update | gone       | insert a,b: conflict_resolved resurrect_on_update +doc
resurrect_on_update | gone image | insert image a,b: conflict_resolved resurrect_on_update +doc
reject_update       | soft       | nothing: rejected deleted reject_update
reject_update       | gone       | nothing: rejected deleted reject_update
reject_update       | gone image | nothing: rejected deleted reject_update
delete_wins         | soft       | nothing: conflict_resolved delete_wins
delete_wins         | gone       | nothing: conflict_resolved delete_wins
delete_wins         | gone image | nothing: conflict_resolved delete_wins`

func cells(table string) map[[2]string]string {
	m := map[[2]string]string{}
	for _, line := range strings.Split(strings.TrimSpace(table), "\n") {
		f := strings.Split(line, "|")
		m[[2]string{strings.TrimSpace(f[0]), strings.TrimSpace(f[1])}] = strings.TrimSpace(f[2])
	}
	return m
}

var stateNames = map[RowState]string{RowLive: "live", RowSoft: "soft", RowGone: "gone", RowNever: "never", RowForeign: "foreign"}

// TestEveryCellOfTheDecisionTable goes through every operation, row state, condition, conflict and delete policy.
func TestEveryCellOfTheDecisionTable(t *testing.T) {
	t.Parallel()
	table, onConflict, onDeleted := cells(decisions), cells(conflicts), cells(deletions)
	expected := func(op Operation, state RowState, condition, conflict, deleted string, image, soft bool) string {
		c := conditions[condition]
		kind, name := "write", stateNames[state]
		shared := c.changed
		if c.all {
			shared = []string{"a", "b"}
		}
		met := c.columns != "" || condition == "hidden"
		if op == PushDelete {
			kind = "delete"
			// A delete has no data, so nothing of what changed is the same.
			met = c.all || len(c.changed) > 0
		}
		if op != PushDelete && op != PushInsert && conflict == Merge {
			met = c.shared != ""
		}
		if state == RowLive && met {
			name += ", conflict"
		}
		want := table[[2]string{string(op), name}]
		switch want {
		case "CONFLICT":
			want = onConflict[[2]string{conflict, kind}]
		case "DELETED":
			if image && state == RowGone {
				name += " image"
			}
			want = onDeleted[[2]string{deleted, name}]
		}
		columns := c.columns
		if op == PushDelete {
			columns = strings.Join(slices.DeleteFunc(slices.Sorted(slices.Values(shared)), func(s string) bool { return s == "secret" }), " ")
			if c.all {
				columns = "a b c deleted_at"
			}
		}
		del := "delete"
		if soft {
			del = "soft-delete"
		}
		want = strings.NewReplacer("[C]", "["+columns+"]", "[SHARED]", "["+c.shared+"]", "update REST", "update "+c.rest, "DEL", del).Replace(want)
		return strings.Replace(want, "update :", "nothing:", 1) // every column of the data is in conflict
	}
	count := 0
	for _, conflict := range append([]string{"", Function}, ConflictPolicies...) {
		for _, deleted := range append([]string{""}, DeletePolicies...) {
			for _, soft := range []bool{false, true} {
				c := compileOne(t, decideTable(), decideSpec(conflict, deleted, soft))
				effective, effectiveDeleted := conflict, deleted
				if conflict == "" {
					effective = "last_write_wins"
				}
				if deleted == "" {
					effectiveDeleted = "resurrect_on_update"
				}
				for _, op := range []Operation{PushInsert, PushUpdate, PushUpsert, PushDelete} {
					for state := range stateNames {
						for condition, met := range conditions {
							for _, image := range []bool{false, true} {
								s := Situation{Op: op, State: state, Changed: met.changed, AllChanged: met.all, Image: image}
								if op != PushDelete {
									s.Data, s.Equal = []string{"a", "b"}, met.equal
								}
								want := expected(op, state, condition, effective, effectiveDeleted, image, soft)
								if got := told(c.Decide(s)); got != want || want == "" {
									t.Errorf("%s of a row %s, changed %s, conflict %q, on_deleted %q, soft %v, image %v:\n got %s\nwant %s",
										op, stateNames[state], condition, conflict, deleted, soft, image, got, want)
								}
								count++
							}
						}
					}
				}
			}
		}
	}
	if want := 7 * 4 * 2 * 4 * 5 * len(conditions) * 2; count != want {
		t.Errorf("%d cells, want %d", count, want)
	}
}

func TestDecideOddities(t *testing.T) {
	t.Parallel()
	soft := compileOne(t, decideTable(), decideSpec(LastWriteWins, "", true))
	for name, tc := range map[string]struct {
		s    Situation
		want string
	}{
		"a version from the future":              {Situation{Op: PushUpdate, State: RowLive, Data: []string{"a"}, Ahead: true}, "nothing: rejected invalid_parent_version +doc"},
		"a version from the future, delete":      {Situation{Op: PushDelete, State: RowLive, Ahead: true}, "nothing: rejected invalid_parent_version +doc"},
		"a version from the future of no row":    {Situation{Op: PushUpdate, State: RowNever, Data: []string{"a"}, Ahead: true}, "nothing: rejected not_found"},
		"a version from the future of no caller": {Situation{Op: PushUpdate, State: RowForeign, Data: []string{"a"}, Ahead: true}, "nothing: rejected not_found"},
		"no data":                                {Situation{Op: PushUpdate, State: RowLive}, "nothing: accepted"},
		"no data, undelete":                      {Situation{Op: PushUpdate, State: RowSoft}, "undelete: conflict_resolved resurrect_on_update +doc"},
		"no data, insert":                        {Situation{Op: PushInsert, State: RowNever}, "insert: accepted"},
		"a column that is gone":                  {Situation{Op: PushUpdate, State: RowLive, Data: []string{"a"}, Changed: []string{"dropped"}}, "update a: accepted"},
		"an operation that isn't one":            {Situation{Op: "replace", State: RowNever}, "nothing: rejected not_found"},
	} {
		if got := told(soft.Decide(tc.s)); got != tc.want {
			t.Errorf("%s: got %s, want %s", name, got, tc.want)
		}
	}
}

// TestOperationsBoundDecisions: an upsert needs insert or update as it turns out, and a row comes into being by insert only.
func TestOperationsBoundDecisions(t *testing.T) {
	t.Parallel()
	const denied = "nothing: rejected permission"
	data := []string{"a"}
	for _, tc := range []struct {
		operation string // the only one
		s         Situation
		want      string
	}{
		{"update", Situation{Op: PushUpsert, State: RowLive, Data: data}, "update a: accepted"},
		{"update", Situation{Op: PushUpsert, State: RowSoft, Data: data}, "undelete a: conflict_resolved resurrect_on_update +doc"},
		{"update", Situation{Op: PushUpsert, State: RowGone, Data: data}, denied},
		{"update", Situation{Op: PushUpsert, State: RowNever, Data: data}, denied},
		{"update", Situation{Op: PushUpsert, State: RowForeign, Data: data}, denied}, // as if it weren't there
		{"update", Situation{Op: PushUpdate, State: RowGone, Data: data}, denied},
		{"update", Situation{Op: PushUpdate, State: RowSoft, Data: data}, "undelete a: conflict_resolved resurrect_on_update +doc"},
		{"update", Situation{Op: PushUpdate, State: RowNever, Data: data}, "nothing: rejected not_found"},
		{"insert", Situation{Op: PushUpsert, State: RowNever, Data: data}, "insert a: accepted"},
		{"insert", Situation{Op: PushUpsert, State: RowGone, Data: data, Image: true}, "insert image a: conflict_resolved resurrect_on_update +doc"},
		{"insert", Situation{Op: PushUpsert, State: RowForeign, Data: data}, "nothing: rejected unique_violation"},
		{"insert", Situation{Op: PushUpsert, State: RowLive, Data: data}, denied},
		{"insert", Situation{Op: PushUpsert, State: RowSoft, Data: data}, denied},
	} {
		c := compileOne(t, decideTable(), decideSpec("", "", true, tc.operation))
		if got := told(c.Decide(tc.s)); got != tc.want {
			t.Errorf("%s of a row %s with only %s: got %s, want %s", tc.s.Op, stateNames[tc.s.State], tc.operation, got, tc.want)
		}
	}
}

func TestResolve(t *testing.T) {
	t.Parallel()
	const current = `{"a": "1", "b": null, "c": "x", "id": 7, "sum": 3, "secret": "s", "deleted_at": null}`
	update := Situation{Op: PushUpdate, State: RowLive, Data: []string{"a"}, Changed: []string{"a", "c"}}
	remove := Situation{Op: PushDelete, State: RowLive, Changed: []string{"a", "c"}}
	const failed, rejected = "nothing: rejected resolver_failed function [a c] +doc", "nothing: rejected conflict function [a c] +doc"
	for _, tc := range []struct {
		s            Situation
		answer, want string
		values       string
	}{
		{update, "NULL", rejected, ""},
		{update, "null", failed, ""},
		{update, `"text"`, failed, ""},
		{update, `[1]`, failed, ""},
		{update, `7`, failed, ""},
		{update, `{}`, "nothing: conflict_resolved function [a c] +doc", "map[]"},
		{update, current, "nothing: conflict_resolved function [a c] +doc", "map[]"},
		{update, `{"c": "y", "a": "2"}`, "update a,c: conflict_resolved function [a c] +doc", `map[a:"2" c:"y"]`},
		{update, `{"a": null, "b": null}`, "update a: conflict_resolved function [a c] +doc", `map[a:null]`},
		{update, `{"secret": "t", "id": 7, "sum": 3}`, "update secret: conflict_resolved function [a c] +doc", `map[secret:"t"]`},
		{update, `{"a": "2", "id": 8}`, failed, ""},
		{update, `{"a": "2", "sum": 4}`, failed, ""},
		{update, `{"a": "2", "unknown": null}`, failed, ""},
		{remove, "NULL", rejected, ""},
		{remove, "null", "DEL: conflict_resolved function [a c]", "map[]"},
		{remove, `{"c": "y"}`, "update c: conflict_resolved function [a c] +doc", `map[c:"y"]`},
		{remove, `{}`, "nothing: conflict_resolved function [a c] +doc", "map[]"},
		{remove, `false`, failed, ""},
	} {
		for soft, del := range map[bool]string{true: "soft-delete", false: "delete"} {
			c := compileOne(t, decideTable(), decideSpec(Function, "", soft))
			if d := c.Decide(tc.s); d.Action != DoResolve {
				t.Fatalf("%s doesn't call the resolver: %s", tc.s.Op, told(d))
			}
			answer := []byte(tc.answer)
			if tc.answer == "NULL" {
				answer = nil
			}
			d := c.Resolve(tc.s, []byte(current), answer)
			values := map[string]string{}
			for name, value := range d.Values {
				values[name] = string(value)
			}
			if got, want := told(d), strings.Replace(tc.want, "DEL", del, 1); got != want || tc.values != "" && fmt.Sprint(values) != tc.values {
				t.Errorf("%s, answer %s: got %s %v, want %s %s", tc.s.Op, tc.answer, got, values, want, tc.values)
			}
			if got := told(c.ResolverFailed(tc.s)); got != failed {
				t.Errorf("a failure: got %s", got)
			}
		}
	}
}

// TestDecisionsKeepTheirPromises draws situations, the impossible ones too, and holds what must be true of every decision.
func TestDecisionsKeepTheirPromises(t *testing.T) {
	t.Parallel()
	names := []string{"a", "b", "c", "secret", "deleted_at"}
	some := func(t *rapid.T, label string, among []string) []string {
		if len(among) == 0 {
			return nil
		}
		return rapid.SliceOfNDistinct(rapid.SampledFrom(among), 0, len(among), rapid.ID[string]).Draw(t, label)
	}
	rapid.Check(t, func(t *rapid.T) {
		conflict := rapid.SampledFrom(append([]string{Function}, ConflictPolicies...)).Draw(t, "conflict")
		deleted := rapid.SampledFrom(DeletePolicies).Draw(t, "deleted")
		spec := decideSpec(conflict, deleted, rapid.Bool().Draw(t, "soft"), some(t, "operations", operations)...)
		tab := decideTable()
		spec.Table = tab.String()
		if len(spec.Write.Operations) == 0 {
			spec.Write.Operations = nil
		}
		find, all := catalog(tab)
		set, faults := Compile(map[string]Spec{"tasks": spec}, find, all)
		if set == nil {
			t.Fatalf("faults %+v", faults)
		}
		c := set.Collections[0]
		s := Situation{
			Op:    rapid.SampledFrom([]Operation{PushInsert, PushUpdate, PushUpsert, PushDelete}).Draw(t, "op"),
			State: rapid.SampledFrom([]RowState{RowLive, RowSoft, RowGone, RowNever, RowForeign}).Draw(t, "state"),
			Data:  some(t, "data", names), Changed: some(t, "changed", names), AllChanged: rapid.Bool().Draw(t, "all"), Ahead: rapid.Bool().Draw(t, "ahead"), Image: rapid.Bool().Draw(t, "image"),
		}
		s.Equal = some(t, "equal", s.Data)
		before := fmt.Sprint(s)
		d := c.Decide(s)
		writes := d.Action == DoInsert || d.Action == DoInsertImage || d.Action == DoUpdate || d.Action == DoUndelete
		inserts := d.Action == DoInsert || d.Action == DoInsertImage
		there := s.State == RowLive || s.State == RowSoft
		for promise, kept := range map[string]bool{
			"writes only what the data names":               !slices.ContainsFunc(d.Write, func(n string) bool { return !slices.Contains(s.Data, n) }),
			"names columns only where it writes":            writes || len(d.Write) == 0,
			"a rejection does nothing and has a code":       (d.Status == Rejected) == (d.Code != "") && (d.Status != Rejected || d.Action == DoNothing),
			"a resolved conflict names its policy":          d.Status != ConflictResolved || d.Policy == conflict || d.Policy == deleted,
			"an accepted change has no conflict":            d.Status != Accepted || d.Policy == "" && d.Columns == nil && !d.Document,
			"server_wins writes nothing in a conflict":      d.Policy != ServerWins || d.Action == DoNothing,
			"reject writes nothing in a conflict":           d.Policy != Reject || d.Status == Rejected,
			"merge writes nothing that changed":             d.Policy != Merge || s.Op != PushDelete && !slices.ContainsFunc(d.Write, func(n string) bool { return slices.Contains(d.Columns, n) }) || d.Action == DoNothing,
			"shows only columns that documents have":        !slices.ContainsFunc(d.Columns, func(n string) bool { return !c.Shown(n) || n == "id" }),
			"a row that isn't the caller's is left alone":   s.State != RowForeign || d.Action == DoNothing && !d.Document && d.Columns == nil,
			"inserts only where there is no row":            !inserts || !there,
			"updates and deletes only what is there":        d.Action == DoNothing || inserts || there,
			"undeletes only what is soft-deleted":           (d.Action == DoUndelete) == (s.State == RowSoft && d.Action != DoNothing),
			"the image is used only where the log has it":   d.Action != DoInsertImage || s.State == RowGone && s.Image,
			"inserts only where inserts are taken":          !inserts || c.Takes(PushInsert),
			"only a delete deletes":                         d.Action != DoDelete && d.Action != DoSoftDelete || s.Op == PushDelete,
			"deletes by the mark where there is one":        d.Action != DoDelete || spec.SoftDelete == "",
			"calls a resolver only where one is configured": d.Action != DoResolve || conflict == Function,
			"leaves the situation alone":                    fmt.Sprint(s) == before,
			"a caller can't tell a foreign row from none":   s.State != RowForeign || s.Op == PushInsert || d.Code == CodeUniqueViolation || told(d) == told(c.Decide(none(s))),
		} {
			if !kept {
				t.Fatalf("broken: %s: %+v of %+v", promise, d, s)
			}
		}
	})
}

func none(s Situation) Situation {
	s.State = RowNever
	return s
}

package main

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
)

// matrixDocs collects what the gateway answered, for docs/conflicts.md.
type matrixDocs struct{ said map[string]string } // by table, row and column of the page

func newMatrixDocs() *matrixDocs { return &matrixDocs{said: map[string]string{}} }

// add takes a cell over. Cells that share a place on the page must read alike.
func (d *matrixDocs) add(t *testing.T, c *matrixCell, got pushResult, row modelRow) {
	t.Helper()
	place := c.place()
	said := c.say(t, got, row)
	if was, known := d.said[place]; known && was != said {
		t.Errorf("%s: answered %q, but elsewhere %q: one of the two is wrong, or docs/conflicts.md needs another table", c, said, was)
	}
	d.said[place] = said
}

func (c *matrixCell) place() string {
	state := c.state
	switch state {
	case "changed in other columns", "changed in the same column", "changed to the same value":
		if c.condition == "none" {
			return matrixPlace(c.operation, "changed, no condition", "")
		}
		return matrixPlace(c.operation, state, c.policy.conflict)
	case "deleted", "soft-deleted":
		return matrixPlace(c.operation, state, c.policy.onDeleted)
	}
	return matrixPlace(c.operation, state, "")
}

func matrixPlace(operation, state, policy string) string {
	return operation + " / " + state + " / " + policy
}

// say tells in words what happened.
func (c *matrixCell) say(t *testing.T, got pushResult, row modelRow) string {
	t.Helper()
	var before modelRow
	if len(c.history) > 0 {
		before = c.history[len(c.history)-1]
	}
	row = normalised(row, c.policy.soft)
	there := func(r modelRow) bool { return r != nil && !c.policy.softDeleted(r) }
	var what string
	switch {
	case got.Status == "rejected":
		what = "**rejected** `" + got.Code + "`"
	case got.Status == "conflict_resolved":
		what = "**resolved**"
	default:
		what = got.Status
	}
	var parts []string
	switch {
	case got.Status == "rejected":
	case !there(before) && there(row) && row["body"] == "first":
		parts = append(parts, "the row is back, with the data")
	case !there(before) && there(row):
		parts = append(parts, "inserted")
	case there(before) && !there(row):
		parts = append(parts, "deleted")
	case fmt.Sprint(before) == fmt.Sprint(row) && !(c.state == "changed to the same value" && got.NewVersion != nil):
		parts = append(parts, "nothing is written")
	case row["title"] == "mine":
		parts = append(parts, "the data is written")
	default:
		parts = append(parts, "the function's row is written")
	}
	if len(got.Columns) > 0 {
		parts = append(parts, "`columns`: "+strings.Join(got.Columns, ", "))
	}
	if got.shown(t) != nil && got.Status == "rejected" {
		parts = append(parts, "with the row")
	}
	if len(parts) == 0 {
		return what
	}
	return what + ": " + strings.Join(parts, "; ")
}

// tables are the page's generated part.
func (d *matrixDocs) tables() string {
	var b strings.Builder
	table := func(title string, states, policies []string) {
		fmt.Fprintf(&b, "\n### %s\n\n| operation | the row |", title)
		for _, p := range policies {
			if p == "" {
				p = "outcome"
			} else {
				p = "`" + p + "`"
			}
			fmt.Fprintf(&b, " %s |", p)
		}
		b.WriteString("\n|---|---|" + strings.Repeat("---|", len(policies)) + "\n")
		for _, operation := range matrixOperations {
			for _, state := range states {
				fmt.Fprintf(&b, "| `%s` | %s |", operation, state)
				for _, p := range policies {
					fmt.Fprintf(&b, " %s |", d.said[matrixPlace(operation, state, p)])
				}
				b.WriteString("\n")
			}
		}
	}
	table("No conflict", []string{"unchanged", "changed, no condition", "never existed", "moved out of scope"}, []string{""})
	table("The row has changed: the policy `conflict`", slices.Clone(matrixStates[1:4]), matrixConflicts)
	table("The row is deleted: the policy `on_deleted`", []string{"deleted", "soft-deleted"}, matrixDeletes)
	return b.String() + "\n"
}

// check holds docs/conflicts.md against what was answered.
func (d *matrixDocs) check(t *testing.T) {
	t.Helper()
	const file, begin, end = "docs/conflicts.md", "-update` -->\n", "<!-- end of tables -->"
	data, err := os.ReadFile(file)
	must(t, err)
	head, rest, ok := strings.Cut(string(data), begin)
	_, tail, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no place for the tables", file)
	}
	want := head + begin + d.tables() + end + tail
	if *update && !t.Failed() {
		must(t, os.WriteFile(file, []byte(want), 0o644))
		return
	}
	if string(data) != want {
		t.Errorf("%s is not what the gateway answers; run: go test -run TestPushMatrix -update .", file)
	}
}

package main

import (
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/walgate/walgate/internal/pgserver"
)

// The matrix is every operation on a row in every state, under every policy, with every condition.
var (
	matrixOperations = []string{"update", "upsert", "insert", "delete"}
	matrixStates     = []string{"unchanged", "changed in other columns", "changed in the same column", "changed to the same value",
		"deleted", "soft-deleted", "never existed", "moved out of scope"}
	matrixConditions = []string{"base", "parent_version", "none"}
	matrixConflicts  = []string{"last_write_wins", "client_wins", "server_wins", "merge", "reject", "function"}
	matrixDeletes    = []string{"resurrect_on_update", "reject_update", "delete_wins"}
)

// matrixFunctionSQL is the conflict function: both titles, and deletes stand.
const matrixFunctionSQL = `CREATE FUNCTION both_titles(current jsonb, incoming jsonb, base jsonb) RETURNS jsonb LANGUAGE sql AS $$
	SELECT CASE WHEN incoming IS NULL THEN 'null'::jsonb ELSE jsonb_build_object('title', concat(current->>'title', ' + ', incoming->>'title')) END $$;
`

func bothTitles(current, incoming, _ modelRow) resolution {
	if incoming == nil {
		return resolution{remove: true}
	}
	title := func(row modelRow) string {
		if row["title"] == nil {
			return ""
		}
		return fmt.Sprint(row["title"])
	}
	return resolution{row: modelRow{"title": title(current) + " + " + title(incoming)}}
}

// matrixCell is one of its cells.
type matrixCell struct {
	operation, state, condition string
	policy                      modelPolicy
	table                       string
	history                     []modelRow // what the application committed
	change                      pushChange
	model                       modelChange
	want                        modelOutcome
}

func (c *matrixCell) String() string {
	return fmt.Sprintf("%s of a row %s, condition %s, conflict %s, on_deleted %s, table %s", c.operation, c.state, c.condition,
		c.policy.conflict, c.policy.onDeleted, c.table)
}

// matrixTables are a table with soft deletes and one without for each pair of policies.
func matrixTables() (sql, collections string, cells []*matrixCell) {
	sql = matrixFunctionSQL
	for i, conflict := range matrixConflicts {
		for j, onDeleted := range matrixDeletes {
			for _, soft := range []string{"", "deleted_at"} {
				table := fmt.Sprintf("rows_%d_%d", i, j)
				column, softYAML := "", ""
				if soft != "" {
					table += "_soft"
					column, softYAML = ", deleted_at timestamptz", "soft_delete: {column: deleted_at}, "
				}
				yaml := conflict
				if conflict == "function" {
					yaml = "{function: public.both_titles}"
				}
				sql += fmt.Sprintf("CREATE TABLE %s (id text PRIMARY KEY, owner text, title text, body text%s);\n", table, column)
				collections += fmt.Sprintf("  %s: {table: public.%[1]s, scope: {owner: claims.sub}, %swrite: {roles: [editor], set: {owner: claims.sub}}, conflict: %s, on_deleted: %s}\n",
					table, softYAML, yaml, onDeleted)
				p := modelPolicy{key: "id", columns: []string{"owner", "title", "body"}, conflict: conflict, onDeleted: onDeleted, soft: soft, set: modelRow{"owner": "ana"},
					sees: func(r modelRow) bool { return r["owner"] == "ana" }, resolve: bothTitles}
				if soft != "" {
					p.columns = append(p.columns, soft)
				}
				cells = append(cells, matrixCells(table, p)...)
			}
		}
	}
	return sql, collections, cells
}

func matrixCells(table string, p modelPolicy) (cells []*matrixCell) {
	for _, operation := range matrixOperations {
		for _, state := range matrixStates {
			for _, condition := range matrixConditions {
				if state == "soft-deleted" && p.soft == "" {
					continue
				}
				c := &matrixCell{operation: operation, state: state, condition: condition, policy: p, table: table}
				id := strings.ReplaceAll(operation+"/"+state+"/"+condition, " ", "-")
				c.change = pushChange{Collection: table, Operation: operation, DocID: id}
				if operation != "delete" {
					c.change.Data = map[string]any{"title": "mine"}
				}
				first := modelRow{"id": id, "owner": "ana", "title": "first", "body": "first"}
				if p.soft != "" {
					first[p.soft] = nil
				}
				c.history = []modelRow{first}
				switch state {
				case "changed in other columns":
					c.history = append(c.history, overlaid(first, modelRow{"body": "theirs"}))
				case "changed in the same column":
					c.history = append(c.history, overlaid(first, modelRow{"title": "theirs"}))
				case "changed to the same value":
					c.history = append(c.history, overlaid(first, modelRow{"title": "mine"}))
				case "deleted":
					c.history = append(c.history, nil)
				case "soft-deleted":
					c.history = append(c.history, overlaid(first, modelRow{"deleted_at": modelSet}))
				case "moved out of scope":
					c.history = append(c.history, overlaid(first, modelRow{"owner": "bob"}))
				case "never existed":
					c.history = nil
				}
				c.model = modelChange{operation: operation, id: id, data: modelRow(c.change.Data), parent: -1}
				switch condition {
				case "base":
					c.change.Base = map[string]any{"title": "first", "body": "first"}
					c.model.base = modelRow(c.change.Base)
				case "parent_version":
					c.model.parent = min(1, len(c.history))
				}
				c.want = p.judge(c.history, c.model)
				cells = append(cells, c)
			}
		}
	}
	return cells
}

// matrixWrites is the application's SQL that makes the states from the n-th on.
func matrixWrites(cells []*matrixCell, first bool) string {
	var b strings.Builder
	quoted := func(v any) string {
		switch v {
		case nil:
			return "NULL"
		case modelSet:
			return "now()"
		}
		return "'" + fmt.Sprint(v) + "'"
	}
	for _, c := range cells {
		switch {
		case first && len(c.history) > 0:
			r := c.history[0]
			fmt.Fprintf(&b, "INSERT INTO %s (id, owner, title, body) VALUES (%s, 'ana', %s, %s);\n", c.table, quoted(r["id"]), quoted(r["title"]), quoted(r["body"]))
		case !first && len(c.history) > 1 && c.history[1] == nil:
			fmt.Fprintf(&b, "DELETE FROM %s WHERE id = '%s';\n", c.table, c.change.DocID)
		case !first && len(c.history) > 1:
			var sets []string
			for column, value := range c.history[1] {
				sets = append(sets, column+" = "+quoted(value))
			}
			fmt.Fprintf(&b, "UPDATE %s SET %s WHERE id = '%s';\n", c.table, strings.Join(sets, ", "), c.change.DocID)
		}
	}
	return b.String()
}

// TestPushMatrix pushes every cell and holds status, code, policy, columns, document, versions and the row against the
// model. docs/conflicts.md is written from what the gateway answered.
func TestPushMatrix(t *testing.T) {
	t.Parallel()
	dsn := pgserver.ForTest(t).Database(t)
	sql, collections, cells := matrixTables()
	g := startPushGateway(t, dsn, sql, "", collections)
	app := connect(t, dsn)
	start, _ := g.here(t)
	resyncExec(t, app, matrixWrites(cells, true))
	known, cursor := g.settled(t, start)
	parent := versionText(cursor)
	resyncExec(t, app, matrixWrites(cells, false))
	later, cursor := g.settled(t, cursor)
	for key, e := range later {
		known[key] = e
	}

	const most = 1000
	var results []pushResult
	for part := range slices.Chunk(cells, most) {
		var changes []pushChange
		for _, c := range part {
			if c.condition == "parent_version" {
				c.change.ParentVersion = parent
			}
			changes = append(changes, c.change)
		}
		results = append(results, g.push(t, false, changes...).Results...)
	}
	fed, _ := g.settled(t, cursor)
	rows := map[string]modelRow{}
	for _, c := range cells {
		if _, read := rows[c.table]; read {
			continue
		}
		rows[c.table] = modelRow{}
		for id, row := range tableRows(t.Context(), t, dsn, "SELECT id, row_to_json(t)::text FROM "+c.table+" t") {
			rows[c.table+"/"+id] = row
		}
	}
	docs := newMatrixDocs()
	for i, c := range cells {
		for _, fault := range c.faults(t, results[i], rows[c.table+"/"+c.change.DocID], known, fed) {
			t.Errorf("%s: %s\n  answer %s\n  model %+v", c, fault, results[i].raw, c.want)
		}
		docs.add(t, c, results[i], rows[c.table+"/"+c.change.DocID])
	}
	t.Logf("%d cells", len(cells))
	docs.check(t)
}

// faults is what is wrong with a cell's answer, its row and its place in the feed.
func (c *matrixCell) faults(t *testing.T, got pushResult, row modelRow, known, fed map[string]pushEntry) (list []string) {
	say := func(format string, args ...any) { list = append(list, fmt.Sprintf(format, args...)) }
	want, key := c.want, c.table+"/"+c.change.DocID
	if got.Status != want.status || got.Code != want.code || got.Retryable {
		say("is %s (retryable %t), want %s %s", got, got.Retryable, want.status, want.code)
	}
	if want.policy != "" && got.Policy != want.policy {
		say("policy is %q, want %q", got.Policy, want.policy)
	}
	if slices.Sort(got.Columns); !slices.Equal(got.Columns, want.columns) && len(got.Columns)+len(want.columns) > 0 {
		say("columns are %q, want %q", got.Columns, want.columns)
	}
	if want.code != "" && got.Error == "" {
		say("says nothing")
	}
	if row = normalised(row, c.policy.soft); !reflect.DeepEqual(row, want.row) {
		say("the row is %v, want %v", row, want.row)
	}
	shown := got.shown(t)
	if wantShown := want.row; !want.shown {
		if shown != nil {
			say("shows %v, want no document", shown)
		}
	} else if shown = normalised(shown, c.policy.soft); !reflect.DeepEqual(shown, wantShown) {
		say("shows %v, want %v", shown, wantShown)
	}
	entry, isFed := fed[key]
	switch {
	case want.wrote && got.NewVersion == nil:
		say("has no new_version")
	case want.wrote && (!isFed || entry.Version != *got.NewVersion || entry.ClientID != "device-1"):
		say("new_version is %s; the feed has %+v", *got.NewVersion, entry)
	case !want.wrote && (got.NewVersion != nil || isFed):
		say("wrote nothing, but has new_version %s; the feed has %+v", text(got.NewVersion), entry)
	}
	if before := known[key].Version; want.shown && !want.wrote && (got.Version == nil || *got.Version != before) {
		say("version is %s, want %s", text(got.Version), before)
	} else if !want.shown && got.Version != nil {
		say("version is %s without a document", *got.Version)
	}
	return list
}

// normalised says only whether the column of soft deletes is set.
func normalised(row modelRow, soft string) modelRow {
	if row == nil || soft == "" || row[soft] == nil {
		return row
	}
	return overlaid(row, modelRow{soft: modelSet})
}

func text(v *string) string {
	if v == nil {
		return "null"
	}
	b, _ := json.Marshal(*v) // a string
	return string(b)
}

package chaos

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"regexp"
	"strconv"
	"strings"

	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/schema"
)

const (
	smallKeys = 40     // of each key column, so that rows collide
	fileIDs   = 24     // that rows name and clients upload
	largeKeys = 100000 // where the keys of large transactions begin
)

// value is a column's value as PostgreSQL writes it; sql, where set, is an expression that draws it.
type value struct {
	text string
	null bool
	sql  string
}

func (v value) literal() string {
	switch {
	case v.sql != "":
		return v.sql
	case v.null:
		return "NULL"
	}
	return quoteText(v.text)
}

func quoteText(s string) string {
	if strings.Contains(s, `\`) {
		return " E'" + strings.ReplaceAll(strings.ReplaceAll(s, `\`, `\\`), "'", "''") + "'"
	}
	return "'" + strings.ReplaceAll(s, "'", "''") + "'"
}

// json is the value as a push writes it.
func (v value) json(c *column, lossless bool) (json.RawMessage, bool) {
	if v.null {
		return json.RawMessage("null"), true
	}
	out, err := schema.AppendValue(nil, c.Type, []byte(v.text), lossless)
	return out, err == nil
}

// madeUp says whether values of a type can be made up.
func madeUp(t *schema.Type) bool {
	_, ok := makeUp(rand.New(rand.NewPCG(0, 0)), t, -1)
	return ok
}

// makeUp makes a value of a type, as PostgreSQL writes it.
func makeUp(rng *rand.Rand, t *schema.Type, mod int32) (string, bool) {
	u := t.Underlying()
	if len(u.Labels) > 0 {
		return pick(rng, u.Labels), true
	}
	if u.Elem != nil && strings.HasSuffix(u.Name, "[]") {
		var parts []string
		for range rng.IntN(4) {
			text, ok := makeUp(rng, u.Elem, mod)
			if !ok {
				return "", false
			}
			parts = append(parts, `"`+strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(text)+`"`)
		}
		if _, ok := makeUp(rng, u.Elem, mod); !ok {
			return "", false
		}
		return "{" + strings.Join(parts, ",") + "}", true
	}
	switch u.Name {
	case "smallint", "integer":
		return fmt.Sprint(rng.IntN(100)), true
	case "bigint":
		return fmt.Sprint([]int64{int64(rng.IntN(100)), 9007199254740993, -rng.Int64()}[rng.IntN(3)]), true
	case "numeric":
		if mod >= 0 { // of a given precision
			return fmt.Sprint(rng.IntN(10)), true
		}
		return fmt.Sprintf("%d.%0*d", rng.IntN(2000)-1000, 1+rng.IntN(20), rng.IntN(10)), true
	case "real", "double precision":
		return fmt.Sprint(float32(rng.IntN(1000)) / 8), true
	case "boolean":
		return pick(rng, []string{"t", "f"}), true
	case "text", "character varying", "character":
		return fit(word(rng), mod), true
	case "uuid":
		return fmt.Sprintf("00000000-0000-4000-8000-%012d", rng.IntN(smallKeys)), true
	case "date":
		return fmt.Sprintf("2026-%02d-%02d", 1+rng.IntN(12), 1+rng.IntN(28)), true
	case "time without time zone":
		return fmt.Sprintf("%02d:30:00", rng.IntN(24)), true
	case "timestamp without time zone":
		return fmt.Sprintf("2026-%02d-%02d 12:00:%02d.5", 1+rng.IntN(12), 1+rng.IntN(28), rng.IntN(60)), true
	case "timestamp with time zone":
		return fmt.Sprintf("2026-%02d-%02d 12:00:%02d.25+00", 1+rng.IntN(12), 1+rng.IntN(28), rng.IntN(60)), true
	case "interval":
		return fmt.Sprintf("%02d:00:00", rng.IntN(24)), true
	case "json":
		return fmt.Sprintf(`{"n" : %d, "a":[1, null, "x"], "n": 2.50}`, rng.IntN(100)), true
	case "jsonb":
		return fmt.Sprintf(`{"a": [1, null, "x\\y"], "n": %d}`, rng.IntN(100)), true
	case "bytea":
		return fmt.Sprintf(`\x%04x`, rng.IntN(1<<16)), true
	case "inet":
		return fmt.Sprintf("10.0.0.%d", rng.IntN(256)), true
	case "int4range":
		return fmt.Sprintf("[%d,%d)", rng.IntN(10), 10+rng.IntN(10)), true
	}
	return "", false
}

// word is short text, with what needs an escape somewhere; at times it is so long that it is stored out of line.
func word(rng *rand.Rand) string {
	if rng.IntN(12) == 0 {
		return strings.Repeat(fmt.Sprintf("%08x", rng.Uint32()), 300+rng.IntN(700))
	}
	return fmt.Sprintf("w%d \"é\\\n'", rng.IntN(100))
}

// fit cuts text to a varchar's length.
func fit(s string, mod int32) string {
	const header = 4
	if r := []rune(s); mod >= header && len(r) > int(mod-header) {
		return string(r[:mod-header])
	}
	return s
}

// random draws a value for a column of a row that writers share.
func (w *World) random(rng *rand.Rand, t *table, c *column) value {
	switch {
	case c.parent >= 0 && (!c.NotNull && !c.key) && rng.IntN(6) == 0:
		return value{null: true}
	case c.parent >= 0: // one that is there; of a key of several columns, the same row for each
		p := t.parents[c.parent]
		var order []string
		for _, name := range p.columns {
			order = append(order, name+"::text")
		}
		return value{sql: fmt.Sprintf("(SELECT %s FROM %s ORDER BY md5(concat(%s, %d)) LIMIT 1)", p.columns[c.Name], p.sql, strings.Join(sorted(order), ","), rng.IntN(20))}
	case len(c.claims) > 0 && !c.NotNull && !c.key && rng.IntN(12) == 0:
		return value{null: true}
	case len(c.claims) > 0:
		return value{text: pick(rng, w.pools[pick(rng, c.claims)].values)}
	case c.key:
		return value{text: smallKey(rng, c)}
	case len(c.files) > 0:
		return w.reference(rng, c)
	case !c.NotNull && rng.IntN(7) == 0:
		return value{null: true}
	case c.Name == t.spec.SoftDelete && rng.IntN(3) > 0:
		if c.Type.Underlying().Name == "boolean" {
			return value{text: "f"}
		}
		return value{null: true}
	}
	if strings.Contains(t.spec.Where, "row."+c.Name) && strings.Contains(c.Type.Underlying().Name, "int") {
		return value{text: fmt.Sprint(rng.IntN(6))} // near what filters compare with
	}
	text, _ := makeUp(rng, c.Type, c.TypMod)
	return value{text: text}
}

// smallKey draws a key column's value from few.
func smallKey(rng *rand.Rand, c *column) string {
	n := rng.IntN(smallKeys)
	switch c.Type.Underlying().Name {
	case "text", "character varying", "character":
		return fit(fmt.Sprint("k", n), c.TypMod)
	case "smallint", "integer", "bigint", "numeric":
		return fmt.Sprint(n)
	}
	text, _ := makeUp(rng, c.Type, c.TypMod)
	return text
}

// ownKey is a key column's value that only one client uses.
func ownKey(c *column, client, n int) string {
	const ownKeys = 1_000_000_000
	switch c.Type.Underlying().Name {
	case "text":
		return fmt.Sprintf("own-%d-%d", client, n)
	case "uuid":
		return fmt.Sprintf("00000000-0000-4000-9%03d-%012d", client, n)
	default: // integer, bigint
		return fmt.Sprint(ownKeys + client*1_000_000 + n)
	}
}

// reference draws a value that names attachments.
func (w *World) reference(rng *rand.Rand, c *column) value {
	if rng.IntN(4) == 0 && !c.NotNull {
		return value{null: true}
	}
	spec := pick(rng, c.files)
	u := c.Type.Underlying()
	switch {
	case spec.Path != "":
		return value{text: alongPath(spec.Path, w.files(rng))}
	case spec.Pattern != "": // texts that match can't be made from a pattern
		text, _ := makeUp(rng, c.Type, c.TypMod)
		return value{text: text}
	case u.Elem != nil:
		return value{text: "{" + w.fileFor(rng, u.Elem) + "," + w.fileFor(rng, u.Elem) + "}"}
	}
	return value{text: w.fileFor(rng, u)}
}

// fileFor is an id that fits a column's type.
func (w *World) fileFor(rng *rand.Rand, t *schema.Type) string { return fileID(rng.IntN(fileIDs), t) }

func fileID(n int, t *schema.Type) string {
	switch {
	case t != nil && t.Name == "uuid":
		return fmt.Sprintf("00000000-0000-4000-b000-%012d", n)
	case t != nil && strings.Contains(t.Name, "int"):
		return fmt.Sprint(1 + n)
	}
	return fmt.Sprintf("f%d.jpg", n)
}

func (w *World) files(rng *rand.Rand) string { return fileID(rng.IntN(fileIDs), nil) }

var pathStep = regexp.MustCompile(`\.\.([A-Za-z_]\w*)|\.\*|\.([A-Za-z_]\w*)|\['([^']*)'\]|\[(\d+)\]|\[\*\]`)

// alongPath is a JSON value in which a path reaches one text.
func alongPath(path, text string) string {
	var out any = text
	steps := pathStep.FindAllStringSubmatch(path, -1)
	for i := len(steps) - 1; i >= 0; i-- {
		s := steps[i]
		name := s[1] + s[2] + s[3]
		switch {
		case name != "":
			out = map[string]any{name: out}
		case s[4] != "":
			n, _ := strconv.Atoi(s[4]) // digits
			out = append(make([]any, n), out)
		default:
			out = []any{out}
		}
	}
	encoded, _ := json.Marshal(out) // texts, maps and lists
	return string(encoded)
}

// uploads are the ids that rows of the collections can name.
func uploads(tables []*table) (ids []string) {
	seen := map[string]bool{}
	for _, t := range tables {
		for i := range t.columns {
			c := &t.columns[i]
			for _, a := range c.files {
				u := c.Type.Underlying()
				if a.Path != "" || a.Pattern != "" {
					u = nil
				} else if u.Elem != nil {
					u = u.Elem
				}
				for n := range fileIDs {
					if id := fileID(n, u); !seen[id] && policies.ValidAttachmentID(id) {
						seen[id], ids = true, append(ids, id)
					}
				}
			}
		}
	}
	return ids
}

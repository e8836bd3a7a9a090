package schema

import (
	"fmt"
	"slices"
	"strings"
)

// Shape writes down what of a table decides how its documents look: one fact per line. Two equal shapes give equal
// documents for equal rows, and no change of a row went unseen between them; it is stored with the log, so that a change
// made while no gateway ran is noticed.
func (t *Table) Shape() string {
	var b strings.Builder
	fmt.Fprintf(&b, "table %d\n", t.OID)
	fmt.Fprintf(&b, "joined %s\n", t.joined)
	for _, k := range t.Key {
		fmt.Fprintf(&b, "key %q deferrable %t\n", t.Columns[k].Name, t.KeyDeferrable)
	}
	fmt.Fprintf(&b, "width %d\n", t.width)
	seen := map[uint32]bool{}
	for _, c := range t.Columns {
		if c.Generated {
			continue
		}
		fmt.Fprintf(&b, "column %d %q %d %d\n", c.Num, c.Name, c.Type.OID, c.TypMod)
		fmt.Fprintf(&b, "stamp %d %s\n", c.Num, c.stamp)
		writeType(&b, c.Type, seen)
	}
	fmt.Fprintf(&b, "file %d\n", t.file)
	for _, l := range t.Leaves {
		fmt.Fprintf(&b, "leaf %d %s\nfile %d\n", l.OID, l.link, l.file)
	}
	return b.String()
}

// writeType writes what can change under a type's OID.
func writeType(b *strings.Builder, t *Type, seen map[uint32]bool) {
	if t == nil || seen[t.OID] {
		return
	}
	seen[t.OID] = true
	for _, l := range t.Labels {
		fmt.Fprintf(b, "label %d %q\n", t.OID, l)
	}
	for i, f := range t.Fields {
		fmt.Fprintf(b, "field %d %d %q %d\n", t.OID, i, f.Name, f.Type.OID)
		writeType(b, f.Type, seen)
	}
	writeType(b, t.Base, seen)
	writeType(b, t.Elem, seen)
}

// KeepsShape says whether clients that hold documents of the stored shape lack nothing: nothing of it is gone, and what
// came is only labels of enums and nullable columns without a default (absent means null).
func (t *Table) KeepsShape(stored string) bool {
	old, now := strings.Split(stored, "\n"), strings.Split(t.Shape(), "\n")
	if !slices.Equal(take(&old, "file "), take(&now, "file ")) && !slices.Equal(take(&old, "stamp "), take(&now, "stamp ")) {
		return false // rewritten by ALTER TABLE: values may be others. VACUUM FULL and the like leave the columns alone
	}
	take(&old, "stamp ")
	take(&now, "stamp ")
	if t.shed(take(&old, "width ")) {
		return false
	}
	take(&now, "width ")
	for _, line := range old {
		if !slices.Contains(now, line) {
			return false
		}
	}
	quiet := map[string]bool{}
	for _, c := range t.Columns {
		if !c.NotNull && !c.HasDefault && c.Type.Base == nil {
			quiet[fmt.Sprintf("column %d %q %d %d", c.Num, c.Name, c.Type.OID, c.TypMod)] = true
		}
	}
	for _, line := range now {
		if slices.Contains(old, line) || quiet[line] || strings.HasPrefix(line, "label ") {
			continue
		}
		var oid uint32
		if n, _ := fmt.Sscanf(line, "field %d ", &oid); n == 1 && !strings.Contains(stored, fmt.Sprintf("field %d ", oid)) {
			continue // a composite type that came with a new column
		}
		return false
	}
	return true
}

// gapLine marks a stored shape: since it was taken, changes may still be missing.
const gapLine = "gap open\n"

// OpenGap marks a shape whose floor must rise once more, when the transactions that are open now have ended. It is stored
// with the mark, so that whoever leads next keeps to that.
func OpenGap(shape string) string { return CloseGap(shape) + gapLine }

// CloseGap returns the shape without that mark.
func CloseGap(shape string) string { return strings.TrimSuffix(shape, gapLine) }

// KeepsPublication says whether the table is in the publication as it was at the stored shape, without a gap.
func (t *Table) KeepsPublication(stored string) bool {
	lines := strings.Split(stored, "\n")
	return slices.Contains(take(&lines, "joined "), "joined "+t.joined)
}

// shed says whether a column came and went since the stored width: documents may have been shown with it.
func (t *Table) shed(stored []string) bool {
	var before int16
	if _, err := fmt.Sscanf(strings.Join(stored, "\n"), "width %d", &before); err != nil {
		return true
	}
	present := 0
	for _, c := range t.Columns {
		if c.Num > before {
			present++
		}
	}
	return present != int(t.width-before)
}

// take removes the lines with a prefix and returns them.
func take(lines *[]string, prefix string) (taken []string) {
	*lines = slices.DeleteFunc(*lines, func(line string) bool {
		mine := strings.HasPrefix(line, prefix)
		if mine {
			taken = append(taken, line)
		}
		return mine
	})
	return taken
}

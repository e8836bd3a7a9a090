package schema

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// recordset is the list of columns that json_to_recordset makes of a statement's parameter: n, the number of the ask or
// write, k0… the key, and values. PostgreSQL makes each of its text by the input function of its type, with its modifier;
// domains are their base here, for a domain that is NOT NULL would refuse an absent value.
type recordset struct {
	defs []string
	t    *Table
}

func (s *recordset) keys(t *Table) {
	s.t = t
	s.defs = append(s.defs, "n pg_catalog.int4")
	s.columns(t, "k", t.Key)
}

func (s *recordset) columns(t *Table, prefix string, at []int) {
	for i, c := range at {
		s.defs = append(s.defs, prefix+strconv.Itoa(i)+" "+t.Columns[c].inputType())
	}
}

func (s *recordset) from(alias string) string {
	return "pg_catalog.json_to_recordset($1) AS " + alias + "(" + strings.Join(s.defs, ", ") + ")"
}

func (s *recordset) keyNames(prefix string) string {
	var b strings.Builder
	for i := range s.t.Key {
		b.WriteString(comma(i) + prefix + "k" + strconv.Itoa(i))
	}
	return b.String()
}

// match finds the row, called w, of a key.
func (s *recordset) match(alias string) string {
	var b strings.Builder
	for i, at := range s.t.Key {
		if i > 0 {
			b.WriteString(" AND ")
		}
		equals := "OPERATOR(pg_catalog.=)"
		if i < len(s.t.keyEquals) {
			equals = s.t.keyEquals[i]
		}
		b.WriteString(s.t.Columns[at].asBase("w."+ident(s.t.Columns[at].Name)) + " " + equals + " " + alias + ".k" + strconv.Itoa(i))
	}
	return b.String()
}

// value turns a column of the recordset into one of the table's type.
func (s *recordset) value(t *Table, at int, name string) string {
	if u := t.Columns[at].Type.Underlying(); u.Kind == KindJSON {
		return name + "::pg_catalog." + u.Name
	}
	return name
}

// inputType is the type by which a column's text is read. json comes as text: json_to_recordset would write a string anew.
func (c *Column) inputType() string {
	switch {
	case c.Type.Underlying().Kind == KindJSON:
		return "pg_catalog.text"
	case c.declared != "":
		return c.declared
	}
	return c.Type.Underlying().Name
}

// asBase takes a domain's name off a column, for which PostgreSQL may have no operator; an index serves all the same.
func (c *Column) asBase(column string) string {
	if c.Type.Base == nil {
		return column
	}
	return column + "::" + c.Type.Underlying().Name
}

// comparable are the built-in types that PostgreSQL compares for equality as a whole, and by nothing less, such as the
// area of a box.
var comparable = []uint32{16, 17, 18, 19, 20, 21, 23, 25, 26, 650, 700, 701, 790, 829, 774, 869, 1042, 1043, 1082, 1083, 1114,
	1184, 1186, 1266, 1560, 1562, 1700, 2950, 3802, 3904, 3906, 3908, 3910, 3912, 3926}

// hasEquality says whether IS NOT DISTINCT FROM may compare values of the type. The operators of an extension's type are
// beyond our search path.
func (t *Type) hasEquality() bool {
	t = t.Underlying()
	switch t.Kind {
	case KindArray:
		return t.Elem.hasEquality()
	case KindComposite:
		return !slices.ContainsFunc(t.Fields, func(f Field) bool { return !f.Type.hasEquality() })
	}
	return t.Labels != nil || slices.Contains(comparable, t.OID)
}

func comma(i int) string {
	if i == 0 {
		return ""
	}
	return ", "
}

// only names the table without those that inherit from it, but with its partitions.
func (t *Table) only() string {
	if t.Kind == 'p' {
		return t.sql()
	}
	return "ONLY " + t.sql()
}

// recordWriter makes a recordset's parameter.
type recordWriter struct {
	buf  []byte
	text []byte
}

func (w *recordWriter) begin(n int) {
	w.buf = append(w.buf, "[,"[min(len(w.buf), 1)])
	w.buf = strconv.AppendInt(append(w.buf, `{"n":`...), int64(n), 10)
}

func (w *recordWriter) keys(key []string) {
	for i, k := range key {
		w.member("k", i, []byte(k))
	}
}

func (w *recordWriter) member(prefix string, i int, text []byte) {
	w.buf = strconv.AppendInt(append(append(w.buf, `,"`...), prefix...), int64(i), 10)
	w.buf = AppendString(append(w.buf, `":`...), text)
}

func (w *recordWriter) columns(t *Table, prefix string, at []int, values map[string][]byte) (err error) {
	for i, c := range at {
		v := values[t.Columns[c].Name]
		if v == nil || isNull(v) {
			continue
		}
		if w.text, err = appendInput(w.text[:0], t.Columns[c].Type, v); err != nil {
			return &ValueError{t.Columns[c].Name, err.Error()}
		}
		w.member(prefix, i, w.text)
	}
	return nil
}

func (w *recordWriter) end() { w.buf = append(w.buf, '}') }

func (w *recordWriter) finish() []byte { return append(w.buf, ']') }

// parseRecord returns the texts of n columns of a row that was written as one text. Only so do rows of any type come as text
// through a batch, in which pgx chooses the format.
func parseRecord(text []byte, n int) (Row, error) {
	if len(text) < 2 || text[0] != '(' || text[len(text)-1] != ')' {
		return nil, fmt.Errorf("%w: a row has no parentheses", ErrMalformed)
	}
	text = text[1 : len(text)-1]
	row := make(Row, 0, n)
	room := make([]byte, 0, len(text))
	for i := range n {
		if i > 0 {
			if len(text) == 0 || text[0] != ',' {
				return nil, fmt.Errorf("%w: a row has fewer columns than its table", ErrMalformed)
			}
			text = text[1:]
		}
		switch {
		case len(text) == 0 || text[0] == ',':
			row = append(row, nil)
		case text[0] == '"':
			end, _ := quotedEnd(text, true)
			if end < 0 {
				return nil, fmt.Errorf("%w: a row lacks a quote", ErrMalformed)
			}
			from := len(room)
			room = appendUnescaped(room, text[1:end-1])
			row = append(row, room[from:len(room):len(room)])
			text = text[end:]
		default:
			end := 0
			for end < len(text) && text[end] != ',' {
				end++
			}
			from := len(room)
			room = append(room, text[:end]...)
			row = append(row, room[from:len(room):len(room)])
			text = text[end:]
		}
	}
	if len(text) > 0 {
		return nil, fmt.Errorf("%w: a row has more columns than its table", ErrMalformed)
	}
	return row, nil
}

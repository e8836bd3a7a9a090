package schema

import (
	"bytes"
	"slices"
)

// Change is one change of a push as OrderChanges looks at it.
type Change struct {
	Table *Table
	Kind  WriteKind // an upsert is an Insert where there is no row, else an Update
	Key   []string  // nil: the database assigns it
	Data  []byte    // a JSON object, or nil
	Row   Row       // the row as it is, in the layout of Table.Ordinary, or nil
}

// OrderChanges returns the order in which to carry changes out, as indexes. It is that of the list, but that a parent's
// insert comes before what refers to it, and what referred to a row before that row's delete. Only changes whose values
// meet in a foreign key are so linked; changes of one document keep their order, and so do those of a circle.
func OrderChanges(changes []Change) []int {
	before := make([][]int, len(changes)) // what has to come before each
	link := func(first, then int) {
		if first != then {
			before[then] = append(before[then], first)
		}
	}
	documents := map[string]int{}
	for i, c := range changes {
		if c.Key == nil {
			continue
		}
		id := linkName(c.Table.OID, nil, c.Key)
		if last, ok := documents[id]; ok {
			link(last, i)
		}
		documents[id] = i
	}
	made, gone := parents(changes)
	for i, c := range changes {
		for _, fk := range c.Table.ForeignKeys {
			if name, ok := c.values(fk.Columns, fk, true); ok && c.Kind != Delete {
				if parent, ok := made[name]; ok {
					link(parent, i)
				}
			}
			if name, ok := c.values(fk.Columns, fk, false); ok && c.Kind != Insert {
				if parent, ok := gone[name]; ok {
					link(i, parent)
				}
			}
		}
	}
	return arrange(before)
}

// parents returns, by the values of every foreign key that may refer to it, the first insert and the last delete of a row.
func parents(changes []Change) (made, gone map[string]int) {
	made, gone = map[string]int{}, map[string]int{}
	known := map[uint32][]ForeignKey{} // by the parent, one for each set of columns
	for _, c := range changes {
		for _, fk := range c.Table.ForeignKeys {
			same := func(k ForeignKey) bool { return slices.Equal(k.ParentColumns, fk.ParentColumns) }
			if !slices.ContainsFunc(known[fk.Parent], same) {
				known[fk.Parent] = append(known[fk.Parent], fk)
			}
		}
	}
	for i, c := range changes {
		for _, fk := range known[c.Table.OID] {
			name, ok := c.values(fk.ParentColumns, fk, c.Kind != Delete)
			if !ok {
				continue
			}
			if _, taken := made[name]; c.Kind == Insert && !taken {
				made[name] = i
			}
			if c.Kind == Delete {
				gone[name] = i
			}
		}
	}
	return made, gone
}

// values names what the change's row holds in columns, after it or before: what a foreign key's child and parent have in
// common. There is no name where a value is null or unknown.
func (c *Change) values(columns []string, fk ForeignKey, after bool) (string, bool) {
	data := map[string][]byte{}
	if after {
		if d, err := members(c.Data); err == nil {
			data = d
		}
	}
	texts := make([]string, len(columns))
	for i, name := range columns {
		text := c.value(name, data)
		if text == nil {
			return "", false
		}
		texts[i] = string(text)
	}
	return linkName(fk.Parent, fk.ParentColumns, texts), true
}

func (c *Change) value(name string, data map[string][]byte) []byte {
	at := c.Table.Column(name)
	if at < 0 {
		return nil
	}
	if k := slices.Index(c.Table.Key, at); k >= 0 && c.Key != nil {
		return canonical(c.Table.Columns[at].Type, []byte(c.Key[k]))
	}
	if v, named := data[name]; named {
		if isNull(v) {
			return nil
		}
		text, err := appendInput(nil, c.Table.Columns[at].Type, v)
		if err != nil {
			return nil
		}
		return canonical(c.Table.Columns[at].Type, text)
	}
	i := slices.IndexFunc(c.Table.Ordinary(), func(col Column) bool { return col.Name == name })
	if c.Row == nil || i < 0 {
		return nil
	}
	return c.Row[i]
}

// canonical is how PostgreSQL writes a uuid, of which clients like capitals. Other keys that are spelled in two ways within
// one push aren't linked.
func canonical(t *Type, text []byte) []byte {
	if t.Underlying().Name == "uuid" {
		return bytes.ToLower(text)
	}
	return text
}

func linkName(table uint32, columns, texts []string) string {
	b := AppendDocID(nil, append([]string{""}, columns...))
	b = append(b, byte(table>>24), byte(table>>16), byte(table>>8), byte(table))
	return string(AppendDocID(b, append([]string{""}, texts...)))
}

// arrange puts each after what has to come before it, and otherwise keeps the order. Those on a circle keep theirs.
func arrange(before [][]int) []int {
	circle := circles(before)
	last := map[int]int{}
	for i := range before { // within a circle only the order of the list counts
		before[i] = slices.DeleteFunc(before[i], func(j int) bool { return circle[i] == circle[j] })
		if j, ok := last[circle[i]]; ok {
			before[i] = append(before[i], j)
		}
		last[circle[i]] = i
		slices.Sort(before[i])
	}
	order := make([]int, 0, len(before))
	done := make([]bool, len(before))
	var visit func(i int)
	visit = func(i int) {
		if done[i] {
			return
		}
		done[i] = true
		for _, j := range before[i] {
			visit(j)
		}
		order = append(order, i)
	}
	for i := range before {
		visit(i)
	}
	return order
}

// circles numbers the strongly connected parts (Tarjan).
func circles(before [][]int) []int {
	circle, index, low := make([]int, len(before)), make([]int, len(before)), make([]int, len(before))
	var stack []int
	on := make([]bool, len(before))
	next := 0
	var visit func(i int)
	visit = func(i int) {
		next++
		index[i], low[i] = next, next
		stack, on[i] = append(stack, i), true
		for _, j := range before[i] {
			if index[j] == 0 {
				visit(j)
				low[i] = min(low[i], low[j])
			} else if on[j] {
				low[i] = min(low[i], index[j])
			}
		}
		if low[i] != index[i] {
			return
		}
		for {
			j := stack[len(stack)-1]
			stack, on[j] = stack[:len(stack)-1], false
			circle[j] = i
			if j == i {
				return
			}
		}
	}
	for i := range before {
		if index[i] == 0 {
			visit(i)
		}
	}
	return circle
}

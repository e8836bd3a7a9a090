package policies

import (
	"bytes"
	"encoding/json"
	"io"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/walgate/walgate/schema"
)

// FuzzPath: whatever is read prints in a form that reads the same.
func FuzzPath(f *testing.F) {
	for _, text := range []string{"$", "$.photos[*].id", "$..id", `$['a b']["c"][0].*`, "$..[*]", "$.", "$[", "$['a", "$.a b", "$[1:2]", "photos"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		path, err := parsePath(text)
		if err != nil {
			return
		}
		again, err := parsePath(path.String())
		if err != nil || !slices.Equal(again, path) || again.String() != path.String() {
			t.Fatalf("%q prints as %q, which reads as %q, %v", text, path, again, err)
		}
	})
}

// node is JSON as encoding/json reads it, with members of one name kept apart.
type node struct {
	members  []member
	elements []*node
	scalar   json.Token
	array    bool
}

type member struct {
	name  string
	value *node
}

func readNode(d *json.Decoder) (*node, error) {
	token, err := d.Token()
	if err != nil {
		return nil, err
	}
	n := &node{scalar: token}
	switch token {
	case json.Delim('{'):
		for n.scalar = nil; d.More(); {
			name, err := d.Token()
			if err != nil {
				return nil, err
			}
			value, err := readNode(d)
			if err != nil {
				return nil, err
			}
			n.members = append(n.members, member{name.(string), value})
		}
		_, err = d.Token()
	case json.Delim('['):
		n.array = true
		for n.scalar = nil; d.More(); {
			value, err := readNode(d)
			if err != nil {
				return nil, err
			}
			n.elements = append(n.elements, value)
		}
		_, err = d.Token()
	}
	return n, err
}

func (n *node) children(f func(name string, index int, value *node)) {
	for _, m := range n.members {
		f(m.name, -1, m.value)
	}
	for i, e := range n.elements {
		f("", i, e)
	}
}

// follow calls f with every value that the path leads to, step by step.
func (n *node) follow(path jsonPath, f func(*node)) {
	if len(path) == 0 {
		f(n)
		return
	}
	s := path[0]
	n.children(func(name string, index int, value *node) {
		if s.kind == stepAny || s.kind == stepIndex && index == s.index || s.kind == stepName && index < 0 && name == s.name {
			value.follow(path[1:], f)
		}
		if s.deep {
			value.follow(path, f)
		}
	})
}

var wholeNumber = regexp.MustCompile(`^-?[0-9]+$`)

// ids adds the ids of a value that was reached.
func (n *node) ids(out map[string]bool) {
	switch v := n.scalar.(type) {
	case string:
		out[v] = true
	case json.Number:
		if wholeNumber.MatchString(v.String()) {
			out[v.String()] = true
		}
	}
	for _, e := range n.elements {
		e.ids(out)
	}
}

func (n *node) matches(pattern *regexp.Regexp, out map[string]bool) {
	if text, ok := n.scalar.(string); ok {
		for _, id := range pattern.FindAllString(text, -1) {
			out[id] = true
		}
	}
	n.children(func(_ string, _ int, value *node) { value.matches(pattern, out) })
}

// FuzzReferencesInJSON holds the walk over raw text against a tree that is followed step by step; what is no JSON must do no
// harm.
func FuzzReferencesInJSON(f *testing.F) {
	for _, s := range [][2]string{
		{"$.photos[*].id", `{"photos": [{"id": "a"}, {"id": 2}, {"id": ["b", {"id": "c"}, 1.5, true, null]}], "id": "d"}`},
		{"$..id", `{"id": {"id": "a\u0062"}, "i\u0064": "\ud83d\ude00", "x": [[{"id": "b"}]], "y": "\\\""}`},
		{"$", `[1, "a", [-2, "b"], {}]`}, {"$..*", `{"a": {"b": "c"}, "d": ["e", 0]}`}, {"$..a..[1]", `{"a": [0, [1, [2, 3]], {"a": [4, 5]}]}`},
		{"$.a", `{"a": "x`}, {"$.a", `{"a" "x"}`}, {"$", `]`}, {"$.*.*", "{\"a\":\n[\"x\" ,\t\"y\"]}"}, {"a+", `{"a": ["aa b", "\u0061"]}`},
	} {
		f.Add(s[0], []byte(s[1]))
	}
	f.Fuzz(func(t *testing.T, where string, text []byte) {
		a := attachment{typ: tJSON}
		var err error
		if a.path, err = parsePath(where); err != nil {
			if a.pattern, err = regexp.Compile(where); err != nil {
				return
			}
			a.path = nil
		}
		c := &Collection{attachments: []attachment{a}}
		b := &Binding{Collection: c, columns: make([]schema.Column, 1), references: references{at: []int{0}}}
		before := bytes.Clone(text)
		got := b.ReferencedIDs(schema.Row{text})
		if !bytes.Equal(text, before) {
			t.Fatalf("%q became %q", before, text)
		}
		if !json.Valid(text) || !utf8.Valid(text) {
			return
		}
		d := json.NewDecoder(bytes.NewReader(text))
		d.UseNumber()
		root, err := readNode(d)
		if err != nil && err != io.EOF {
			t.Fatal(err)
		}
		all := map[string]bool{}
		if a.pattern != nil {
			root.matches(a.pattern, all)
		} else {
			root.follow(a.path, func(n *node) { n.ids(all) })
		}
		var want []string
		for id := range all {
			if ValidAttachmentID(id) {
				want = append(want, id)
			}
		}
		slices.Sort(want)
		if strings.Join(got, " ") != strings.Join(want, " ") {
			t.Fatalf("%s of %s: got %q, want %q", where, text, got, want)
		}
	})
}

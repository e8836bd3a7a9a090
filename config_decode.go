package main

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// mark is where a value stands: in the file, or in an environment variable.
type mark struct {
	line, column int
	variable     string
}

// decoder walks the YAML tree against the keys and gathers every fault instead of stopping at the first.
type decoder struct {
	path      string
	env       func(string) (string, bool)
	positions map[string]mark
	faults    []Fault
	bad       []string // keys with a fault, which later checks leave alone
}

func (d *decoder) fault(at mark, key, got, want, hint string) {
	f := Fault{Line: at.line, Column: at.column, Key: key, Got: got, Want: want, Hint: hint}
	switch {
	case at.variable != "":
		f.At = "environment variable " + at.variable
	case at.line > 0:
		f.At = fmt.Sprintf("%s:%d:%d", d.path, at.line, at.column)
	default:
		f.At = d.path
	}
	d.faults = append(d.faults, f)
	d.bad = append(d.bad, key)
}

// where returns the place of a key, or of its nearest parent that the file names.
func (d *decoder) where(key string) mark {
	for key != "" {
		if at, ok := d.positions[key]; ok {
			return at
		}
		key = key[:max(strings.LastIndexByte(key, '.'), 0)]
	}
	return mark{}
}

// file decodes the YAML text. It returns false where the text is no configuration at all, which makes all further
// faults noise.
func (d *decoder) file(data []byte, keys []key, c *Config) bool {
	root, ok := d.parse(data)
	if !ok {
		return false
	}
	if _, isMap := root.(ast.MapNode); !isMap && root != nil {
		d.fault(nodeMark(root), "", describe(root), "a map of keys such as database and collections", "")
		return false
	}
	d.mapping(root, "", keys, map[string]func(string, ast.Node){
		"collections": func(path string, n ast.Node) { c.Collections = d.collections(path, n) },
	})
	return true
}

// parse returns the document's root, nil for an empty file.
func (d *decoder) parse(data []byte) (root ast.Node, ok bool) {
	const want = "YAML"
	defer func() {
		if recover() != nil { // the YAML library indexes some broken input without checks
			d.fault(mark{}, "", "text that the YAML reader can't take", want, "check brackets, quotes and indentation")
			root, ok = nil, false
		}
	}()
	file, err := parser.ParseBytes(data, 0, parser.AllowDuplicateMapKey())
	if err != nil {
		var broken *yaml.SyntaxError
		if errors.As(err, &broken) {
			d.fault(tokenMark(broken.GetToken()), "", "broken syntax: "+broken.GetMessage(), want, "")
		} else {
			d.fault(mark{}, "", "broken syntax", want, "check brackets, quotes and indentation")
		}
		return nil, false
	}
	docs := slices.DeleteFunc(file.Docs, func(doc *ast.DocumentNode) bool { return doc.Body == nil })
	switch len(docs) {
	case 0:
		return nil, true
	case 1:
		return docs[0].Body, true
	}
	d.fault(nodeMark(docs[1].Body), "", "a second YAML document", "one document", "remove the line ---")
	return nil, false
}

// mapping decodes a map whose known keys begin with prefix. special decodes what is not a plain key.
func (d *decoder) mapping(n ast.Node, prefix string, keys []key, special map[string]func(string, ast.Node)) {
	for _, e := range d.entries(n, strings.TrimSuffix(prefix, ".")) {
		path := prefix + e.name
		i := slices.IndexFunc(keys, func(k key) bool { return k.path == path })
		switch {
		case i >= 0:
			d.value(keys[i], e.value)
		case special[path] != nil:
			special[path](path, e.value)
		case slices.ContainsFunc(keys, func(k key) bool { return strings.HasPrefix(k.path, path+".") }):
			d.mapping(e.value, path+".", keys, special)
		default:
			d.unknown(e, prefix, keys, special)
		}
	}
}

func (d *decoder) unknown(e entry, prefix string, keys []key, special map[string]func(string, ast.Node)) {
	known := childNames(prefix, keys, special)
	hint := ""
	if near := nearest(e.name, known); near != "" {
		hint = fmt.Sprintf("did you mean %q?", near)
	} else if i := slices.IndexFunc(keys, func(k key) bool { return strings.HasSuffix(k.path, "."+e.name) }); i >= 0 {
		hint = fmt.Sprintf("did you mean %q?", keys[i].path)
	}
	d.fault(e.at, prefix+e.name, "an unknown key", "one of "+strings.Join(known, ", "), hint)
}

// childNames lists the keys directly below a prefix.
func childNames(prefix string, keys []key, special map[string]func(string, ast.Node)) []string {
	var names []string
	add := func(path string) {
		if rest, ok := strings.CutPrefix(path, prefix); ok {
			name, _, _ := strings.Cut(rest, ".")
			if !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	for _, k := range keys {
		add(k.path)
	}
	for path := range special {
		add(path)
	}
	slices.Sort(names)
	return names
}

// entry is one key and value of a YAML map.
type entry struct {
	name  string
	at    mark
	value ast.Node
}

// entries returns the map's entries, the first of each name, and notes where each stands.
func (d *decoder) entries(n ast.Node, path string) []entry {
	var values []*ast.MappingValueNode
	switch n := n.(type) {
	case *ast.MappingNode:
		values = n.Values
	case *ast.MappingValueNode:
		values = []*ast.MappingValueNode{n}
	case *ast.NullNode, nil: // a section whose keys are all commented out
		return nil
	default:
		d.fault(nodeMark(n), path, describe(n), "a map", "")
		return nil
	}
	var entries []entry
	seen := map[string]mark{}
	for _, v := range values {
		at := nodeMark(v.Key)
		name, ok := keyName(v.Key)
		if !ok {
			d.fault(at, path, "a key that is not plain text", "a name", "")
			continue
		}
		full := strings.TrimPrefix(path+"."+name, ".")
		if first, twice := seen[name]; twice {
			d.fault(at, full, "the key a second time", "it once", fmt.Sprintf("the first stands in line %d", first.line))
			continue
		}
		seen[name] = at
		d.positions[full] = at
		entries = append(entries, entry{name: name, at: at, value: v.Value})
	}
	return entries
}

func keyName(n ast.MapKeyNode) (string, bool) {
	switch n := n.(type) {
	case *ast.StringNode:
		return n.Value, true
	case *ast.IntegerNode, *ast.BoolNode, *ast.NullNode, *ast.FloatNode:
		return n.GetToken().Value, true
	}
	return "", false
}

// value decodes what stands behind a plain key. The environment's twin wins, so the file's value is then not looked at.
func (d *decoder) value(k key, n ast.Node) {
	if _, ok := d.env(twin(k.path)); ok {
		return
	}
	if list, ok := k.into.(*[]string); ok {
		*list = d.list(k, n)
		return
	}
	text, ok := d.scalar(k, k.path, n)
	if !ok {
		return
	}
	if want := k.set(text); want != "" {
		d.fault(nodeMark(n), k.path, k.show(n, text), want, k.nearest(text))
	}
}

func (d *decoder) list(k key, n ast.Node) []string {
	seq, ok := n.(*ast.SequenceNode)
	if !ok {
		d.fault(nodeMark(n), k.path, describe(n), "a list", "write it as [one, two]")
		return nil
	}
	var list []string
	element := key{path: k.path, into: new(string), check: k.check, words: k.words, nonEmpty: true}
	for i, item := range seq.Values {
		path := fmt.Sprintf("%s.%d", k.path, i)
		d.positions[path] = nodeMark(item)
		text, ok := d.scalar(element, path, item)
		if !ok {
			continue
		}
		if want := element.set(text); want != "" {
			d.fault(nodeMark(item), path, element.show(item, text), want, k.nearest(text))
		}
		list = append(list, text)
	}
	if k.nonEmpty && len(seq.Values) == 0 {
		d.fault(nodeMark(n), k.path, "an empty list", k.checkAll(nil), "")
	}
	return list
}

// scalar returns the text of a single value with the environment's variables filled in.
func (d *decoder) scalar(k key, path string, n ast.Node) (string, bool) {
	raw, ok := rawText(n)
	if !ok {
		d.fault(nodeMark(n), path, describe(n), k.wantType(), nullHint(n))
		return "", false
	}
	if !k.accepts(n, raw) {
		d.fault(nodeMark(n), path, k.show(n, raw), k.wantType(), quoteHint(k))
		return "", false
	}
	full, problem := expand(raw, d.env)
	if problem != "" {
		d.fault(nodeMark(n), path, problem, k.wantType(), "set the variable, or write $${ for a literal ${")
		return "", false
	}
	return full, true
}

// rawText is the text of a single value as the file has it.
func rawText(n ast.Node) (string, bool) {
	switch n := n.(type) {
	case *ast.StringNode:
		return n.Value, true
	case *ast.LiteralNode:
		return n.Value.Value, true
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode:
		return n.GetToken().Value, true
	}
	return "", false
}

func isText(n ast.Node) bool { return n.Type() == ast.StringType || n.Type() == ast.LiteralType }

// accepts tells whether the YAML type fits the key. A text with a variable may become a number or boolean; a bare
// number is left to the check of sizes and durations, which asks for a unit.
func (k key) accepts(n ast.Node, raw string) bool {
	variable := isText(n) && strings.Contains(raw, "${")
	switch k.into.(type) {
	case *bool:
		return n.Type() == ast.BoolType || variable
	case *int, *int64:
		return n.Type() == ast.IntegerType || variable
	case *Size, *time.Duration:
		return isText(n) || n.Type() == ast.IntegerType
	default:
		return isText(n)
	}
}

func nullHint(n ast.Node) string {
	if _, ok := n.(*ast.NullNode); ok {
		return "leave the key out for its default"
	}
	return ""
}

func quoteHint(k key) string {
	switch k.into.(type) {
	case *bool:
		return ""
	case *int, *int64:
		return "write digits without quotes and unit"
	case *Size, *time.Duration:
		return "write a whole number and a unit"
	}
	return "put it in quotes"
}

// show is the value as messages may repeat it.
func (k key) show(n ast.Node, text string) string {
	if k.hidden() {
		return "a value (not shown)"
	}
	if isText(n) {
		return quote(text)
	}
	return text
}

func describe(n ast.Node) string {
	switch n := n.(type) {
	case *ast.MappingNode, *ast.MappingValueNode:
		return "a map"
	case *ast.SequenceNode:
		return "a list"
	case *ast.NullNode, nil:
		return "nothing"
	case *ast.StringNode, *ast.LiteralNode:
		return "text"
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode:
		return n.GetToken().Value
	case *ast.AnchorNode, *ast.AliasNode:
		return "a YAML anchor or alias, which walgate does not read"
	}
	return "a YAML tag or other construct that walgate does not read"
}

func quote(text string) string {
	const most = 60
	if runes := []rune(text); len(runes) > most {
		text = string(runes[:most]) + "…"
	}
	return strconv.Quote(text)
}

var variablePattern = regexp.MustCompile(`\$?\$\{[^}]*\}?`)

// expand replaces ${NAME} from the environment; $${ stands for ${. The second result says what is wrong.
func expand(text string, env func(string) (string, bool)) (string, string) {
	problem := ""
	full := variablePattern.ReplaceAllStringFunc(text, func(m string) string {
		if strings.HasPrefix(m, "$$") {
			return m[1:]
		}
		name := strings.TrimSuffix(m[2:], "}")
		if !namePattern.MatchString(name) || !strings.HasSuffix(m, "}") {
			problem = "${ without a variable's name and }"
			return ""
		}
		value, ok := env(name)
		if !ok && problem == "" {
			problem = m + ", a variable that the environment does not set"
		}
		return value
	})
	return full, problem
}

var namePattern = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

func nodeMark(n ast.Node) mark {
	if n == nil {
		return mark{}
	}
	if m, ok := n.(*ast.MappingNode); ok && len(m.Values) > 0 && !m.IsFlowStyle {
		return nodeMark(m.Values[0].Key) // the map's own token is a colon
	}
	if v, ok := n.(*ast.MappingValueNode); ok {
		return nodeMark(v.Key)
	}
	return tokenMark(n.GetToken())
}

func tokenMark(t *token.Token) mark {
	if t == nil || t.Position == nil {
		return mark{}
	}
	return mark{line: t.Position.Line, column: t.Position.Column}
}

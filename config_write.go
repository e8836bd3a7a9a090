package main

import (
	"slices"

	"github.com/goccy/go-yaml/ast"

	"github.com/walgate/walgate/policies"
)

// writeKeys lists the plain keys of a collection's write section.
func writeKeys(path string, w *policies.WriteSpec) []key {
	return []key{
		{path: path + ".roles", into: &w.Roles, nonEmpty: true},
		{path: path + ".operations", into: &w.Operations, nonEmpty: true, words: []string{"insert", "update", "delete"}},
		{path: path + ".columns", into: &w.Columns, nonEmpty: true},
		{path: path + ".check", into: &w.Check, nonEmpty: true},
	}
}

// write decodes who may write what. A section that says nothing is a slip: it would let everybody write everything.
func (d *decoder) write(path string, n ast.Node) *policies.WriteSpec {
	w := &policies.WriteSpec{}
	d.mapping(n, path+".", writeKeys(path, w), map[string]func(string, ast.Node){
		path + ".set": func(path string, n ast.Node) {
			w.Set = d.alternative(path, n, "leave set out where inserts take nothing from claims")
		},
	})
	said := w.Roles != nil || w.Operations != nil || w.Columns != nil || w.Set != nil || w.Check != ""
	if !said && !d.badWithin(path) {
		d.fault(d.positions[path], path, "nothing", "roles, operations, columns, set or check", "leave write out where nobody may write")
	}
	return w
}

// conflict decodes the name of a conflict policy, or {function: schema.name}.
func (d *decoder) conflict(path string, n ast.Node, s *policies.Spec) {
	if _, isMap := n.(ast.MapNode); !isMap {
		d.value(key{path: path, into: &s.Conflict, words: slices.Concat(policies.ConflictPolicies, []string{"{function: schema.name}"})}, n)
		return
	}
	function := key{path: path + ".function", into: &s.ConflictFunction, check: checkFunction}
	d.mapping(n, path+".", []key{function}, nil)
	s.Conflict = policies.Function
	if s.ConflictFunction == "" && !d.badWithin(path) {
		d.fault(nodeMark(n), path, "a map without function", "{function: schema.name}", "")
	}
}

func checkFunction(text string) string {
	if policies.IsFunctionName(text) {
		return ""
	}
	return "a SQL function as schema.name, such as app.resolve"
}

// nearest is a hint at the one right text that is like the wrong one, or "".
func (k key) nearest(text string) string {
	if near := nearest(text, k.words); near != "" {
		return "did you mean " + near + "?"
	}
	return ""
}

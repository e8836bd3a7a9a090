package policies

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/google/cel-go/cel"
	"github.com/google/cel-go/common/ast"
	"github.com/google/cel-go/common/operators"
	"github.com/google/cel-go/common/types"
	"github.com/google/cel-go/common/types/ref"

	"github.com/walgate/walgate/schema"
)

// CostLimit is how much CEL work one evaluation of a filter may do; past it the row counts as invisible. An operator
// costs 1 and work on a text a tenth of its length.
const CostLimit = 100_000

// filter is a compiled where. Immutable but for its pool.
type filter struct {
	program cel.Program
	columns []filterColumn // those that the expression reads, in table order
	claims  []string       // those that it names, sorted

	judgements judgements
}

type filterColumn struct {
	variable string // as CEL knows it: row.NAME
	table    int    // position in Table.Columns
	kind     valueKind
	elem     valueKind // of a list
}

func (k *compiler) compileWhere() { k.c.filter = k.compileFilter("where", k.c.Spec.Where) }

// compileFilter compiles the expression of a key; nil where there is none, or it is faulty.
func (k *compiler) compileFilter(key, text string) *filter {
	if strings.TrimSpace(text) == "" {
		return nil
	}
	fault := func(got, hint string) *filter {
		k.fault(key, got, "a CEL expression over row and claims that gives true or false", hint)
		return nil
	}
	env, err := cel.NewCustomEnv(cel.StdLib(), cel.CustomTypeAdapter(adapter{}), cel.EnableIdentifierEscapeSyntax())
	if err != nil {
		return fault(text, err.Error())
	}
	parsed, issues := env.Parse(text)
	if issues.Err() != nil {
		return fault(text, oneLine(issues))
	}
	f, ok := k.collectUses(key, parsed)
	if !ok {
		return nil
	}
	options := []cel.EnvOption{cel.Variable("claims", cel.MapType(cel.StringType, cel.DynType))}
	for _, col := range f.columns {
		options = append(options, cel.Variable(col.variable, celType(col.kind, col.elem)))
	}
	env, err = env.Extend(options...)
	if err != nil {
		return fault(text, err.Error())
	}
	checked, issues := env.Check(parsed)
	if issues.Err() != nil {
		return fault(text, oneLine(issues))
	}
	if checked.OutputType().Kind() != types.BoolKind {
		return fault(text+", which gives "+plainTypes(checked.OutputType().String()), "compare it with something: … == true")
	}
	if f.program, err = newProgram(env, checked); err != nil {
		return fault(text, err.Error())
	}
	return f
}

// newProgram makes the evaluator. Counting the cost takes longer than most expressions, so it is left out where the
// expression can't exceed the limit whatever the row holds.
func newProgram(env *cel.Env, checked *cel.Ast) (cel.Program, error) {
	estimate, err := env.EstimateCost(checked, unknownSizes{})
	if err == nil && estimate.Max <= CostLimit {
		return env.Program(checked, cel.EvalOptions(cel.OptOptimize))
	}
	return env.Program(checked, cel.EvalOptions(cel.OptOptimize), cel.CostLimit(CostLimit))
}

func oneLine(issues *cel.Issues) string {
	var out []string
	for _, e := range issues.Errors() {
		out = append(out, fmt.Sprintf("column %d: %s", e.Location.Column()+1, strings.ReplaceAll(plainTypes(e.Message), "\n", " ")))
	}
	return strings.Join(out, "; ")
}

var wrapper = regexp.MustCompile(`wrapper\((\w+)\)`)

// plainTypes takes CEL's mark of nullable types, which every column has, out of a message.
func plainTypes(message string) string { return wrapper.ReplaceAllString(message, "$1") }

// uses walks a parsed filter for what it reads. row and claims may only be selected from by constant names: a filter
// that could name any column or claim would depend on all of them.
type uses struct {
	k       *compiler
	key     string // of the configuration
	columns map[int]bool
	claims  map[string]bool
	named   map[int64]bool // ids of row and claims identifiers that stand before a name
	ok      bool
}

func (k *compiler) collectUses(key string, parsed *cel.Ast) (*filter, bool) {
	u := &uses{k: k, key: key, columns: map[int]bool{}, claims: map[string]bool{}, named: map[int64]bool{}, ok: true}
	ast.PreOrderVisit(parsed.NativeRep().Expr(), ast.NewExprVisitor(u.visit))
	f := &filter{}
	for i, col := range k.c.Table.Columns {
		if u.columns[i] {
			kind, elem := kindOf(col.Type)
			f.columns = append(f.columns, filterColumn{variable: "row." + col.Name, table: i, kind: kind, elem: elem})
		}
	}
	for name := range u.claims {
		f.claims = append(f.claims, name)
	}
	slices.Sort(f.claims)
	return f, u.ok
}

func (u *uses) visit(e ast.Expr) {
	switch e.Kind() {
	case ast.SelectKind:
		s := e.AsSelect()
		u.selected(s.Operand(), s.FieldName(), s.IsTestOnly())
	case ast.CallKind:
		call := e.AsCall()
		if call.FunctionName() != operators.Index || len(call.Args()) != 2 {
			return
		}
		from, key := call.Args()[0], call.Args()[1]
		if name, ok := constantString(key); ok && isIdent(from, "claims") {
			u.selected(from, name, false)
		}
	case ast.IdentKind:
		if u.named[e.ID()] {
			return
		}
		switch e.AsIdent() {
		case "row":
			u.fault("row without a column", "row.COLUMN", "row can't be used as a whole")
		case "claims":
			u.fault("claims without a name", "claims.NAME", "only constant names, so that it is known which claims matter")
		}
	}
}

func (u *uses) selected(from ast.Expr, name string, presence bool) {
	switch {
	case isIdent(from, "claims"):
		u.named[from.ID()] = true
		u.claims[name] = true
	case isIdent(from, "row"):
		u.named[from.ID()] = true
		u.column(name, presence)
	}
}

func (u *uses) column(name string, presence bool) {
	t := u.k.c.Table
	i := t.Column(name)
	switch {
	case i < 0:
		u.fault("row."+name, "a column of "+t.String(), didYouMean(name, u.k.names))
	case strings.Contains(name, "."):
		u.fault("row."+name, "a column without a dot in its name", "CEL can't tell it from a field of a column")
	case t.Columns[i].Generated:
		u.fault("row."+name+", a generated column", "an ordinary column", "logical replication does not carry generated columns")
	case presence:
		u.fault("has(row."+name+")", "row."+name+" != null", "every row has all columns")
	default:
		u.columns[i] = true
	}
}

func (u *uses) fault(got, want, hint string) {
	u.ok = false
	u.k.fault(u.key, got, want, hint)
}

func isIdent(e ast.Expr, name string) bool { return e.Kind() == ast.IdentKind && e.AsIdent() == name }

func constantString(e ast.Expr) (string, bool) {
	if e.Kind() != ast.LiteralKind {
		return "", false
	}
	s, ok := e.AsLiteral().(types.String)
	return string(s), ok
}

// evaluation is one run of a filter: what CEL reads its variables from. Its values are made when first named.
type evaluation struct {
	filter *filter
	row    schema.Row
	at     []int // positions of the filter's columns in row
	claims ref.Val
	values []ref.Val
}

func newEvaluation(f *filter, at []int) *evaluation {
	return &evaluation{filter: f, at: at, values: make([]ref.Val, len(f.columns))}
}

// ResolveName fulfils cel.Activation.
func (e *evaluation) ResolveName(name string) (any, bool) {
	for i := range e.filter.columns {
		col := &e.filter.columns[i]
		if col.variable == name {
			if e.values[i] == nil {
				e.values[i] = celValue(col.kind, col.elem, e.row[e.at[i]])
			}
			return e.values[i], true
		}
	}
	if name == "claims" && e.claims != nil {
		return e.claims, true
	}
	return nil, false
}

// Parent fulfils cel.Activation.
func (e *evaluation) Parent() cel.Activation { return nil }

// run says whether the row passes. With an error it doesn't.
func (e *evaluation) run(row schema.Row, claims ref.Val) (bool, error) {
	e.row, e.claims = row, claims
	clear(e.values)
	out, _, err := e.filter.program.Eval(e)
	if err != nil {
		return false, errors.New(reason(err))
	}
	pass, ok := out.(types.Bool)
	if !ok {
		return false, errors.New("it gives NULL")
	}
	return bool(pass), nil
}

// reason names the kind of an evaluation error. CEL's own text may quote values of the row, which belong in no log.
func reason(err error) string {
	text := err.Error()
	for _, known := range []struct{ in, out string }{
		{"cost limit", "it exceeds the cost limit"},
		{"no such overload", "an operator meets NULL or a value of another type"},
		{"no such key", "a field or claim is missing: test it with has() first"},
		{"index out of", "a list is shorter than the index"},
		{"divi", "it divides by zero"},
		{"modulus", "it divides by zero"},
		{"overflow", "a number is out of range"},
		{"range", "a number is out of range"},
		{errColumnText, "a column's text is not of its type"},
		{"error parsing regexp", "the pattern is not a regular expression"},
	} {
		if strings.Contains(text, known.in) {
			return known.out
		}
	}
	return "a value can't be converted"
}

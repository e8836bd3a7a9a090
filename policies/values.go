package policies

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"strconv"
	"strings"

	"github.com/google/cel-go/cel"
	"github.com/google/cel-go/checker"
	"github.com/google/cel-go/common/types"
	"github.com/google/cel-go/common/types/ref"

	"github.com/walgate/walgate/schema"
)

// valueKind says how CEL sees a column.
type valueKind uint8

const (
	asString valueKind = iota // the PostgreSQL text; numeric too, whose digits a double would lose
	asBool
	asInt
	asDouble
	asJSON
	asList
)

// kindOf returns how CEL sees a column of type t and, of a list, its elements.
func kindOf(t *schema.Type) (kind, elem valueKind) {
	t = t.Underlying()
	switch t.Kind {
	case schema.KindJSON:
		return asJSON, asString
	case schema.KindArray:
		elem, _ := kindOf(t.Elem)
		if elem == asList || t.Elem.Underlying().Kind == schema.KindComposite || t.Delim != 0 && t.Delim != ',' {
			return asString, asString
		}
		return asList, elem
	}
	switch t.OID {
	case oidBool:
		return asBool, asString
	case oidInt2, oidInt4, oidInt8:
		return asInt, asString
	case oidFloat4, oidFloat8:
		return asDouble, asString
	}
	return asString, asString
}

// celType declares every column nullable, whatever its constraint says: an application that adds NOT NULL must not break
// a filter that tests for null.
func celType(kind, elem valueKind) *cel.Type {
	switch kind {
	case asBool:
		return cel.NullableType(cel.BoolType)
	case asInt:
		return cel.NullableType(cel.IntType)
	case asDouble:
		return cel.NullableType(cel.DoubleType)
	case asJSON:
		return cel.DynType
	case asList:
		return cel.NullableType(cel.ListType(celType(elem, asString)))
	}
	return cel.NullableType(cel.StringType)
}

// errColumnText marks the errors of texts that aren't of their column's type.
const errColumnText = "column text"

// celValue turns a column's PostgreSQL text into what CEL computes with. A text that isn't of the type becomes a CEL
// error, so that the row is invisible rather than misjudged.
func celValue(kind, elem valueKind, text []byte) ref.Val {
	if text == nil {
		return types.NullValue
	}
	switch kind {
	case asBool:
		return types.Bool(len(text) > 0 && text[0] == 't')
	case asInt:
		n, err := strconv.ParseInt(string(text), 10, 64)
		if err != nil {
			return types.NewErr(errColumnText)
		}
		return types.Int(n)
	case asDouble:
		f, err := strconv.ParseFloat(string(text), 64)
		if err != nil {
			return types.NewErr(errColumnText)
		}
		return types.Double(f)
	case asJSON:
		return jsonValue(text)
	case asList:
		p := arrayParser{text: text, elem: elem}
		v, err := p.array()
		if err != nil {
			return types.NewErr(errColumnText)
		}
		return v
	}
	return types.String(text)
}

func jsonValue(text []byte) ref.Val {
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	var v any
	if err := d.Decode(&v); err != nil {
		return types.NewErr(errColumnText)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return types.NewErr(errColumnText)
	}
	return adapter{}.NativeToValue(v)
}

// adapter turns decoded JSON into CEL values, one level at a time as they are named.
type adapter struct{}

// NativeToValue fulfils types.Adapter.
func (adapter) NativeToValue(v any) ref.Val {
	switch v := v.(type) {
	case json.Number:
		return jsonNumber(v.String())
	case map[string]any:
		return types.NewStringInterfaceMap(adapter{}, v)
	case []any:
		return types.NewDynamicList(adapter{}, v)
	}
	return types.DefaultTypeAdapter.NativeToValue(v)
}

// jsonNumber is an int where the number is whole and fits, else a double. CEL compares the two by value.
func jsonNumber(s string) ref.Val {
	if n, err := strconv.ParseInt(s, 10, 64); err == nil {
		return types.Int(n)
	}
	f, err := strconv.ParseFloat(s, 64)
	if err != nil {
		return types.NewErr(errColumnText)
	}
	return types.Double(f)
}

// unknownSizes tells CEL's cost estimate nothing: a text may be of any length.
type unknownSizes struct{}

// EstimateSize fulfils checker.CostEstimator.
func (unknownSizes) EstimateSize(checker.AstNode) *checker.SizeEstimate { return nil }

// EstimateCallCost fulfils checker.CostEstimator.
func (unknownSizes) EstimateCallCost(string, string, *checker.AstNode, []checker.AstNode) *checker.CallEstimate {
	return nil
}

// arrayParser reads PostgreSQL's array text into CEL lists: {1,NULL,"a b"}, nested, with or without bounds before it.
type arrayParser struct {
	text  []byte
	elem  valueKind
	depth int
}

var errArray = errors.New("malformed array")

func (p *arrayParser) array() (ref.Val, error) {
	if bounds := bytes.IndexByte(p.text, '='); len(p.text) > 0 && p.text[0] == '[' && bounds > 0 {
		p.text = p.text[bounds+1:]
	}
	v, err := p.braces()
	if err == nil && len(p.text) > 0 {
		err = errArray
	}
	return v, err
}

func (p *arrayParser) braces() (ref.Val, error) {
	if !p.take('{') || p.depth > 6 {
		return nil, errArray
	}
	p.depth++
	defer func() { p.depth-- }()
	var elements []ref.Val
	if p.take('}') {
		return types.NewRefValList(adapter{}, elements), nil
	}
	for {
		v, err := p.element()
		if err != nil {
			return nil, err
		}
		elements = append(elements, v)
		if p.take('}') {
			return types.NewRefValList(adapter{}, elements), nil
		}
		if !p.take(',') {
			return nil, errArray
		}
	}
}

func (p *arrayParser) element() (ref.Val, error) {
	if len(p.text) > 0 && p.text[0] == '{' {
		return p.braces()
	}
	text, quoted := p.token()
	if text == nil {
		return nil, errArray
	}
	if !quoted && strings.EqualFold(string(text), "NULL") {
		text = nil
	}
	v := celValue(p.elem, asString, text)
	if err, ok := v.(*types.Err); ok {
		return nil, err
	}
	return v, nil
}

// token takes one element's text; nil: there is none.
func (p *arrayParser) token() (text []byte, quoted bool) {
	quoted = p.take('"')
	for i := 0; i < len(p.text); i++ {
		switch c := p.text[i]; {
		case c == '\\' && i+1 < len(p.text):
			i++
			text = append(text, p.text[i])
		case quoted && c == '"':
			p.text = p.text[i+1:]
			if text == nil {
				text = []byte{}
			}
			return text, true
		case !quoted && (c == ',' || c == '}'):
			p.text = p.text[i:]
			return text, false
		default:
			text = append(text, c)
		}
	}
	return nil, quoted
}

func (p *arrayParser) take(c byte) bool {
	if len(p.text) > 0 && p.text[0] == c {
		p.text = p.text[1:]
		return true
	}
	return false
}

package policies

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"slices"
	"strconv"
	"strings"

	"github.com/google/cel-go/common/types/ref"
)

// Caller is one authenticated subject with what its claims select. Immutable.
type Caller struct {
	Subject string
	Roles   []string
	// ScopeHash is 8 hex digits over the claim values and roles that the policies name (design 5).
	ScopeHash string

	raw    map[string]any
	claims ref.Val
	views  []view // in the order of the Set's collections
}

// view is what one caller's claims select of one collection.
type view struct {
	collection *Collection
	mayRead    bool
	keys       []ScopeKey
	values     [][][]string // canonical texts by alternative and column; nil: the alternative matches nothing
	judgeKey   string
}

// NewCaller works out what a subject with these roles and claims sees of each collection. The claims are decoded JSON
// with numbers as json.Number; they must not be changed afterwards. A caller belongs to the Set that made it: to the
// collections of another it sees nothing. The error is ErrTooManyScopes.
func (s *Set) NewCaller(subject string, roles []string, claims map[string]any) (*Caller, error) {
	caller := &Caller{Subject: subject, Roles: slices.Clone(roles), raw: claims}
	caller.ScopeHash = s.scopeHash(roles, claims)
	caller.claims = adapter{}.NativeToValue(claims)
	caller.views = make([]view, len(s.Collections))
	total := 0
	for i, c := range s.Collections {
		v := &caller.views[i]
		v.collection = c
		v.mayRead = c.MayRead(caller)
		if c.filter != nil {
			v.judgeKey = string(appendClaims(nil, c.filter.claims, claims))
		}
		if !v.mayRead && !c.writes(roles) {
			continue
		}
		if len(c.scopes) == 0 {
			v.keys = []ScopeKey{c.everyone}
			continue
		}
		if !v.selectScopes(claims) {
			return nil, ErrTooManyScopes
		}
		if total += len(v.keys); total > MaxScopes {
			return nil, ErrTooManyScopes
		}
	}
	return caller, nil
}

// selectScopes fills in keys and values. It returns false if one alternative alone selects too many.
func (v *view) selectScopes(claims map[string]any) bool {
	v.values = make([][][]string, len(v.collection.scopes))
	seen := map[ScopeKey]bool{}
	for i, alt := range v.collection.scopes {
		product := 1
		columns := make([][]string, len(alt.columns))
		for j, col := range alt.columns {
			columns[j] = col.canonicalValues(claims)
			product = min(product*len(columns[j]), MaxScopes*MaxScopes)
		}
		if product > MaxScopes {
			return false
		}
		if product == 0 {
			continue
		}
		v.values[i] = columns
		eachTuple(alt.prefix, columns, func(text []byte) {
			if key := hashScope(text); !seen[key] {
				seen[key] = true
				v.keys = append(v.keys, key)
			}
		})
	}
	return true
}

// eachTuple calls f with the scope text of every combination of one value a column.
func eachTuple(prefix []byte, columns [][]string, f func(text []byte)) {
	if len(columns) == 0 {
		f(prefix)
		return
	}
	for _, value := range columns[0] {
		eachTuple(appendSized(slices.Clip(prefix), []byte(value)), columns[1:], f)
	}
}

// canonicalValues returns the distinct values that the column may have for a caller with these claims.
func (col *scopeColumn) canonicalValues(claims map[string]any) []string {
	value, _ := lookup(claims, col.claim)
	elements, ok := value.([]any)
	if !ok {
		elements = []any{value}
	}
	var out []string
	for _, e := range elements {
		if text, ok := canonical(col.typ, e); ok {
			out = append(out, text)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func lookup(claims map[string]any, path claimPath) (any, bool) {
	var value any = claims
	for _, name := range path {
		object, _ := value.(map[string]any)
		v, ok := object[name]
		if !ok {
			return nil, false
		}
		value = v
	}
	return value, true
}

// view returns what the caller sees of the collection, or nil if the collection is of another Set.
func (c *Caller) view(of *Collection) *view {
	if c == nil || of.pos >= len(c.views) || c.views[of.pos].collection != of {
		return nil
	}
	return &c.views[of.pos]
}

// Scopes returns the scopes of the collection that the caller may see, each once: for a collection without scope the one
// that is everybody's, for a caller who may not read it none. The slice is the Caller's own: don't change it.
func (c *Caller) Scopes(of *Collection) []ScopeKey {
	if v := c.view(of); v != nil && v.mayRead {
		return v.keys
	}
	return nil
}

// ScopeSQL returns a predicate that is true for exactly the rows in the caller's scopes, with parameters numbered from
// firstParam, and their values: array literals in PostgreSQL's text form.
func (c *Caller) ScopeSQL(of *Collection, firstParam int) (predicate string, args []string) {
	v := c.view(of)
	if v == nil || !v.mayRead {
		return "false", nil
	}
	if len(of.scopes) == 0 {
		return "true", nil
	}
	var alternatives []string
	for i, columns := range v.values {
		if columns == nil {
			continue
		}
		var terms []string
		for j, values := range columns {
			col := of.scopes[i].columns[j]
			terms = append(terms, quoteIdent(col.name)+col.cast+" = ANY($"+strconv.Itoa(firstParam+len(args))+"::"+castName(col.typ)+"[])")
			args = append(args, arrayLiteral(values))
		}
		alternatives = append(alternatives, "("+strings.Join(terms, " AND ")+")")
	}
	switch len(alternatives) {
	case 0:
		return "false", nil
	case 1:
		return alternatives[0], args
	}
	return "(" + strings.Join(alternatives, " OR ") + ")", args
}

func quoteIdent(name string) string { return `"` + strings.ReplaceAll(name, `"`, `""`) + `"` }

var arrayEscape = strings.NewReplacer(`\`, `\\`, `"`, `\"`)

func arrayLiteral(values []string) string {
	var b strings.Builder
	b.WriteByte('{')
	for i, v := range values {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteString(`"` + arrayEscape.Replace(v) + `"`)
	}
	b.WriteByte('}')
	return b.String()
}

// scopeHash covers the roles and claims that any policy names. In a claim that only scopes name, order and repetition of
// an array mean nothing, so they don't change the hash: an issuer may list groups in any order.
func (s *Set) scopeHash(roles []string, claims map[string]any) string {
	b := appendClaims(nil, s.whole, claims)
	for _, path := range s.scoped {
		value, ok := lookup(claims, path)
		if !ok {
			continue
		}
		b = append(appendCanonical(append(b, '\n'), toAny(path)), ' ')
		if elements, isArray := value.([]any); isArray {
			b = appendSet(b, elements)
		} else {
			b = appendCanonical(b, value)
		}
	}
	b = append(b, '\n')
	for _, role := range s.roles {
		if slices.Contains(roles, role) {
			b = appendCanonical(b, role)
		}
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:4])
}

func toAny(path claimPath) []any {
	out := make([]any, len(path))
	for i, name := range path {
		out[i] = name
	}
	return out
}

// appendClaims appends a JSON object of the named claims that are there.
func appendClaims(dst []byte, names []string, claims map[string]any) []byte {
	named := make(map[string]any, len(names))
	for _, name := range names {
		if v, ok := claims[name]; ok {
			named[name] = v
		}
	}
	return appendCanonical(dst, named)
}

func appendSet(dst []byte, elements []any) []byte {
	texts := make([][]byte, len(elements))
	for i, e := range elements {
		texts[i] = appendCanonical(nil, e)
	}
	slices.SortFunc(texts, bytes.Compare)
	texts = slices.CompactFunc(texts, bytes.Equal)
	return append(append(append(dst, '['), bytes.Join(texts, []byte{','})...), ']')
}

// appendCanonical appends v as JSON with sorted object keys, which is what encoding/json writes.
func appendCanonical(dst []byte, v any) []byte {
	text, err := json.Marshal(v)
	if err != nil { // not decoded JSON: no such claim can be told from another
		return append(dst, "null"...)
	}
	return append(dst, text...)
}

package policies

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/walgate/walgate/schema"
)

// The built-in types that policies treat each in its own way. Their OIDs never change.
const (
	oidBool        = 16
	oidInt8        = 20
	oidInt2        = 21
	oidInt4        = 23
	oidText        = 25
	oidFloat4      = 700
	oidFloat8      = 701
	oidVarchar     = 1043
	oidDate        = 1082
	oidTimestamp   = 1114
	oidTimestampTZ = 1184
	oidUUID        = 2950
)

// claimPath is the way to a claim: {"sub"}, or {"org", "id"} for claims.org.id.
type claimPath []string

// alternative is one way to see a row: all its columns equal to a value of their claims.
type alternative struct {
	columns []scopeColumn // sorted by name
	prefix  []byte        // of every key's hashed text: collection and column names
}

type scopeColumn struct {
	name  string
	table int // position in Table.Columns
	claim claimPath
	typ   *schema.Type // underlying
	cast  string       // of the column in SQL: a domain over an enum has no = of its own
}

var claimPattern = regexp.MustCompile(`^claims(\.[A-Za-z_][A-Za-z0-9_-]*)+$`)

func (k *compiler) compileScope() {
	spec := k.c.Spec.Scope
	if spec != nil && len(spec) == 0 {
		k.fault("scope", "an empty list", "at least one alternative", "leave scope out if every caller may see every row")
	}
	for n, columns := range spec {
		path := "scope"
		if len(spec) > 1 {
			path += "." + strconv.Itoa(n)
		}
		if len(columns) == 0 {
			k.fault(path, "no column", "at least one column: claims.NAME", "leave scope out if every caller may see every row")
			continue
		}
		var alt alternative
		for _, name := range slices.Sorted(maps.Keys(columns)) {
			if col, ok := k.scopeColumn(path+"."+name, name, columns[name]); ok {
				alt.columns = append(alt.columns, col)
			}
		}
		alt.prefix = scopePrefix(k.c.Name, alt.columns)
		k.c.scopes = append(k.c.scopes, alt)
	}
	slices.SortFunc(k.c.scopes, compareAlternatives)
	k.c.scopes = slices.CompactFunc(k.c.scopes, func(a, b alternative) bool { return compareAlternatives(a, b) == 0 })
}

func compareAlternatives(a, b alternative) int {
	return slices.CompareFunc(a.columns, b.columns, func(x, y scopeColumn) int {
		if n := strings.Compare(x.name, y.name); n != 0 {
			return n
		}
		return slices.Compare(x.claim, y.claim)
	})
}

// scopeColumn checks one column of an alternative. Only types whose equality is the equality of their texts are let in,
// so that feed and SQL agree.
func (k *compiler) scopeColumn(path, name, claim string) (scopeColumn, bool) {
	ok := claimPattern.MatchString(claim)
	if !ok {
		k.fault(path, claim, "claims.NAME", didYouMeanClaim(claim))
	}
	i := k.c.Table.Column(name)
	if i < 0 {
		k.fault(path, name, "a column of "+k.c.Table.String(), didYouMean(name, k.names))
		return scopeColumn{}, false
	}
	col := k.c.Table.Columns[i]
	typ := col.Type.Underlying()
	switch {
	case castName(typ) == "":
		k.fault(path, name+", a "+col.Type.Name, "a column of type int2, int4, int8, uuid, text, varchar, bool, date or an enum",
			"the equality of other types is not that of their texts")
		ok = false
	case (typ.OID == oidText || typ.OID == oidVarchar) && !col.Deterministic:
		k.fault(path, name+", whose collation is not deterministic", "a column with a deterministic collation",
			"under its collation different texts are equal")
		ok = false
	case col.Generated:
		k.fault(path, name+", a generated column", "an ordinary column", "logical replication does not carry generated columns")
		ok = false
	}
	if !ok {
		return scopeColumn{}, false
	}
	out := scopeColumn{name: name, table: i, claim: strings.Split(claim, ".")[1:], typ: typ}
	if typ.Labels != nil && typ != col.Type {
		out.cast = "::" + typ.Name
	}
	return out, true
}

func didYouMeanClaim(claim string) string {
	head, rest, dotted := strings.Cut(claim, ".")
	if !dotted {
		rest = claim
	} else if Nearest(head, []string{"claims"}) == "" {
		return ""
	}
	if guess := "claims." + rest; claimPattern.MatchString(guess) {
		return "did you mean " + guess + "?"
	}
	return ""
}

// scopeColumns returns the positions in Table.Columns of all scope columns.
func (c *Collection) scopeColumns() []int {
	var at []int
	for _, alt := range c.scopes {
		for _, col := range alt.columns {
			at = append(at, col.table)
		}
	}
	slices.Sort(at)
	return slices.Compact(at)
}

// castName is the SQL name of a scope column's type, or "" where a column of the type can't be one.
func castName(t *schema.Type) string {
	switch t.OID {
	case oidBool:
		return "bool"
	case oidInt2:
		return "int2"
	case oidInt4:
		return "int4"
	case oidInt8:
		return "int8"
	case oidUUID:
		return "uuid"
	case oidDate:
		return "date"
	case oidText, oidVarchar:
		return "text" // varchar compares as text; a cast to it could cut
	}
	if t.Labels != nil {
		return t.Name
	}
	return ""
}

func scopePrefix(collection string, columns []scopeColumn) []byte {
	b := appendSized([]byte("walgate scope\n"), []byte(collection))
	b = binary.AppendUvarint(b, uint64(len(columns)))
	for _, col := range columns {
		b = appendSized(b, []byte(col.name))
	}
	return b
}

func everyoneKey(collection string) ScopeKey { return hashScope(scopePrefix(collection, nil)) }

// hashScope is the key of a scope's text: the prefix and then each column's value, sized, so that no two scopes have one
// text.
func hashScope(text []byte) ScopeKey {
	sum := sha256.Sum256(text)
	return ScopeKey(sum[:len(ScopeKey{})])
}

func appendSized(dst, s []byte) []byte {
	dst = binary.AppendUvarint(dst, uint64(len(s)))
	return append(dst, s...)
}

// canonical returns the PostgreSQL text that a column of type t shows for the claim's value, and false where no value of
// the column can equal it.
func canonical(t *schema.Type, v any) (string, bool) {
	switch t.OID {
	case oidBool:
		b, ok := v.(bool)
		if b {
			return "t", ok
		}
		return "f", ok
	case oidInt2:
		return canonicalInt(v, 16)
	case oidInt4:
		return canonicalInt(v, 32)
	case oidInt8:
		return canonicalInt(v, 64)
	}
	s, ok := v.(string)
	if !ok {
		n, number := v.(json.Number)
		if !number {
			return "", false
		}
		s = n.String()
	}
	switch {
	case t.OID == oidUUID:
		return canonicalUUID(s)
	case t.OID == oidDate:
		d, err := time.Parse(time.DateOnly, s)
		return s, err == nil && d.Year() > 0 // PostgreSQL has no year 0
	case t.Labels != nil:
		return s, ok && slices.Contains(t.Labels, s)
	}
	// No text of PostgreSQL holds these, and naming one in a query is an error rather than no match.
	return s, utf8.ValidString(s) && !strings.Contains(s, "\x00")
}

func canonicalInt(v any, bits int) (string, bool) {
	var s string
	switch n := v.(type) {
	case json.Number:
		s = n.String()
	case string:
		s = n
	}
	if s == "" || s[0] == '+' {
		return "", false
	}
	n, err := strconv.ParseInt(s, 10, bits)
	return strconv.FormatInt(n, 10), err == nil
}

// canonicalUUID takes the form with hyphens, in either case, or bare hexadecimal digits.
func canonicalUUID(s string) (string, bool) {
	if len(s) == 32 {
		s = s[:8] + "-" + s[8:12] + "-" + s[12:16] + "-" + s[16:20] + "-" + s[20:]
	}
	if len(s) != 36 {
		return "", false
	}
	out := bytes.ToLower([]byte(s))
	for i, c := range out {
		hyphen := i == 8 || i == 13 || i == 18 || i == 23
		digit := c >= '0' && c <= '9' || c >= 'a' && c <= 'f'
		if hyphen != (c == '-') || !hyphen && !digit {
			return "", false
		}
	}
	return string(out), true
}

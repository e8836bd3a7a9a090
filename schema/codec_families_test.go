package schema

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
)

// family is one type with the values that the differential test writes.
type family struct {
	typ    string
	edges  []string                  // SQL expressions
	random func(r *rand.Rand) string // a random SQL expression; nil: edges only
	alone  bool                      // is an array already: no array of it is tested
}

// create makes the family's table: the type alone, in an array, in a composite, and in an array of composites.
func (f family) create(t *testing.T, conn *pgx.Conn, i int) {
	t.Helper()
	array := f.typ + "[]"
	if f.alone {
		array = "text[]"
	}
	mustExec(t, conn, fmt.Sprintf(`
		CREATE TYPE public.holder_%[1]d AS (v %[2]s, "n ""o""" int8, "é" %[3]s);
		CREATE TABLE public.family_%[1]d (id int PRIMARY KEY, v %[2]s, a %[3]s, c public.holder_%[1]d, ca public.holder_%[1]d[]);
		ALTER TABLE public.family_%[1]d REPLICA IDENTITY FULL;
		COMMENT ON TABLE public.family_%[1]d IS %[4]s`, i, f.typ, array, quote(f.typ)))
}

// fill inserts the edge values, NULL, and random values.
func (f family) fill(t *testing.T, conn *pgx.Conn, i int, r *rand.Rand) {
	t.Helper()
	values := append([]string{"NULL"}, f.edges...)
	if f.random != nil {
		for range randomRows {
			values = append(values, f.random(r))
		}
	}
	var rows []string
	for id, expr := range values {
		v := fmt.Sprintf("(%s)::%s", expr, f.typ)
		other := fmt.Sprintf("(%s)::%s", values[r.IntN(len(values))], f.typ)
		array := fmt.Sprintf("ARRAY[%s, NULL, %s]::%s[]", v, other, f.typ)
		if f.alone {
			array = "ARRAY['x', NULL]"
		}
		holder := fmt.Sprintf("ROW(%s, %d, %s)::public.holder_%d", v, math.MaxInt64-id, array, i)
		rows = append(rows, fmt.Sprintf("(%d, %s, %s, %s, ARRAY[%s, NULL, ROW(NULL, NULL, NULL)]::public.holder_%d[])",
			id, v, array, holder, holder, i))
	}
	mustExec(t, conn, fmt.Sprintf("INSERT INTO public.family_%d VALUES %s", i, strings.Join(rows, ",\n")))
}

func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", "''") + "'" }

func quoteAll(list ...string) []string {
	for i := range list {
		list[i] = quote(list[i])
	}
	return list
}

// differentialTypes are the application's own types in the test.
const differentialTypes = `
CREATE TYPE public.mood AS ENUM ('sad', 'o k', 'NULL', '', '"q"', '{a,b}', '(c)', 'back\slash', 'é');
CREATE TYPE public."Odd Name" AS ENUM ('x');
CREATE DOMAIN public.positive AS int8 CHECK (VALUE > 0);
CREATE DOMAIN public.more_positive AS public.positive;
CREATE DOMAIN public.mood_domain AS public.mood;
CREATE DOMAIN public.ints AS int8[];
CREATE DOMAIN public.boxes AS box;
CREATE TYPE public.pair AS (a int8, b text);
CREATE DOMAIN public.pair_domain AS public.pair;
CREATE TYPE public.nested AS (p public.pair, ps public.pair[], j json, n numeric, at timestamptz, m public.mood[],
	d public.pair_domain, i public.ints[]);
CREATE TYPE public.nothing AS ();
CREATE TYPE public.shrunk AS (a int, b text, c int);
ALTER TYPE public.shrunk DROP ATTRIBUTE b;
CREATE TYPE public.grown AS (a int);
CREATE TYPE public.textrange AS RANGE (subtype = text);
CREATE TABLE public."We ird" (id int, j jsonb);
`

// nastyText is what quoting rules differ over.
var nastyText = []string{"", " ", "a", "NULL", "null", `"`, `\`, `\\"`, "'", "{}", "{a,b}", "(a,b)", ",", ";", "\t", "\n", "\r\n",
	"\b\f\v\x01\x1f\x7f", "é", "日本語", "😀", "\u2028", "<script>&amp;", "a b", "t", `\x41`, "/", "=>", `"a"=>"b"`,
	strings.Repeat("long ", 1000)}

func randomText(r *rand.Rand) string {
	var b strings.Builder
	for range r.IntN(6) {
		b.WriteString(nastyText[r.IntN(len(nastyText)-1)])
	}
	return b.String()
}

func randomTextLiteral(r *rand.Rand) string { return quote(randomText(r)) }

func randomInt(low, high int64) func(*rand.Rand) string {
	return func(r *rand.Rand) string {
		n := int64(r.Uint64() >> r.IntN(64))
		if r.IntN(2) == 0 {
			n = -n
		}
		return quote(strconv.FormatInt(max(low, min(high, n)), 10))
	}
}

func randomFloat(bits int) func(*rand.Rand) string {
	return func(r *rand.Rand) string {
		f := math.Float64frombits(r.Uint64())
		if bits == 32 {
			f = float64(math.Float32frombits(r.Uint32()))
		}
		return quote(strconv.FormatFloat(f, 'g', -1, bits))
	}
}

func randomNumeric(r *rand.Rand) string {
	return quote(strconv.FormatInt(int64(r.Uint64()), 10) + "." + strconv.FormatUint(r.Uint64(), 10) +
		"e" + strconv.Itoa(r.IntN(60)-30))
}

func randomBytea(r *rand.Rand) string {
	b := make([]byte, r.IntN(20))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return fmt.Sprintf(`'\x%x'`, b)
}

// randomTime is a timestamp from 4713 BC to the year 60000, in microseconds.
func randomTime(r *rand.Rand) string {
	return fmt.Sprintf("(timestamp '0001-01-01' + make_interval(days => %d, secs => %d * 0.000001))",
		r.IntN(23_000_000)-1_700_000, r.Int64N(86_400_000_000))
}

func randomInterval(r *rand.Rand) string {
	return fmt.Sprintf("make_interval(months => %d, days => %d, secs => %d * 0.0001)",
		r.IntN(2000)-1000, r.IntN(200)-100, r.IntN(2_000_000_000)-1_000_000_000)
}

func randomJSON(r *rand.Rand, depth int) string {
	space := []string{"", " ", "\n", "\r\n\t"}[r.IntN(4)]
	switch kind := r.IntN(8); {
	case kind == 0 && depth > 0:
		return "[" + space + randomJSON(r, depth-1) + space + "," + randomJSON(r, depth-1) + "]"
	case kind == 1 && depth > 0:
		return "{" + randomJSONString(r) + space + ":" + randomJSON(r, depth-1) + space + `,"a":1,"a":` + randomJSON(r, depth-1) + "}"
	case kind == 2:
		return []string{"true", "false", "null", "[]", "{}", "[ ]", "{\n}"}[r.IntN(7)]
	case kind < 5:
		return strconv.FormatInt(int64(r.Uint64()), 10) + []string{"", ".0", "e5", "E-3", ".500"}[r.IntN(5)]
	}
	return randomJSONString(r)
}

func randomJSONString(r *rand.Rand) string { return string(AppendString(nil, []byte(randomText(r)))) }

func randomJSONLiteral(r *rand.Rand) string { return quote(randomJSON(r, 4)) }

func randomPair(r *rand.Rand) string {
	return fmt.Sprintf("ROW(%s, %s)::public.pair", randomInt(math.MinInt64, math.MaxInt64)(r), randomTextLiteral(r))
}

func randomNested(r *rand.Rand) string {
	return fmt.Sprintf("ROW(%s, ARRAY[%s, NULL, %s], %s, %s, %s AT TIME ZONE 'UTC', ARRAY['NULL', NULL, '{a,b}']::public.mood[], %s, ARRAY['{1,NULL}', '{}']::public.ints[])",
		randomPair(r), randomPair(r), randomPair(r), randomJSONLiteral(r), randomNumeric(r), randomTime(r), randomPair(r))
}

func randomTextArray(r *rand.Rand) string {
	rows, columns := 1+r.IntN(3), 1+r.IntN(3)
	var outer []string
	for range rows {
		var inner []string
		for range columns {
			if r.IntN(5) == 0 {
				inner = append(inner, "NULL")
			} else {
				inner = append(inner, randomTextLiteral(r))
			}
		}
		outer = append(outer, "ARRAY["+strings.Join(inner, ",")+"]::text[]")
	}
	return "ARRAY[" + strings.Join(outer, ",") + "]"
}

func randomHstore(r *rand.Rand) string {
	var pairs []string
	for i := range r.IntN(4) {
		value := "NULL"
		if r.IntN(3) > 0 {
			value = randomTextLiteral(r)
		}
		pairs = append(pairs, fmt.Sprintf("public.hstore(%s, %s)", quote(randomText(r)+strconv.Itoa(i)), value))
	}
	if len(pairs) == 0 {
		return "''"
	}
	return "array_to_string(ARRAY[" + strings.Join(pairs, "::text,") + "::text], ',')"
}

// allFamilies lists the types and their edge values.
func allFamilies(extensions map[string]bool, xml bool, version string) []family {
	families := slices.Concat(numberFamilies(), textFamilies(), timeFamilies(version), documentFamilies(xml), geometryFamilies(),
		systemFamilies(), ownFamilies(), arrayFamilies())
	if extensions["hstore"] {
		edges := quoteAll(``, `a=>1`, `"a b"=>"", c=>NULL, "NULL"=>"NULL"`, `"q\"\\"=>"\"\\", "=>"=>","`, `é=>😀, "{"=>"}"`)
		families = append(families, family{typ: "public.hstore", edges: edges, random: randomHstore})
	}
	if extensions["citext"] {
		families = append(families, family{typ: "public.citext", edges: quoteAll("Ab", `"`, ""), random: randomTextLiteral})
	}
	if extensions["ltree"] {
		families = append(families, family{typ: "public.ltree", edges: quoteAll("", "a.b_1.c")})
	}
	return families
}

func numberFamilies() []family {
	floats := []string{"NaN", "Infinity", "-Infinity", "-0", "0", "0.1", "1e-5", "0.0001", "1e15", "1e16", "123456789012345680", "100000", "-1.5"}
	return []family{
		{typ: "boolean", edges: []string{"true", "false"}},
		{typ: "smallint", edges: quoteAll("-32768", "32767", "0"), random: randomInt(math.MinInt16, math.MaxInt16)},
		{typ: "integer", edges: quoteAll("-2147483648", "2147483647", "0"), random: randomInt(math.MinInt32, math.MaxInt32)},
		{typ: "bigint", edges: quoteAll("-9223372036854775808", "9223372036854775807", "9007199254740993"),
			random: randomInt(math.MinInt64, math.MaxInt64)},
		{typ: "numeric", edges: quoteAll("0", "-0", "NaN", "Infinity", "-Infinity", "1e-30", "1.500", "1e100", "-0.000",
			"123456789012345678901234567890.123456789"), random: randomNumeric},
		{typ: "numeric(10,2)", edges: quoteAll("0", "1.005", "-99999999.99", "NaN")},
		{typ: "real", edges: quoteAll(append([]string{"3.4028235e38", "1e-45", "16777217"}, floats...)...), random: randomFloat(32)},
		{typ: "double precision", edges: quoteAll(append([]string{"1.7976931348623157e308", "5e-324"}, floats...)...), random: randomFloat(64)},
		{typ: "money", edges: quoteAll("-1234567.89", "0", "92233720368547758.07", "-0.01"), random: func(r *rand.Rand) string {
			return fmt.Sprintf("%d::numeric / 100", r.Int64N(1e15)-5e14)
		}},
	}
}

func textFamilies() []family {
	return []family{
		{typ: "text", edges: quoteAll(append([]string{}, nastyText...)...), random: randomTextLiteral},
		{typ: "varchar(10)", edges: quoteAll("", "ab", `"\`, "😀😀")},
		{typ: "char(5)", edges: quoteAll("", "ab", `"\`, "é")},
		{typ: "bpchar", edges: quoteAll("", "ab  ", `"\`)},
		{typ: `"char"`, edges: quoteAll("", "a", `"`, `\`, "{", `\200`)},
		{typ: "name", edges: quoteAll("", "a b", `"\`)},
		{typ: "bytea", edges: quoteAll(`\x`, `\xdeadbeef005c22`), random: randomBytea},
		{typ: "bit(3)", edges: []string{"B'101'", "B'000'"}},
		{typ: "bit varying", edges: []string{"B''", "B'0110'"}},
		{typ: "uuid", edges: quoteAll("00000000-0000-0000-0000-000000000000", "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11")},
		{typ: "inet", edges: quoteAll("::1", "10.0.0.1/8", "192.168.0.1", "::ffff:1.2.3.4/128")},
		{typ: "cidr", edges: quoteAll("10.0.0.0/8", "2001:db8::/32")},
		{typ: "macaddr", edges: quoteAll("08-00-2b-01-02-03")},
		{typ: "macaddr8", edges: quoteAll("08-00-2b-01-02-03-04-05")},
		{typ: "tsvector", edges: quoteAll("", "'a b':1A,2 c 'it''s' 'back\\\\slash'")},
		{typ: "tsquery", edges: quoteAll("", "'a b' & !c | d:*A <-> e")},
	}
}

func timeFamilies(version string) []family {
	days := []string{"infinity", "-infinity", "0044-03-15 BC", "4713-01-01 BC", "0001-01-01", "2000-02-29", "9999-12-31", "10000-01-01"}
	moments := append([]string{"294276-12-31 23:59:59.999999", "1999-12-31 24:00:00", "2020-01-01 00:00:00.1", "0044-03-15 12:34:56.789 BC"}, days...)
	intervals := []string{"0", "1 year -2 mons +3 days -04:05:06.789", "178000000 years", "-1 day", "-00:00:00.000001", "100:00:00"}
	if major, _, _ := strings.Cut(version, "."); len(major) == 2 && major >= "17" {
		intervals = append(intervals, "infinity", "-infinity")
	}
	return []family{
		{typ: "date", edges: quoteAll(append([]string{"5874897-12-31"}, days...)...), random: randomTime},
		{typ: "time", edges: quoteAll("24:00:00", "00:00", "12:34:56.789", "23:59:59.999999")},
		{typ: "timetz", edges: quoteAll("24:00:00+15:59", "12:00-05:30", "00:00:00+00", "04:05:06.789-08:00:30")},
		{typ: "timestamp", edges: quoteAll(append([]string{}, moments...)...), random: randomTime},
		{typ: "timestamptz", edges: quoteAll(append([]string{"2020-06-01 12:00+05:30"}, moments...)...), random: randomTime},
		{typ: "timestamptz(0)", edges: quoteAll("2020-06-01 12:00:00.7")},
		{typ: "interval", edges: quoteAll(intervals...), random: randomInterval},
		{typ: "daterange", edges: quoteAll("empty", "(,)", "[-infinity,infinity]", "[2020-01-01,2020-02-01)", "[0044-03-15 BC,)")},
		{typ: "tsrange", edges: quoteAll("empty", `["2020-01-01 00:00","10000-01-01 00:00")`)},
		{typ: "tstzrange", edges: quoteAll("empty", `["2020-01-01 00:00+02",infinity]`, "(,)")},
		{typ: "tstzmultirange", edges: quoteAll("{}", `{["2020-01-01 00:00+02","2020-01-02 00:00+02"),[2021-01-01,)}`)},
	}
}

func documentFamilies(xml bool) []family {
	documents := quoteAll(`null`, `{}`, `[]`, `""`, `"NULL"`, `-0`, `1.0`, `123456789012345678901234567890.5`, `{"a":1,"a":2}`,
		" [1 ,\n 2,\r\n\t{ \"k\" : [ ] } ]\n", `"\u00e9\n\"\\\/"`, `"é 😀 <>&"`, `[[[[[[[[1]]]]]]]]`, `{"b":{"":null}}`,
		strings.Repeat("[", 200)+strings.Repeat("]", 200))
	families := []family{
		{typ: "json", edges: append(quoteAll(`"\u0000"`, `"\ud800"`, `1e999`, `1E+2`), documents...), random: randomJSONLiteral},
		{typ: "jsonb", edges: documents, random: randomJSONLiteral},
		{typ: "jsonpath", edges: quoteAll(`$`, `$."a b"[*] ? (@ > 1 && @.x like_regex "^\"")`)},
	}
	if xml {
		families = append(families, family{typ: "xml",
			edges: quoteAll(`<a b="c">é&amp;</a>`, `<?xml version="1.0" encoding="UTF-8"?><a/>`, "text\n only")})
	}
	return families
}

func geometryFamilies() []family {
	return []family{
		{typ: "point", edges: quoteAll("(1,-0)", "(NaN,Infinity)", "(0.1,1e300)")},
		{typ: "lseg", edges: quoteAll("[(0,0),(1,1)]")},
		{typ: "line", edges: quoteAll("{1,-1,0}")},
		{typ: "box", edges: quoteAll("(1,1),(0,0)", "(0.1,NaN),(-1e300,5)")},
		{typ: "path", edges: quoteAll("[(0,0),(1,1)]", "((0,0),(1,1))")},
		{typ: "polygon", edges: quoteAll("((0,0),(1,1),(1,0))")},
		{typ: "circle", edges: quoteAll("<(1,2),3>")},
		{typ: "int4range", edges: quoteAll("empty", "[1,5)", "(,)", "(,3]")},
		{typ: "int8range", edges: quoteAll("[1,9223372036854775807)")},
		{typ: "numrange", edges: quoteAll("empty", "[1.50,NaN]", "(-Infinity,0)")},
		{typ: "int4multirange", edges: quoteAll("{}", "{[1,2),[5,6)}", "{(,)}")},
	}
}

func systemFamilies() []family {
	return []family{
		{typ: "oid", edges: quoteAll("0", "4294967295")},
		{typ: "xid", edges: quoteAll("4294967295")},
		{typ: "xid8", edges: quoteAll("18446744073709551615")},
		{typ: "cid", edges: quoteAll("7")},
		{typ: "tid", edges: quoteAll("(0,1)")},
		{typ: "pg_lsn", edges: quoteAll("0/0", "16/B374D848")},
		{typ: "pg_snapshot", edges: quoteAll("10:20:10,14,15")},
		{typ: "regclass", edges: quoteAll("pg_catalog.pg_class", `public."We ird"`, "public.pair", "-")},
		{typ: "regtype", edges: quoteAll("integer", "public.mood", `public."Odd Name"[]`, "timestamptz")},
		{typ: "regproc", edges: quoteAll("pg_catalog.now", "-")},
		{typ: "regprocedure", edges: quoteAll("pg_catalog.abs(numeric)")},
		{typ: "regoperator", edges: quoteAll("pg_catalog.+(integer,integer)")},
		{typ: "regrole", edges: quoteAll("pg_monitor")},
		{typ: "regnamespace", edges: quoteAll("public")},
		{typ: "regconfig", edges: quoteAll("english")},
		{typ: "regcollation", edges: quoteAll(`"C"`)},
		{typ: "int2vector", edges: quoteAll("", "1", "1 -2 3"), alone: true},
		{typ: "oidvector", edges: quoteAll("", "1", "1 2 4294967295"), alone: true},
		{typ: "int2vector[]", edges: quoteAll("{}", `{"1 2","3",NULL}`), alone: true},
		{typ: "aclitem", edges: []string{"makeaclitem(10, 10, 'SELECT', true)"}},
	}
}

func ownFamilies() []family {
	return []family{
		{typ: "public.mood", edges: quoteAll("sad", "o k", "NULL", "", `"q"`, "{a,b}", "(c)", `back\slash`, "é")},
		{typ: `public."Odd Name"`, edges: quoteAll("x")},
		{typ: "public.positive", edges: quoteAll("1", "9007199254740993")},
		{typ: "public.more_positive", edges: quoteAll("1")},
		{typ: "public.mood_domain", edges: quoteAll("NULL", "{a,b}")},
		{typ: "public.ints", edges: quoteAll("{}", "{1,NULL}", "{{1,2},{3,4}}", "[0:1]={5,6}"), alone: true},
		{typ: "public.ints[]", edges: quoteAll("{}", `{"{}",NULL,"{1,NULL}","[0:1]={5,6}","{{1},{2}}"}`), alone: true},
		{typ: "public.boxes", edges: quoteAll("(1,1),(0,0)")},
		{typ: "public.pair", edges: []string{"ROW(NULL, NULL)", "ROW(NULL, '')", "ROW(1, 'NULL')"}, random: randomPair},
		{typ: "public.pair_domain", edges: []string{"ROW(NULL, NULL)::public.pair"}, random: randomPair},
		{typ: "public.nested", edges: []string{"ROW(NULL, '{}', NULL, NULL, NULL, NULL, NULL, NULL)"}, random: randomNested},
		{typ: "public.nothing", edges: []string{"ROW()"}},
		{typ: "public.shrunk", edges: []string{"ROW(1, 3)", "ROW(NULL, 3)"}},
		{typ: `public."We ird"`, edges: []string{`ROW(1, '{"a": [1, 2]}')`}},
		{typ: "public.textrange", edges: quoteAll("empty", `["a b","c,""d")`, `["",)`)},
		{typ: "public.textmultirange", edges: quoteAll(`{["a b","c,""d"),["é",)}`)},
	}
}

func arrayFamilies() []family {
	return []family{
		{typ: "text[]", edges: []string{"'{}'", "'[0:2]={a,NULL,\"NULL\"}'", "'[-1:0][2:3]={{a,b},{c,\"\"}}'"}, random: randomTextArray, alone: true},
		{typ: "int8[]", edges: quoteAll("{}", "{{{1}}}", "{{{{{{1,2},{3,NULL}}}}}}", "[5:5]={9223372036854775807}"), alone: true},
		{typ: "box[]", edges: quoteAll("{}", "{(1,1),(0,0);(2,2),(1,1);NULL}", "{{(1,1),(0,0)};{(2,2),(1,1)}}"), alone: true},
		{typ: "jsonb[]", edges: []string{`ARRAY[ARRAY['{"a":"b\"c"}', 'null'], ARRAY[NULL, '[1, 2]']]`}, alone: true},
		{typ: "public.boxes[]", edges: quoteAll("{(1,1),(0,0);(2,2),(1,1)}"), alone: true},
	}
}

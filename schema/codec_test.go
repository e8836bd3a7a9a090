package schema

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
)

// Types that a database would have to be asked for.
var (
	testMood   = &Type{OID: 90001, Name: "public.mood", Kind: KindText, Labels: []string{"sad", "NULL"}}
	testAmount = &Type{OID: 90002, Name: "public.amount", Kind: KindBigNumber, Base: builtin[1700]}
	testPair   = &Type{OID: 90003, Name: "public.pair", Kind: KindComposite, Fields: []Field{
		{"a", builtin[20]}, {`b "c"`, builtin[25]}}}
	testNested = &Type{OID: 90004, Name: "public.nested", Kind: KindComposite, Fields: []Field{
		{"p", testPair}, {"ps", arrayOf(90005, testPair)}, {"amounts", arrayOf(90006, testAmount)}, {"j", builtin[114]}}}
	testNothing = &Type{OID: 90007, Name: "public.nothing", Kind: KindComposite}
	testBoxes   = &Type{OID: 1020, Name: "box[]", Kind: KindArray, Delim: ';', Elem: &Type{OID: 603, Name: "box"}}
	testHstore  = &Type{OID: 90008, Name: "public.hstore", Kind: KindHstore}
	testBags    = arrayOf(90009, testHstore)
)

// testTypes is one type of every kind and way of nesting.
var testTypes = []*Type{
	builtin[25], builtin[16], builtin[701], builtin[1700], builtin[3802], builtin[1082], builtin[1114], builtin[1184],
	builtin[1009], builtin[1016], builtin[1185], builtin[3807], builtin[22], builtin[30], builtin[1006],
	testMood, testAmount, testPair, testNested, testNothing, testBoxes, testHstore, testBags,
}

func TestAppendValue(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		typ  *Type
		text string
		want string
	}{
		{builtin[16], "t", "true"},
		{builtin[16], "f", "false"},
		{builtin[23], "-7", "-7"},
		{builtin[701], "-0", "-0"},
		{builtin[701], "1e+20", "1e+20"},
		{builtin[701], "NaN", `"NaN"`},
		{builtin[1700], "-Infinity", `"-Infinity"`},
		{builtin[1700], "123456789012345678901234567890.50", "123456789012345678901234567890.50"},
		{builtin[25], "a\"\\/\b\f\n\r\t\x01\x7f<é\u2028", `"a\"\\/\b\f\n\r\t\u0001` + "\x7f<é\u2028" + `"`},
		{builtin[25], "", `""`},
		{builtin[114], "{\"a\" :\r\n1,\"a\":1E400}", `{"a" :  1,"a":1E400}`},
		{builtin[114], "\"\xff\"", "\"\ufffd\""},
		{builtin[1082], "0044-03-15 BC", `"0044-03-15 BC"`},
		{builtin[1082], "-infinity", `"-infinity"`},
		{builtin[1114], "10000-01-01 00:00:00", `"10000-01-01T00:00:00"`},
		{builtin[1114], "0044-03-15 12:34:56.789 BC", `"0044-03-15T12:34:56.789 BC"`},
		{builtin[1184], "2026-05-02 15:00:00.5+00", `"2026-05-02T15:00:00.5+00:00"`},
		{builtin[1184], "0044-03-15 00:00:00+00 BC", `"0044-03-15T00:00:00+00:00 BC"`},
		{builtin[1184], "2026-05-02 15:00:00-05:30", `"2026-05-02T15:00:00-05:30"`},
		{builtin[1184], "infinity", `"infinity"`},
		{builtin[1007], "{}", "[]"},
		{builtin[1007], "[0:2]={1,NULL,3}", "[1,null,3]"},
		{builtin[1007], "[1:1][-2:-1]={{1,2}}", "[[1,2]]"},
		{builtin[1009], `{NULL,"NULL",null,"","a\"\\b",c d}`, `[null,"NULL","null","","a\"\\b","c d"]`},
		{builtin[3807], `{"{\"a\": [1, \"x\"]}",NULL}`, `[{"a": [1, "x"]},null]`},
		{testBoxes, "{(1,1),(0,0);NULL}", `["(1,1),(0,0)",null]`},
		{builtin[22], "1 -2", "[1,-2]"},
		{builtin[30], "1 2", `["1","2"]`},
		{builtin[30], "", "[]"},
		{builtin[1006], `{"1 2","3"}`, "[[1,2],[3]]"},
		{testPair, `(,)`, `{"a":null,"b \"c\"":null}`},
		{testPair, `(1,"")`, `{"a":1,"b \"c\"":""}`},
		{testPair, `(1,"say ""x"" \\ , ()")`, `{"a":1,"b \"c\"":"say \"x\" \\ , ()"}`},
		{testNested, `("(1,""a b"")","{""(2,\\""c d\\"")"",NULL}",{1.50},"{""k"": 1}")`,
			`{"p":{"a":1,"b \"c\"":"a b"},"ps":[{"a":2,"b \"c\"":"c d"},null],"amounts":[1.50],"j":{"k": 1}}`},
		{testNothing, "()", "{}"},
		{testHstore, "", "{}"},
		{testHstore, `"a"=>"1", "b\"\\"=>NULL, "NULL"=>"NULL"`, `{"a": "1", "b\"\\": null, "NULL": "NULL"}`},
		{testBags, `{"\"a\"=>\"b\\\"c\"",""}`, `[{"a": "b\"c"},{}]`},
	} {
		got, err := AppendValue([]byte("prefix"), c.typ, []byte(c.text), false)
		if err != nil {
			t.Errorf("%s %q: %v", c.typ.Name, c.text, err)
		} else if string(got) != "prefix"+c.want {
			t.Errorf("%s %q:\n got %s\nwant prefix%s", c.typ.Name, c.text, got, c.want)
		}
	}
}

func TestAppendValueLossless(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		typ  *Type
		text string
		want string
	}{
		{builtin[20], "9007199254740993", `"9007199254740993"`},
		{builtin[1700], "0.10", `"0.10"`},
		{builtin[1700], "NaN", `"NaN"`},
		{builtin[23], "7", "7"},
		{builtin[701], "1e+20", "1e+20"},
		{builtin[114], `{"n":9007199254740993}`, `{"n":9007199254740993}`},
		{builtin[1016], "{{1,NULL},{2,3}}", `[["1",null],["2","3"]]`},
		{testNested, `("(1,x)","{""(2,y)""}",{1.50},7)`,
			`{"p":{"a":"1","b \"c\"":"x"},"ps":[{"a":"2","b \"c\"":"y"}],"amounts":["1.50"],"j":7}`},
	} {
		got, err := AppendValue(nil, c.typ, []byte(c.text), true)
		if err != nil || string(got) != c.want {
			t.Errorf("%s %q: %s, %v; want %s", c.typ.Name, c.text, got, err, c.want)
		}
	}
}

func TestAppendValueMalformed(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		typ  *Type
		text []string
	}{
		{builtin[16], []string{"", "true", "x"}},
		{builtin[23], []string{"", "-", "01", "1.", ".5", "1e", "+1", "0x1", "1 ", "nan"}},
		{builtin[114], []string{"", "{", `{"a"}`, `{"a":}`, `{"a":1,}`, "[1,]", "[1 2]", "tru", `"a`, `"\x"`, `"\u12g4"`, "\"\n\"",
			"1 2", "[1}", `{"a":1]`, "{1:2}", "]"}},
		{builtin[1082], []string{"", `2020"`, "today"}},
		{builtin[1114], []string{"", "2020-01-01", `2020-01-01 "`}},
		{builtin[1184], []string{"2020-01-01 00:00:00", "infinity "}},
		{builtin[1007], []string{"", "1", "{", "{1", "{1,}", "{,1}", "{1}}", "{1}x", "[0:1]", "[0:1]=", `{"1}`, `{1"2"}`, `{"1"2}`, `{1\2}`,
			"{x}", "{{{{{{{1}}}}}}}"}},
		{builtin[22], []string{" ", "1 ", " 1", "1  2", "x"}},
		{testPair, []string{"", "(", "()", "(1)", "(1,2,3)", `(1,"a)`, `(1,a"b)`, `(1,"a"b)`, "(x,)", "(1,(2))"}},
		{testNothing, []string{"(1)", "(,)"}},
		{testHstore, []string{"a", `"a"`, `"a"=>`, `"a"=>b`, `"a"=>"b",`, `"a"=>"b","c"=>"d"`, `"a"=>"b`}},
	} {
		for _, text := range c.text {
			dst := append(make([]byte, 0, 256), "prefix"...)
			got, err := AppendValue(dst, c.typ, []byte(text), false)
			if !errors.Is(err, ErrMalformed) {
				t.Errorf("%s %q: %s, %v; want ErrMalformed", c.typ.Name, text, got, err)
			}
			if string(got) != "prefix" || &got[0] != &dst[0] {
				t.Errorf("%s %q: dst comes back as %q", c.typ.Name, text, got)
			}
			if len(text) > 4 && strings.Contains(err.Error(), text) {
				t.Errorf("%s %q: the error shows the value: %v", c.typ.Name, text, err)
			}
		}
	}
}

// TestAppendStringEveryByte moves every byte through every place of the eight that plainPrefix looks at together.
func TestAppendStringEveryByte(t *testing.T) {
	t.Parallel()
	for c := range 256 {
		for at := range 20 {
			s := []byte(strings.Repeat("~", 20))
			s[at] = byte(c)
			got := AppendString(nil, s)
			var back string
			if err := json.Unmarshal(got, &back); err != nil {
				t.Fatalf("byte %#x at %d: %v in %q", c, at, err, got)
			}
			if want := string([]rune(string(s))); back != want {
				t.Fatalf("byte %#x at %d: %q, want %q", c, at, back, want)
			}
		}
	}
}

func TestAppendStringDamaged(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"\xff":                `"` + "\ufffd" + `"`,
		"é\xe9\n\"日":          `"é` + "\ufffd" + `\n\"日"`,
		"\xed\xa0\x80":        `"` + "\ufffd\ufffd\ufffd" + `"`,
		"12345678\xc3":        `"12345678` + "\ufffd" + `"`,
		"\n12345678é\xf0\x9f": `"\n12345678é` + "\ufffd\ufffd" + `"`,
	} {
		if got := AppendString(nil, []byte(text)); string(got) != want {
			t.Errorf("%q: %s, want %s", text, got, want)
		}
	}
}

// TestAppendValueAllocates holds the promise that values cost no allocation once dst is large enough.
func TestAppendValueAllocates(t *testing.T) { // not parallel: AllocsPerRun counts the whole process
	dst := make([]byte, 0, 4096)
	for _, c := range []struct {
		typ  *Type
		text string
	}{
		{builtin[16], "t"},
		{builtin[1700], "12.5"},
		{builtin[25], "a \"quoted\" é"},
		{builtin[3802], `{"a": [1, {"b": null}]}`},
		{builtin[1184], "2026-05-02 15:00:00.5+00"},
		{builtin[1009], `{a,"b \"c\"",NULL}`},
		{testNested, `("(1,""a b"")","{""(2,\\""c d\\"")"",NULL}",{1.50},"{""k"": 1}")`},
		{testHstore, `"a\""=>"1"`},
	} {
		text := []byte(c.text)
		if n := testing.AllocsPerRun(100, func() { _, _ = AppendValue(dst, c.typ, text, false) }); n != 0 {
			t.Errorf("%s: %v allocations a value, want none", c.typ.Name, n)
		}
	}
}

// TestDeepJSON is a value that would overflow a recursive parser's patience, and an open one that isn't JSON.
func TestDeepJSON(t *testing.T) {
	t.Parallel()
	const depth = 1_000_000
	text := strings.Repeat("[", depth) + strings.Repeat("]", depth)
	if !validJSON([]byte(text)) {
		t.Error("a deeply nested array is not valid")
	}
	if validJSON([]byte(text[1:])) || validJSON([]byte(text[:len(text)-1])) {
		t.Error("an unbalanced array is valid")
	}
}

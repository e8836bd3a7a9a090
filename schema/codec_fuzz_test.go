package schema

import (
	"bytes"
	"encoding/json"
	"testing"
	"unicode/utf8"
)

// FuzzAppendValue gives any bytes to any type: the outcome is an error or one line of valid JSON, and what stood in dst
// before stays.
func FuzzAppendValue(f *testing.F) {
	f.Add(uint8(0), []byte("a\xff\"\\"), false)
	f.Fuzz(func(t *testing.T, which uint8, text []byte, lossless bool) {
		typ := testTypes[int(which)%len(testTypes)]
		before := bytes.Clone(text)
		got, err := AppendValue([]byte("prefix"), typ, text, lossless)
		if !bytes.HasPrefix(got, []byte("prefix")) {
			t.Fatalf("%s %q: the prefix became %q", typ.Name, text, got)
		}
		if !bytes.Equal(text, before) {
			t.Fatalf("%s %q: the text became %q", typ.Name, before, text)
		}
		got = got[len("prefix"):]
		if err != nil {
			if len(got) != 0 {
				t.Fatalf("%s %q: %v, but also %q", typ.Name, text, err, got)
			}
			return
		}
		if !json.Valid(got) || !utf8.Valid(got) || bytes.ContainsAny(got, "\n\r") {
			t.Fatalf("%s %q: %q is not one line of JSON", typ.Name, text, got)
		}
		room, err := AppendValue(make([]byte, 0, 1<<16), typ, text, lossless)
		if err != nil || !bytes.Equal(room, got) {
			t.Fatalf("%s %q: %q with little room in dst, %q (%v) with much", typ.Name, text, got, room, err)
		}
	})
}

// FuzzAppendString holds the string against what encoding/json reads back from it.
func FuzzAppendString(f *testing.F) {
	f.Add([]byte("a\xff\"\\\x00é"))
	f.Fuzz(func(t *testing.T, s []byte) {
		got := AppendString([]byte("prefix"), s)
		got, ok := bytes.CutPrefix(got, []byte("prefix"))
		if !ok {
			t.Fatalf("%q: the prefix is gone", s)
		}
		var back string
		if err := json.Unmarshal(got, &back); err != nil || !utf8.Valid(got) {
			t.Fatalf("%q: %q: %v", s, got, err)
		}
		if want := string([]rune(string(s))); back != want {
			t.Fatalf("%q reads back as %q, want %q", s, back, want)
		}
	})
}

// FuzzValidJSON holds the codec's own check against encoding/json's.
func FuzzValidJSON(f *testing.F) {
	f.Add([]byte(`{"a":[1,-0.5e+3,"\u00e9",true,null,{}]}`))
	f.Fuzz(func(t *testing.T, s []byte) {
		if got, want := validJSON(s), json.Valid(s); got != want {
			t.Fatalf("%q: %v, want %v", s, got, want)
		}
	})
}

package schema

import (
	"strings"
	"testing"
)

// BenchmarkRow is one row of the kind that most tables hold.
func BenchmarkRow(b *testing.B) {
	columns := []struct {
		name string
		typ  *Type
		text string
	}{
		{"id", builtin[2950], "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"},
		{"position", builtin[23], "1234567"},
		{"title", builtin[25], "Call the supplier about the late delivery"},
		{"notes", builtin[25], "They said \"Tuesday\".\nAsk for Zoë, extension 12, and have the order number ready."},
		{"done", builtin[16], "f"},
		{"created_at", builtin[1184], "2026-05-02 15:00:00.123456+00"},
	}
	texts := make([][]byte, len(columns))
	for i, c := range columns {
		texts[i] = []byte(c.text)
	}
	var dst []byte
	b.ReportAllocs()
	for b.Loop() {
		dst = append(dst[:0], '{')
		for i, c := range columns {
			if i > 0 {
				dst = append(dst, ',')
			}
			dst = AppendString(dst, []byte(c.name))
			dst = append(dst, ':')
			var err error
			if dst, err = AppendValue(dst, c.typ, texts[i], false); err != nil {
				b.Fatal(err)
			}
		}
		dst = append(dst, '}')
	}
	b.SetBytes(int64(len(dst)))
}

func BenchmarkValue(b *testing.B) {
	for _, c := range []struct {
		name string
		typ  *Type
		text string
	}{
		{"text", builtin[25], strings.Repeat("An ordinary sentence of plain English. ", 100)},
		{"text-japanese", builtin[25], strings.Repeat("日本語の文章です。", 100)},
		{"text-escapes", builtin[25], strings.Repeat("a \"b\"\n", 500)},
		{"jsonb", builtin[3802], "[" + strings.Repeat(`{"id": 17, "name": "An ordinary name", "tags": ["a", "b"], "ok": true}, `, 50) + "null]"},
		{"int-array", builtin[1007], "{" + strings.Repeat("12345,", 500) + "NULL}"},
		{"text-array", builtin[1009], "{" + strings.Repeat(`plain,"two words","a \"quote\"",`, 50) + "NULL}"},
		{"composite", testNested, `("(1,""a b"")","{""(2,\\""c d\\"")"",NULL}",{1.50},"{""k"": 1}")`},
	} {
		b.Run(c.name, func(b *testing.B) {
			text := []byte(c.text)
			var dst []byte
			b.ReportAllocs()
			b.SetBytes(int64(len(text)))
			for b.Loop() {
				var err error
				if dst, err = AppendValue(dst[:0], c.typ, text, false); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

package schema

import (
	"encoding/binary"
	"math/bits"
	"unicode/utf8"
)

const hexDigits = "0123456789abcdef"

// plain says which bytes stand for themselves within a JSON string.
var plain = func() (t [utf8.RuneSelf]bool) {
	for c := range t {
		t[c] = c >= ' ' && c != '"' && c != '\\'
	}
	return t
}()

// AppendString appends s as a JSON string with the escapes that PostgreSQL uses. Bytes that aren't UTF-8 become U+FFFD.
func AppendString(dst, s []byte) []byte {
	dst = append(dst, '"')
	known := false // that the rest of s is UTF-8
	from := 0
	for i := 0; i < len(s); {
		i += plainPrefix(s[i:])
		if i == len(s) {
			break
		}
		if c := s[i]; c < utf8.RuneSelf {
			dst = append(dst, s[from:i]...)
			dst = appendEscape(dst, c)
			i++
			from = i
			continue
		}
		if !known {
			if known = utf8.Valid(s[i:]); !known {
				return appendDamaged(append(dst, s[from:i]...), s[i:])
			}
		}
		for i < len(s) && s[i] >= utf8.RuneSelf {
			i++
		}
	}
	dst = append(dst, s[from:]...)
	return append(dst, '"')
}

// plainPrefix returns how many bytes at the beginning of s are ASCII without escapes, looking at eight at a time.
func plainPrefix(s []byte) int {
	const ones, high = 0x0101010101010101, 0x8080808080808080
	n := 0
	for ; len(s)-n >= 8; n += 8 {
		w := binary.LittleEndian.Uint64(s[n:])
		quote := w ^ ones*'"'
		slash := w ^ ones*'\\'
		// A byte's high bit is set where the byte is below the space, zero after the xor, or not ASCII. A borrow can
		// set it wrongly, but only above a byte where it is right, so the lowest one is always right.
		if found := (w | (w - ones*' ') | (quote - ones) | (slash - ones)) & high; found != 0 {
			return n + bits.TrailingZeros64(found)/8
		}
	}
	for n < len(s) && s[n] < utf8.RuneSelf && plain[s[n]] {
		n++
	}
	return n
}

// appendEscape appends the escape of a control byte, quote or backslash, in the form of PostgreSQL's escape_json.
func appendEscape(dst []byte, c byte) []byte {
	switch c {
	case '"', '\\':
		return append(dst, '\\', c)
	case '\b':
		return append(dst, '\\', 'b')
	case '\f':
		return append(dst, '\\', 'f')
	case '\n':
		return append(dst, '\\', 'n')
	case '\r':
		return append(dst, '\\', 'r')
	case '\t':
		return append(dst, '\\', 't')
	}
	return append(dst, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
}

// appendDamaged finishes a JSON string whose rest s is not UTF-8, which only an SQL_ASCII database can hold.
func appendDamaged(dst, s []byte) []byte {
	for len(s) > 0 {
		c := s[0]
		switch {
		case c >= utf8.RuneSelf:
			r, size := utf8.DecodeRune(s)
			dst = utf8.AppendRune(dst, r)
			s = s[size:]
			continue
		case plain[c]:
			dst = append(dst, c)
		default:
			dst = appendEscape(dst, c)
		}
		s = s[1:]
	}
	return append(dst, '"')
}

// appendValidUTF8 copies s, with U+FFFD for each byte that isn't UTF-8.
func appendValidUTF8(dst, s []byte) []byte {
	for len(s) > 0 {
		r, size := utf8.DecodeRune(s)
		dst = utf8.AppendRune(dst, r)
		s = s[size:]
	}
	return dst
}

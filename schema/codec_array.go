package schema

import "bytes"

// maxDimensions is PostgreSQL's MAXDIM: deeper text is not an array, and recursion ends here.
const maxDimensions = 6

// appendArray turns {1,NULL,"a b"} into [1,null,"a b"], a dimension being one JSON array. Bounds other than 1, written
// before the braces as [0:2]=, have no place in JSON; row_to_json leaves them out too.
func appendArray(dst []byte, t *Type, text []byte, lossless bool) ([]byte, error) {
	if len(text) > 0 && text[0] == '[' {
		equals := bytes.IndexByte(text, '=')
		if equals < 0 {
			return dst, malformed(t, "its bounds have no end")
		}
		text = text[equals+1:]
	}
	dst, rest, err := appendDimension(dst, t, text, 1, lossless)
	if err == nil && len(rest) > 0 {
		err = malformed(t, "something follows the last brace")
	}
	return dst, err
}

// appendDimension appends one pair of braces with all within, and returns what follows it.
func appendDimension(dst []byte, t *Type, text []byte, depth int, lossless bool) (out, rest []byte, err error) {
	if depth > maxDimensions || len(text) == 0 || text[0] != '{' {
		return dst, text, malformed(t, "a brace is missing or nested too deep")
	}
	dst = append(dst, '[')
	text = text[1:]
	if len(text) > 0 && text[0] == '}' {
		return append(dst, ']'), text[1:], nil
	}
	for {
		if len(text) > 0 && text[0] == '{' {
			dst, text, err = appendDimension(dst, t, text, depth+1, lossless)
		} else {
			dst, text, err = appendElement(dst, t, text, lossless)
		}
		if err != nil {
			return dst, text, err
		}
		if len(text) == 0 {
			return dst, text, malformed(t, "its last brace is missing")
		}
		switch text[0] {
		case t.Delim:
			dst = append(dst, ',')
		case '}':
			return append(dst, ']'), text[1:], nil
		default:
			return dst, text, malformed(t, "its elements are not delimited")
		}
		text = text[1:]
	}
}

// appendElement appends the element that text starts with and returns what follows it.
func appendElement(dst []byte, t *Type, text []byte, lossless bool) (out, rest []byte, err error) {
	if len(text) > 0 && text[0] == '"' {
		end, escaped := quotedEnd(text, false)
		if end < 0 {
			return dst, text, malformed(t, "a quote is missing")
		}
		dst, err = appendUnquoted(dst, t.Elem, text[1:end-1], escaped, lossless)
		return dst, text[end:], err
	}
	end := 0
	for end < len(text) && text[end] != t.Delim && text[end] != '}' {
		if c := text[end]; c == '"' || c == '\\' || c == '{' {
			return dst, text, malformed(t, "an element should be quoted")
		}
		end++
	}
	word := text[:end]
	switch {
	case len(word) == 0:
		return dst, text, malformed(t, "an element is missing")
	case string(word) == "NULL":
		dst = append(dst, "null"...)
	default:
		dst, err = appendValue(dst, t.Elem, word, lossless)
	}
	return dst, text[end:], err
}

// appendVector turns the text of an int2vector or oidvector, "1 2 3", into an array.
func appendVector(dst []byte, t *Type, text []byte, lossless bool) ([]byte, error) {
	dst = append(dst, '[')
	for first := true; len(text) > 0; first = false {
		word, rest, more := bytes.Cut(text, []byte{' '})
		if len(word) == 0 || (more && len(rest) == 0) {
			return dst, malformed(t, "an element is missing")
		}
		if !first {
			dst = append(dst, ',')
		}
		var err error
		if dst, err = appendValue(dst, t.Elem, word, lossless); err != nil {
			return dst, err
		}
		text = rest
	}
	return append(dst, ']'), nil
}

// quotedEnd returns the position after the closing quote of the string that text starts with, or -1, and whether
// anything within is escaped. With doubled, two quotes stand for one, as in records.
func quotedEnd(text []byte, doubled bool) (end int, escaped bool) {
	for i := 1; i < len(text); i++ {
		switch text[i] {
		case '\\':
			escaped = true
			i++
		case '"':
			if !doubled || i+1 == len(text) || text[i+1] != '"' {
				return i + 1, escaped
			}
			escaped = true
			i++
		}
	}
	return -1, false
}

// appendUnquoted appends the value whose quoted text, without the quotes, is raw. Unescaping needs room for a moment:
// it uses the end of dst, so that no element costs an allocation, and moves the JSON over it afterwards.
func appendUnquoted(dst []byte, t *Type, raw []byte, escaped, lossless bool) ([]byte, error) {
	if !escaped {
		return appendValue(dst, t, raw, lossless)
	}
	start := len(dst)
	dst = appendUnescaped(dst, raw)
	end := len(dst)
	dst, err := appendValue(dst, t, dst[start:end:end], lossless)
	if err != nil {
		return dst, err
	}
	n := copy(dst[start:], dst[end:])
	return dst[:start+n], nil
}

// appendUnescaped copies raw, which quotedEnd has measured, without its backslashes and doubled quotes.
func appendUnescaped(dst, raw []byte) []byte {
	for i := 0; i < len(raw); i++ {
		if raw[i] == '\\' || raw[i] == '"' {
			i++
		}
		dst = append(dst, raw[i])
	}
	return dst
}

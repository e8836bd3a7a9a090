package schema

import "bytes"

// appendComposite turns the text of a record, (1,"a b",), into an object of its fields, an empty field being null.
func appendComposite(dst []byte, t *Type, text []byte, lossless bool) ([]byte, error) {
	if len(text) < 2 || text[0] != '(' || text[len(text)-1] != ')' {
		return dst, malformed(t, "its parentheses are missing")
	}
	text = text[1 : len(text)-1]
	dst = append(dst, '{')
	for i := range t.Fields {
		if i > 0 {
			if len(text) == 0 || text[0] != ',' {
				return dst, malformed(t, "it has fewer fields than the type")
			}
			text = text[1:]
			dst = append(dst, ',')
		}
		dst = AppendString(dst, []byte(t.Fields[i].Name))
		dst = append(dst, ':')
		var err error
		if dst, text, err = appendField(dst, t, t.Fields[i].Type, text, lossless); err != nil {
			return dst, err
		}
	}
	if len(text) > 0 {
		return dst, malformed(t, "it has more fields than the type")
	}
	return append(dst, '}'), nil
}

// appendField appends the field of type f that text starts with and returns what follows it.
func appendField(dst []byte, t, f *Type, text []byte, lossless bool) (out, rest []byte, err error) {
	if len(text) > 0 && text[0] == '"' {
		end, escaped := quotedEnd(text, true)
		if end < 0 {
			return dst, text, malformed(t, "a quote is missing")
		}
		dst, err = appendUnquoted(dst, f, text[1:end-1], escaped, lossless)
		return dst, text[end:], err
	}
	end := bytes.IndexByte(text, ',')
	if end < 0 {
		end = len(text)
	}
	word := text[:end]
	if len(word) == 0 {
		return append(dst, "null"...), text[end:], nil
	}
	if bytes.ContainsAny(word, `"\()`) {
		return dst, text, malformed(t, "a field should be quoted")
	}
	dst, err = appendValue(dst, f, word, lossless)
	return dst, text[end:], err
}

// appendHstore turns "a"=>"1", "b"=>NULL into an object, spaced as hstore's own cast to json spaces it.
func appendHstore(dst []byte, t *Type, text []byte) ([]byte, error) {
	dst = append(dst, '{')
	for first := true; len(text) > 0; first = false {
		if !first {
			var ok bool
			if text, ok = bytes.CutPrefix(text, []byte(", ")); !ok {
				return dst, malformed(t, "its pairs are not delimited")
			}
			dst = append(dst, ", "...)
		}
		var ok bool
		if dst, text, ok = appendHstoreString(dst, text); !ok {
			return dst, malformed(t, "a key is not quoted")
		}
		if text, ok = bytes.CutPrefix(text, []byte("=>")); !ok {
			return dst, malformed(t, "a key has no value")
		}
		dst = append(dst, ": "...)
		if rest, null := bytes.CutPrefix(text, []byte("NULL")); null {
			dst, text = append(dst, "null"...), rest
			continue
		}
		if dst, text, ok = appendHstoreString(dst, text); !ok {
			return dst, malformed(t, "a value is not quoted")
		}
	}
	return append(dst, '}'), nil
}

// appendHstoreString appends the quoted string that text starts with and returns what follows it.
func appendHstoreString(dst, text []byte) (out, rest []byte, ok bool) {
	if len(text) == 0 || text[0] != '"' {
		return dst, text, false
	}
	end, escaped := quotedEnd(text, false)
	if end < 0 {
		return dst, text, false
	}
	dst, err := appendUnquoted(dst, plainText, text[1:end-1], escaped, false)
	return dst, text[end:], err == nil
}

// plainText is the type of text within hstore, whatever text is called in the database.
var plainText = &Type{Name: "text", Kind: KindText}

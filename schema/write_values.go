package schema

import (
	"encoding/hex"
	"errors"
	"fmt"
	"unicode/utf16"
	"unicode/utf8"
)

// ValueError says that the JSON given for a column can't be a value of its type. Its text holds no value.
type ValueError struct {
	Column string
	Reason string
}

func (e *ValueError) Error() string { return fmt.Sprintf("column %s: %s", e.Column, e.Reason) }

var (
	errNUL       = errors.New("text can't hold the character U+0000")
	errSurrogate = errors.New("half of a surrogate pair is no character")
	errContainer = errors.New("an object or an array is no value of its type")
)

// appendInput appends the text from which PostgreSQL makes the value of type t that the codec writes as the JSON v: the
// reverse of AppendValue. A string in place of an array or a composite is taken for its text. v must be valid JSON and not
// null, and is checked as far as its form goes; what it means is PostgreSQL's to judge.
func appendInput(dst []byte, t *Type, v []byte) ([]byte, error) {
	t = t.Underlying()
	if t.Kind == KindJSON {
		return append(dst, v...), nil
	}
	switch v[0] {
	case '"':
		return unquote(dst, v)
	case '[':
		switch t.Kind {
		case KindArray:
			return appendArrayInput(dst, t, v, 1)
		case KindVector:
			return appendVectorInput(dst, t, v)
		}
		return dst, errContainer
	case '{':
		switch t.Kind {
		case KindComposite:
			return appendCompositeInput(dst, t, v)
		case KindHstore:
			return appendHstoreInput(dst, v)
		}
		return dst, errContainer
	}
	return append(dst, v...), nil // a number, true or false
}

// appendArrayInput makes {"1",NULL} of [1,null]. Elements that are arrays in JSON themselves are one more dimension, but
// for types whose values look so.
func appendArrayInput(dst []byte, t *Type, v []byte, depth int) ([]byte, error) {
	if depth > maxDimensions {
		return dst, errors.New("it has too many dimensions")
	}
	element := t.Elem.Underlying().Kind
	nested := element != KindArray && element != KindVector && element != KindJSON
	dst = append(dst, '{')
	first := true
	err := eachElement(v, func(e []byte) (err error) {
		if !first {
			dst = append(dst, t.Delim)
		}
		first = false
		switch {
		case nested && e[0] == '[':
			dst, err = appendArrayInput(dst, t, e, depth+1)
		case isNull(e):
			dst = append(dst, "NULL"...)
		default:
			dst, err = appendQuotedInput(dst, t.Elem, e, '\\')
		}
		return err
	})
	return append(dst, '}'), err
}

// appendCompositeInput makes ("1",) of {"a":1,"b":null}. A field that isn't named is null.
func appendCompositeInput(dst []byte, t *Type, v []byte) ([]byte, error) {
	fields := map[string][]byte{}
	if err := eachMember(v, func(name, value []byte) error {
		fields[string(name)] = value
		return nil
	}); err != nil {
		return dst, err
	}
	dst = append(dst, '(')
	for i, f := range t.Fields {
		if i > 0 {
			dst = append(dst, ',')
		}
		value := fields[f.Name]
		delete(fields, f.Name)
		if value == nil || isNull(value) {
			continue
		}
		var err error
		if dst, err = appendQuotedInput(dst, f.Type, value, 0); err != nil {
			return dst, err
		}
	}
	if len(fields) > 0 {
		return dst, errors.New("it has a member that is no field of its type")
	}
	return append(dst, ')'), nil
}

func appendVectorInput(dst []byte, t *Type, v []byte) ([]byte, error) {
	first := true
	err := eachElement(v, func(e []byte) (err error) {
		if !first {
			dst = append(dst, ' ')
		}
		first = false
		if isNull(e) {
			return errors.New("its elements can't be null")
		}
		dst, err = appendInput(dst, t.Elem, e)
		return err
	})
	return dst, err
}

// appendHstoreInput makes "a"=>"1","b"=>NULL of {"a":"1","b":null}.
func appendHstoreInput(dst, v []byte) ([]byte, error) {
	first := true
	err := eachMember(v, func(name, value []byte) (err error) {
		if !first {
			dst = append(dst, ',')
		}
		first = false
		dst = append(appendEscapedQuoted(dst, name, '\\'), "=>"...)
		if isNull(value) {
			dst = append(dst, "NULL"...)
			return nil
		}
		dst, err = appendQuotedInput(dst, plainText, value, '\\')
		return err
	})
	return dst, err
}

// appendQuotedInput appends the input text of v within quotes, as an element of a larger text. escape comes before each
// quote and backslash; 0 doubles them, as records want it.
func appendQuotedInput(dst []byte, t *Type, v []byte, escape byte) ([]byte, error) {
	text, err := appendInput(nil, t, v)
	if err != nil {
		return dst, err
	}
	return appendEscapedQuoted(dst, text, escape), nil
}

func appendEscapedQuoted(dst, text []byte, escape byte) []byte {
	dst = append(dst, '"')
	for _, c := range text {
		if c == '"' || c == '\\' {
			if escape == 0 {
				dst = append(dst, c)
			} else {
				dst = append(dst, escape)
			}
		}
		dst = append(dst, c)
	}
	return append(dst, '"')
}

func isNull(v []byte) bool { return v[0] == 'n' }

// members reads an object's members; the last one of a name counts.
func members(object []byte) (map[string][]byte, error) {
	if len(object) == 0 {
		return nil, nil
	}
	if !utf8.Valid(object) {
		return nil, errors.New("it is not UTF-8")
	}
	if !validJSON(object) || object[skipSpace(object, 0)] != '{' {
		return nil, errors.New("it is no JSON object")
	}
	found := map[string][]byte{}
	return found, eachMember(object[skipSpace(object, 0):], func(name, value []byte) error {
		found[string(name)] = value
		return nil
	})
}

// eachMember calls f for each member of the valid JSON object v.
func eachMember(v []byte, f func(name, value []byte) error) error {
	for i := skipSpace(v, 1); v[i] != '}'; {
		colon := skipString(v, i)
		name, err := unquote(nil, v[i:colon])
		if err != nil {
			return err
		}
		from := skipKey(v, i)
		end := skipValue(v, from)
		if err := f(name, v[from:end]); err != nil {
			return err
		}
		i = skipComma(v, end)
	}
	return nil
}

// eachElement calls f for each element of the valid JSON array v.
func eachElement(v []byte, f func(value []byte) error) error {
	for i := skipSpace(v, 1); v[i] != ']'; {
		end := skipValue(v, i)
		if err := f(v[i:end]); err != nil {
			return err
		}
		i = skipComma(v, end)
	}
	return nil
}

func skipComma(v []byte, i int) int {
	if i = skipSpace(v, i); v[i] == ',' {
		i = skipSpace(v, i+1)
	}
	return i
}

// skipValue returns the end of the value at i of valid JSON.
func skipValue(v []byte, i int) int {
	switch v[i] {
	case '"':
		return skipString(v, i)
	case 't', 'n':
		return i + 4
	case 'f':
		return i + 5
	case '{', '[':
		for depth := 0; ; {
			switch v[i] {
			case '"':
				i = skipString(v, i)
				continue
			case '{', '[':
				depth++
			case '}', ']':
				depth--
			}
			i++
			if depth == 0 {
				return i
			}
		}
	}
	return numberEnd(v, i)
}

// unquote appends what the valid JSON string s says. Unlike encoding/json it puts no other character in the place of one
// that PostgreSQL can't store.
func unquote(dst, s []byte) ([]byte, error) {
	s = s[1 : len(s)-1]
	for i := 0; i < len(s); {
		if s[i] != '\\' {
			dst = append(dst, s[i])
			i++
			continue
		}
		c := s[i+1]
		i += 2
		switch c {
		case 'b':
			c = '\b'
		case 'f':
			c = '\f'
		case 'n':
			c = '\n'
		case 'r':
			c = '\r'
		case 't':
			c = '\t'
		case 'u':
			r := unit(s[i:])
			i += 4
			if utf16.IsSurrogate(r) {
				if i+6 > len(s) || s[i] != '\\' || s[i+1] != 'u' {
					return dst, errSurrogate
				}
				if r = utf16.DecodeRune(r, unit(s[i+2:])); r == utf8.RuneError {
					return dst, errSurrogate
				}
				i += 6
			}
			if r == 0 {
				return dst, errNUL
			}
			dst = utf8.AppendRune(dst, r)
			continue
		}
		dst = append(dst, c)
	}
	return dst, nil
}

// unit reads the four hexadecimal digits that s starts with.
func unit(s []byte) rune {
	var b [2]byte
	_, _ = hex.Decode(b[:], s[:4]) // a scanner has passed over them
	return rune(b[0])<<8 | rune(b[1])
}

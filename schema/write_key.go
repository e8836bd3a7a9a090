package schema

import (
	"errors"
	"unicode/utf8"
)

// ErrKey is in the chain of errors about a document's key: the text given is not one.
var ErrKey = errors.New("the key is not of the table's form")

// ParseDocID returns the texts of the key's columns, in key order: the text itself for a key of one column, else the
// members of a JSON array of as many strings. It doesn't say whether they are values of the columns' types.
func ParseDocID(t *Table, text string) ([]string, error) {
	if !utf8.ValidString(text) {
		return nil, ErrKey
	}
	if len(t.Key) == 1 {
		for i := range len(text) {
			if text[i] == 0 {
				return nil, ErrKey
			}
		}
		return []string{text}, nil
	}
	s := []byte(text)
	if !validJSON(s) || s[skipSpace(s, 0)] != '[' {
		return nil, ErrKey
	}
	key := make([]string, 0, len(t.Key))
	err := eachElement(s[skipSpace(s, 0):], func(e []byte) error {
		if e[0] != '"' || len(key) == len(t.Key) {
			return ErrKey
		}
		part, err := unquote(nil, e)
		key = append(key, string(part))
		return err
	})
	if err != nil || len(key) != len(t.Key) {
		return nil, ErrKey
	}
	return key, nil
}

// AppendDocID is the reverse of ParseDocID.
func AppendDocID(dst []byte, key []string) []byte {
	if len(key) == 1 {
		return append(dst, key[0]...)
	}
	for i, part := range key {
		dst = append(dst, "[,"[min(i, 1)])
		dst = AppendString(dst, []byte(part))
	}
	return append(dst, ']')
}

package schema

import (
	"bytes"
	"errors"
	"fmt"
	"unicode/utf8"
)

// CodecVersion is part of every collection's fingerprint: raise it when the JSON of any value changes.
const CodecVersion = 1

// ErrMalformed is in the chain of every error of AppendValue. Who reads the change stream checks for it: a composite
// type altered since it was loaded looks the same as damaged text, and loading the type again tells them apart.
var ErrMalformed = errors.New("the text is not a value of its type")

// AppendValue appends the JSON of one PostgreSQL text value of type t to dst. With lossless, int8 and numeric become
// strings, inside arrays and composites too. text must not be nil (NULL is the caller's "null"). The result equals
// row_to_json's value for a session with SessionSettings, except that raw line breaks in json are spaces.
// An error says that the text is not of the type; dst is then returned as it was.
func AppendValue(dst []byte, t *Type, text []byte, lossless bool) ([]byte, error) {
	out, err := appendValue(dst, t, text, lossless)
	if err != nil {
		return dst, err
	}
	return out, nil
}

func appendValue(dst []byte, t *Type, text []byte, lossless bool) ([]byte, error) {
	t = t.Underlying()
	switch t.Kind {
	case KindBool:
		return appendBool(dst, t, text)
	case KindNumber:
		return appendNumber(dst, t, text, false)
	case KindBigNumber:
		return appendNumber(dst, t, text, lossless)
	case KindJSON:
		return appendJSON(dst, t, text)
	case KindDate:
		return appendDate(dst, t, text)
	case KindTimestamp, KindTimestampTZ:
		return appendTimestamp(dst, t, text)
	case KindArray:
		return appendArray(dst, t, text, lossless)
	case KindVector:
		return appendVector(dst, t, text, lossless)
	case KindComposite:
		return appendComposite(dst, t, text, lossless)
	case KindHstore:
		return appendHstore(dst, t, text)
	default:
		return AppendString(dst, text), nil
	}
}

// malformed names the type and never the value, which may be private and ends up in logs.
func malformed(t *Type, reason string) error {
	return fmt.Errorf("%w: %s: %s; if the type was altered, load it again", ErrMalformed, t.Name, reason)
}

func appendBool(dst []byte, t *Type, text []byte) ([]byte, error) {
	switch string(text) {
	case "t":
		return append(dst, "true"...), nil
	case "f":
		return append(dst, "false"...), nil
	}
	return dst, malformed(t, "it is neither t nor f")
}

// appendNumber copies the digits as PostgreSQL wrote them; what JSON has no number for becomes a string.
func appendNumber(dst []byte, t *Type, text []byte, quote bool) ([]byte, error) {
	if numberEnd(text, 0) != len(text) {
		switch string(text) {
		case "NaN", "Infinity", "-Infinity":
			quote = true
		default:
			return dst, malformed(t, "it is not a number")
		}
	}
	if quote {
		return appendQuoted(dst, text), nil
	}
	return append(dst, text...), nil
}

func appendDate(dst []byte, t *Type, text []byte) ([]byte, error) {
	if !isInfinite(text) && !isDateText(text) {
		return dst, malformed(t, "it is not an ISO date")
	}
	return appendQuoted(dst, text), nil
}

// appendTimestamp turns "2026-05-02 15:00:00.5+00 BC" into "2026-05-02T15:00:00.5+00:00 BC".
func appendTimestamp(dst []byte, t *Type, text []byte) ([]byte, error) {
	if isInfinite(text) {
		return appendQuoted(dst, text), nil
	}
	space := bytes.IndexByte(text, ' ')
	if space < 0 || !isDateText(text) {
		return dst, malformed(t, "it is not an ISO timestamp")
	}
	dst = append(dst, '"')
	dst = append(dst, text[:space]...)
	dst = append(dst, 'T')
	clock := text[space+1:]
	if t.Kind == KindTimestamp {
		dst = append(dst, clock...)
		return append(dst, '"'), nil
	}
	clock, bc := bytes.CutSuffix(clock, []byte(" BC"))
	sign := bytes.LastIndexAny(clock, "+-")
	if sign < 0 {
		return dst, malformed(t, "it has no time zone")
	}
	dst = append(dst, clock...)
	if len(clock)-sign == len("+00") {
		dst = append(dst, ":00"...)
	}
	if bc {
		dst = append(dst, " BC"...)
	}
	return append(dst, '"'), nil
}

func isInfinite(text []byte) bool {
	return string(text) == "infinity" || string(text) == "-infinity"
}

// isDateText reports whether text holds only what ISO dates and times are made of, so that it needs no escapes.
func isDateText(text []byte) bool {
	for _, c := range text {
		switch {
		case c >= '0' && c <= '9', c == '-', c == ':', c == ' ', c == '.', c == '+', c == 'B', c == 'C':
		default:
			return false
		}
	}
	return len(text) > 0 && text[0] >= '0' && text[0] <= '9'
}

// appendQuoted puts quotes around text that is known to need no escapes.
func appendQuoted(dst, text []byte) []byte {
	dst = append(dst, '"')
	dst = append(dst, text...)
	return append(dst, '"')
}

// appendJSON copies a json value byte for byte: digits, duplicate keys and order are the application's. Only raw line
// breaks become spaces, since a document is one line on the wire.
func appendJSON(dst []byte, t *Type, text []byte) ([]byte, error) {
	if !validJSON(text) {
		return dst, malformed(t, "it is not JSON")
	}
	start := len(dst)
	if utf8.Valid(text) {
		dst = append(dst, text...)
	} else {
		dst = appendValidUTF8(dst, text)
	}
	for i, c := range dst[start:] {
		if c == '\n' || c == '\r' {
			dst[start+i] = ' '
		}
	}
	return dst, nil
}

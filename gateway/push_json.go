package gateway

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"unicode/utf8"
)

// jsonScanner reads JSON strictly (RFC 8259, UTF-8) and without copying: values stay as the client wrote them, so that
// numbers keep their digits on the way to PostgreSQL.
type jsonScanner struct {
	b     []byte
	at    int
	stack []byte // of open brackets; kept for its memory
	// odd says what PostgreSQL can't take of what was read since it was last cleared; empty: nothing.
	odd string
}

const (
	mostDepth    = 128
	mostExponent = 400 // doubles end at 308; more only makes short numbers long
)

var errJSONEnd = errors.New("the JSON ends too early")

func (s *jsonScanner) fault(what string) error {
	return fmt.Errorf("byte %d: %s", s.at, what)
}

// peek skips white space and returns the next byte, 0 at the end.
func (s *jsonScanner) peek() byte {
	for ; s.at < len(s.b); s.at++ {
		switch c := s.b[s.at]; c {
		case ' ', '\t', '\n', '\r':
		default:
			return c
		}
	}
	return 0
}

// end expects nothing but white space.
func (s *jsonScanner) end() error {
	if s.peek(); s.at < len(s.b) {
		return s.fault("something follows the JSON value")
	}
	return nil
}

// object reads an object; member is called before each value and must read it.
func (s *jsonScanner) object(member func(name string) error) error {
	if s.peek() != '{' {
		return s.fault("an object is expected")
	}
	s.at++
	if s.peek() == '}' {
		s.at++
		return nil
	}
	for {
		name, err := s.text()
		if err != nil {
			return err
		}
		if s.peek() != ':' {
			return s.fault("a colon is expected")
		}
		s.at++
		if err := member(name); err != nil {
			return err
		}
		switch s.peek() {
		case ',':
			s.at++
		case '}':
			s.at++
			return nil
		default:
			return s.fault("a comma or the end of the object is expected")
		}
	}
}

// array reads an array; element is called before each value and must read it.
func (s *jsonScanner) array(element func() error) error {
	if s.peek() != '[' {
		return s.fault("an array is expected")
	}
	s.at++
	if s.peek() == ']' {
		s.at++
		return nil
	}
	for {
		if err := element(); err != nil {
			return err
		}
		switch s.peek() {
		case ',':
			s.at++
		case ']':
			s.at++
			return nil
		default:
			return s.fault("a comma or the end of the array is expected")
		}
	}
}

// value reads one value of any kind and returns its text.
func (s *jsonScanner) value() ([]byte, error) {
	s.peek()
	from := s.at
	s.stack = s.stack[:0]
	for {
		if err := s.element(); err != nil {
			return nil, err
		}
		// A value has ended: close what ends with it, up to the next value.
		for more := true; more; {
			if len(s.stack) == 0 {
				return s.b[from:s.at], nil
			}
			var err error
			if more, err = s.next(); err != nil {
				return nil, err
			}
		}
	}
}

// element reads a scalar or, of a container, everything up to its first scalar or its end where it is empty.
func (s *jsonScanner) element() error {
	for {
		c := s.peek()
		if c != '{' && c != '[' {
			return s.scalar(c)
		}
		s.at++
		if s.peek() == c+2 { // ']' follows '[' by two in ASCII, '}' follows '{'
			s.at++
			return nil
		}
		if s.stack = append(s.stack, c); len(s.stack) > mostDepth {
			s.odd = fmt.Sprintf("it is nested more than %d deep", mostDepth)
		}
		if c == '{' {
			if err := s.name(); err != nil {
				return err
			}
		}
	}
}

// next goes on after a value in a container; true: the container ended as well.
func (s *jsonScanner) next() (ended bool, err error) {
	open := s.stack[len(s.stack)-1]
	switch c := s.peek(); c {
	case ',':
		s.at++
		if open == '{' {
			return false, s.name()
		}
		return false, nil
	case open + 2:
		s.at++
		s.stack = s.stack[:len(s.stack)-1]
		return true, nil
	}
	return false, s.fault("a comma or the end of the object or array is expected")
}

// name reads a member's name and its colon.
func (s *jsonScanner) name() error {
	if s.peek() != '"' {
		return s.fault("the name of a member is expected")
	}
	if _, err := s.quoted(); err != nil {
		return err
	}
	if s.peek() != ':' {
		return s.fault("a colon is expected")
	}
	s.at++
	return nil
}

func (s *jsonScanner) scalar(c byte) error {
	switch {
	case c == '"':
		_, err := s.quoted()
		return err
	case c == '-' || c >= '0' && c <= '9':
		return s.number()
	}
	for _, word := range []string{"true", "false", "null"} {
		if bytes.HasPrefix(s.b[s.at:], []byte(word)) {
			s.at += len(word)
			return nil
		}
	}
	if s.at >= len(s.b) {
		return errJSONEnd
	}
	return s.fault("a value is expected")
}

func (s *jsonScanner) digits() int {
	from := s.at
	for s.at < len(s.b) && s.b[s.at] >= '0' && s.b[s.at] <= '9' {
		s.at++
	}
	return s.at - from
}

func (s *jsonScanner) is(chars string) bool {
	return s.at < len(s.b) && bytes.IndexByte([]byte(chars), s.b[s.at]) >= 0
}

func (s *jsonScanner) number() error {
	if s.is("-") {
		s.at++
	}
	zero := s.is("0")
	if n := s.digits(); n == 0 || zero && n > 1 {
		return s.fault("this is no number in JSON")
	}
	if s.is(".") {
		s.at++
		if s.digits() == 0 {
			return s.fault("this is no number in JSON")
		}
	}
	if s.is("eE") {
		s.at++
		if s.is("+-") {
			s.at++
		}
		from := s.at
		if s.digits() == 0 {
			return s.fault("this is no number in JSON")
		}
		if n, err := strconv.Atoi(string(s.b[from:s.at])); err != nil || n > mostExponent {
			s.odd = fmt.Sprintf("a number's exponent is beyond %d", mostExponent)
		}
	}
	return nil
}

// text reads a string.
func (s *jsonScanner) text() (string, error) {
	if s.peek() != '"' {
		return "", s.fault("a string is expected")
	}
	raw, err := s.quoted()
	if err != nil {
		return "", err
	}
	return unquote(raw), nil
}

// quoted reads a string and returns it with its quotes.
func (s *jsonScanner) quoted() ([]byte, error) {
	from := s.at
	s.at++
	for s.at < len(s.b) {
		switch c := s.b[s.at]; {
		case c == '"':
			s.at++
			return s.b[from:s.at], nil
		case c == '\\':
			if err := s.escape(); err != nil {
				return nil, err
			}
		case c < ' ':
			return nil, s.fault("a control character in a string has to be escaped")
		case c < utf8.RuneSelf:
			s.at++
		default:
			r, size := utf8.DecodeRune(s.b[s.at:])
			if r == utf8.RuneError && size == 1 {
				return nil, s.fault("this is not UTF-8")
			}
			s.at += size
		}
	}
	return nil, errJSONEnd
}

func (s *jsonScanner) escape() error {
	if s.at+1 >= len(s.b) {
		return errJSONEnd
	}
	if s.b[s.at+1] != 'u' {
		if bytes.IndexByte([]byte(`"\/bfnrt`), s.b[s.at+1]) < 0 {
			return s.fault("there is no such escape in JSON")
		}
		s.at += 2
		return nil
	}
	r, ok := s.unicode(s.at)
	if !ok {
		return s.fault("four hexadecimal digits are expected after \\u")
	}
	s.at += 6
	switch {
	case r == 0:
		s.odd = "it holds the character NUL, which PostgreSQL's texts can't"
	case r >= 0xd800 && r < 0xdc00:
		if low, ok := s.unicode(s.at); ok && low >= 0xdc00 && low < 0xe000 {
			s.at += 6
			break
		}
		fallthrough
	case r >= 0xdc00 && r < 0xe000:
		s.odd = "it holds half of a surrogate pair"
	}
	return nil
}

func (s *jsonScanner) unicode(at int) (rune, bool) {
	if at+6 > len(s.b) || s.b[at] != '\\' || s.b[at+1] != 'u' {
		return 0, false
	}
	n, err := strconv.ParseUint(string(s.b[at+2:at+6]), 16, 16)
	return rune(n), err == nil
}

// unquote returns the text of a valid JSON string.
func unquote(raw []byte) string {
	if bytes.IndexByte(raw, '\\') < 0 {
		return string(raw[1 : len(raw)-1])
	}
	var text string
	if json.Unmarshal(raw, &text) != nil {
		return ""
	}
	return text
}

package policies

import (
	"bytes"
	"math/bits"
	"regexp"
	"strconv"
	"unicode/utf16"
	"unicode/utf8"
)

// maxJSONDepth bounds recursion. PostgreSQL itself reads under 20,000 levels, and some 70,000 where max_stack_depth is raised.
const maxJSONDepth = 100_000

// collectJSON adds what the attachment's path or pattern finds in a JSON text.
func (b *Binding) collectJSON(into *idSet, a *attachment, text []byte) {
	w := jsonWalk{text: text, path: a.path, pattern: a.pattern, into: into, scratch: b.references.scratch[:0]}
	w.value(1)
	b.references.scratch = w.scratch[:0]
}

// jsonWalk reads a JSON text once and builds nothing of it. All that a path's steps have matched of the way to a value is a
// set of bits: bit i says that the first i steps lead there. A value that no step leads to or through is skipped. A text that
// isn't JSON, which PostgreSQL doesn't send, ends the walk where that shows.
type jsonWalk struct {
	text    []byte
	at      int
	depth   int
	path    jsonPath
	pattern *regexp.Regexp // not nil: of all strings, instead of path
	into    *idSet
	scratch []byte
}

// found says whether the path ends at the value with these states.
func (w *jsonWalk) found(states uint64) bool { return states>>len(w.path) != 0 }

// value reads a value with the states that lead to it. It returns false where the walk ends.
func (w *jsonWalk) value(states uint64) bool {
	w.space()
	if w.at >= len(w.text) {
		return false
	}
	c := w.text[w.at]
	if states == 0 || w.depth >= maxJSONDepth {
		return w.skip()
	}
	switch c {
	case '{', '[':
		w.depth++
		ok := w.within(states, c == '{')
		w.depth--
		return ok
	case '"':
		raw, escaped, ok := w.string()
		if ok && w.found(states) {
			w.word(raw, escaped)
		}
		return ok
	}
	token := w.token()
	if w.pattern == nil && w.found(states) && isInteger(token) {
		w.into.add(token)
	}
	return len(token) > 0
}

// within reads an object or array, the opening of which is next.
func (w *jsonWalk) within(states uint64, object bool) bool {
	end := byte(']')
	if object {
		end = '}'
	}
	w.at++
	if w.space(); w.take(end) {
		return true
	}
	for index := 0; ; index++ {
		next := states // of a pattern: everywhere
		if object {
			w.space()
			key, escaped, ok := w.string()
			if w.space(); !ok || !w.take(':') {
				return false
			}
			if w.pattern == nil {
				next = w.step(states, w.unescape(key, escaped), -1)
			}
		} else if w.pattern == nil {
			next = w.step(states, nil, index)
			if w.found(states) { // an array that is reached: its elements are
				next |= 1 << len(w.path)
			}
		}
		if !w.value(next) {
			return false
		}
		if w.space(); w.take(end) {
			return true
		}
		if !w.take(',') {
			return false
		}
	}
}

// step returns the states of a member, or of an element where index is not negative.
func (w *jsonWalk) step(states uint64, key []byte, index int) (next uint64) {
	for states &= 1<<len(w.path) - 1; states != 0; states &= states - 1 {
		i := bits.TrailingZeros64(states)
		s := &w.path[i]
		if s.deep {
			next |= 1 << i
		}
		if s.kind == stepAny || s.kind == stepIndex && s.index == index || s.kind == stepName && index < 0 && s.name == string(key) {
			next |= 1 << (i + 1)
		}
	}
	return next
}

func (w *jsonWalk) word(raw []byte, escaped bool) {
	if !escaped && w.pattern == nil {
		w.into.add(raw)
		return
	}
	text := w.unescape(raw, escaped)
	if w.pattern != nil {
		collectMatches(w.into, w.pattern, text)
		return
	}
	w.into.add(text)
}

func (w *jsonWalk) space() {
	for w.at < len(w.text) && w.text[w.at] <= ' ' {
		w.at++
	}
}

func (w *jsonWalk) take(c byte) bool {
	if w.at < len(w.text) && w.text[w.at] == c {
		w.at++
		return true
	}
	return false
}

// string takes a string and returns what stands between its quotes.
func (w *jsonWalk) string() (raw []byte, escaped, ok bool) {
	if !w.take('"') {
		return nil, false, false
	}
	start := w.at
	for {
		n := bytes.IndexByte(w.text[w.at:], '"')
		if n < 0 {
			w.at = len(w.text)
			return nil, false, false
		}
		if slash := bytes.IndexByte(w.text[w.at:w.at+n], '\\'); slash >= 0 {
			escaped = true
			w.at = min(w.at+slash+2, len(w.text)) // what is escaped may be the quote
			continue
		}
		raw = w.text[start : w.at+n]
		w.at += n + 1
		return raw, escaped, true
	}
}

// token takes a number, true, false or null.
func (w *jsonWalk) token() []byte {
	start := w.at
	for w.at < len(w.text) {
		switch c := w.text[w.at]; {
		case c >= '0' && c <= '9', c >= 'a' && c <= 'z', c == 'E', c == '-', c == '+', c == '.':
			w.at++
			continue
		}
		break
	}
	return w.text[start:w.at]
}

// skip passes over the value that is next, however deep.
func (w *jsonWalk) skip() bool {
	for depth := 0; w.at < len(w.text); {
		switch w.text[w.at] {
		case '"':
			if _, _, ok := w.string(); !ok {
				return false
			}
		case '{', '[':
			depth++
			w.at++
		case '}', ']':
			depth--
			w.at++
		case ',', ':', ' ', '\t', '\n', '\r':
			w.at++
			continue
		default:
			if len(w.token()) == 0 {
				return false
			}
		}
		if depth <= 0 {
			return depth == 0
		}
	}
	return false
}

func isInteger(token []byte) bool {
	if len(token) > 0 && token[0] == '-' {
		token = token[1:]
	}
	for _, c := range token {
		if c < '0' || c > '9' {
			return false
		}
	}
	return len(token) > 0
}

// unescape returns the text of a string; it holds until the next.
func (w *jsonWalk) unescape(raw []byte, escaped bool) []byte {
	if !escaped {
		return raw
	}
	out := w.scratch[:0]
	for i := 0; i < len(raw); i++ {
		c := raw[i]
		if c != '\\' || i+1 == len(raw) {
			out = append(out, c)
			continue
		}
		i++
		switch c = raw[i]; c {
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
			r := hexRune(raw[i+1:])
			i += 4
			if utf16.IsSurrogate(r) {
				second := rune(-1)
				if i+2 < len(raw) && raw[i+1] == '\\' && raw[i+2] == 'u' {
					second = hexRune(raw[i+3:])
				}
				if r = utf16.DecodeRune(r, second); r != utf8.RuneError {
					i += 6
				}
			}
			out = utf8.AppendRune(out, r)
			continue
		}
		out = append(out, c)
	}
	w.scratch = out
	return out
}

// hexRune reads four hexadecimal digits; -1: there are none.
func hexRune(text []byte) rune {
	if len(text) < 4 {
		return -1
	}
	n, err := strconv.ParseUint(string(text[:4]), 16, 32)
	if err != nil {
		return -1
	}
	return rune(n)
}

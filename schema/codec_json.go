package schema

// validJSON reports whether s is one JSON text (RFC 8259). It keeps the open brackets in a slice rather than on the
// call stack, so that deeply nested values of an application can't end the process.
func validJSON(s []byte) bool {
	var room [64]byte
	open := room[:0]
	i := skipSpace(s, 0)
	for {
		var opened bool
		if i, opened = valueStart(s, i); i < 0 {
			return false
		}
		if opened {
			bracket := s[i]
			open = append(open, bracket)
			if i = skipSpace(s, i+1); bracket == '{' {
				i = skipKey(s, i)
			}
			if i < 0 {
				return false
			}
			continue
		}
		if i, open = valueEnd(s, i, open); i < 0 {
			return false
		}
		if len(open) == 0 {
			return i == len(s)
		}
	}
}

// valueStart passes over the scalar or empty container at i, or stays on the bracket of one that isn't empty and
// reports it as opened. It returns -1 where no value starts.
func valueStart(s []byte, i int) (next int, opened bool) {
	if i >= len(s) {
		return -1, false
	}
	switch c := s[i]; c {
	case '{', '[':
		inner := skipSpace(s, i+1)
		if inner < len(s) && s[inner] == c+2 { // in ASCII the closing bracket is two after the opening one
			return inner + 1, false
		}
		return i, true
	case '"':
		return skipString(s, i), false
	case 't':
		return skipWord(s, i, "true"), false
	case 'f':
		return skipWord(s, i, "false"), false
	case 'n':
		return skipWord(s, i, "null"), false
	}
	return numberEnd(s, i), false
}

// valueEnd passes over what may follow a value: closing brackets, then a comma with, in an object, the next key. It
// returns the position of the next value, or of the end where nothing is open any more, or -1.
func valueEnd(s []byte, i int, open []byte) (next int, stillOpen []byte) {
	for {
		i = skipSpace(s, i)
		if len(open) == 0 {
			return i, open
		}
		if i >= len(s) {
			return -1, open
		}
		bracket := open[len(open)-1]
		switch s[i] {
		case bracket + 2:
			open = open[:len(open)-1]
			i++
		case ',':
			if i = skipSpace(s, i+1); bracket == '{' {
				i = skipKey(s, i)
			}
			return i, open
		default:
			return -1, open
		}
	}
}

func skipSpace(s []byte, i int) int {
	for i < len(s) && (s[i] == ' ' || s[i] == '\n' || s[i] == '\r' || s[i] == '\t') {
		i++
	}
	return i
}

// skipKey passes over a member's name and colon up to its value.
func skipKey(s []byte, i int) int {
	if i >= len(s) || s[i] != '"' {
		return -1
	}
	if i = skipString(s, i); i < 0 {
		return -1
	}
	if i = skipSpace(s, i); i >= len(s) || s[i] != ':' {
		return -1
	}
	return skipSpace(s, i+1)
}

func skipWord(s []byte, i int, word string) int {
	if end := i + len(word); end <= len(s) && string(s[i:end]) == word {
		return end
	}
	return -1
}

// skipString passes over the string whose opening quote is at i.
func skipString(s []byte, i int) int {
	for i++; i < len(s); {
		i += plainPrefix(s[i:])
		if i == len(s) {
			break
		}
		switch c := s[i]; {
		case c == '"':
			return i + 1
		case c == '\\':
			if i = skipEscape(s, i+1); i < 0 {
				return -1
			}
		case c < ' ':
			return -1
		default:
			i++
		}
	}
	return -1
}

// skipEscape passes over what follows a backslash.
func skipEscape(s []byte, i int) int {
	if i >= len(s) {
		return -1
	}
	switch s[i] {
	case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		return i + 1
	case 'u':
		if i+5 > len(s) {
			return -1
		}
		for _, c := range s[i+1 : i+5] {
			if (c < '0' || c > '9') && (c|0x20 < 'a' || c|0x20 > 'f') {
				return -1
			}
		}
		return i + 5
	}
	return -1
}

// numberEnd returns the end of the JSON number at i, or -1 where there is none.
func numberEnd(s []byte, i int) int {
	if i < len(s) && s[i] == '-' {
		i++
	}
	first := i
	if i = digitsEnd(s, i); i < 0 || (s[first] == '0' && i > first+1) {
		return -1
	}
	if i < len(s) && s[i] == '.' {
		if i = digitsEnd(s, i+1); i < 0 {
			return -1
		}
	}
	if i < len(s) && (s[i] == 'e' || s[i] == 'E') {
		i++
		if i < len(s) && (s[i] == '+' || s[i] == '-') {
			i++
		}
		return digitsEnd(s, i)
	}
	return i
}

// digitsEnd passes over one or more digits.
func digitsEnd(s []byte, i int) int {
	from := i
	for i < len(s) && s[i] >= '0' && s[i] <= '9' {
		i++
	}
	if i == from {
		return -1
	}
	return i
}

package policies

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// jsonPath is a parsed path, whose root is everything's: $ has no step.
type jsonPath []pathStep

// pathStep leads from a value to some of those within it.
type pathStep struct {
	kind  stepKind
	deep  bool   // of the value and of all within it
	name  string // of stepName
	index int    // of stepIndex
}

type stepKind uint8

const (
	stepName  stepKind = iota // the member of that name
	stepIndex                 // the element at that place
	stepAny                   // every member and element
)

// maxSteps keeps the states of a walk in one word.
const maxSteps = 62

const wantPath = "$ followed by .name, ['name'], [0], [*], .* or ..name"

// parsePath reads the part of RFC 9535 that names values by their place alone.
func parsePath(text string) (jsonPath, error) {
	p := pathParser{text: text}
	if !utf8.ValidString(text) {
		return nil, errors.New("it is not UTF-8")
	}
	if !p.take("$") {
		return nil, errors.New("a path begins with $")
	}
	path := jsonPath{}
	for p.at < len(p.text) {
		step, err := p.step()
		if err != nil {
			return nil, fmt.Errorf("at its byte %d: %w", p.at+1, err)
		}
		if path = append(path, step); len(path) > maxSteps {
			return nil, fmt.Errorf("it has more than %d steps", maxSteps)
		}
	}
	return path, nil
}

type pathParser struct {
	text string
	at   int
}

func (p *pathParser) take(s string) bool {
	if strings.HasPrefix(p.text[p.at:], s) {
		p.at += len(s)
		return true
	}
	return false
}

func (p *pathParser) step() (s pathStep, err error) {
	switch {
	case p.take(".."):
		s.deep = true
		if !strings.HasPrefix(p.text[p.at:], "[") {
			return s, p.dotted(&s)
		}
		fallthrough
	case strings.HasPrefix(p.text[p.at:], "["):
		p.at++
		return s, p.bracketed(&s)
	case p.take("."):
		return s, p.dotted(&s)
	}
	return s, errors.New("a step begins with . or [")
}

// dotted reads a name, which needs quotes and brackets where it holds what means something in a path.
func (p *pathParser) dotted(s *pathStep) error {
	if p.take("*") {
		s.kind = stepAny
		return nil
	}
	rest := p.text[p.at:]
	end := strings.IndexAny(rest, ".[")
	if end < 0 {
		end = len(rest)
	}
	if end == 0 {
		return errors.New("a name is missing")
	}
	if bad := strings.IndexAny(rest[:end], " \t\r\n*]()'\"`?@,:|&<>=!\\/"); bad >= 0 {
		p.at += bad
		return fmt.Errorf("a name that holds %q is written ['name']", rest[bad])
	}
	s.name = rest[:end]
	p.at += end
	return nil
}

// bracketed reads what stands between [ and ].
func (p *pathParser) bracketed(s *pathStep) error {
	rest := p.text[p.at:]
	switch {
	case rest == "":
		return errors.New("] is missing")
	case p.take("*"):
		s.kind = stepAny
	case rest[0] == '\'' || rest[0] == '"':
		p.at++
		if err := p.quoted(s, rest[0]); err != nil {
			return err
		}
	default:
		digits := len(rest) - len(strings.TrimLeft(rest, "0123456789"))
		n, err := strconv.ParseUint(rest[:digits], 10, 31)
		if err != nil {
			return errors.New("brackets hold *, a name in quotes or a place from 0 on; slices, lists and filters are not known")
		}
		p.at += digits
		s.kind, s.index = stepIndex, int(n)
	}
	if !p.take("]") {
		return errors.New("] is missing")
	}
	return nil
}

func (p *pathParser) quoted(s *pathStep, quote byte) error {
	var name []byte
	for ; p.at < len(p.text); p.at++ {
		switch c := p.text[p.at]; {
		case c == quote:
			p.at++
			s.name = string(name)
			return nil
		case c != '\\':
			name = append(name, c)
		case p.at+1 < len(p.text) && (p.text[p.at+1] == '\\' || p.text[p.at+1] == quote):
			p.at++
			name = append(name, p.text[p.at])
		default:
			return fmt.Errorf(`\ stands only before \ and %c`, quote)
		}
	}
	return errors.New("the closing quote is missing")
}

var quotePath = strings.NewReplacer(`\`, `\\`, `'`, `\'`)

// String is the one form of all paths that mean the same.
func (p jsonPath) String() string {
	var b strings.Builder
	b.WriteByte('$')
	for _, s := range p {
		if s.deep {
			b.WriteString("..")
		}
		switch s.kind {
		case stepName:
			b.WriteString("['" + quotePath.Replace(s.name) + "']")
		case stepIndex:
			b.WriteString("[" + strconv.Itoa(s.index) + "]")
		case stepAny:
			b.WriteString("[*]")
		}
	}
	return b.String()
}

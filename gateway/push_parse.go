package gateway

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/walgate/walgate/schema"
)

const (
	mostChanges = 1000
	mostID      = 255  // characters of client_id, change_id and local_id
	mostDocID   = 4096 // bytes; PostgreSQL's own limit for a key is below
	mostFaults  = 20   // that are listed of one request
)

// pushRequest is the body of POST /sync/push.
type pushRequest struct {
	client  string
	atomic  bool
	changes []pushChange
}

// pushColumn is a column as a client names it, with its value as JSON.
type pushColumn struct {
	name  string
	value []byte
}

// pushChange is one change of a push. What is wrong with it is in fault: that rejects the change, not the push.
type pushChange struct {
	collection string
	operation  string
	docID      string
	localID    string
	changeID   string
	parent     string // parent_version
	hasDocID   bool
	hasData    bool // an object
	hasBase    bool
	hasParent  bool
	data       []pushColumn
	base       []pushColumn
	fault      *changeFault
}

// changeFault is why a change is rejected.
type changeFault struct{ code, detail string }

func (c *pushChange) reject(code, format string, args ...any) {
	if c.fault == nil {
		c.fault = &changeFault{code, fmt.Sprintf(format, args...)}
	}
}

// parsePush reads a push strictly: what isn't known is refused rather than ignored.
func parsePush(body []byte) (*pushRequest, error) {
	p := &pushParser{s: jsonScanner{b: body}, r: &pushRequest{atomic: true}}
	err := p.request()
	if err == nil {
		err = p.s.end()
	}
	switch {
	case errors.Is(err, errTooManyChanges):
		detail := fmt.Sprintf("a push takes at most %d changes: send the others with the next", mostChanges)
		return nil, &Problem{Code: TooManyChanges, Detail: detail, Errors: []FieldError{{"changes", detail}}}
	case err != nil:
		return nil, &Problem{Code: InvalidRequest, Detail: "the body is no JSON that a push can be read from", Errors: []FieldError{{"", err.Error()}}}
	case len(p.faults) > 0:
		return nil, &Problem{Code: InvalidRequest, Detail: "the push is malformed", Errors: p.faults}
	}
	return p.r, nil
}

var errTooManyChanges = errors.New("too many changes")

type pushParser struct {
	s      jsonScanner
	r      *pushRequest
	faults []FieldError
}

func (p *pushParser) wrong(field, format string, args ...any) {
	if len(p.faults) < mostFaults {
		p.faults = append(p.faults, FieldError{field, fmt.Sprintf(format, args...)})
	}
}

// skip reads a value that is of another kind than expected.
func (p *pushParser) skip(field, want string) error {
	_, err := p.s.value()
	p.wrong(field, "must be %s", want)
	return err
}

func (p *pushParser) request() error {
	if p.s.peek() != '{' {
		if p.s.at < len(p.s.b) {
			return p.skip("", "an object with client_id and changes")
		}
		return errJSONEnd
	}
	var seen []string
	err := p.s.object(func(name string) (err error) {
		if slices.Contains(seen, name) {
			p.wrong(name, "the member is there twice")
		}
		seen = append(seen, name)
		switch name {
		case "client_id":
			p.r.client, err = p.clientID()
		case "atomic":
			var value []byte
			if value, err = p.s.value(); string(value) != "true" && string(value) != "false" && err == nil {
				p.wrong(name, "must be true or false")
			}
			p.r.atomic = string(value) != "false"
		case "changes":
			err = p.changes()
		default:
			p.wrong(name, "unknown member; known are client_id, changes and atomic")
			_, err = p.s.value()
		}
		return err
	})
	for _, name := range []string{"client_id", "changes"} {
		if !slices.Contains(seen, name) {
			p.wrong(name, "is missing")
		}
	}
	return err
}

func (p *pushParser) clientID() (string, error) {
	if p.s.peek() != '"' {
		return "", p.skip("client_id", "a text that names the device")
	}
	p.s.odd = ""
	text, err := p.s.text()
	if why := wrongID(text); err == nil && why != "" {
		p.wrong("client_id", "%s", why)
	}
	return text, err
}

// wrongID says what is wrong with an id that a client made; empty: nothing.
func wrongID(text string) string {
	switch n := utf8.RuneCountInString(text); {
	case n == 0 || n > mostID:
		return fmt.Sprintf("has %d characters; it may have 1 to %d", n, mostID)
	case strings.ContainsRune(text, 0):
		return "holds the character NUL"
	}
	return ""
}

func (p *pushParser) changes() error {
	if p.s.peek() != '[' {
		return p.skip("changes", "a list of changes")
	}
	p.r.changes = p.r.changes[:0]
	err := p.s.array(func() error {
		if len(p.r.changes) == mostChanges {
			return errTooManyChanges
		}
		p.r.changes = append(p.r.changes, pushChange{})
		return p.change(&p.r.changes[len(p.r.changes)-1])
	})
	if err == nil && len(p.r.changes) == 0 {
		p.wrong("changes", "is empty; it must hold 1 to %d changes", mostChanges)
	}
	return err
}

// change reads one change. Only JSON that can't be read at all is an error; everything else rejects the change.
func (p *pushParser) change(c *pushChange) error {
	if p.s.peek() != '{' {
		c.reject(codeInvalidChange, "a change must be an object")
		_, err := p.s.value()
		return err
	}
	var seen [16]string
	n := 0
	err := p.s.object(func(name string) error {
		if slices.Contains(seen[:n], name) {
			c.reject(codeInvalidChange, "the member %q is there twice", shorten(name))
		}
		if n < len(seen) {
			seen[n] = name
			n++
		}
		return p.member(c, name)
	})
	if err == nil {
		c.validate()
	}
	return err
}

func (p *pushParser) member(c *pushChange, name string) (err error) {
	null := p.s.peek() == 'n'
	switch name {
	case "collection":
		err = p.textMember(c, name, &c.collection)
	case "operation":
		err = p.textMember(c, name, &c.operation)
	case "doc_id", "local_id", "change_id", "parent_version":
		if null { // as if it were absent
			_, err = p.s.value()
			return err
		}
		switch name {
		case "doc_id":
			c.hasDocID = true
			err = p.textMember(c, name, &c.docID)
		case "local_id":
			err = p.idMember(c, name, &c.localID)
		case "change_id":
			err = p.idMember(c, name, &c.changeID)
		default:
			c.hasParent = true
			err = p.textMember(c, name, &c.parent)
		}
	case "data":
		if null {
			_, err = p.s.value()
			return err
		}
		c.hasData = true
		c.data, err = p.columns(c, name)
	case "base":
		if null {
			_, err = p.s.value()
			return err
		}
		c.hasBase = true
		c.base, err = p.columns(c, name)
	default:
		c.reject(codeInvalidChange, "%q is no member of a change", shorten(name))
		_, err = p.s.value()
	}
	return err
}

func (p *pushParser) textMember(c *pushChange, name string, to *string) (err error) {
	if p.s.peek() != '"' {
		c.reject(codeInvalidChange, "%s must be a text", name)
		_, err = p.s.value()
		return err
	}
	*to, err = p.s.text()
	return err
}

func (p *pushParser) idMember(c *pushChange, name string, to *string) error {
	before := c.fault
	if err := p.textMember(c, name, to); err != nil {
		return err
	}
	if why := wrongID(*to); why != "" && c.fault == before {
		c.reject(codeInvalidChange, "%s %s", name, why)
	}
	return nil
}

// columns reads data or base.
func (p *pushParser) columns(c *pushChange, name string) ([]pushColumn, error) {
	if p.s.peek() != '{' {
		c.reject(codeInvalidChange, "%s must be an object of columns", name)
		_, err := p.s.value()
		return nil, err
	}
	var out []pushColumn
	var seen map[string]bool // where there are many
	err := p.s.object(func(column string) error {
		p.s.odd = ""
		value, err := p.s.value()
		if p.s.odd != "" && err == nil {
			c.reject(schema.CodeInvalidValue, "%s.%s: %s", name, shorten(column), p.s.odd)
		}
		twice := seen[column] || seen == nil && slices.ContainsFunc(out, func(o pushColumn) bool { return o.name == column })
		if twice {
			c.reject(codeInvalidChange, "%s names the column %q twice", name, shorten(column))
		}
		out = append(out, pushColumn{column, value})
		if seen != nil {
			seen[column] = true
		} else if len(out) == 32 {
			seen = map[string]bool{}
			for _, o := range out {
				seen[o.name] = true
			}
		}
		return err
	})
	return out, err
}

// validate holds what a change must be, whatever its collection.
func (c *pushChange) validate() {
	switch c.operation {
	case "insert", "update", "upsert", "delete":
	case "":
		c.reject(codeInvalidChange, "operation is missing")
	default:
		c.reject(codeUnknownOperation, "there is no operation %q; there are insert, update, upsert and delete", shorten(c.operation))
	}
	switch {
	case c.collection == "":
		c.reject(codeInvalidChange, "collection is missing")
	case c.hasDocID && c.localID != "":
		c.reject(codeInvalidChange, "doc_id and local_id exclude each other")
	case !c.hasDocID && c.localID == "":
		c.reject(codeInvalidChange, "doc_id is missing, or local_id in place of it")
	case len(c.docID) > mostDocID || strings.ContainsRune(c.docID, 0):
		c.reject(schema.CodeInvalidKey, "doc_id is no key of a row")
	case c.operation == "delete" && c.hasData:
		c.reject(codeInvalidChange, "data must be null where the operation is delete")
	case c.operation != "delete" && !c.hasData:
		c.reject(codeInvalidChange, "data is missing: an object of the columns to write")
	}
}

// shorten keeps what a client sent short where it is repeated to it.
func shorten(text string) string {
	const most = 60
	if len(text) <= most {
		return text
	}
	return strings.ToValidUTF8(text[:most], "") + "…"
}

// hash covers what the change says, however it is spelt: a repeated change_id must come with the same change.
func (c *pushChange) hash() []byte {
	h := sha256.New()
	for _, text := range []string{c.collection, c.operation, c.docID, c.localID, c.parent} {
		fmt.Fprintf(h, "%d:%s", len(text), text)
	}
	var compact bytes.Buffer
	for _, list := range [][]pushColumn{c.data, c.base} {
		sorted := slices.Clone(list)
		slices.SortFunc(sorted, func(a, b pushColumn) int { return strings.Compare(a.name, b.name) })
		fmt.Fprintf(h, "%d{", len(sorted))
		for _, col := range sorted {
			compact.Reset()
			if json.Compact(&compact, col.value) != nil {
				continue // never: it was read
			}
			fmt.Fprintf(h, "%d:%s%d:%s", len(col.name), col.name, compact.Len(), compact.Bytes())
		}
	}
	fmt.Fprintf(h, "%t%t%t%t", c.hasDocID, c.hasData, c.hasBase, c.hasParent)
	return h.Sum(nil)
}

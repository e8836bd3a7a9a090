package replication

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/schema"
)

// The kinds of pgoutput messages, protocol version 1 (PostgreSQL documentation, "Logical Replication Message Formats").
const (
	msgBegin    = 'B'
	msgCommit   = 'C'
	msgOrigin   = 'O'
	msgRelation = 'R'
	msgType     = 'Y'
	msgInsert   = 'I'
	msgUpdate   = 'U'
	msgDelete   = 'D'
	msgTruncate = 'T'
	msgMessage  = 'M'
	msgAbort    = 'A' // stream abort: PostgreSQL 18 may send it unasked; it means nothing in version 1
)

// errShort says that a message ends before its fields do.
var errShort = errors.New("message is cut short")

// relation is a Relation message: the layout of the rows that follow.
type relation struct {
	oid      uint32
	schema   string
	name     string
	identity byte
	columns  []relationColumn
}

type relationColumn struct {
	name    string
	typ     uint32
	typmod  int32
	flagged bool // part of the identity; every column is, under FULL
}

// message is the last decoded message. Rows point into the input and are valid until the next one.
type message struct {
	kind      byte
	xid       uint32
	commit    time.Time
	begins    changelog.LSN // start of the commit record, of a Begin
	end       changelog.LSN // end of the commit record, of a Commit
	relation  uint32
	rel       *relation
	old, new  schema.Row // nil: not sent
	oldKind   byte       // 'K' key only, 'O' whole row, 0 none
	unchanged bool       // new has unchanged TOAST values: see isUnchanged
	relations []uint32   // of a truncate
	prefix    []byte     // of a logical message
	oldBuf    schema.Row
	newBuf    schema.Row
}

// unchangedTOAST stands in a new row for a value that wasn't sent because it didn't change. Only its address counts.
var unchangedTOAST = []byte{0}

func isUnchanged(v []byte) bool { return len(v) == 1 && &v[0] == &unchangedTOAST[0] }

// microsecondsTo2000 is 2000-01-01 in Unix microseconds: the protocol's epoch.
const microsecondsTo2000 = 946684800000000

// decode reads one pgoutput message into m. It never panics whatever the bytes; what it doesn't know is an error.
func (m *message) decode(b []byte) error {
	r := reader{b: b}
	m.kind = r.byte()
	switch m.kind {
	case msgBegin:
		m.begins = changelog.LSN(r.uint64())
		m.commit = time.UnixMicro(int64(r.uint64()) + microsecondsTo2000)
		m.xid = r.uint32()
	case msgCommit:
		r.byte() // flags, unused
		r.uint64()
		m.end = changelog.LSN(r.uint64())
		r.uint64()
	case msgRelation:
		m.rel = decodeRelation(&r)
	case msgInsert:
		m.relation = r.uint32()
		m.old, m.oldKind = nil, 0
		r.expect('N')
		m.new = m.tuple(&r, &m.newBuf)
	case msgUpdate:
		m.relation = r.uint32()
		m.old, m.oldKind = nil, 0
		k := r.byte()
		if k == 'K' || k == 'O' {
			m.oldKind = k
			m.old = m.tuple(&r, &m.oldBuf)
			k = r.byte()
		}
		if k != 'N' && r.err == nil {
			return fmt.Errorf("update message: new row marked %q", k)
		}
		m.new = m.tuple(&r, &m.newBuf)
	case msgDelete:
		m.relation = r.uint32()
		m.oldKind = r.byte()
		if m.oldKind != 'K' && m.oldKind != 'O' && r.err == nil {
			return fmt.Errorf("delete message: old row marked %q", m.oldKind)
		}
		m.old, m.new = m.tuple(&r, &m.oldBuf), nil
	case msgTruncate:
		n := r.uint32()
		r.byte() // CASCADE, RESTART IDENTITY: the relations are all named either way
		m.relations = m.relations[:0]
		for i := uint32(0); i < n && r.err == nil; i++ {
			m.relations = append(m.relations, r.uint32())
		}
	case msgMessage:
		r.byte()
		r.uint64()
		m.prefix = r.text()
		r.bytes(int(r.uint32()))
	case msgOrigin, msgType, msgAbort:
		return nil // where a change comes from and what a type is called change nothing here
	default:
		if r.err == nil {
			return fmt.Errorf("unknown message %q", m.kind)
		}
	}
	return r.err
}

func decodeRelation(r *reader) *relation {
	rel := &relation{oid: r.uint32(), schema: string(r.text()), name: string(r.text()), identity: r.byte()}
	if rel.schema == "" {
		rel.schema = "pg_catalog"
	}
	n := int(r.uint16())
	for i := 0; i < n && r.err == nil; i++ {
		c := relationColumn{flagged: r.byte()&1 != 0, name: string(r.text()), typ: r.uint32()}
		c.typmod = int32(r.uint32())
		rel.columns = append(rel.columns, c)
	}
	return rel
}

// tuple reads a row into buf.
func (m *message) tuple(r *reader, buf *schema.Row) schema.Row {
	row := (*buf)[:0]
	m.unchanged = false
	n := int(r.uint16())
	for i := 0; i < n && r.err == nil; i++ {
		switch k := r.byte(); k {
		case 'n':
			row = append(row, nil)
		case 'u':
			m.unchanged = true
			row = append(row, unchangedTOAST)
		case 't':
			v := r.bytes(int(r.uint32()))
			if v == nil {
				v = []byte{} // empty text is not NULL
			}
			row = append(row, v)
		default:
			if r.err == nil {
				r.err = fmt.Errorf("column %d of the row is marked %q", i+1, k)
			}
		}
	}
	*buf = row
	if row == nil {
		row = schema.Row{}
	}
	return row
}

// reader takes fields off a message; after the first failure it returns zeros and keeps the error.
type reader struct {
	b   []byte
	err error
}

func (r *reader) bytes(n int) []byte {
	if r.err != nil {
		return nil
	}
	if n < 0 || n > len(r.b) {
		r.err = errShort
		return nil
	}
	v := r.b[:n:n]
	r.b = r.b[n:]
	return v
}

func (r *reader) byte() byte {
	if len(r.b) == 0 || r.err != nil {
		r.fail()
		return 0
	}
	c := r.b[0]
	r.b = r.b[1:]
	return c
}

func (r *reader) uint16() uint16 {
	if v := r.bytes(2); v != nil {
		return binary.BigEndian.Uint16(v)
	}
	return 0
}

func (r *reader) uint32() uint32 {
	if v := r.bytes(4); v != nil {
		return binary.BigEndian.Uint32(v)
	}
	return 0
}

func (r *reader) uint64() uint64 {
	if v := r.bytes(8); v != nil {
		return binary.BigEndian.Uint64(v)
	}
	return 0
}

func (r *reader) text() []byte {
	if r.err != nil {
		return nil
	}
	i := bytes.IndexByte(r.b, 0)
	if i < 0 {
		r.fail()
		return nil
	}
	v := r.b[:i:i]
	r.b = r.b[i+1:]
	return v
}

func (r *reader) expect(c byte) {
	if got := r.byte(); got != c && r.err == nil {
		r.err = fmt.Errorf("row marked %q instead of %q", got, c)
	}
}

func (r *reader) fail() {
	if r.err == nil {
		r.err = errShort
	}
}

package changelog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"
)

// A message is a batch as instances tell it to each other: one format for all instances of a version of walgate. Who can't
// read it reads the log, so that the format may change with any version.
const batchFormat = 1

// messageLimit is how many bytes of a message are looked at: what instances announce stays well below (see messageMost), and what
// it unfolds into may be sixteen times as much.
const messageLimit = 4 * messageMost

const (
	batchOmitted = 1 << iota
)

const (
	raiseSetStopped = 1 << iota
)

const (
	operationDelete = 1 << iota
	operationMissing
)

// errMessage is of bytes that aren't a message.
var errMessage = errors.New("not a message of the bus")

// appendBatch appends the message of a batch that a sender tells.
func appendBatch(b []byte, sender uint64, m *Batch) []byte {
	b = append(b, batchFormat)
	b = binary.BigEndian.AppendUint64(b, sender)
	b = binary.BigEndian.AppendUint64(b, uint64(m.Claim))
	b = appendText(b, m.History)
	b = binary.AppendUvarint(b, uint64(m.Prev))
	b = binary.AppendUvarint(b, uint64(m.Last))
	b = binary.AppendUvarint(b, uint64(m.LSN))
	b = append(b, flags(m.Omitted, batchOmitted))
	b = binary.AppendUvarint(b, uint64(len(m.Entries)))
	for i := range m.Entries {
		e := &m.Entries[i]
		b = binary.AppendUvarint(b, uint64(e.Version))
		b = binary.AppendUvarint(b, uint64(e.Tx))
		b = append(b, e.Scope[:]...)
		b = binary.AppendUvarint(b, uint64(uint32(e.Collection)))
		b = append(b, e.Op)
		b = appendBytes(b, e.DocID)
		b = appendBytes(b, e.Data)
		b = appendBytes(b, e.Guard)
		b = appendBytes(b, e.Changed)
	}
	b = binary.AppendUvarint(b, uint64(len(m.Raises)))
	for i := range m.Raises {
		r := &m.Raises[i]
		b = binary.AppendUvarint(b, uint64(uint32(r.Collection)))
		b = binary.AppendUvarint(b, uint64(r.Version))
		b = appendText(b, r.Reason)
		b = appendText(b, r.Shape)
		b = append(b, flags(r.SetStopped, raiseSetStopped))
		b = appendText(b, r.Stopped)
	}
	b = binary.AppendUvarint(b, uint64(len(m.Pushes)))
	for i := range m.Pushes {
		p := &m.Pushes[i]
		b = binary.AppendUvarint(b, uint64(p.Tx))
		b = binary.AppendUvarint(b, uint64(p.Last))
		b = binary.AppendUvarint(b, uint64(p.ID))
		b = appendText(b, p.Subject)
		b = appendText(b, p.ClientID)
		b = binary.AppendUvarint(b, uint64(len(p.Locals)))
		for _, l := range p.Locals {
			b = appendText(appendText(appendText(b, l.Collection), l.DocID), l.LocalID)
		}
	}
	b = binary.AppendUvarint(b, uint64(len(m.Operations)))
	for i := range m.Operations {
		o := &m.Operations[i]
		b = binary.AppendUvarint(b, uint64(o.Version))
		b = append(append(b, o.Attachment[:]...), o.Scope[:]...)
		b = appendText(b, o.ID)
		b = append(b, flags(o.Delete, operationDelete)|flags(o.Missing, operationMissing))
		b = binary.AppendUvarint(b, uint64(o.Size))
		b = appendText(b, o.ContentType)
		b = appendBytes(b, o.SHA256)
		b = binary.AppendVarint(b, o.CreatedAt.UnixMicro())
	}
	return b
}

func flags(set bool, bit byte) byte {
	if set {
		return bit
	}
	return 0
}

func appendText(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

// appendBytes keeps nil and empty apart.
func appendBytes(b, v []byte) []byte {
	if v == nil {
		return append(b, 0)
	}
	return append(binary.AppendUvarint(b, uint64(len(v))+1), v...)
}

// parseBatch reads a message. What is returned shares its memory. The sender is told of every message of this format that is
// long enough to name one.
func parseBatch(message []byte) (m *Batch, sender uint64, err error) {
	if len(message) < 17 || len(message) > messageLimit || message[0] != batchFormat {
		return nil, 0, errMessage
	}
	r := &batchReader{left: message[1:]}
	m = &Batch{}
	sender = r.uint64()
	m.Claim = int64(r.uint64())
	m.History = r.text()
	m.Prev, m.Last, m.LSN = Version(r.number()), Version(r.number()), LSN(r.number())
	m.Omitted = r.byte()&batchOmitted != 0
	if n := r.count(26); n > 0 {
		m.Entries = make([]Entry, n)
	}
	for i := range m.Entries {
		e := &m.Entries[i]
		e.Version, e.Tx = Version(r.number()), Version(r.number())
		copy(e.Scope[:], r.take(16))
		e.Collection, e.Op = int32(uint32(r.number())), r.byte()
		e.DocID, e.Data, e.Guard, e.Changed = r.bytes(), r.bytes(), r.bytes(), r.bytes()
	}
	if n := r.count(6); n > 0 {
		m.Raises = make([]Raise, n)
	}
	for i := range m.Raises {
		c := &m.Raises[i]
		c.Collection, c.Version, c.Reason, c.Shape = int32(uint32(r.number())), Version(r.number()), r.text(), r.text()
		c.SetStopped = r.byte()&raiseSetStopped != 0
		c.Stopped = r.text()
	}
	if n := r.count(6); n > 0 {
		m.Pushes = make([]Pushed, n)
	}
	for i := range m.Pushes {
		p := &m.Pushes[i]
		p.Tx, p.Last, p.ID = Version(r.number()), Version(r.number()), int64(r.number())
		p.Subject, p.ClientID = r.text(), r.text()
		if n := r.count(3); n > 0 {
			p.Locals = make([]Local, n)
		}
		for j := range p.Locals {
			p.Locals[j] = Local{Collection: r.text(), DocID: r.text(), LocalID: r.text()}
		}
	}
	if n := r.count(38); n > 0 {
		m.Operations = make([]Operation, n)
	}
	for i := range m.Operations {
		o := &m.Operations[i]
		o.Version = Version(r.number())
		copy(o.Attachment[:], r.take(16))
		copy(o.Scope[:], r.take(16))
		o.ID = r.text()
		f := r.byte()
		o.Delete, o.Missing = f&operationDelete != 0, f&operationMissing != 0
		o.Size, o.ContentType, o.SHA256 = int64(r.number()), r.text(), r.bytes()
		o.CreatedAt = time.UnixMicro(r.signed()).UTC()
	}
	if r.failed || len(r.left) > 0 {
		return nil, sender, fmt.Errorf("%w: %d bytes, broken", errMessage, len(message))
	}
	return m, sender, nil
}

// batchReader reads a message from its front. After a failure it returns zeros.
type batchReader struct {
	left   []byte
	failed bool
}

func (r *batchReader) take(n int) []byte {
	if r.failed || n < 0 || n > len(r.left) {
		r.failed, r.left = true, nil
		return nil
	}
	out := r.left[:n:n]
	r.left = r.left[n:]
	return out
}

func (r *batchReader) byte() byte {
	if b := r.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (r *batchReader) uint64() uint64 {
	if b := r.take(8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

func (r *batchReader) number() uint64 {
	v, n := binary.Uvarint(r.left)
	if n <= 0 {
		n = -1
	}
	r.take(n)
	return v
}

func (r *batchReader) signed() int64 {
	v, n := binary.Varint(r.left)
	if n <= 0 {
		n = -1
	}
	r.take(n)
	return v
}

// count reads how many of something follow that take least bytes each: a number that can't be true allocates nothing.
func (r *batchReader) count(least int) int {
	n := r.number()
	if n > uint64(len(r.left)/least) {
		r.failed, r.left = true, nil
		return 0
	}
	return int(n)
}

func (r *batchReader) length() int {
	n := r.number()
	if n > uint64(len(r.left)) {
		r.failed, r.left = true, nil
		return 0
	}
	return int(n)
}

func (r *batchReader) text() string { return string(r.take(r.length())) }

func (r *batchReader) bytes() []byte {
	n := r.number()
	if n == 0 || n-1 > uint64(len(r.left)) {
		r.failed = r.failed || n != 0
		return nil
	}
	return r.take(int(n - 1))
}

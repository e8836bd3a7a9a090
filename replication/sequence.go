package replication

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"slices"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/schema"
)

// A transaction is handed to the appender in pieces of about this size, so that memory doesn't grow with it.
const (
	pieceBytes   = 512 << 10
	pieceEntries = 2000
	arenaChunk   = 64 << 10
	// giantBytes is the size from which a document isn't copied into a piece's memory, and no buffer is kept for the next.
	giantBytes = 1 << 20
)

// target is where a relation's rows go: the collection as bound to the layout of the last Relation message.
type target struct {
	relation   *relation
	collection *policies.Collection
	id         int32
	binding    *policies.Binding
	attnums    []int16 // by position in the row; 0: not known any more
	guarded    bool
	fill       *fill  // nil: its rows name no attachments
	stopped    string // why nothing of it is logged
}

// sequencer turns decoded messages into pieces: it stamps versions and asks the policies what each change means in which
// scope. It belongs to the stream's goroutine.
type sequencer struct {
	clock   *changelog.Clock
	put     func(changelog.Piece) error
	targets map[uint32]*target
	stats   *Stats
	log     *slog.Logger

	logged   changelog.LSN // where the log stood at the start: what ends at or before it is there
	skipping bool          // the present transaction is logged already
	widen    xidWidener
	inTx     bool
	ends     changelog.LSN // of the present transaction's commit record
	millis   int64
	xid      uint64
	tx       changelog.Version // version of the first change, 0: none yet
	fence    bool
	marks    *marks          // the layout of walgate.pushes; nil: not described yet
	push     *changelog.Push // whose push the present transaction is; nil: nobody's
	events   *events         // the layout of walgate.attachments; nil: not described yet
	fills    map[int32]*fill // of the collections with attachments, by id
	lastFill int32           // the newest number of any fill
	onFill   func(collection int32, f fill)
	pairs    []policies.Pair
	piece    changelog.Piece
	arena    []byte
	scratch  []byte
	docID    []byte
	effects  []policies.Effect
	deleted  map[deletedKey]deletedRow // documents deleted in this piece of the transaction
	moved    map[int32]bool            // collections raised in this transaction because their keys moved
	dead     bool                      // the piece has entries that an insert replaced: their Op is 0
}

// deletedKey names a document: ids are the same in many collections. A row is understood by its target's binding only.
type deletedKey struct {
	target *target
	docID  string
}

// deletedRow remembers a deleted row for as long as an insert of the same document would make both one upsert.
type deletedRow struct {
	row      schema.Row
	from, to int // its entries in the piece
}

func (s *sequencer) begin(m *message) {
	s.inTx, s.tx, s.fence, s.push, s.ends = true, 0, false, nil, m.begins
	s.skipping = m.begins < s.logged // its commit record lies before, so it ends at or before
	s.millis = m.commit.UnixMilli()
	s.xid = s.widen.widen(m.xid)
	s.piece, s.dead = changelog.Piece{}, false
	clear(s.deleted)
	clear(s.moved)
}

// commit ends the transaction and hands over what is left of it. It says whether anything was handed over.
func (s *sequencer) commit(m *message) (logged bool, err error) {
	s.inTx = false
	if s.tx == 0 && len(s.piece.Raises) == 0 && len(s.piece.Fills) == 0 && !s.fence && s.push == nil {
		return false, nil
	}
	if s.piece.Push = s.push; s.push != nil {
		if s.tx == 0 { // it changed nothing, but its client waits for a version
			s.tx = s.clock.Next(s.millis)
		}
		s.piece.Size += s.push.Size()
	}
	s.piece.LSN, s.piece.Final = max(m.end, s.logged), true // a raise within a logged transaction mustn't take the log back
	return true, s.flush()
}

// flush hands the piece over.
func (s *sequencer) flush() error {
	p := &s.piece
	if s.dead {
		p.Entries, s.dead = dropDead(p.Entries), false
	}
	clear(s.deleted)
	p.Tx, p.Xid, p.Version = s.tx, s.xid, s.clock.Last()
	out := *p
	s.piece = changelog.Piece{}
	return s.put(out)
}

// dropDead removes entries that a later insert of the same document replaced.
func dropDead(entries []changelog.Entry) []changelog.Entry {
	n := 0
	for i := range entries {
		if entries[i].Op != 0 {
			entries[n] = entries[i]
			n++
		}
	}
	return entries[:n]
}

// change handles an insert, update or delete of a synced relation.
func (s *sequencer) change(t *target, m *message) error {
	want := len(t.relation.columns)
	if m.old != nil && len(m.old) != want || m.new != nil && len(m.new) != want {
		return fmt.Errorf("row has another number of columns than its relation (%d)", want)
	}
	old, now := m.old, m.new
	if m.kind == msgUpdate {
		if err := fillUnchanged(t, m); err != nil {
			return err
		}
		if old == nil {
			old = now // the identity's columns didn't change, and the policy reads no others
		}
		moved, err := s.keyChanged(t, old, now)
		if err != nil {
			return err
		}
		if moved {
			s.keyMoved(t)
			if err := s.emit(t, old, nil, nil); err != nil {
				return err
			}
			return s.emit(t, nil, now, nil)
		}
		var changed []byte
		if m.oldKind == 'O' {
			changed = s.changedColumns(t, old, now)
		}
		return s.emit(t, old, now, changed)
	}
	return s.emit(t, old, now, nil)
}

// keyMoved resynchronises a collection whose key may be checked late: within one statement one row may take the key that
// another gives up afterwards, so the changes in their order would delete documents that exist.
func (s *sequencer) keyMoved(t *target) {
	if t.collection.Table.KeyDeferrable && !s.moved[t.id] {
		if s.moved == nil {
			s.moved = map[int32]bool{}
		}
		s.moved[t.id] = true
		s.raise(changelog.Raise{Collection: t.id, Reason: "keys moved under a deferrable primary key"})
	}
}

// fillUnchanged puts the old row's values where the new one says "unchanged". Only a whole old row has them.
func fillUnchanged(t *target, m *message) error {
	for i, v := range m.new {
		if !isUnchanged(v) {
			continue
		}
		if m.oldKind != 'O' || isUnchanged(m.old[i]) {
			return fmt.Errorf("column %s was not sent because it is stored out of line and did not change, and the old row isn't there to take it from: set REPLICA IDENTITY FULL (walgate init)", t.relation.columns[i].name)
		}
		m.new[i] = m.old[i]
	}
	return nil
}

func (s *sequencer) keyChanged(t *target, old, now schema.Row) (bool, error) {
	before, err := t.binding.AppendDocID(s.scratch[:0], old)
	if err != nil {
		return false, err
	}
	n := len(before)
	s.scratch, err = t.binding.AppendDocID(before, now)
	return !bytes.Equal(s.scratch[:n], s.scratch[n:]), err
}

// changedColumns returns a bit for each changed column, by attnum - 1; nil (all) if a column's attnum is not known.
func (s *sequencer) changedColumns(t *target, old, now schema.Row) []byte {
	top := int16(0)
	for _, n := range t.attnums {
		if n == 0 {
			return nil
		}
		top = max(top, n)
	}
	b := s.hold(make([]byte, (top+7)/8))
	for i, n := range t.attnums {
		if (old[i] == nil) != (now[i] == nil) || !bytes.Equal(old[i], now[i]) {
			b[(n-1)/8] |= 1 << ((n - 1) % 8)
		}
	}
	return b
}

// emit adds the entries of one row change; old nil is an insert, now nil a delete.
func (s *sequencer) emit(t *target, old, now schema.Row, changed []byte) error {
	row := now
	if row == nil {
		row = old
	}
	id, err := t.binding.AppendDocID(s.docID[:0], row)
	s.docID = id
	if err != nil {
		return err
	}
	var again deletedRow // delete + insert in one transaction is one upsert
	if old == nil {
		if again = s.deleted[deletedKey{t, string(id)}]; again.row != nil {
			old = again.row
		}
	}
	effects, policyErr := t.binding.Route(s.effects[:0], old, now)
	s.effects = effects
	if policyErr != nil {
		s.stats.policyError(t.collection.Name, policyErr, s.log)
	}
	from := len(s.piece.Entries)
	if err := s.addEntries(t, id, old, now, changed); err != nil {
		return err
	}
	if again.row != nil {
		for i := again.from; i < again.to; i++ {
			s.piece.Entries[i].Op, s.dead = 0, true
		}
		delete(s.deleted, deletedKey{t, string(id)})
	}
	if t.fill != nil {
		s.refer(t, id, old, now, again.row != nil)
	}
	if now == nil && len(effects) > 0 {
		s.remember(t, id, old, from)
	}
	if s.piece.Size >= pieceBytes || len(s.piece.Entries) >= pieceEntries {
		return s.flush()
	}
	return nil
}

func (s *sequencer) addEntries(t *target, id []byte, old, now schema.Row, changed []byte) error {
	if len(s.effects) == 0 {
		return nil
	}
	var data []byte
	for _, f := range s.effects {
		if f.Op != policies.Upsert || data != nil {
			continue
		}
		doc, err := t.binding.AppendDocument(s.scratch[:0], now)
		s.scratch = doc
		if err != nil {
			return err
		}
		if len(doc) >= giantBytes { // the piece takes the buffer
			data, s.scratch = doc, nil
			continue
		}
		data = s.hold(doc)
	}
	version := s.clock.Next(s.millis) // after all that may fail: a version without a change is none
	if s.tx == 0 {
		s.tx = version
	}
	if !slices.ContainsFunc(s.effects, func(f policies.Effect) bool { return !f.Entered }) {
		changed = nil // nobody saw the row before: what changed meanwhile isn't logged
	}
	e := changelog.Entry{Version: version, Tx: s.tx, Collection: t.id, DocID: s.hold(id), Changed: changed}
	if !slices.ContainsFunc(s.effects, func(f policies.Effect) bool { return f.Op != policies.Upsert || !f.Entered }) {
		e.Changed = nil // nobody saw the row before, and what changed while nobody did isn't in the log
	}
	var entered, stayed []byte // guards: who never saw the row must not learn that it left
	if t.guarded {
		entered, stayed = s.guard(t, nil, now), s.guard(t, old, now)
	}
	for _, f := range s.effects {
		e.Scope, e.Op, e.Data, e.Guard = f.Scope, byte(f.Op), nil, stayed
		if f.Entered {
			e.Guard = entered
		}
		if f.Op == policies.Upsert {
			e.Data = data
		}
		s.piece.Entries = append(s.piece.Entries, e)
		s.piece.Size += 120
	}
	s.piece.Size += len(data) + len(id) + len(entered) + len(stayed)
	return nil
}

func (s *sequencer) guard(t *target, old, now schema.Row) []byte {
	s.scratch = t.binding.AppendGuard(s.scratch[:0], old, now)
	if len(s.scratch) == 0 {
		return nil
	}
	return s.hold(s.scratch)
}

// remember keeps a deleted row until the piece is handed over.
func (s *sequencer) remember(t *target, id []byte, row schema.Row, from int) {
	if s.deleted == nil {
		s.deleted = map[deletedKey]deletedRow{}
	}
	held := make(schema.Row, len(row))
	for i, v := range row {
		if v != nil {
			held[i] = append([]byte{}, v...)
			s.piece.Size += len(v)
		}
	}
	s.deleted[deletedKey{t, string(id)}] = deletedRow{row: held, from: from, to: len(s.piece.Entries)}
}

// hold copies b into memory that lives as long as the piece.
func (s *sequencer) hold(b []byte) []byte {
	if cap(s.arena)-len(s.arena) < len(b) {
		s.arena = make([]byte, 0, max(arenaChunk, len(b)))
	}
	n := len(s.arena)
	s.arena = append(s.arena, b...)
	return s.arena[n:len(s.arena):len(s.arena)]
}

// raise adds a change of a collection's state at this place of the order.
func (s *sequencer) raise(r changelog.Raise) {
	if r.Reason != "" {
		r.Version = s.stamp()
	}
	s.piece.Raises = append(s.piece.Raises, r)
	if r.Reason != "" && s.fills[r.Collection] != nil {
		s.startFill(r.Collection) // what the log holds of its documents is as uncertain as what clients hold
	}
}

// xidWidener makes 64-bit transaction ids of the 32 bits that the stream carries: the one nearest to a known id.
type xidWidener struct{ near uint64 }

func (w *xidWidener) widen(xid uint32) uint64 {
	v := w.near&^0xffffffff | uint64(xid)
	switch {
	case v > w.near+1<<31 && v >= 1<<32:
		v -= 1 << 32
	case v+1<<31 < w.near:
		v += 1 << 32
	}
	if v > w.near {
		w.near = v
	}
	return v
}

// DecodeError says where the stream can't be decoded.
type DecodeError struct {
	LSN      changelog.LSN
	Relation string // empty: no relation
	Err      error
}

func (e *DecodeError) Error() string {
	at := "at " + e.LSN.String()
	if e.Relation != "" {
		at += " in " + e.Relation
	}
	return fmt.Sprintf("can't decode the WAL %s: %v", at, e.Err)
}

func (e *DecodeError) Unwrap() error { return e.Err }

// errStalled: the server sent nothing although its timeout makes it send keepalives.
var errStalled = errors.New("the source has sent nothing on the replication connection for too long, though it should answer: the network between lets nothing through, or the source stands still; connecting anew")

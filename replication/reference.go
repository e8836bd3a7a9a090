package replication

import (
	"slices"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/schema"
)

// bytesFill is the "collection" of the fill of the bytes themselves, which are read from walgate.files.
const bytesFill int32 = 0

// bytesFillName is what it is called; no collection is.
const bytesFillName = "walgate.files"

// hiddenMost bounds how many documents are remembered that changed out of sight.
const hiddenMost = 50_000

// fill is the newest fill of a collection with attachments, as far as it stands in the order.
type fill struct {
	id      int32
	version changelog.Version // where it began
	done    bool              // all rows that existed then were looked through
	// hidden are the documents whose references changed since the last step though nobody saw them, so that the log holds no
	// change of them.
	hidden map[[16]byte]struct{}
}

// refer adds what a change means for attachments. It is called after Route and the entries of the same change; again says
// that a delete of the same document, whose references are taken away already, came before.
//
// While the fill isn't done, nobody knows what the log holds of a document that was there, so all that it may hold is replaced.
func (s *sequencer) refer(t *target, id []byte, old, now schema.Row, again bool) {
	if again {
		old = nil
	}
	s.pairs = t.binding.AppendReferences(s.pairs[:0], old, now, old != nil && !t.fill.done)
	if len(s.pairs) == 0 {
		return
	}
	r := changelog.Reference{Document: policies.DocumentKey(t.id, id), Fill: t.fill.id}
	if len(s.effects) == 0 { // nobody sees the row, but what it names is kept for when somebody does
		s.clock.Next(s.millis)
		if t.fill.hide(r.Document); s.tx == 0 {
			s.tx = s.clock.Last()
		}
	}
	r.Version = s.clock.Last()
	for _, p := range s.pairs {
		r.Attachment, r.Scope, r.Removed = p.Attachment, p.Scope, p.Removed
		s.piece.References = append(s.piece.References, r)
	}
	s.piece.Size += len(s.pairs) * changelog.ReferenceBytes
}

// hide notes a document that changed out of sight.
func (f *fill) hide(document [16]byte) {
	if f.done || len(f.hidden) > hiddenMost {
		return
	}
	if f.hidden == nil {
		f.hidden = map[[16]byte]struct{}{}
	}
	f.hidden[document] = struct{}{}
}

// pass takes the rows out that changed out of sight since the last step. It says whether it knows them all.
func (f *fill) pass(rows []changelog.FillRow) (left []changelog.FillRow, known bool) {
	known = len(f.hidden) <= hiddenMost
	if len(f.hidden) > 0 && known {
		rows = slices.DeleteFunc(rows, func(r changelog.FillRow) bool { _, ok := f.hidden[r.Document]; return ok })
	}
	f.hidden = nil
	return rows, known
}

// startFill begins a new fill of a collection at this place of the order.
func (s *sequencer) startFill(collection int32) {
	f := s.fills[collection]
	s.lastFill++
	*f = fill{id: s.lastFill, version: s.stamp()}
	s.addStep(changelog.FillStep{Fill: f.id, Collection: collection, Version: f.version, Start: true})
	if s.onFill != nil {
		s.onFill(collection, *f)
	}
}

// placing is what became of a step of a fill.
type placing struct {
	version   changelog.Version // up to here the log must come to hold it; of what was dropped: rows must be read after it
	overtaken bool              // another fill of the collection began
	dropped   bool              // too much changed out of sight since its rows were read
}

// place adds a step of a fill. The rows of two steps must not be read at a time.
func (s *sequencer) place(step changelog.FillStep, files []changelog.FileEvent) placing {
	f := s.fills[step.Collection]
	if f != nil {
		if f.id != step.Fill {
			return placing{overtaken: true}
		}
		var known bool
		if step.Rows, known = f.pass(step.Rows); !known {
			return placing{dropped: true, version: s.clock.Last()}
		}
		f.done = f.done || step.Done
	}
	for i := range step.Rows {
		step.Rows[i].Version = s.stamp()
	}
	for i := range files {
		files[i].Version = s.stamp()
		s.piece.Size += files[i].Bytes()
	}
	s.piece.Files = append(s.piece.Files, files...)
	step.Version = s.stamp()
	s.addStep(step)
	return placing{version: step.Version}
}

func (s *sequencer) addStep(step changelog.FillStep) {
	s.piece.Fills = append(s.piece.Fills, step)
	s.piece.Size += step.Bytes()
}

// stamp returns the version of something that isn't a change of a row.
func (s *sequencer) stamp() changelog.Version {
	millis := s.millis
	if !s.inTx {
		millis = 0 // no commit gives a time, and this machine's clock must not run ahead of the source's: the next version
	}
	return s.clock.Next(millis)
}

package gateway

import (
	"cmp"
	"slices"

	"github.com/walgate/walgate/changelog"
)

// delivery is a part of the log that is handed out: row changes and operations on attachments, each in version order.
type delivery struct {
	entries    []changelog.Entry
	pushes     []changelog.Pushed
	operations []changelog.Operation
	held       map[[16]byte][][16]byte // see hub.holders
	complete   bool                    // the last transaction ends here
}

// transaction returns the next version, of the entries from i and the operations from k on, and its transaction. An
// operation belongs to the transaction that goes on after it or shares its version; another one stands for itself, as an
// upload does.
func (d *delivery) transaction(i, k int) (v, tx changelog.Version) {
	switch {
	case i == len(d.entries):
		v = d.operations[k].Version
		return v, v
	case k == len(d.operations) || d.entries[i].Version <= d.operations[k].Version:
		return d.entries[i].Version, d.entries[i].Tx
	}
	v = d.operations[k].Version
	if tx = d.entries[i].Tx; tx > v {
		tx = v
	}
	return v, tx
}

// deliverLocked hands out to the live subscribers of each scope, a transaction at a time. Each frame is encoded once, however
// many get it, and once more for the client whose push the transaction is.
func (h *hub) deliverLocked(d delivery) {
	if !slices.IsSortedFunc(d.operations, compareOperations) {
		d.operations = slices.SortedFunc(slices.Values(d.operations), compareOperations)
	}
	fr, marks := frames{memory: h.memory}, markReader{pushes: d.pushes}
	defer fr.release()
	for i, k := 0, 0; i < len(d.entries) || k < len(d.operations); {
		v, tx := d.transaction(i, k)
		from := i
		for i < len(d.entries) && d.entries[i].Version == v {
			i++
		}
		if i > from {
			fr.reset(d.entries[from:i], h.head, marks.of(tx))
			h.deliverVersionLocked(d.entries[from:i], &fr)
		}
		for from = k; k < len(d.operations) && d.operations[k].Version == v; {
			for k < len(d.operations) && d.operations[k].Version == v && d.operations[k].Attachment == d.operations[from].Attachment {
				k++
			}
			h.deliverOperationLocked(d.operations[from:k], tx, d.held)
			from = k
		}
		if i == len(d.entries) && k == len(d.operations) {
			if d.complete {
				h.endTransactionLocked(v)
			}
		} else if _, next := d.transaction(i, k); next != tx {
			h.endTransactionLocked(v)
		}
	}
	for _, s := range h.touched { // the rest of the transaction comes with the next page
		s.flushPending(0, nil)
	}
	h.partial = append(h.partial, h.touched...)
	h.touched = h.touched[:0]
}

func compareOperations(a, b changelog.Operation) int {
	return cmp.Or(cmp.Compare(a.Version, b.Version), slices.Compare(a.Attachment[:], b.Attachment[:]))
}

// deliverOperationLocked hands out what one version says of one attachment: a download outweighs its deletion in another
// scope, and a deletion is none for who holds it elsewhere.
func (h *hub) deliverOperationLocked(group []changelog.Operation, tx changelog.Version, held map[[16]byte][][16]byte) {
	var made [2]frame
	defer func() { releaseAll(made[:]) }()
	v, key := group[0].Version, group[0].Attachment
	holders, known := held[key]
	for pass := range 2 {
		for i := range group {
			o := &group[i]
			if o.Missing || o.Delete != (pass == 1) {
				continue
			}
			for _, s := range h.files[o.Scope] {
				if !s.wants(v) || s.file.version == v && s.file.attachment == key {
					continue
				}
				s.file.version, s.file.attachment = v, key
				switch {
				case !o.Delete:
				case !known:
					s.leaveLive(tx)
					continue
				case s.feed.files.holdsAny(holders):
					continue
				}
				at := &made[pass]
				if at.data == nil {
					at.data = h.appendOperation(nil, o, o.Delete, h.head.History)
					at.kind, at.room = frameAttachment, h.memory.hold(len(at.data))
				}
				if s.pend(*at, v, tx) {
					h.touched = append(h.touched, s)
				}
			}
		}
	}
}

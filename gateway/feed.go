package gateway

import (
	"strconv"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/schema"
)

// feed is one caller's view of the collections that it asked for. Immutable.
type feed struct {
	caller      *policies.Caller
	collections []*policies.Collection
	scopes      [][16]byte
	set         *policies.Set
	files       *fileScopes // where its attachments are; nil: not asked for
}

// newFeed checks that the caller may read what it names; no names: everything that it may read.
func newFeed(set *policies.Set, caller *policies.Caller, names []string) (*feed, error) {
	f := &feed{caller: caller, set: set}
	if len(names) == 0 {
		for _, c := range set.Collections {
			if c.MayRead(caller) {
				f.collections = append(f.collections, c)
			}
		}
	}
	for _, name := range names {
		c := set.ByName(name)
		if c == nil {
			return nil, &Problem{Code: UnknownCollection, Detail: "no collection is called " + strconv.Quote(name), Errors: []FieldError{{Field: "collections", Detail: name}}}
		}
		if !c.MayRead(caller) {
			return nil, &Problem{Code: Forbidden, Detail: "none of the token's roles may read " + name}
		}
		if !f.has(c.Name) {
			f.collections = append(f.collections, c)
		}
	}
	for _, c := range f.collections {
		for _, key := range caller.Scopes(c) {
			f.scopes = append(f.scopes, key)
		}
	}
	return f, nil
}

func (f *feed) has(name string) bool { return f.collection(name) != nil }

func (f *feed) collection(name string) *policies.Collection {
	for _, c := range f.collections {
		if c.Name == name {
			return c
		}
	}
	return nil
}

func (f *feed) names() []string {
	out := make([]string, 0, len(f.collections))
	for _, c := range f.collections {
		out = append(out, c.Name)
	}
	return out
}

// resync says that a client can't continue from where it is.
type resync struct {
	Collections []string
	Attachments bool // its files too: from 0
	Reason      string
}

// Reasons of a full resync, as clients see them.
const (
	reasonScopes  = "scopes_changed"  // the token's claims select other rows than before
	reasonHistory = "history_changed" // the log began anew
	reasonAhead   = "ahead_of_log"    // the client has seen what this log never held
	reasonTooOld  = "too_old"         // the changes since then are gone, or don't tell all
	reasonFirst   = "first_sync"      // the device of a session has nothing yet
)

// usable says whether every collection can be served from a log in this state.
func (f *feed) usable(h *changelog.Head) error {
	for _, c := range f.collections {
		if err := usable(c, h); err != nil {
			return err
		}
	}
	return f.files.usable(h)
}

func stateOf(h *changelog.Head, name string) *changelog.Collection {
	for i := range h.Collections {
		if h.Collections[i].Name == name {
			return &h.Collections[i]
		}
	}
	return nil
}

// unbroken says whether the log held every change of the collections from one head to the other.
func (f *feed) unbroken(from, to *changelog.Head) bool {
	if from.History != to.History {
		return false
	}
	for _, c := range f.collections {
		was, is := stateOf(from, c.Name), stateOf(to, c.Name)
		if was == nil || is == nil || was.Floor != is.Floor || was.Stopped != is.Stopped {
			return false
		}
	}
	return true
}

// check says whether a client may continue from since; nil: it may. The head must be of the same snapshot as what was read.
func (f *feed) check(since changelog.Cursor, h *changelog.Head) *resync {
	r := &resync{}
	switch {
	case since.History != "" && since.History != h.History:
		r.Reason, r.Collections = reasonHistory, f.names()
	case !h.Issued(since.Version):
		r.Reason, r.Collections = reasonAhead, f.names()
	case since.Version < h.Floor:
		r.Reason, r.Collections = reasonTooOld, f.names()
	case since.ScopeHash != "" && since.ScopeHash != f.caller.ScopeHash:
		r.Reason, r.Collections = reasonScopes, f.scoped()
	}
	if r.Attachments = r.Reason != "" && f.files != nil; len(r.Collections) > 0 || r.Attachments {
		return r
	}
	for _, c := range f.collections {
		if st := stateOf(h, c.Name); st != nil && since.Version < st.Floor {
			r.Reason = reasonTooOld
			r.Collections = append(r.Collections, c.Name)
		}
	}
	if len(r.Collections) > 0 {
		return r
	}
	return nil
}

// scoped returns the collections whose rows depend on the caller.
func (f *feed) scoped() []string {
	var out []string
	for _, c := range f.collections {
		if c.ScopedByCaller() {
			out = append(out, c.Name)
		}
	}
	return out
}

// cursor returns the opaque position v of this caller.
func (f *feed) cursor(v changelog.Version, history string) string {
	return changelog.Cursor{Version: v, History: history, ScopeHash: f.caller.ScopeHash}.String()
}

// change is what one row change means to a caller.
type change struct {
	entry      *changelog.Entry
	collection string
	op         policies.Op
	own        own // to the client whose push it is; else empty
}

// judge turns entries (in version order) into what they mean to the caller: one change for each row change that it sees,
// also where the row moves between two of its own scopes.
func (f *feed) judge(entries []changelog.Entry, h *changelog.Head, failed func(string, error)) []change {
	out := make([]change, 0, len(entries))
	for i := range entries {
		e := &entries[i]
		st := h.Collection(e.Collection)
		if st == nil {
			continue
		}
		c := f.collection(st.Name)
		if c == nil {
			continue
		}
		op, seen, err := c.Judge(policies.Op(e.Op), e.Guard, f.caller)
		if err != nil {
			failed(c.Name, err)
		}
		if !seen {
			continue
		}
		if n := len(out); n > 0 && out[n-1].entry.Version == e.Version {
			if stronger(op, out[n-1].op) {
				out[n-1] = change{entry: e, collection: c.Name, op: op}
			}
			continue
		}
		out = append(out, change{entry: e, collection: c.Name, op: op})
	}
	return out
}

// stronger orders what several scopes say of one row change: it is there, it is gone, it left.
func stronger(a, b policies.Op) bool {
	rank := func(o policies.Op) int {
		switch o {
		case policies.Upsert:
			return 2
		case policies.Delete:
			return 1
		}
		return 0
	}
	return rank(a) > rank(b)
}

// lastStates keeps of each document the last change only, in version order. What its client calls it stays with it.
func lastStates(changes []change) []change {
	kept := make(map[string]int, len(changes))
	n := len(changes)
	for i := len(changes) - 1; i >= 0; i-- {
		key := changes[i].collection + "\x00" + string(changes[i].entry.DocID)
		if at, dup := kept[key]; dup {
			if changes[at].own.localID == "" {
				changes[at].own.localID = changes[i].own.localID
			}
			continue
		}
		n--
		kept[key] = n
		changes[n] = changes[i]
	}
	return changes[n:]
}

// appendChange appends the change as clients see it, in a page and as a frame of the stream alike.
func appendChange(b []byte, collection string, e *changelog.Entry, op policies.Op, history string, mine own) []byte {
	b = append(b, `{"version":"`...)
	b = e.Version.AppendText(b, history)
	b = append(b, `","seq":`...)
	b = strconv.AppendInt(b, int64(e.Version), 10)
	b = append(b, `,"collection":"`...)
	b = append(b, collection...) // a name that needs no escapes
	b = append(b, `","doc_id":`...)
	b = schema.AppendString(b, e.DocID)
	if op == policies.Upsert {
		b = append(b, `,"operation":"upsert","data":`...)
		b = append(b, e.Data...)
	} else {
		b = append(b, `,"operation":"delete","data":null`...)
		if op == policies.Leave {
			b = append(b, `,"reason":"left"`...)
		}
	}
	b = append(b, `,"tx":"`...)
	b = e.Tx.AppendText(b, history)
	b = append(b, '"')
	if mine.clientID != "" {
		b = append(b, `,"client_id":`...)
		b = schema.AppendString(b, []byte(mine.clientID))
	}
	if mine.localID != "" {
		b = append(b, `,"local_id":`...)
		b = schema.AppendString(b, []byte(mine.localID))
	}
	return append(b, '}')
}

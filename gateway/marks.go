package gateway

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/gofiber/fiber/v2"

	"github.com/walgate/walgate/changelog"
)

// client is a device of a subject, which is shown its own marks; without an id nobody is.
type client struct{ subject, id string }

// longestClientID is in characters.
const longestClientID = 255

// clientFault says what is wrong with a client_id; "": nothing.
func clientFault(id string) string {
	switch {
	case !utf8.ValidString(id) || strings.ContainsRune(id, 0):
		return "must be text without NUL"
	case utf8.RuneCountInString(id) > longestClientID:
		return fmt.Sprintf("may have %d characters", longestClientID)
	}
	return ""
}

// clientParameter reads client_id. The string is a copy, for the framework reuses the request's memory.
func clientParameter(c *fiber.Ctx) (string, error) {
	id := c.Query("client_id")
	if detail := clientFault(id); detail != "" {
		return "", &Problem{Code: InvalidRequest, Detail: "client_id " + detail, Errors: []FieldError{{"client_id", detail}}}
	}
	return strings.Clone(id), nil
}

// mark says whose push a transaction is, and how its client calls the documents that it made.
type mark struct {
	client
	locals map[string]string // by collection, a zero byte and doc_id
}

func newMark(p *changelog.Push) *mark {
	m := &mark{client: client{p.Subject, p.ClientID}}
	if len(p.Locals) > 0 {
		m.locals = make(map[string]string, len(p.Locals))
		for _, l := range p.Locals {
			m.locals[l.Collection+"\x00"+l.DocID] = l.LocalID
		}
	}
	return m
}

// own is what a change of the marked transaction says to the client whose push it is.
type own struct{ clientID, localID string }

func (m *mark) own(collection string, docID []byte) own {
	o := own{clientID: m.id}
	if m.locals != nil {
		o.localID = m.locals[collection+"\x00"+string(docID)]
	}
	return o
}

// markReader finds the marks of transactions that are asked for in their order.
type markReader struct {
	pushes []changelog.Pushed // in the order of versions
	tx     changelog.Version
	last   *mark
}

// of returns the mark of a transaction; nil: it is nobody's push.
func (r *markReader) of(tx changelog.Version) *mark {
	if r.last != nil && r.tx == tx {
		return r.last
	}
	r.last = nil
	for len(r.pushes) > 0 && r.pushes[0].Tx <= tx {
		if r.pushes[0].Tx == tx {
			r.tx, r.last = tx, newMark(&r.pushes[0].Push)
		}
		r.pushes = r.pushes[1:]
	}
	return r.last
}

// judgePage is judge of a page, with the marks that it holds.
func (f *feed) judgePage(p *changelog.Page, failed func(string, error)) []change {
	changes := f.judge(p.Entries, &p.Head, failed)
	if len(p.Pushes) == 0 {
		return changes
	}
	marks := markReader{pushes: p.Pushes}
	for i := range changes {
		c := &changes[i]
		if m := marks.of(c.entry.Tx); m != nil {
			c.own = m.own(c.collection, c.entry.DocID)
		}
	}
	return changes
}

// echo is a push as it came through the log.
type echo struct {
	changelog.PushedChanges
	whole bool // Changes are all; else the log has to be asked for them
}

// awaitPush waits for a push to come through the log. It is called before the push commits; done gets where it stands, once.
// forget ends the waiting.
func (h *hub) awaitPush(id int64) (done <-chan echo, forget func()) {
	c := make(chan echo, 1)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.echoes[id] = c
	return c, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.echoes[id] == c {
			delete(h.echoes, id)
		}
	}
}

// echoLocked tells those who wait for pushes. What the log holds is told at once, wherever the hub stands. The entries are
// those from a version on up to another one.
func (h *hub) echoLocked(pushes []changelog.Pushed, entries []changelog.Entry, from, to changelog.Version) {
	for _, p := range pushes {
		c := h.echoes[p.ID]
		if c == nil {
			continue
		}
		delete(h.echoes, p.ID)
		e := echo{PushedChanges: changelog.PushedChanges{Pushed: p}, whole: from <= p.Tx && p.Last <= to}
		at, _ := slices.BinarySearchFunc(entries, p.Tx, func(e changelog.Entry, v changelog.Version) int { return cmp.Compare(e.Version, v) })
		for ; e.whole && at < len(entries) && entries[at].Version <= p.Last; at++ {
			e.Changes = append(e.Changes, changelog.PushedChange{Collection: entries[at].Collection, DocID: string(entries[at].DocID), Version: entries[at].Version})
		}
		c <- e
	}
}

// idleLocked says whether nobody would miss what the hub passes over.
func (h *hub) idleLocked() bool { return len(h.subs) == 0 && len(h.echoes) == 0 }

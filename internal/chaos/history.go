package chaos

import (
	"fmt"
	"slices"
	"strings"
)

// change is a line of a full resync, an entry of a page or a frame of the stream.
type change struct {
	Version    string  `json:"version"`
	Collection string  `json:"collection"`
	DocID      string  `json:"doc_id"`
	Operation  string  `json:"operation"`
	Data       rawJSON `json:"data"`
	Deleted    bool    `json:"deleted"`
	Tx         string  `json:"tx"`
	ClientID   string  `json:"client_id"`
}

func (c *change) String() string {
	return fmt.Sprintf("%s %s/%s at %s (tx %s)", c.Operation, c.Collection, c.DocID, c.Version, c.Tx)
}

// unit is what a client applies at once, together with its new position: a page that ends at a transaction's end, with
// the partial ones before it, or what came on a stream before a checkpoint.
type unit struct {
	since, last string // positions
	changes     []change
	until       bool // the client asked to stop there, which need not be a transaction's end
}

// history is what one client was told, and what must hold of it whatever breaks in between.
type history struct {
	device string
	mine   func(*change) bool // whether the caller may see the row

	cut    bool                         // the last unit ended where the client wished
	tx     string                       // of the last change
	docs   map[string]map[string]string // by collection and document: the version last told
	fulls  map[string]string            // by collection: the position of the last full resync
	broken func(rule, text string)
}

func newHistory(device string, mine func(*change) bool, broken func(rule, text string)) *history {
	return &history{device: device, mine: mine, broken: broken, docs: map[string]map[string]string{}, fulls: map[string]string{}}
}

func (h *history) fault(rule, format string, args ...any) {
	h.broken(rule, fmt.Sprintf(format, args...))
}

// page checks what must hold of a page alone.
func (h *history) page(changes []change, limit int) {
	seen := map[string]bool{}
	for i := range changes {
		key := changes[i].Collection + " " + changes[i].DocID
		if seen[key] {
			h.fault("a document is once in a page", "%s is there twice", key)
		}
		seen[key] = true
	}
	if limit > 0 && len(changes) > limit {
		h.fault("a page keeps to its limit", "%d changes came, %d were asked for", len(changes), limit)
	}
}

// apply checks a unit that continues what the client has, and remembers it.
func (h *history) apply(u *unit) {
	seen, tx := u.since, h.tx
	for i := range u.changes {
		c := &u.changes[i]
		if rank(c.Version) <= rank(seen) {
			h.fault("versions rise, and nothing comes twice", "%s comes after %s (position before: %s)", c, seen, u.since)
		}
		if rank(c.Tx) > rank(c.Version) || tx != "" && rank(c.Tx) < rank(tx) {
			h.fault("transactions come in their order", "%s comes after a change of transaction %s", c, tx)
		}
		if i == 0 && c.Tx == h.tx && !h.cut && rank(u.since) >= rank(c.Tx) {
			h.fault("a transaction comes whole", "%s belongs to a transaction that was applied before, up to %s", c, u.since)
		}
		if c.ClientID != "" && c.ClientID != h.device {
			h.fault("only the own changes are marked", "%s is said to come from %q, to %q", c, c.ClientID, h.device)
		}
		switch c.Operation {
		case "upsert":
			if !h.mine(c) {
				h.fault("nobody is shown a row that isn't theirs", "%s: %.300s", c, c.Data)
			}
		case "delete":
		default:
			h.fault("operations are upsert and delete", "%s", c)
		}
		if h.docs[c.Collection] == nil {
			h.docs[c.Collection] = map[string]string{}
		}
		h.docs[c.Collection][c.DocID] = c.Version
		seen, tx = c.Version, c.Tx
	}
	if rank(u.last) < rank(seen) {
		h.fault("last_seq doesn't go back", "from %s, with changes up to %s, it ended at %s", u.since, seen, u.last)
	}
	h.tx, h.cut = tx, u.until
}

// resync notes that collections were read in full at a position, after which other changes may come again.
func (h *history) resync(collections []string, at string) {
	for _, name := range collections {
		h.docs[name], h.fulls[name] = nil, at
	}
	h.tx, h.cut = "", false
}

// holds says whether the client was told of a document's state at a version or a later one.
func (h *history) holds(collection, id, version string) bool {
	return rank(h.docs[collection][id]) >= rank(version) || rank(h.fulls[collection]) >= rank(version)
}

// rank is the part of a version or position whose text order is the order; empty for none.
func rank(text string) string {
	part := strings.SplitN(text, "-", 3)
	if len(part) < 2 {
		return text
	}
	return part[0] + "-" + part[1]
}

// wants is what a push promised: at or after the position, the client has these documents.
type wants struct {
	visible string
	change  string // its change_id
	doc     promised
	lost    int // World.losses when it was answered
}

type promised struct {
	collection, id, version string
	column, value           string // what the document has at exactly that version; empty column: not known
}

// readYourWrites checks the promises that a position has passed, and returns those that it hasn't. value returns
// a column of the client's document.
func (h *history) readYourWrites(position string, open []wants, value func(p promised) (string, bool)) []wants {
	return slices.DeleteFunc(open, func(w wants) bool {
		if rank(position) < rank(w.visible) {
			return false
		}
		d := w.doc
		if !h.holds(d.collection, d.id, d.version) {
			h.fault("a client reads its writes", "the push %s was answered with %s/%s at %s, visible at %s; the client stands at %s and was last told of the document at %q, of the collection in full at %q",
				w.change, d.collection, d.id, d.version, w.visible, position, h.docs[d.collection][d.id], h.fulls[d.collection])
		} else if d.column != "" && h.docs[d.collection][d.id] != "" && rank(h.docs[d.collection][d.id]) == rank(d.version) {
			if has, ok := value(d); ok && has != d.value {
				h.fault("a client reads its writes", "%s/%s came at %s, which is what the push %s was answered with, but %s is %q and not %q", d.collection, d.id, d.version, w.change, d.column, has, d.value)
			}
		}
		return true
	})
}

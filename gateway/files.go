package gateway

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strconv"
	"time"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/schema"
)

// fileScopes is where a caller's attachments are: the scopes of all rows with attachments that it may read, of its own uploads
// that no row names, and of those of one device. Immutable.
type fileScopes struct {
	keys        [][16]byte
	hash        string // of the rows' scopes: a position holds for these only
	collections []*policies.Collection
	set         map[[16]byte]struct{}
}

// newFileScopes makes a caller's; without a client there are no uploads of a device.
func newFileScopes(set *policies.Set, caller *policies.Caller, clientID string) *fileScopes {
	f := &fileScopes{}
	for _, c := range set.Collections {
		if c.HasAttachments() && c.MayRead(caller) {
			f.collections = append(f.collections, c)
		}
	}
	for _, key := range caller.ReadableScopes() {
		f.keys = append(f.keys, key)
	}
	slices.SortFunc(f.keys, func(a, b [16]byte) int { return slices.Compare(a[:], b[:]) })
	sum := sha256.New()
	for _, key := range f.keys {
		sum.Write(key[:])
	}
	f.hash = hex.EncodeToString(sum.Sum(nil)[:8])
	f.keys = append(f.keys, policies.SubjectScope(caller.Subject))
	if clientID != "" {
		f.keys = append(f.keys, policies.DeviceScope(caller.Subject, clientID))
	}
	f.set = make(map[[16]byte]struct{}, len(f.keys))
	for _, key := range f.keys {
		f.set[key] = struct{}{}
	}
	return f
}

// scopes returns the keys; of nil none.
func (f *fileScopes) scopes() [][16]byte {
	if f == nil {
		return nil
	}
	return f.keys
}

func (f *fileScopes) holdsAny(keys [][16]byte) bool {
	return slices.ContainsFunc(keys, func(key [16]byte) bool {
		_, has := f.set[key]
		return has
	})
}

// usable says whether every collection of theirs can be served from a log in this state; nil is.
func (f *fileScopes) usable(h *changelog.Head) error {
	if f == nil {
		return nil
	}
	for _, c := range f.collections {
		if err := usable(c, h); err != nil {
			return err
		}
	}
	return nil
}

// checkClient says whether a caller may speak for a client: any, unless tokens say which device they are of.
func (g *Gateway) checkClient(id *Identity, clientID string) error {
	if g.auth.NamesClient() && clientID != id.ClientID {
		return &Problem{Code: ClientMismatch}
	}
	return nil
}

// appendOperation appends an operation as a frame of the stream.
func (h *hub) appendOperation(b []byte, o *changelog.Operation, remove bool, history string) []byte {
	b = append(b, `{"type":"attachment","operation":"`...)
	if remove {
		b = append(b, `delete`...)
	} else {
		b = append(b, `download`...)
	}
	b = append(b, `","attachment_id":`...)
	b = schema.AppendString(b, []byte(o.ID))
	b = append(b, `,"version":"`...)
	b = o.Version.AppendText(b, history)
	b = append(b, `","seq":`...)
	b = strconv.AppendInt(b, int64(o.Version), 10)
	if !remove {
		b = appendContent(b, o, h.url(o))
	}
	return append(b, '}')
}

// appendContent appends what a download says besides: where it is, and what.
func appendContent(b []byte, o *changelog.Operation, url []byte) []byte {
	b = append(b, `,"download_url":`...)
	b = schema.AppendString(b, url)
	b = append(b, `,"size":`...)
	b = strconv.AppendInt(b, o.Size, 10)
	b = append(b, `,"content_type":`...)
	b = schema.AppendString(b, []byte(o.ContentType))
	b = append(b, `,"sha256":"`...)
	b = hex.AppendEncode(b, o.SHA256)
	return append(b, '"')
}

const (
	// holdersAsked bounds the attachments whose holders the hub asks for at a time, holdersMost the holders of one. Subscribers
	// that are told of more deletions read the log.
	holdersAsked = 2000
	holdersMost  = 256
	holdersWait  = 5 * time.Second
)

// holders asks the log which scopes hold the attachments that operations delete, where a subscriber is told of the deletion:
// it may hold the attachment by another scope. What is missing in the answer is not known. The log may be ahead of the
// operations; then more of them follow, and each is held against a state at or after it.
func (h *hub) holders(ctx context.Context, operations []changelog.Operation) map[[16]byte][][16]byte {
	keys := h.deleted(operations)
	if len(keys) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, holdersWait)
	defer cancel()
	held, err := h.log.Holders(ctx, keys, holdersMost)
	if err != nil && ctx.Err() == nil {
		h.logger.Warn("the change log doesn't tell who holds deleted attachments; streams read it themselves", "error", err)
	}
	return held
}

func (h *hub) deleted(operations []changelog.Operation) (keys [][16]byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.files) == 0 {
		return nil
	}
	for i := range operations {
		if o := &operations[i]; o.Delete && len(h.files[o.Scope]) > 0 && len(keys) < holdersAsked && !slices.Contains(keys[max(0, len(keys)-1):], o.Attachment) {
			keys = append(keys, o.Attachment)
		}
	}
	return keys
}

// scopesSeen bounds the memory of operationsSeen.
const scopesSeen = 1 << 16

// operationsSeen is what the hub has heard of operations: the newest one of each scope since a version. It is the hub's, under
// its lock.
type operationsSeen struct {
	since  changelog.Version
	newest map[[16]byte]changelog.Version
	heard  changelog.Version // the log is at least here
}

// forget begins anew at v.
func (s *operationsSeen) forget(v changelog.Version) {
	s.since, s.heard = v, v
	clear(s.newest)
}

// note takes up the operations up to v.
func (s *operationsSeen) note(operations []changelog.Operation, v changelog.Version) {
	if len(operations) == 0 {
		return
	}
	if s.newest == nil {
		s.newest = map[[16]byte]changelog.Version{}
	}
	for i := range operations {
		s.newest[operations[i].Scope] = operations[i].Version
	}
	if len(s.newest) > scopesSeen {
		s.since = v
		clear(s.newest)
	}
}

// hear tells the hub that the log is at least at v: whoever was told of it must not be answered from before.
func (h *hub) hear(v changelog.Version) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.seen.heard = max(h.seen.heard, v)
}

// quiet says whether the scopes had no operation after v, as far as the log is known to reach, and where that is.
func (h *hub) quiet(scopes [][16]byte, v changelog.Version) (at changelog.Head, quiet bool) {
	at, known := h.position()
	h.mu.Lock()
	defer h.mu.Unlock()
	if !known || h.head.History != at.History || h.whole != at.Version || h.seen.heard > at.Version || v < h.seen.since || v > at.Version {
		return at, false
	}
	for _, key := range scopes {
		if h.seen.newest[key] > v {
			return at, false
		}
	}
	return at, true
}

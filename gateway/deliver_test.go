package gateway

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/policies"
)

// newFileSub is newTestSub that asked for the attachments of scopes.
func newFileSub(limit int, rows []int, files ...int) *subscriber {
	s := newTestSub(limit, rows...)
	s.feed.files = &fileScopes{set: map[[16]byte]struct{}{}}
	for _, n := range files {
		s.feed.files.keys = append(s.feed.files.keys, scopeKey(n))
		s.feed.files.set[scopeKey(n)] = struct{}{}
	}
	return s
}

// waiting is what waits for s in short: row changes as their version, operations as + or - and the id, | for a checkpoint.
func waiting(t *testing.T, s *subscriber) string {
	t.Helper()
	queued, _, _, _ := s.take(nil)
	defer releaseAll(queued)
	var out []string
	for _, f := range queued {
		var v struct {
			Operation string `json:"operation"`
			ID        string `json:"attachment_id"`
			Seq       int    `json:"seq"`
		}
		ok(t, json.Unmarshal(f.data, &v))
		switch {
		case f.kind == frameCheckpoint:
			out = append(out, "|")
		case f.kind == frameChange:
			out = append(out, fmt.Sprint(v.Seq))
		case v.Operation == "delete":
			out = append(out, "-"+v.ID)
		default:
			out = append(out, "+"+v.ID)
		}
		if f.kind == frameAttachment && !bytes.Contains(f.data, fmt.Appendf(nil, `"seq":%d`, v.Seq)) {
			t.Errorf("%s", f.data)
		}
	}
	return strings.Join(out, " ")
}

// TestDeliverOperations: operations stand in their transactions by their versions; each subscriber gets one once, as a
// deletion only where it is known that it holds the attachment by no other scope.
func TestDeliverOperations(t *testing.T) {
	t.Parallel()
	entry := func(v, tx changelog.Version, scope int) changelog.Entry {
		return changelog.Entry{Version: v, Tx: tx, Scope: scopeKey(scope), Collection: 1, Op: byte(policies.Upsert), DocID: []byte("1"), Data: []byte(`{}`)}
	}
	op := func(v changelog.Version, id string, scope int) changelog.Operation {
		name := strings.TrimPrefix(id, "-")
		return changelog.Operation{Version: v, ID: name, Attachment: policies.AttachmentKey([]byte(name)), Scope: scopeKey(scope), Delete: name != id}
	}
	key := func(id string) [16]byte { return policies.AttachmentKey([]byte(id)) }
	for name, c := range map[string]struct {
		entries    []changelog.Entry
		operations []changelog.Operation
		held       map[string][]int
		partial    bool
		want       string // of who has scopes 1 and 2
		left       bool   // it reads the log from the transaction's beginning
	}{
		"an upload": {operations: []changelog.Operation{op(101, "a", 1)}, want: "+a |"},
		"two":       {operations: []changelog.Operation{op(101, "a", 1), op(102, "b", 2)}, want: "+a | +b |"},
		"others'":   {operations: []changelog.Operation{op(101, "a", 7)}},
		"in a transaction": {entries: []changelog.Entry{entry(101, 101, 1), entry(105, 101, 1), entry(106, 106, 1)},
			operations: []changelog.Operation{op(101, "a", 1), op(103, "b", 1), op(105, "c", 1), op(106, "d", 1)}, want: "101 +a +b 105 +c | 106 +d |"},
		"between transactions": {entries: []changelog.Entry{entry(101, 101, 1), entry(106, 106, 1)},
			operations: []changelog.Operation{op(103, "b", 1), op(108, "c", 1)}, want: "101 | +b | 106 | +c |"},
		"within one of others": {entries: []changelog.Entry{entry(101, 101, 7), entry(105, 101, 7)}, operations: []changelog.Operation{op(102, "a", 1), op(103, "b", 2)}, want: "+a +b |"},
		"a part of one":        {entries: []changelog.Entry{entry(101, 101, 1)}, operations: []changelog.Operation{op(101, "a", 1)}, partial: true, want: "101 +a"},
		"out of order":         {operations: []changelog.Operation{op(102, "b", 1), op(101, "a", 1)}, want: "+a | +b |"},
		"in both scopes":       {operations: []changelog.Operation{op(101, "a", 1), op(101, "a", 2), op(101, "b", 2)}, want: "+a +b |"},
		"interleaved":          {operations: []changelog.Operation{op(101, "a", 1), op(101, "b", 1), op(101, "a", 2), op(101, "b", 2)}, want: "+a +b |"},
		"from one to the other": {operations: []changelog.Operation{op(101, "-a", 1), op(101, "a", 2)},
			held: map[string][]int{"a": {2}}, want: "+a |"},
		"gone":              {operations: []changelog.Operation{op(101, "-a", 1)}, held: map[string][]int{"a": {7}}, want: "-a |"},
		"gone from both":    {operations: []changelog.Operation{op(101, "-a", 1), op(101, "-a", 2)}, held: map[string][]int{"a": {}}, want: "-a |"},
		"held by the other": {operations: []changelog.Operation{op(101, "-a", 1)}, held: map[string][]int{"a": {7, 2}}},
		"nobody knows":      {operations: []changelog.Operation{op(101, "-a", 1)}, left: true},
		"nobody knows, in the midst": {entries: []changelog.Entry{entry(101, 101, 1), entry(102, 102, 1), entry(104, 102, 1)},
			operations: []changelog.Operation{op(103, "-a", 1)}, want: "101 |", left: true},
	} {
		h := newTestHub()
		s, both, plain := newFileSub(1<<20, []int{1}, 1, 2), newFileSub(1<<20, []int{1}, 1, 2), newTestSub(1<<20, 1)
		for _, s := range []*subscriber{s, both, plain} {
			h.join(s, 100)
		}
		held := map[[16]byte][][16]byte{}
		for id, scopes := range c.held {
			held[key(id)] = [][16]byte{}
			for _, n := range scopes {
				held[key(id)] = append(held[key(id)], scopeKey(n))
			}
		}
		given := slices.Clone(c.operations)
		h.mu.Lock()
		h.deliverLocked(delivery{entries: c.entries, operations: c.operations, held: held, complete: !c.partial})
		h.mu.Unlock()
		if got := waiting(t, s); got != c.want || s.live == c.left {
			t.Errorf("%s: got %q, want %q; live: %v", name, got, c.want, s.live)
		}
		if got := waiting(t, plain); strings.ContainsAny(got, "+-") {
			t.Errorf("%s: who didn't ask got %q", name, got)
		}
		for i := range given {
			if given[i].ID != c.operations[i].ID {
				t.Errorf("%s: the batch, which others share, was written to", name)
			}
		}
		if last := c.entries; c.left && len(last) > 0 && s.reached(0) != 101 {
			t.Errorf("%s: it reads from %d", name, s.reached(0))
		}
		h.leave(both)
		h.leave(s)
		h.leave(plain)
		if len(h.files) != 0 || len(h.scopes) != 0 {
			t.Errorf("%s: left behind: %d, %d scopes", name, len(h.files), len(h.scopes))
		}
	}
}

// TestManyOperationsOverflow: operations that don't fit end the live path like row changes.
func TestManyOperationsOverflow(t *testing.T) {
	t.Parallel()
	h, s := newTestHub(), newFileSub(1000, nil, 1)
	h.join(s, 100)
	b := &changelog.Batch{History: testHistory, Prev: 100, Last: 150}
	for v := changelog.Version(101); v <= 150; v++ {
		b.Operations = append(b.Operations, changelog.Operation{Version: v, ID: fmt.Sprint(v), Attachment: [16]byte{byte(v)}, Scope: scopeKey(1)})
	}
	if !h.apply(t.Context(), b) {
		t.Fatal("not taken")
	}
	got := strings.Fields(waiting(t, s))
	if s.live || len(got) == 0 || len(got)%2 != 0 || s.reached(150) != changelog.Version(100+len(got)/2) {
		t.Errorf("live %v; %d frames; it has all up to %d", s.live, len(got), s.reached(150))
	}
	if h.memory.held.Load() != 0 {
		t.Error("memory is held")
	}
}

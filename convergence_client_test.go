package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"
)

// errAway is a lost connection, a gateway that is down or a retryable problem: the client comes again.
var errAway = errors.New("away")

// replica is what a client has stored, always together with the cursor up to which it is whole.
type replica struct {
	documents map[string]map[string]json.RawMessage // by collection and doc_id
	cursor    string
	settles   string // the replica is consistent from this position on
}

func (r replica) clone() replica {
	out := r
	out.documents = map[string]map[string]json.RawMessage{}
	for name, docs := range r.documents {
		out.documents[name] = maps.Clone(docs)
	}
	return out
}

func (r replica) put(collection, id string, doc json.RawMessage) {
	if r.documents[collection] == nil {
		r.documents[collection] = map[string]json.RawMessage{}
	}
	r.documents[collection][id] = doc
}

// syncChange is a line of a full resync, an entry of a pull or a frame of the stream.
type syncChange struct {
	Type       string          `json:"type"`
	Version    string          `json:"version"`
	Collection string          `json:"collection"`
	DocID      string          `json:"doc_id"`
	Operation  string          `json:"operation"`
	Data       json.RawMessage `json:"data"`
	Deleted    bool            `json:"deleted"`
	Tx         string          `json:"tx"`
	ClientID   string          `json:"client_id"`
	End        bool            `json:"end"`
	Count      int             `json:"count"`
	LastSeq    string          `json:"last_seq"`
	Settles    string          `json:"settles"`
	Code       string          `json:"code"`

	Changes     []syncChange `json:"changes"`
	HasMore     bool         `json:"has_more"`
	Partial     bool         `json:"partial"`
	Resync      bool         `json:"full_resync_required"`
	Collections []string     `json:"collections"`
	Reason      string       `json:"reason"`
}

// syncClient follows the protocol and checks what it is told.
type syncClient struct {
	t       *testing.T
	name    string
	caller  syncCaller
	claims  map[string]any
	base    string
	token   string
	device  string                         // client_id; empty: it names none
	names   []string                       // the collections that it asks for
	whole   func(c *syncClient, r replica) // what must hold of every stored state; nil: nothing
	pace    time.Duration                  // pause between two steps
	told    bool                           // begins anew only when told to
	steady  bool                           // reads full resyncs as fast as it can, to their end
	rng     *rand.Rand
	http    *http.Client
	replica replica
	lost    []string // collections that need a full resync before anything else
	counts  map[string]int
	trail   []string // what the client did last, for a failure's message
}

// newSyncClient returns a client that has nothing yet and names no collections.
func newSyncClient(t *testing.T, cfg *Config, base, name, claims string, rng *rand.Rand) *syncClient {
	t.Helper()
	c := &syncClient{t: t, name: name + " " + claims, base: base, rng: rng, counts: map[string]int{},
		http: &http.Client{Transport: &http.Transport{}}, replica: replica{documents: map[string]map[string]json.RawMessage{}}}
	var err error
	c.caller, c.claims = parseSyncCaller(claims)
	if c.token, err = signToken(cfg, c.caller.sub, nil, c.claims, time.Hour); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.http.CloseIdleConnections)
	return c
}

func (c *syncClient) note(format string, args ...any) {
	c.trail = append(c.trail, time.Now().Format("05.000 ")+fmt.Sprintf(format, args...))
	c.trail = c.trail[max(0, len(c.trail)-15):]
}

// broken reports what the gateway must never do.
func (c *syncClient) broken(format string, args ...any) {
	c.t.Errorf("client %s: %s\n  its last steps:\n  %s", c.name, fmt.Sprintf(format, args...), strings.Join(c.trail, "\n  "))
}

// run syncs in random ways until ctx ends.
func (c *syncClient) run(ctx context.Context) {
	for ; ctx.Err() == nil && !c.t.Failed(); pause(ctx, c.pace) {
		var err error
		switch n := c.rng.IntN(12); {
		case c.replica.cursor == "" || len(c.lost) > 0:
			err = c.resync(ctx)
		case n == 0 && !c.told:
			c.lost = c.names
			err = c.resync(ctx)
		case n == 1:
			pause(ctx, time.Duration(c.rng.IntN(1500))*time.Millisecond)
		case n < 6:
			err = c.pullOn(ctx)
		default:
			err = c.follow(ctx)
		}
		if err != nil && ctx.Err() == nil {
			if !errors.Is(err, errAway) {
				c.broken("%v", err)
			}
			pause(ctx, 30*time.Millisecond)
		}
	}
}

// catchUp follows the protocol, without further adventures, to the end of the log.
func (c *syncClient) catchUp(ctx context.Context) error {
	c.steady = true
	defer func() { c.steady = false }()
	for {
		if c.replica.cursor == "" || len(c.lost) > 0 {
			if err := c.resync(ctx); err != nil {
				return err
			}
		}
		next, more, err := c.pull(ctx, c.replica.clone(), c.names, "", 0)
		if err != nil {
			return err
		}
		if len(c.lost) > 0 {
			continue
		}
		c.commit(next)
		if !more {
			return nil
		}
	}
}

// commit stores a replica with its cursor, and checks it unless it is known to settle later.
func (c *syncClient) commit(r replica) {
	c.replica = r
	if c.whole != nil && r.settles <= r.cursor {
		c.whole(c, r)
	}
}

// wholePairs checks that a replica holds whole transactions, where nobody made them arrive in parts.
func (v *convergence) wholePairs(c *syncClient, r replica) {
	if v.torn.Load() {
		return
	}
	for n := range 3 {
		at := int(c.caller.sub[1]-'0')*10 + 1 + n
		var a, b struct{ Tag json.RawMessage }
		note, exact := r.documents["notes"][pairNote(at)], r.documents["exact"][fmt.Sprint(900000+at)]
		if note == nil || exact == nil {
			c.broken("at %s half of pair %d is missing: %s and %s", r.cursor, at, note, exact)
			continue
		}
		if err := errors.Join(json.Unmarshal(note, &a), json.Unmarshal(exact, &b)); err != nil {
			c.broken("a document is no JSON: %v", err)
		}
		if string(a.Tag) != strings.Trim(string(b.Tag), `"`) {
			c.broken("half a transaction at %s: pair %d is %s in notes and %s in exact", r.cursor, at, a.Tag, b.Tag)
		}
	}
}

// apply takes one change over; since is the last version seen, and the result the new one.
func (c *syncClient) apply(r replica, ch *syncChange, since string) string {
	if version := versionOf(ch.Version); version <= versionOf(since) {
		c.broken("%s %s has version %s, after %s was seen", ch.Collection, ch.DocID, ch.Version, since)
	}
	if ch.ClientID != "" && ch.ClientID != c.device {
		c.broken("%s %s is said to come from %q", ch.Collection, ch.DocID, ch.ClientID)
	} else if ch.ClientID != "" {
		c.counts["own change"]++
	}
	switch ch.Operation {
	case "upsert":
		if !c.caller.maySee(ch.Collection, ch.Data) {
			c.broken("was shown %s %s, which it may not see: %.300s", ch.Collection, ch.DocID, ch.Data)
		}
		r.put(ch.Collection, ch.DocID, ch.Data)
	case "delete":
		delete(r.documents[ch.Collection], ch.DocID)
	default:
		c.broken("unknown operation %q", ch.Operation)
	}
	c.counts[ch.Operation]++
	return ch.Version
}

// versionOf is the part of a version or cursor whose text order is the order.
func versionOf(text string) string {
	part := strings.SplitN(text, "-", 3)
	if len(part) < 2 {
		return text
	}
	return part[0] + "-" + part[1]
}

// get asks for path; a nil response comes with an error, which is errAway where the client should come again.
func (c *syncClient) get(ctx context.Context, path string, query url.Values) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base+path+"?"+query.Encode(), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+c.token)
	res, err := c.http.Do(req)
	if err != nil {
		return nil, errAway
	}
	if res.StatusCode == http.StatusOK {
		return res, nil
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		return nil, errAway
	}
	var p struct {
		Code      string
		Retryable bool
	}
	c.note("%s: %d %.300s", path, res.StatusCode, bytes.TrimPrefix(text, []byte(`{"type":"https://github.com/walgate/walgate/blob/main/docs/errors.md`)))
	if err := json.Unmarshal(text, &p); err == nil && (p.Retryable && p.Code != "internal" || p.Code == "cursor_expired") {
		c.counts[p.Code]++
		return nil, errAway
	}
	return nil, fmt.Errorf("GET %s?%s: %d %s", path, query.Encode(), res.StatusCode, text)
}

// pullOn pulls a few pages, waiting for changes at times.
func (c *syncClient) pullOn(ctx context.Context) error {
	for range 1 + c.rng.IntN(6) {
		wait := 0
		if c.rng.IntN(3) == 0 {
			wait = 1 + c.rng.IntN(2)
		}
		asking, cancel := ctx, context.CancelFunc(func() {})
		if c.rng.IntN(6) == 0 { // cut in mid-answer
			asking, cancel = context.WithTimeout(ctx, time.Duration(c.rng.IntN(30))*time.Millisecond)
		}
		next, _, err := c.pull(asking, c.replica.clone(), c.names, "", wait)
		cancel()
		if err != nil {
			return err
		}
		if len(c.lost) > 0 {
			return nil
		}
		c.commit(next)
	}
	return nil
}

// pull applies pages until one ends at a transaction's end. With until it goes on to there.
func (c *syncClient) pull(ctx context.Context, r replica, collections []string, until string, wait int) (replica, bool, error) {
	for {
		limit := []int{1, 2, 7, 50, 500, 1000, 1000}[c.rng.IntN(7)]
		if until != "" {
			limit = 1000
		}
		q := url.Values{"since": {r.cursor}, "collections": {strings.Join(collections, ",")}, "limit": {fmt.Sprint(limit)}, "wait": {fmt.Sprint(wait)}}
		if until != "" {
			q.Set("until", until)
		}
		if c.device != "" {
			q.Set("client_id", c.device)
		}
		page, err := c.page(ctx, q)
		if err != nil {
			return r, false, err
		}
		if page.Resync {
			c.note("pull from %s: resync of %v, %s", r.cursor, page.Collections, page.Reason)
			c.lose(page)
			return r, false, nil
		}
		c.note("pull from %s limit %d until %s: %d changes to %s, more %t, partial %t", r.cursor, limit, until, len(page.Changes), page.LastSeq, page.HasMore, page.Partial)
		seen, documents := r.cursor, map[string]bool{}
		for i := range page.Changes {
			ch := &page.Changes[i]
			if key := ch.Collection + " " + ch.DocID; documents[key] {
				c.broken("%s is twice in a page", key)
			} else {
				documents[key] = true
			}
			seen = c.apply(r, ch, seen)
		}
		if versionOf(page.LastSeq) < versionOf(seen) || page.HasMore && page.LastSeq == r.cursor {
			c.broken("a page from %s to %s ends at %s", r.cursor, seen, page.LastSeq)
		}
		if len(page.Changes) > limit {
			c.broken("a page of %d has %d changes", limit, len(page.Changes))
		}
		r.cursor = page.LastSeq
		if page.Partial && !page.HasMore {
			c.broken("a partial page has no more")
		}
		if !page.Partial && (until == "" || !page.HasMore) {
			return r, page.HasMore, nil
		}
	}
}

func (c *syncClient) page(ctx context.Context, q url.Values) (*syncChange, error) {
	res, err := c.get(ctx, "/sync/pull", q)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	page := &syncChange{}
	if err := json.NewDecoder(res.Body).Decode(page); err != nil {
		return nil, errAway // cut
	}
	return page, nil
}

// lose remembers what must be read in full.
func (c *syncClient) lose(p *syncChange) {
	c.counts["resync "+p.Reason]++
	if len(p.Collections) == 0 {
		c.broken("a resync of nothing is required")
	}
	for _, name := range p.Collections {
		if !slices.Contains(c.lost, name) {
			c.lost = append(c.lost, name)
		}
	}
}

// resync follows the recipe: full(A) → L; pull(the others, since = old, until = L) to its end; then one cursor, L.
func (c *syncClient) resync(ctx context.Context) error {
	all := c.names
	if c.replica.cursor == "" {
		c.lost = all
	}
	r, err := c.full(ctx, c.lost)
	if err != nil {
		return err
	}
	var others []string
	for _, name := range all {
		if !slices.Contains(c.lost, name) {
			others = append(others, name)
		}
	}
	last := r.cursor
	if len(others) > 0 && c.replica.cursor != "" {
		r.cursor = c.replica.cursor
		known := len(c.lost)
		if r, _, err = c.pull(ctx, r, others, last, 0); err != nil || len(c.lost) > known {
			return err
		}
		if versionOf(r.cursor) != max(versionOf(last), versionOf(c.replica.cursor)) {
			c.broken("pulling until %s from %s ended at %s", last, c.replica.cursor, r.cursor)
		}
	}
	c.lost, r.cursor = nil, last
	c.note("resync done at %s, settles %s", last, r.settles)
	c.commit(r)
	return nil
}

// full reads the named collections in full into a copy of the replica.
func (c *syncClient) full(ctx context.Context, names []string) (replica, error) {
	r := c.replica.clone()
	q := url.Values{"collections": {strings.Join(names, ",")}}
	if c.replica.cursor != "" && c.rng.IntN(2) == 0 {
		q.Set("since", c.replica.cursor)
	}
	paged := c.rng.IntN(2) == 0
	limit := 1000 + c.rng.IntN(4000)
	if !paged {
		q.Set("limit", "all")
	}
	for page := 0; ; page++ {
		if paged {
			q.Set("limit", fmt.Sprint(limit))
		}
		res, err := c.get(ctx, "/sync/full", q)
		if err != nil {
			return r, err
		}
		last := res.Header.Get("X-Sync-LastSeq")
		if page == 0 {
			r.cursor = last
			if res.Header.Get("X-Sync-Mode") == "replace" {
				for _, name := range names {
					delete(r.documents, name)
				}
			}
			c.counts["full "+res.Header.Get("X-Sync-Mode")]++
		} else if r.cursor != last {
			c.broken("a later page's X-Sync-LastSeq is %s, the first one's %s", last, r.cursor)
		}
		r.settles = max(r.settles, res.Header.Get("X-Sync-Settles"))
		ended, err := c.lines(res.Body, &r, names)
		res.Body.Close()
		cursor := res.Header.Get("X-Sync-Cursor")
		c.note("full %s: L %s, mode %s, settles %s, more %t, end %t, %v", q.Encode(), last, res.Header.Get("X-Sync-Mode"), r.settles, cursor != "", ended, err)
		if err != nil {
			return r, err
		}
		if !paged && !ended {
			return r, errAway // incomplete
		}
		if cursor == "" {
			return r, nil
		}
		q.Set("cursor", cursor)
		q.Del("since")
	}
}

// lines applies the lines of a full resync, which it may cut at any.
func (c *syncClient) lines(body io.Reader, r *replica, names []string) (ended bool, err error) {
	cut := -1
	if c.rng.IntN(8) == 0 && !c.steady {
		cut = c.rng.IntN(400)
	}
	slow := c.rng.IntN(8) == 0 && !c.steady
	count := 0
	lines := json.NewDecoder(bufio.NewReader(body))
	for n := 0; ; n++ {
		if slow && n%500 == 0 {
			c.counts["slow read"]++
			pause(c.t.Context(), time.Duration(c.rng.IntN(100))*time.Millisecond)
		}
		var line syncChange
		if err := lines.Decode(&line); errors.Is(err, io.EOF) {
			return ended, nil
		} else if err != nil || n == cut {
			return false, errAway
		}
		switch {
		case line.End:
			if ended = true; line.LastSeq != r.cursor || line.Count != count {
				c.broken("the end line says %d documents and %s; there were %d and %s", line.Count, line.LastSeq, count, r.cursor)
			}
			r.settles = max(r.settles, line.Settles)
		case !slices.Contains(names, line.Collection):
			c.broken("a full resync of %v brought %s", names, line.Collection)
		case line.Deleted:
			delete(r.documents[line.Collection], line.DocID)
		default:
			count++
			if !c.caller.maySee(line.Collection, line.Data) {
				c.broken("a full resync brought %s %s, which it may not see: %.300s", line.Collection, line.DocID, line.Data)
			}
			r.put(line.Collection, line.DocID, line.Data)
		}
	}
}

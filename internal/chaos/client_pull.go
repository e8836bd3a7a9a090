package chaos

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

// page is an answer to a pull.
type page struct {
	Changes     []change `json:"changes"`
	LastSeq     string   `json:"last_seq"`
	HasMore     bool     `json:"has_more"`
	Partial     bool     `json:"partial"`
	Resync      bool     `json:"full_resync_required"`
	Collections []string `json:"collections"`
	Reason      string   `json:"reason"`
}

// pullOn pulls a few times, and waits for changes at times.
func (c *client) pullOn(ctx context.Context) error {
	for range 1 + c.rng.IntN(4) {
		wait := 0
		if c.rng.IntN(4) == 0 {
			wait = 1
		}
		u, _, err := c.pull(ctx, c.cursor, c.names, "", wait)
		if err != nil || u == nil {
			return err
		}
		c.store(u)
	}
	return nil
}

// pull asks for pages until one ends at a transaction's end; with until, until it is reached. A nil unit without an error
// means that a full resync was asked for.
func (c *client) pull(ctx context.Context, since string, names []string, until string, wait int) (*unit, bool, error) {
	u := &unit{since: since, last: since, until: until != ""}
	for {
		limit := pick(c.rng, []int{1, 3, 20, 200, 1000, 1000, 1000, 1000})
		if until != "" || c.calm {
			limit = 1000
		}
		q := url.Values{"since": {u.last}, "collections": {strings.Join(names, ",")}, "limit": {fmt.Sprint(limit)}, "wait": {fmt.Sprint(wait)}, "client_id": {c.device}}
		if until != "" {
			q.Set("until", until)
		}
		a, err := c.ask(ctx, http.MethodGet, "/sync/pull", q, nil)
		if err != nil {
			return nil, false, err
		}
		var p page
		if a.status != http.StatusOK || json.Unmarshal(a.body, &p) != nil {
			return nil, false, c.wrong("pull from "+u.last, a)
		}
		c.w.count("clients: pages")
		if p.Resync {
			c.turn("pull from %s: resync of %v, %s%s", u.last, p.Collections, p.Reason, from(a.header))
			return nil, false, c.told(p.Collections, p.Reason)
		}
		c.note("pull from %s, limit %d, until %q: %d changes to %s, more %t, partial %t%s", u.last, limit, until, len(p.Changes), p.LastSeq, p.HasMore, p.Partial, from(a.header))
		c.history.page(p.Changes, limit)
		if p.HasMore && rank(p.LastSeq) == rank(u.last) || p.Partial && !p.HasMore {
			c.violation("more comes only after a step", "a pull from %s ended at %s, more %t, partial %t", u.last, p.LastSeq, p.HasMore, p.Partial)
		}
		if rank(p.LastSeq) < rank(u.last) {
			c.violation("last_seq doesn't go back", "a pull from %s ended at %s", u.last, p.LastSeq)
		}
		u.changes, u.last = append(u.changes, p.Changes...), p.LastSeq
		if !p.Partial && (until == "" || !p.HasMore) {
			return u, p.HasMore, nil
		}
		wait = 0
	}
}

// told remembers what must be read in full.
func (c *client) told(names []string, reason string) error {
	c.w.count("clients: resync " + reason)
	if len(names) == 0 {
		c.violation("a resync names its collections", "none is named; the reason is %s", reason)
		return errWrong
	}
	for _, name := range names {
		if !slices.Contains(c.lost, name) && slices.Contains(c.names, name) {
			c.lost = append(c.lost, name)
		}
	}
	return nil
}

// resync follows the recipe: full(A) → L; pull(the others, since = old, until = L) to its end; then one position, L.
func (c *client) resync(ctx context.Context) error {
	if c.cursor == "" {
		c.lost = slices.Clone(c.names)
	}
	if len(c.names) == 0 { // no role reads anything
		pause(ctx, 100*time.Millisecond)
		return nil
	}
	whole, before := slices.Clone(c.lost), c.cursor
	f, err := c.full(ctx, whole)
	if err != nil {
		return err
	}
	var others []string
	for _, name := range c.names {
		if !slices.Contains(whole, name) {
			others = append(others, name)
		}
	}
	var rest *unit
	if len(others) > 0 && c.cursor != "" { // also where nothing was logged since: other claims would make these be read in full too
		if rest, _, err = c.pull(ctx, c.cursor, others, f.last, 0); err != nil || rest == nil {
			return err
		}
		if rank(rest.last) != max(rank(f.last), rank(c.cursor)) {
			c.violation("a pull ends where it is told to", "pulling until %s from %s ended at %s", f.last, c.cursor, rest.last)
		}
	}
	if rest != nil {
		c.take(rest)
	}
	for _, name := range whole {
		c.documents[name] = f.documents[name]
	}
	c.history.resync(whole, f.last)
	c.history.cut = true // the others stand where the client chose
	c.lost, c.cursor, c.settles = nil, f.last, max(c.settles, f.settles)
	c.turn("resync of %v done at %s, from %q, settles %q", whole, f.last, before, f.settles)
	c.keepPromises()
	return nil
}

// fullState is what a full resync brought.
type fullState struct {
	documents     map[string]map[string]rawJSON
	last, settles string
}

// full reads collections in full.
func (c *client) full(ctx context.Context, names []string) (*fullState, error) {
	f := &fullState{documents: map[string]map[string]rawJSON{}}
	q := url.Values{"collections": {strings.Join(names, ",")}}
	if c.cursor != "" && c.rng.IntN(2) == 0 {
		q.Set("since", c.cursor)
	}
	if c.rng.IntN(2) == 0 {
		q.Set("limit", "all")
	} else {
		q.Set("limit", fmt.Sprint(100+c.rng.IntN(3000)))
	}
	for first := true; ; first = false {
		res, cancel, err := c.open(ctx, http.MethodGet, "/sync/full", q, nil)
		if err != nil {
			return nil, err
		}
		more, err := c.fullPage(ctx, f, names, q, res, first)
		res.Body.Close()
		cancel()
		if err != nil {
			return nil, err
		}
		if more == "" {
			return f, nil
		}
		q.Set("cursor", more)
		q.Del("since")
	}
}

func (c *client) fullPage(ctx context.Context, f *fullState, names []string, q url.Values, res *http.Response, first bool) (more string, err error) {
	if res.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(res.Body) // for the story
		if code, _ := problem(text); code == "cursor_expired" {
			c.note("full: %d %s%s", res.StatusCode, code, from(res.Header))
			return "", errAway
		}
		return "", c.wrong("full "+q.Encode(), answer{status: res.StatusCode, body: text, header: res.Header})
	}
	last, mode := res.Header.Get("X-Sync-LastSeq"), res.Header.Get("X-Sync-Mode")
	switch {
	case first:
		f.last = last
		for _, name := range names {
			f.documents[name] = map[string]rawJSON{}
			if mode == "merge" {
				f.documents[name] = maps.Clone(c.documents[name])
			}
			if f.documents[name] == nil {
				f.documents[name] = map[string]rawJSON{}
			}
		}
		c.w.count("clients: full " + mode)
	case f.last != last:
		c.violation("all pages of a full resync have one position", "a later page has %s, the first one %s", last, f.last)
	}
	f.settles = max(f.settles, res.Header.Get("X-Sync-Settles"))
	count, ended, err := c.lines(ctx, f, names, res.Body)
	more = res.Header.Get("X-Sync-Cursor")
	c.note("full of %v, limit %s: mode %s, %d documents at %s, settles %q, more %t, end %t, %v%s", names, q.Get("limit"), mode, count, last, f.settles, more != "", ended, err, from(res.Header))
	if err == nil && q.Get("limit") == "all" && !ended {
		err = errAway // incomplete
	}
	return more, err
}

// lines takes the lines of a full resync.
func (c *client) lines(ctx context.Context, f *fullState, names []string, body io.Reader) (count int, ended bool, err error) {
	lines := json.NewDecoder(bufio.NewReader(body))
	for n := 1; ; n++ {
		if c.slow && !c.calm && n%200 == 0 {
			pause(ctx, upTo(c.rng, 50*time.Millisecond))
		}
		var line struct {
			change
			End     bool   `json:"end"`
			Count   int    `json:"count"`
			LastSeq string `json:"last_seq"`
			Settles string `json:"settles"`
		}
		if err := lines.Decode(&line); errors.Is(err, io.EOF) {
			return count, ended, nil
		} else if err != nil {
			return count, false, errAway
		}
		switch {
		case line.End:
			if ended = true; line.LastSeq != f.last || line.Count != count {
				c.violation("a full resync says what it has sent", "its end says %d documents and %s; there were %d and %s", line.Count, line.LastSeq, count, f.last)
			}
			f.settles = max(f.settles, line.Settles)
		case !slices.Contains(names, line.Collection):
			c.violation("a full resync has what was asked for", "%v was asked for, and %s came", names, line.Collection)
		case line.Deleted:
			delete(f.documents[line.Collection], line.DocID)
		default:
			count++
			if !c.mine(&line.change) {
				c.violation("nobody is shown a row that isn't theirs", "full resync: %s/%s: %.300s", line.Collection, line.DocID, line.Data)
			}
			f.documents[line.Collection][line.DocID] = line.Data
		}
	}
}

// catchUp goes to the end of the log without further adventures.
func (c *client) catchUp(ctx context.Context) error {
	for len(c.names) > 0 {
		if c.cursor == "" || len(c.lost) > 0 {
			if err := c.resync(ctx); err != nil {
				return err
			}
		}
		u, more, err := c.pull(ctx, c.cursor, c.names, "", 0)
		if err != nil {
			return err
		}
		if u == nil {
			continue
		}
		c.store(u)
		if !more {
			return nil
		}
	}
	return nil
}

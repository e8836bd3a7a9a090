package chaos

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
)

// session goes through the four steps of a client that keeps no position: the server does. What it pushes is pushed beside,
// under the same device.
func (c *client) session(ctx context.Context) error {
	if len(c.names) == 0 {
		return nil
	}
	body, _ := json.Marshal(map[string]string{"device_uuid": c.device}) // texts
	a, err := c.ask(ctx, http.MethodPost, "/sync/sessions", nil, body, "Content-Type", "application/json")
	if err != nil {
		return err
	}
	var window struct {
		ID       string  `json:"sync_uuid"`
		LastSync *string `json:"last_sync"`
		Until    string  `json:"max_checkin"`
	}
	if a.status/100 != 2 || json.Unmarshal(a.body, &window) != nil {
		return c.wrong("opening a session", a)
	}
	c.w.count("clients: sessions")
	c.note("session %s from %s to %s%s", window.ID, text(window.LastSync), window.Until, from(a.header))
	after, since := "", ""
	if window.LastSync != nil {
		after = *window.LastSync
	}
	for more := true; more; {
		q := url.Values{"session": {window.ID}, "collections": {strings.Join(c.names, ",")}, "limit": {fmt.Sprint(pick(c.rng, []int{20, 500, 1000}))}}
		if since != "" {
			q.Set("since", since)
		}
		var p page
		if err := c.inSession(ctx, http.MethodGet, "/sync/pull", q, nil, &p); err != nil {
			return err
		}
		if p.Resync {
			c.turn("session: resync of %v, %s", p.Collections, p.Reason)
			c.w.count("clients: session resync " + p.Reason)
			f, err := c.full(ctx, p.Collections)
			if err != nil {
				return err
			}
			for _, name := range p.Collections {
				c.documents[name] = f.documents[name]
			}
			c.settles = max(c.settles, f.settles)
			after, since = "", f.last // others than these are told again from the beginning, if they are at all
			continue
		}
		c.note("session: %d changes to %s, more %t", len(p.Changes), p.LastSeq, p.HasMore)
		c.takeSession(&p, after, window.Until)
		since, more = p.LastSeq, p.HasMore
	}
	body, _ = json.Marshal(map[string]string{"last_update": since}) // texts
	return c.inSession(ctx, http.MethodPost, "/sync/sessions/"+window.ID+"/complete", nil, body, &struct{}{})
}

// inSession asks for something within a session, which another may have replaced.
func (c *client) inSession(ctx context.Context, method, path string, q url.Values, body []byte, into any) error {
	var header []string
	if body != nil {
		header = []string{"Content-Type", "application/json"}
	}
	a, err := c.ask(ctx, method, path, q, body, header...)
	if err != nil {
		return err
	}
	if code, _ := problem(a.body); code == "unknown_session" || code == "session_expired" {
		c.note("%s %s: %d %s%s", method, path, a.status, code, from(a.header))
		return errAway
	}
	if a.status != http.StatusOK || json.Unmarshal(a.body, into) != nil {
		return c.wrong(method+" "+path, a)
	}
	return nil
}

// takeSession applies a page of a session's window.
func (c *client) takeSession(p *page, after, until string) {
	c.history.page(p.Changes, 0)
	for i := range p.Changes {
		ch := &p.Changes[i]
		if ch.ClientID != c.device && (rank(ch.Version) <= rank(after) || rank(ch.Version) > rank(until)) {
			c.violation("a session keeps to its window", "%s is outside of %q to %q", ch, after, until)
		}
		if ch.Operation == "upsert" && !c.mine(ch) {
			c.violation("nobody is shown a row that isn't theirs", "%s: %.300s", ch, ch.Data)
		}
		if ch.Operation == "delete" {
			delete(c.documents[ch.Collection], ch.DocID)
		} else {
			c.put(ch.Collection, ch.DocID, slices.Clone(ch.Data))
		}
	}
	c.w.add("clients: changes", len(p.Changes))
}

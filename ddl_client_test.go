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
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/fasthttp/websocket"
)

// ddlClient follows one collection by the protocol, by pulling or on the stream, until its context ends.
type ddlClient struct {
	base, token, collection string
	stream                  bool
	http                    *http.Client

	mu      sync.Mutex
	state   ddlState
	trail   []string
	arrived map[string]time.Time // by doc_id, of the last upsert
	broken  error                // what the gateway must never answer
}

// ddlState is what a client holds and what it went through.
type ddlState struct {
	documents map[string]string
	cursor    string // empty: a full resync is due
	resyncs   int    // full resyncs that ended well
	refused   int    // answers and frames that say the collection is unavailable
}

var errDDLAway = errors.New("come again")

func (c *ddlClient) snapshot() ddlState {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.state
	s.documents = maps.Clone(s.documents)
	return s
}

func (c *ddlClient) note(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.trail = append(c.trail, time.Now().Format("05.000 ")+fmt.Sprintf(format, args...))
	c.trail = c.trail[max(0, len(c.trail)-12):]
}

func (c *ddlClient) story() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return strings.Join(c.trail, "\n   ")
}

func (c *ddlClient) run(ctx context.Context) {
	for ctx.Err() == nil {
		var err error
		switch {
		case c.snapshot().cursor == "":
			err = c.full(ctx)
		case c.stream:
			err = c.follow(ctx)
		default:
			err = c.pull(ctx)
		}
		if err != nil && !errors.Is(err, errDDLAway) && ctx.Err() == nil {
			c.mu.Lock()
			c.broken = errors.Join(c.broken, err)
			c.mu.Unlock()
			return
		}
		if err != nil {
			pause(ctx, 20*time.Millisecond)
		}
	}
}

// get asks; an answer other than 200 is errDDLAway where the client should come again.
func (c *ddlClient) get(ctx context.Context, path string, query url.Values) (*http.Response, error) {
	query.Set("collections", c.collection)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base+path+"?"+query.Encode(), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+c.token)
	res, err := c.http.Do(req)
	if err != nil {
		return nil, errDDLAway
	}
	if res.StatusCode == http.StatusOK {
		return res, nil
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return nil, errDDLAway
	}
	var p struct{ Code string }
	_ = json.Unmarshal(body, &p) // another body has no code
	c.note("%s: %d %s", path, res.StatusCode, p.Code)
	return nil, c.refusal(p.Code, string(body))
}

// refusal says what a problem means to the client.
func (c *ddlClient) refusal(code, text string) error {
	switch code {
	case "collection_unavailable":
		c.mu.Lock()
		c.state.refused++
		c.mu.Unlock()
	case "source_unavailable", "log_behind", "rate_limited", "cursor_expired", "log_unavailable":
	default:
		return fmt.Errorf("the gateway answered %s", text)
	}
	return errDDLAway
}

// full replaces everything.
func (c *ddlClient) full(ctx context.Context) error {
	res, err := c.get(ctx, "/sync/full", url.Values{"limit": {"all"}})
	if err != nil {
		return err
	}
	defer res.Body.Close()
	documents := map[string]string{}
	lines := bufio.NewScanner(res.Body)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var l resyncLine
		if err := json.Unmarshal(lines.Bytes(), &l); err != nil {
			return fmt.Errorf("line %q: %w", lines.Text(), err)
		}
		if l.End {
			c.mu.Lock()
			c.state.documents, c.state.cursor = documents, l.LastSeq
			c.state.resyncs++
			c.mu.Unlock()
			c.note("full: %d documents at %s", len(documents), l.LastSeq)
			return nil
		}
		documents[l.DocID] = string(l.Data)
	}
	return errDDLAway // cut short
}

// lost says that a full resync is due.
func (c *ddlClient) lost(reason string) {
	c.note("resync required: %s", reason)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.state.cursor = ""
}

// store takes changes over together with their cursor.
func (c *ddlClient) store(changes []syncChange, cursor string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range changes {
		if ch := &changes[i]; ch.Operation == "delete" {
			delete(c.state.documents, ch.DocID)
		} else {
			c.state.documents[ch.DocID] = string(ch.Data)
			if c.arrived != nil {
				c.arrived[ch.DocID] = time.Now()
			}
		}
	}
	c.state.cursor = cursor
}

func (c *ddlClient) pull(ctx context.Context) error {
	res, err := c.get(ctx, "/sync/pull", url.Values{"since": {c.snapshot().cursor}, "wait": {"1"}})
	if err != nil {
		return err
	}
	defer res.Body.Close()
	var page syncChange
	if err := json.NewDecoder(res.Body).Decode(&page); err != nil {
		return errDDLAway
	}
	if page.Resync {
		if !slices.Equal(page.Collections, []string{c.collection}) {
			return fmt.Errorf("a resync of %v is required of a client of %s", page.Collections, c.collection)
		}
		c.lost(page.Reason)
		return nil
	}
	c.store(page.Changes, page.LastSeq)
	return nil
}

// follow stays on the stream until it ends; what came after the last checkpoint is forgotten then.
func (c *ddlClient) follow(ctx context.Context) error {
	dialer := websocket.Dialer{HandshakeTimeout: 10 * time.Second}
	conn, res, err := dialer.DialContext(ctx, "ws"+strings.TrimPrefix(c.base, "http")+"/sync/stream", http.Header{"Authorization": {"Bearer " + c.token}})
	if res != nil && res.Body != nil {
		res.Body.Close()
	}
	if err != nil {
		return errDDLAway
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() }) // ends the read
	defer stop()
	subscribe, _ := json.Marshal(map[string]any{"type": "subscribe", "since": c.snapshot().cursor, "collections": []string{c.collection}}) // texts
	if err := conn.WriteMessage(websocket.TextMessage, subscribe); err != nil {
		return errDDLAway
	}
	var staged []syncChange
	for {
		_, text, err := conn.ReadMessage()
		if err != nil {
			return errDDLAway
		}
		var f syncChange
		if err := json.Unmarshal(text, &f); err != nil {
			return err
		}
		switch f.Type {
		case "":
			staged = append(staged, f)
		case "checkpoint", "ready", "heartbeat":
			c.store(staged, f.LastSeq)
			staged = nil
		case "full_resync_required":
			c.lost(f.Reason)
			return nil
		case "goodbye":
			return errDDLAway
		case "error":
			c.note("stream: %s", bytes.TrimSpace(text))
			return c.refusal(f.Code, string(text))
		default:
			return fmt.Errorf("unknown frame %s", text)
		}
	}
}

// differs says where the documents held differ from those wanted. A nullable column that was added later may be absent,
// which means null.
func differs(have, want map[string]string) error {
	for id, doc := range want {
		if got, ok := have[id]; !ok {
			return fmt.Errorf("%s is missing (%d of %d are there)", id, len(have), len(want))
		} else if !sameButNulls(got, doc) {
			return fmt.Errorf("%s is %s, want %s", id, got, doc)
		}
	}
	for id, doc := range have {
		if _, ok := want[id]; !ok {
			return fmt.Errorf("%s is there but should not be: %s", id, doc)
		}
	}
	return nil
}

func sameButNulls(got, want string) bool {
	g := members([]byte(got))
	for _, m := range members([]byte(want)) {
		if len(g) > 0 && g[0].name == m.name && bytes.Equal(g[0].value, m.value) {
			g = g[1:]
		} else if string(m.value) != "null" {
			return false
		}
	}
	return len(g) == 0
}

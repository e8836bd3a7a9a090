package gateway

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/gofiber/fiber/v2"
	"github.com/walgate/walgate/changelog"
)

const (
	fullDefault = 1000
	fullMost    = 10_000
	// fullAdmission is how long a request waits for its turn before it is sent away: a page's turn comes in milliseconds.
	fullAdmission = 2 * time.Second
)

// fullCursor is what X-Sync-Cursor holds. It grants nothing: the policy is applied anew on every page.
type fullCursor struct {
	Last        changelog.Version   `json:"l"` // L: where pulling goes on
	History     string              `json:"h"`
	Floors      []changelog.Version `json:"f"` // of the collections when the resync began
	ScopeHash   string              `json:"s"`
	Collections []string            `json:"c"`
	Index       int                 `json:"i"` // of the collection being read
	Key         []string            `json:"k"` // the last key sent of it
	Merge       bool                `json:"m,omitempty"`
	Tombstones  changelog.Version   `json:"t,omitempty"` // read up to here; at Last all are sent
}

func (c *fullCursor) String() string {
	b, _ := json.Marshal(c) // numbers and strings
	return base64.RawURLEncoding.EncodeToString(b)
}

func parseFullCursor(text string) (*fullCursor, error) {
	b, err := base64.RawURLEncoding.DecodeString(text)
	c := &fullCursor{}
	if err == nil {
		err = json.Unmarshal(b, c)
	}
	if err != nil || len(c.Floors) != len(c.Collections) || c.Index < 0 || c.Index > len(c.Collections) || len(c.Collections) == 0 {
		return nil, &Problem{Code: InvalidCursor, Detail: "send X-Sync-Cursor as it was received", Errors: []FieldError{{"cursor", "unreadable"}}}
	}
	return c, nil
}

type fullRequest struct {
	collections []string
	cursor      *fullCursor
	limit       int // 0: all
	since       *changelog.Cursor
}

func parseFull(c *fiber.Ctx) (r fullRequest, err error) {
	if err := knownParameters(c, "collections", "cursor", "limit", "since", "client_id"); err != nil {
		return r, err
	}
	if c.Query("limit") != "all" {
		if r.limit, err = intParameter(c, "limit", fullDefault, 1, fullMost); err != nil {
			return r, err
		}
	}
	if text := c.Query("since"); text != "" {
		since, err := changelog.ParseCursor(text)
		if err != nil {
			return r, &Problem{Code: InvalidSince, Detail: "since is " + err.Error(), Errors: []FieldError{{"since", err.Error()}}}
		}
		r.since = &since
	}
	r.collections = listParameter(c, "collections")
	if text := c.Query("cursor"); text != "" {
		if r.limit == 0 {
			return r, &Problem{Code: InvalidRequest, Detail: "cursor and limit=all exclude each other", Errors: []FieldError{{"limit", "all with a cursor"}}}
		}
		if r.cursor, err = parseFullCursor(strings.Clone(text)); err != nil {
			return r, err
		}
		if len(r.collections) == 0 {
			r.collections = r.cursor.Collections
		}
	}
	return r, nil
}

// full answers GET /sync/full.
func (g *Gateway) full(c *fiber.Ctx) error {
	g.metrics.fulls.Inc()
	r, err := parseFull(c)
	if err != nil {
		return err
	}
	feed, err := g.feedFor(identityOf(c), r.collections)
	if err != nil {
		return err
	}
	if stopped := g.o.SourceStatus().Stopped; len(r.collections) == 0 && len(stopped) > 0 { // "replace" would drop its documents
		return NewProblem(CollectionUnavailable, "a collection is stopped (%s): name the others in collections", strings.Join(slices.Sorted(maps.Keys(stopped)), ", "))
	}
	if len(feed.collections) == 0 {
		return &Problem{Code: Forbidden, Detail: "the token's roles may read no collection"}
	}
	waiting, stopWaiting := context.WithTimeout(g.serving, fullAdmission)
	err = g.fulls.Acquire(waiting, 1)
	stopWaiting()
	if err != nil { // after a new history everybody comes at once
		return &Problem{Code: RateLimited, Detail: "as many full resyncs are running as this instance allows", RetryAfter: time.Second + rand.N(9*time.Second)}
	}
	release := func() { g.fulls.Release(1) }
	enc := chooseEncoding(c.Get(fiber.HeaderAcceptEncoding))
	if r.limit == 0 {
		return g.fullAll(c, feed, r, enc, release)
	}
	defer release()
	ctx, cancel := context.WithTimeout(g.working, g.limits.chunk)
	defer cancel()
	return g.fullPage(ctx, c, feed, r, enc)
}

// fullPage answers one page.
func (g *Gateway) fullPage(ctx context.Context, c *fiber.Ctx, f *feed, r fullRequest, enc encoding) error {
	x := &export{g: g, feed: f, cur: r.cursor, rows: r.limit, bytes: g.limits.page}
	if err := x.begin(ctx, r.since); err != nil {
		return err
	}
	if err := x.fill(ctx); err != nil {
		return err
	}
	settles, err := x.settle(ctx)
	if err != nil {
		return err
	}
	x.headers(c)
	if settles != 0 {
		c.Set("X-Sync-Settles", f.cursor(settles, x.cur.History))
	}
	if !x.done() {
		c.Set("X-Sync-Cursor", x.cur.String())
	}
	body, err := enc.compress(x.buf)
	if err != nil {
		return err
	}
	enc.header(c)
	room, err := g.memory.acquire(ctx, len(body)) // while the resync's place is held: what waits is bounded by the places
	if err != nil {
		return err
	}
	sendHeld(c, body, room)
	return nil
}

// headers sets what is the same on every page.
func (x *export) headers(c *fiber.Ctx) {
	c.Set(fiber.HeaderContentType, "application/x-ndjson")
	c.Set(fiber.HeaderCacheControl, "no-store")
	c.Set("X-Accel-Buffering", "no")
	c.Set("X-Sync-LastSeq", x.feed.cursor(x.cur.Last, x.cur.History))
	mode := "replace"
	if x.cur.Merge {
		mode = "merge"
	}
	c.Set("X-Sync-Mode", mode)
}

// resume checks that a cursor's resync can go on: nothing that it rests on may have changed.
func (x *export) resume(ctx context.Context) error {
	h, err := x.g.o.Log.Head(ctx)
	if err != nil {
		return x.g.logProblem(err)
	}
	if err := x.feed.usable(h); err != nil {
		return err
	}
	c := x.cur
	same := c.History == h.History && c.ScopeHash == x.feed.caller.ScopeHash && h.Issued(c.Last) && strings.Join(c.Collections, ",") == strings.Join(x.feed.names(), ",")
	for i, name := range c.Collections {
		st := stateOf(h, name)
		same = same && st != nil && st.Floor == c.Floors[i]
	}
	if !same {
		return &Problem{Code: CursorExpired, Detail: "the log, the policy, the collections asked for or the caller's scopes changed since the first page"}
	}
	return nil
}

// errRetry: another snapshot may do.
var errRetry = errors.New("the snapshot is no prefix of the commit order, or older than the log's beginning")

package gateway

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/gofiber/fiber/v2"

	"github.com/walgate/walgate/changelog"
)

const (
	pullDefault = 500
	pullMost    = 1000
	waitMost    = 25 * time.Second
	readMost    = 30 * time.Second // the longest read of the log: retention waits far longer before it drops anything
)

// pullRequest is the query of GET /sync/pull.
type pullRequest struct {
	since        changelog.Cursor
	until        changelog.Version
	untilHistory string // empty: not said
	collections  []string
	limit        int
	wait         time.Duration
	client       client // whose marks are wanted
}

func parsePull(c *fiber.Ctx) (r pullRequest, err error) {
	if err := knownParameters(c, "since", "until", "collections", "limit", "wait", "client_id"); err != nil {
		return r, err
	}
	if r.since, err = changelog.ParseCursor(c.Query("since", "-")); err != nil {
		return r, &Problem{Code: InvalidSince, Detail: "since is " + err.Error(), Errors: []FieldError{{"since", err.Error()}}}
	}
	if text := c.Query("until"); text != "" {
		until, err := changelog.ParseCursor(text)
		if err != nil {
			return r, &Problem{Code: InvalidSince, Detail: "until is " + err.Error(), Errors: []FieldError{{"until", err.Error()}}}
		}
		r.untilHistory = until.History // judged after since, which may be what is out of date
		// A resync's position may lie below an older one (its snapshot missed a commit that was logged already): nothing lies
		// between them, so the page is empty.
		r.until = max(until.Version, r.since.Version, 1) // 0 would mean the newest
	}
	if r.limit, err = intParameter(c, "limit", pullDefault, 1, pullMost); err != nil {
		return r, err
	}
	if r.client.id, err = clientParameter(c); err != nil {
		return r, err
	}
	r.collections = listParameter(c, "collections")
	r.wait, err = waitParameter(c)
	return r, err
}

// waitParameter reads wait, in seconds ("25") or as a duration ("25s").
func waitParameter(c *fiber.Ctx) (time.Duration, error) {
	text := c.Query("wait", "0")
	if isNumber(text) {
		text += "s"
	}
	d, err := time.ParseDuration(text)
	if err != nil || d < 0 || d > waitMost {
		detail := fmt.Sprintf("wait must be from 0s to %s", waitMost)
		return 0, &Problem{Code: InvalidRequest, Detail: detail, Errors: []FieldError{{"wait", detail}}}
	}
	return d, nil
}

func isNumber(s string) bool {
	_, err := strconv.ParseUint(s, 10, 32)
	return err == nil
}

func intParameter(c *fiber.Ctx, name string, otherwise, least, most int) (int, error) {
	text := c.Query(name)
	if text == "" {
		return otherwise, nil
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < least || n > most {
		detail := fmt.Sprintf("%s must be a whole number from %d to %d", name, least, most)
		code := InvalidRequest
		if name == "limit" {
			code = InvalidLimit
		}
		return 0, &Problem{Code: code, Detail: detail, Errors: []FieldError{{name, detail}}}
	}
	return n, nil
}

// listParameter splits a comma list; the strings are copies, for the framework reuses the request's memory.
func listParameter(c *fiber.Ctx, name string) []string {
	var out []string
	for part := range strings.SplitSeq(c.Query(name), ",") {
		if part = strings.TrimSpace(part); part != "" {
			out = append(out, strings.Clone(part))
		}
	}
	return out
}

// knownParameters refuses what would be ignored: a misspelt limit must not become "no limit".
func knownParameters(c *fiber.Ctx, known ...string) error {
	var wrong []FieldError
	c.Context().QueryArgs().VisitAll(func(key, _ []byte) {
		if name := string(key); !slices.Contains(known, name) {
			wrong = append(wrong, FieldError{name, "unknown parameter"})
		}
	})
	if len(wrong) > 0 {
		return &Problem{Code: InvalidRequest, Detail: "unknown query parameters; known are " + strings.Join(known, ", "), Errors: wrong}
	}
	return nil
}

// pull answers GET /sync/pull.
func (g *Gateway) pull(c *fiber.Ctx) error {
	g.metrics.pulls.Inc()
	if isSessionPull(c) {
		return g.pullSession(c)
	}
	r, err := parsePull(c)
	if err != nil {
		return err
	}
	id := identityOf(c)
	r.client.subject = id.Subject
	feed, err := g.feedFor(id, r.collections)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(g.working, r.wait+readMost)
	defer cancel()
	body, n, room, err := g.pullPage(ctx, feed, r)
	if err != nil {
		return err
	}
	g.metrics.pullChanges.Add(float64(n))
	c.Set(fiber.HeaderContentType, fiber.MIMEApplicationJSON)
	c.Set(fiber.HeaderCacheControl, "no-store")
	sendHeld(c, body, room)
	return nil
}

// pullPage reads one page; with wait it reads again when something may have come. room is what the body holds.
func (g *Gateway) pullPage(ctx context.Context, f *feed, r pullRequest) (body []byte, changes int, room *lease, err error) {
	deadline := time.Now().Add(r.wait)
	since := r.since
	for {
		p, room, err := g.readPage(ctx, changelog.Request{Scopes: f.scopes, Since: since.Version, Until: r.until, Limit: r.limit, MaxBytes: g.limits.page,
			Subject: r.client.subject, ClientID: r.client.id})
		if err != nil {
			return nil, 0, nil, err
		}
		if err := f.usable(&p.Head); err != nil {
			room.release()
			return nil, 0, nil, err
		}
		if rs := f.check(r.since, &p.Head); rs != nil {
			g.metrics.resyncs.Inc()
			names, _ := json.Marshal(rs.Collections) // strings
			return fmt.Appendf(nil, `{"full_resync_required":true,"collections":%s,"reason":%q}`, names, rs.Reason), 0, room, nil
		}
		if r.untilHistory != "" && r.untilHistory != p.Head.History {
			room.release()
			return nil, 0, nil, &Problem{Code: InvalidSince, Detail: "until is of another history than since", Errors: []FieldError{{"until", "of another history than since"}}}
		}
		list := lastStates(f.judgePage(p, g.policyFailed))
		if len(list) > 0 || p.More || r.until != 0 {
			return appendPage(f, p, list, f.cursor(p.Last, p.Head.History)), len(list), room, nil
		}
		room.release() // while it waits it holds nothing
		if !g.waitForChange(ctx, f, p.Last, deadline) {
			return appendPage(f, p, list, f.cursor(p.Last, p.Head.History)), 0, nil, nil
		}
		since.Version = p.Last // what lies before is nothing that the caller may see
	}
}

// waitForChange waits until something for the feed may have come after v; false: time is up, or the server stops.
func (g *Gateway) waitForChange(ctx context.Context, f *feed, v changelog.Version, deadline time.Time) bool {
	if !time.Now().Before(deadline) {
		return false
	}
	s := newSubscriber(f, 0)
	if g.hub.awaitStart(ctx) != nil {
		return false
	}
	from := g.hub.join(s, v)
	defer g.hub.leave(s)
	if from > v {
		return true
	}
	timer := time.NewTimer(time.Until(deadline))
	defer timer.Stop()
	select {
	case <-s.bell:
		return true
	case <-timer.C:
	case <-ctx.Done():
	case <-g.serving.Done(): // the client asks the next instance
	}
	return false
}

// appendPage writes the answer of a pull; last is its last_seq.
func appendPage(f *feed, p *changelog.Page, list []change, last string) []byte {
	size := 256
	for i := range list {
		size += len(list[i].entry.Data) + len(list[i].entry.DocID) + 200
	}
	b := make([]byte, 0, size)
	b = append(b, `{"changes":[`...)
	for i, c := range list {
		if i > 0 {
			b = append(b, ',')
		}
		b = appendChange(b, c.collection, c.entry, c.op, p.Head.History, c.own)
	}
	b = append(b, `],"last_seq":"`...)
	b = append(b, last...)
	b = append(b, `","seq":`...)
	b = strconv.AppendInt(b, int64(p.Last), 10)
	b = append(b, `,"has_more":`...)
	b = strconv.AppendBool(b, p.More)
	if p.Partial {
		b = append(b, `,"partial":true`...)
	}
	return append(b, '}')
}

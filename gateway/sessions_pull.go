package gateway

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/gofiber/fiber/v2"

	"github.com/walgate/walgate/changelog"
)

// sessionPlace is where a session's pull goes on.
type sessionPlace struct {
	at  changelog.Cursor
	own changelog.Version // not 0: the window is behind it, and of the device's own rows those up to here
}

// parsePlace reads a since of a session's pull: any since, or the last_seq of a page of own rows, which is max_checkin's with
// a further part. So nobody takes it for a place in the log: what others wrote between the own rows was not handed out.
func parsePlace(text string) (p sessionPlace, err error) {
	at, own, isOwn := strings.Cut(text, ownMark)
	if p.at, err = changelog.ParseCursor(at); err != nil || !isOwn {
		return p, err
	}
	further, err := changelog.ParseCursor(own)
	if err != nil || further.History != "" || further.Version < p.at.Version || p.at.ScopeHash == "" {
		return p, changelog.ErrCursor
	}
	p.own = further.Version
	return p, nil
}

const ownMark = "~"

// isSessionPull says whether a pull is of a session.
func isSessionPull(c *fiber.Ctx) bool { return c.Context().QueryArgs().Has("session") }

// pullSession answers GET /sync/pull?session=: pages of the window, then pages of the device's own rows above it.
func (g *Gateway) pullSession(c *fiber.Ctx) error {
	if err := knownParameters(c, "session", "since", "collections", "limit"); err != nil {
		return err
	}
	limit, err := intParameter(c, "limit", pullDefault, 1, pullMost)
	if err != nil {
		return err
	}
	var from *sessionPlace
	if text := c.Query("since"); text != "" {
		place, err := parsePlace(strings.Clone(text))
		if err != nil {
			return &Problem{Code: InvalidSince, Detail: "since is " + err.Error(), Errors: []FieldError{{"since", err.Error()}}}
		}
		from = &place
	}
	id := identityOf(c)
	f, err := g.feedFor(id, listParameter(c, "collections"))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(g.working, readMost)
	defer cancel()
	s, err := g.loadSession(ctx, strings.Clone(c.Query("session")), id.Subject)
	if err != nil {
		return err
	}
	body, n, room, err := g.sessionPage(ctx, f, s, from, limit)
	if err != nil {
		return err
	}
	g.metrics.pullChanges.Add(float64(n))
	c.Set(fiber.HeaderContentType, fiber.MIMEApplicationJSON)
	c.Set(fiber.HeaderCacheControl, "no-store")
	sendHeld(c, body, room)
	return nil
}

// sessionPage reads the page that follows from, or the session's first.
func (g *Gateway) sessionPage(ctx context.Context, f *feed, s *syncSession, from *sessionPlace, limit int) (body []byte, changes int, room *lease, err error) {
	place := sessionPlace{at: s.lastSync}
	if from != nil {
		place = *from
	}
	r := &sessionReader{g: g, feed: f, session: s, place: place, limit: limit}
	if from == nil && s.lastSync.History == "" {
		body, err = r.first(ctx)
		return body, 0, nil, err
	}
	if place.at.Version < s.checkin.Version { // also where a page of own rows was of an earlier session
		r.place.own = 0
		return r.window(ctx)
	}
	return r.own(ctx)
}

// first answers a device that has nothing yet.
func (r *sessionReader) first(ctx context.Context) ([]byte, error) {
	h, err := r.g.o.Log.Head(ctx)
	if err != nil {
		return nil, r.g.logProblem(err)
	}
	if err := r.session.usable(h); err != nil {
		return nil, err
	}
	if err := r.feed.usable(h); err != nil {
		return nil, err
	}
	if len(r.feed.collections) == 0 { // there is nothing that it could be told to read
		return appendPage(r.feed, &changelog.Page{Last: r.session.checkin.Version}, nil, r.end().String()), nil
	}
	return r.resync(reasonFirst), nil
}

// end is max_checkin as a position of the caller.
func (r *sessionReader) end() changelog.Cursor {
	return changelog.Cursor{Version: r.session.checkin.Version, History: r.session.checkin.History, ScopeHash: r.feed.caller.ScopeHash}
}

// sessionReader reads one page of a session.
type sessionReader struct {
	g       *Gateway
	feed    *feed
	session *syncSession
	place   sessionPlace
	limit   int
}

// resync names all collections of the pull, whichever can't go on: the device goes on from the position of its full resync,
// and what the others had below that it would never be told.
func (r *sessionReader) resync(reason string) []byte {
	r.g.metrics.resyncs.Inc()
	names, _ := json.Marshal(r.feed.names()) // strings
	return fmt.Appendf(nil, `{"full_resync_required":true,"collections":%s,"reason":%q}`, names, reason)
}

// window reads on up to max_checkin.
func (r *sessionReader) window(ctx context.Context) ([]byte, int, *lease, error) {
	p, rs, room, err := r.read(ctx, r.place.at.Version, r.session.checkin.Version)
	if err != nil || rs != nil {
		return r.refused(rs, room), 0, nil, err
	}
	last := changelog.Cursor{Version: p.Last, History: p.Head.History, ScopeHash: r.feed.caller.ScopeHash}
	err = r.g.storePulled(ctx, r.session, last)
	further := last.String()
	if !p.More && err == nil {
		var newest changelog.Version
		if newest, err = r.newestOwn(ctx); newest > p.Last {
			p.More = true
			further = ownPlace(last, p.Last)
		}
	}
	if err != nil {
		room.release()
		return nil, 0, nil, err
	}
	list := lastStates(r.feed.judgePage(p, r.g.policyFailed))
	return appendPage(r.feed, p, list, further), len(list), room, nil
}

// own reads the device's own rows above max_checkin: everything that its pushes wrote and the caller may see. What others
// wrote between them is passed over; it lies in the next session's window.
func (r *sessionReader) own(ctx context.Context) ([]byte, int, *lease, error) {
	end, from := r.end(), r.place.own
	if from == 0 {
		// A pull from behind the window, after a full resync, gets them all the same: their marks aren't in a full. What the
		// device has confirmed, which is more than the window where two sessions were opened at once, doesn't come again.
		from = max(end.Version, r.session.lastSync.Version)
	}
	newest, err := r.newestOwn(ctx)
	if err != nil {
		return nil, 0, nil, err
	}
	for {
		p, rs, room, err := r.read(ctx, from, max(newest, from))
		if err != nil || rs != nil {
			return r.refused(rs, room), 0, nil, err
		}
		if err := r.g.storePulled(ctx, r.session, end); err != nil {
			room.release()
			return nil, 0, nil, err
		}
		mine := func(tx changelog.Version) bool {
			_, found := slices.BinarySearchFunc(p.Pushes, tx, func(m changelog.Pushed, tx changelog.Version) int { return cmp.Compare(m.Tx, tx) })
			return found
		}
		p.Partial = p.Partial && mine(p.Entries[len(p.Entries)-1].Tx)
		p.Entries = slices.DeleteFunc(p.Entries, func(e changelog.Entry) bool { return !mine(e.Tx) })
		list := lastStates(r.feed.judgePage(p, r.g.policyFailed))
		if p.More && len(list) == 0 {
			room.release()
			from = p.Last
			continue
		}
		further := end.String()
		if p.More {
			further = ownPlace(end, p.Last)
		}
		p.Last = end.Version
		return appendPage(r.feed, p, list, further), len(list), room, nil
	}
}

// read reads a page of the log and checks that the caller may go on with it.
func (r *sessionReader) read(ctx context.Context, since, until changelog.Version) (*changelog.Page, *resync, *lease, error) {
	p, room, err := r.g.readPage(ctx, changelog.Request{Scopes: r.feed.scopes, Since: since, Until: until, Limit: r.limit,
		MaxBytes: r.g.limits.page, Subject: r.session.subject, ClientID: r.session.device})
	if err != nil {
		return nil, nil, nil, err
	}
	if err := r.feed.usable(&p.Head); err != nil {
		return nil, nil, room, err
	}
	if err := r.session.usable(&p.Head); err != nil {
		return nil, nil, room, err
	}
	return p, r.feed.check(r.place.at, &p.Head), room, nil
}

// refused gives back what a page that isn't sent would have needed.
func (r *sessionReader) refused(rs *resync, room *lease) []byte {
	room.release()
	if rs == nil {
		return nil
	}
	return r.resync(rs.Reason)
}

// newestOwn returns the newest version that the device's pushes hold. Everything that was committed before counts.
func (r *sessionReader) newestOwn(ctx context.Context) (changelog.Version, error) {
	if r.place.own == 0 { // a later page needs no later pushes
		if err := r.g.passFence(ctx); err != nil {
			return 0, err
		}
	}
	newest, err := r.g.o.Log.NewestPush(ctx, r.session.subject, r.session.device, math.MaxInt64)
	if err != nil || newest == nil {
		return 0, r.g.logProblem(err)
	}
	return newest.Last, nil
}

// ownPlace is the last_seq of a page that own rows follow.
func ownPlace(at changelog.Cursor, own changelog.Version) string {
	return at.String() + ownMark + strconv.FormatInt(int64(own), 10)
}

package gateway

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/gofiber/fiber/v2"

	"github.com/walgate/walgate/changelog"
)

// A server-side session is for clients that keep no cursor: the server remembers how far a device has come. Opening it
// fixes a window, from what the device has confirmed (last_sync) to where the log stands (max_checkin); pulls hand out the
// window and then what the device itself has pushed since; completing it moves last_sync, never past the window's end. So
// what others commit while the session runs lies in the next window, and what the device pushed comes again there.

const (
	// sessionMost bounds the opening or completion of a session.
	sessionMost = 10 * time.Second
	// sessionBody bounds the bodies of both.
	sessionBody = 8 << 10
)

// syncSession is a device's present session. A cursor without a history is none.
type syncSession struct {
	id       string // sync_uuid
	subject  string
	device   string
	lastSync changelog.Cursor // everything up to here is the device's
	checkin  changelog.Cursor // max_checkin
	pulled   changelog.Cursor // how far the session's pulls have handed out
}

// openSession answers POST /sync/sessions. Each opening makes a session of its own, which takes the place of the device's
// last one: a repeated opening does no harm, and who holds the last one's sync_uuid finds it gone.
func (g *Gateway) openSession(c *fiber.Ctx) error {
	var device string
	err := readMember(c, "device_uuid", func(value json.RawMessage) string {
		if value[0] != '"' || json.Unmarshal(value, &device) != nil {
			return "must be a text that names the device"
		}
		if device == "" {
			return "must not be empty"
		}
		return clientFault(device)
	})
	if err != nil {
		return err
	}
	id := identityOf(c)
	f, err := g.feedFor(id, nil)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(g.working, sessionMost)
	defer cancel()
	h, err := g.o.Log.Head(ctx)
	if err != nil {
		return g.logProblem(err)
	}
	s := &syncSession{subject: id.Subject, device: device, checkin: changelog.Cursor{Version: h.Version, History: h.History, ScopeHash: f.caller.ScopeHash}}
	if err := g.storeOpened(ctx, s); err != nil {
		return err
	}
	return s.answer(c)
}

// completeSession answers POST /sync/sessions/{sync_uuid}/complete.
func (g *Gateway) completeSession(c *fiber.Ctx) error {
	var upTo changelog.Cursor
	err := readMember(c, "last_update", func(value json.RawMessage) (why string) {
		upTo, why = parseLastUpdate(value)
		return why
	})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(g.working, sessionMost)
	defer cancel()
	h, err := g.o.Log.Head(ctx)
	if err != nil {
		return g.logProblem(err)
	}
	s, err := g.storeCompleted(ctx, strings.Clone(c.Params("sync_uuid")), identityOf(c).Subject, func(s *syncSession) error {
		if err := s.usable(h); err != nil {
			return err
		}
		s.lastSync, err = s.completed(upTo, h)
		return err
	})
	if err != nil {
		return err
	}
	if err := g.confirmLocalIDs(ctx, s); err != nil {
		return err
	}
	return s.answer(c)
}

// parseLastUpdate reads last_update: a position such as last_seq, a row's version, or its seq.
func parseLastUpdate(value json.RawMessage) (upTo changelog.Cursor, why string) {
	const want = "must be the last_seq of the last page applied, or the version of the newest row received"
	text := string(value)
	if strings.HasPrefix(text, `"`) && json.Unmarshal(value, &text) != nil {
		return upTo, want
	}
	place, err := parsePlace(text)
	if err != nil {
		return upTo, want
	}
	return place.at, ""
}

// usable says whether the session can go on with the log as it is now.
func (s *syncSession) usable(h *changelog.Head) error {
	if s.checkin.History != h.History || !h.Issued(s.checkin.Version) {
		return NewProblem(SessionExpired, "the change log began anew since the session was opened")
	}
	return nil
}

// completed returns the session's new last_sync for a last_update. It never lies beyond max_checkin, for what others
// committed behind it was not handed out, and never before the last one. A position, such as last_seq, says that the device
// has everything up to it. The version of a row says so only as far as the session's pulls have come: the device may know it
// from a push.
func (s *syncSession) completed(upTo changelog.Cursor, h *changelog.Head) (changelog.Cursor, error) {
	if upTo.History != "" && upTo.History != h.History {
		return upTo, invalidLastUpdate("is of another history: the change log began anew since")
	}
	if !h.Issued(upTo.Version) {
		return upTo, invalidLastUpdate("is a version that the change log has not issued")
	}
	to := changelog.Cursor{Version: min(upTo.Version, s.checkin.Version), History: h.History, ScopeHash: upTo.ScopeHash}
	if to.ScopeHash == "" {
		if s.pulled.History == "" {
			return s.lastSync, nil
		}
		to.Version, to.ScopeHash = min(to.Version, s.pulled.Version), s.pulled.ScopeHash
	}
	if behind(to, s.lastSync) {
		return s.lastSync, nil
	}
	return to, nil
}

// behind says whether a position comes before another one that it can be compared with.
func behind(a, b changelog.Cursor) bool {
	return a.History == b.History && a.ScopeHash == b.ScopeHash && a.Version < b.Version
}

func invalidLastUpdate(why string) *Problem {
	return &Problem{Code: InvalidLastUpdate, Detail: "last_update " + why, Errors: []FieldError{{"last_update", why}}}
}

// answer sends the session as its device sees it.
func (s *syncSession) answer(c *fiber.Ctx) error {
	last := "null"
	if s.lastSync.History != "" {
		last = strconv.Quote(s.lastSync.String())
	}
	c.Set(fiber.HeaderContentType, fiber.MIMEApplicationJSON)
	c.Set(fiber.HeaderCacheControl, "no-store")
	return c.SendString(`{"sync_uuid":"` + s.id + `","last_sync":` + last + `,"max_checkin":"` + s.checkin.String() + `"}`)
}

// readMember reads a body that is an object with this one member, which read takes; it returns what is wrong with it, or
// nothing.
func readMember(c *fiber.Ctx, name string, read func(json.RawMessage) string) error {
	body, err := readSmallBody(c)
	if err != nil {
		return err
	}
	faults, err := parseMember(body, name, read)
	switch {
	case err != nil:
		return &Problem{Code: InvalidRequest, Detail: "the body is no JSON object", Errors: []FieldError{{"", jsonFault(err)}}}
	case len(faults) > 0:
		return &Problem{Code: InvalidRequest, Detail: "the body must be an object with the member " + name, Errors: faults}
	}
	return nil
}

func parseMember(body []byte, name string, read func(json.RawMessage) string) (faults []FieldError, err error) {
	d := json.NewDecoder(bytes.NewReader(body))
	if !utf8.Valid(body) {
		return nil, errors.New("not UTF-8")
	}
	if open, err := d.Token(); err != nil || open != json.Delim('{') {
		return nil, errors.Join(err, errors.New("no object"))
	}
	found := false
	for d.More() {
		key, err := d.Token()
		var value json.RawMessage
		if err == nil {
			err = d.Decode(&value)
		}
		if err != nil {
			return nil, err
		}
		switch {
		case key != name:
			faults = append(faults, FieldError{key.(string), "unknown member; " + name + " is the only one"})
		case found:
			faults = append(faults, FieldError{name, "the member is there twice"})
		default:
			found = true
			if why := read(value); why != "" {
				faults = append(faults, FieldError{name, why})
			}
		}
	}
	if _, err := d.Token(); err != nil {
		return nil, err
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("something follows the object")
	}
	if !found {
		faults = append(faults, FieldError{name, "is missing"})
	}
	return faults, nil
}

// readSmallBody reads a body of at most sessionBody bytes. The framework's own limit doesn't hold for streamed bodies.
func readSmallBody(c *fiber.Ctx) ([]byte, error) {
	stream := c.Context().RequestBodyStream()
	if stream == nil {
		return nil, nil
	}
	body, err := io.ReadAll(io.LimitReader(stream, sessionBody+1))
	if err == nil && len(body) <= sessionBody {
		c.Locals(bodyReadKey{}, true)
		return body, nil
	}
	c.Context().SetConnectionClose() // the rest isn't read
	if err != nil {
		return nil, (&Problem{Code: InvalidRequest, Detail: "the body ended too early"}).Because(err)
	}
	return nil, NewProblem(RequestTooLarge, "the body is larger than %d bytes", sessionBody)
}

package gateway

import (
	"context"
	"math/rand/v2"
	"time"

	"github.com/gofiber/fiber/v2"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/policies"
)

const (
	pushMost      = time.Minute      // the longest push, but for its echo
	pushAdmission = 10 * time.Second // how long a push waits for its turn
	pushesWaiting = 1000             // pushes that wait for their turn, at most
	bodiesMemory  = 8                // bodies of the largest size that may be held at a time
	rowsMemory    = 8                // times the largest body that the rows which one push is about may take
)

// push is one request on its way into the source.
type push struct {
	g       *Gateway
	set     *policies.Set
	head    changelog.Head // where the hub stands, for the collections' ids
	caller  *policies.Caller
	claims  string // of its token, as JSON
	r       *pushRequest
	plans   *pushPlans
	changes []pending
	races   int // lost against inserts of the same key

	// What the transaction came to.
	id        int64 // of its mark; 0: nothing was committed
	txid      int64
	visibleAt string // a version; empty: not known
}

// pending is one change with all that is known of it.
type pending struct {
	*pushChange
	plan   *pushPlan // nil: its collection isn't known, or not to be written by the caller
	hash   []byte    // where it has a change_id
	parent changelog.Version
	since  bool // parent is set and of this history

	// Of one attempt: with the keys that the source gave in place of local ids.
	key      []string // nil: the database assigns it
	values   []pushColumn
	believed []pushColumn
	resolved bool
	state    policies.RowState // of the locked row
	result   pushResult
}

// pushResult is the answer to one change.
type pushResult struct {
	docID     string
	status    policies.Status // empty: not decided yet
	policy    string
	columns   []string
	code      string
	detail    string
	written   bool // a row was: it has a version in the feed
	document  []byte
	version   string // of the document, or of what was written; empty: none, or not known
	duplicate bool
	first     int64 // of a duplicate, the push that it first came with
}

// answerPush answers POST /sync/push.
func (g *Gateway) answerPush(c *fiber.Ctx) error {
	began := time.Now()
	g.metrics.pushing.Inc()
	defer g.metrics.pushing.Dec()
	body, err := g.pushRequest(c)
	g.metrics.pushEnded(began, err)
	if err != nil {
		return err
	}
	c.Set(fiber.HeaderContentType, fiber.MIMEApplicationJSON)
	c.Set(fiber.HeaderCacheControl, "no-store")
	return c.Send(body)
}

// pushRequest does the work of answerPush.
func (g *Gateway) pushRequest(c *fiber.Ctx) (answer []byte, err error) {
	if err := knownParameters(c); err != nil {
		return nil, endingWith(c, err)
	}
	ctx, cancel := context.WithTimeout(g.working, pushMost)
	defer cancel()
	waiting, stopWaiting := context.WithTimeout(ctx, pushAdmission)
	body, room, err := g.readPushBody(waiting, c)
	stopWaiting()
	if err != nil {
		return nil, err
	}
	defer room.release()
	r, err := parsePush(body)
	if err != nil {
		return nil, err
	}
	p, err := g.newPush(identityOf(c), r)
	if err != nil {
		return nil, err
	}
	release, err := g.admitPush(ctx)
	if err != nil {
		return nil, err
	}
	echo, err := p.run(ctx)
	release()
	if err != nil {
		return nil, err
	}
	echo.await(g.working, p)
	g.metrics.pushResults(p)
	g.o.Logger.Debug("push", "request_id", requestID(c), "push", p.id, "changes", len(p.changes), "visible_at", p.visibleAt)
	return p.answer(), nil
}

// admitPush bounds how many pushes use the source at a time, and how many wait for that.
func (g *Gateway) admitPush(ctx context.Context) (release func(), err error) {
	full := &Problem{Code: RateLimited, Detail: "as many pushes are running and waiting as this instance allows", RetryAfter: pushRetryAfter()}
	if g.queued.Add(1) > pushesWaiting {
		g.queued.Add(-1)
		return nil, full
	}
	defer g.queued.Add(-1)
	waiting, cancel := context.WithTimeout(ctx, pushAdmission)
	defer cancel()
	if err := g.pushes.Acquire(waiting, 1); err != nil {
		return nil, full.Because(err)
	}
	return func() { g.pushes.Release(1) }, nil
}

// pushRetryAfter spreads those who were sent away.
func pushRetryAfter() time.Duration { return time.Second + rand.N(4*time.Second) }

package gateway

import (
	"context"
	"errors"
	"io"
	"mime"
	"net"
	"strings"

	"github.com/gofiber/fiber/v2"
)

// readPushBody reads the body once there is memory for it. The framework's own limits don't hold for streamed bodies.
func (g *Gateway) readPushBody(ctx context.Context, c *fiber.Ctx) ([]byte, *lease, error) {
	request := &c.Context().Request
	media, params, err := mime.ParseMediaType(c.Get(fiber.HeaderContentType))
	if charset := params["charset"]; err != nil || media != fiber.MIMEApplicationJSON || charset != "" && !strings.EqualFold(charset, "utf-8") {
		return nil, nil, endingWith(c, NewProblem(UnsupportedMediaType, "send the push as application/json"))
	}
	if e := c.Get(fiber.HeaderContentEncoding); e != "" && !strings.EqualFold(e, "identity") {
		return nil, nil, endingWith(c, NewProblem(UnsupportedMediaType, "send the push without a content encoding"))
	}
	most := g.o.PushBody
	size := request.Header.ContentLength()
	if size > most {
		discard(request.BodyStream())
		return nil, nil, endingWith(c, tooLarge(most))
	}
	if size < 0 { // chunked
		size = most
	}
	room, err := g.bodies.acquire(ctx, size)
	if err != nil {
		return nil, nil, endingWith(c, &Problem{Code: RateLimited, Detail: "as many pushes are being received as this instance has memory for", RetryAfter: pushRetryAfter()})
	}
	body, err := readAtMost(request.BodyStream(), request.Header.ContentLength(), most)
	if err == nil {
		room.shrink(len(body))
		c.Locals(bodyReadKey{}, true)
		return body, room, nil
	}
	room.release()
	var timeout net.Error
	switch {
	case errors.Is(err, errBodyTooLarge):
		discard(request.BodyStream())
		err = tooLarge(most)
	case errors.As(err, &timeout) && timeout.Timeout():
		err = (&Problem{Code: RequestTimeout}).Because(err)
	default:
		err = (&Problem{Code: InvalidRequest, Detail: "the body ended too early"}).Because(err)
	}
	return nil, nil, endingWith(c, err)
}

// discardMost is how much of a body that is too large is read nevertheless.
const discardMost = 64 << 20

// discard reads what a client is still sending: a connection that is closed before is reset, and its client may never see
// the answer.
func discard(r io.Reader) {
	if r != nil {
		_, _ = io.CopyN(io.Discard, r, discardMost) // the answer says what is wrong
	}
}

func tooLarge(most int) *Problem {
	return NewProblem(RequestTooLarge, "the body is larger than the %d bytes that a push may have (limits.push_body): send fewer changes at once", most)
}

// endingWith ends the connection after the answer: what is left of the body is not read.
func endingWith(c *fiber.Ctx, err error) error {
	c.Context().SetConnectionClose()
	return err
}

var errBodyTooLarge = errors.New("the body is too large")

func readAtMost(r io.Reader, size, most int) ([]byte, error) {
	if r == nil {
		return nil, nil
	}
	if size >= 0 {
		body := make([]byte, size)
		_, err := io.ReadFull(r, body)
		return body, err
	}
	body, err := io.ReadAll(io.LimitReader(r, int64(most)+1))
	if err == nil && len(body) > most {
		err = errBodyTooLarge
	}
	return body, err
}

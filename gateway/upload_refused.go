package gateway

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"strconv"
	"time"

	"github.com/gofiber/fiber/v2"
	"github.com/valyala/fasthttp"
)

// The framework answers Expect: 100-continue and reads the first 8 KB of a body before it calls a handler, and takes what a
// handler left of a body for the next request. So uploads are kept from it until their handler reads them, and what is left
// when a request was refused is read for a moment and never taken for anything else.

// heldLength and heldExpect are where holdBody keeps what it hides from the framework.
const heldLength, heldExpect = "X-Walgate-Held-Length", "X-Walgate-Held-Expect"

// holdBody hides from the framework that an upload has a body, until settleBody.
func holdBody(h *fasthttp.RequestHeader) (unchanged fasthttp.RequestConfig) {
	h.Del(heldLength)
	h.Del(heldExpect)
	method, uri := string(h.Method()), h.RequestURI()
	switch {
	case method == fasthttp.MethodPut && bytes.HasPrefix(uri, []byte("/attachments/")):
	case (method == fasthttp.MethodPost || method == fasthttp.MethodPatch) && bytes.HasPrefix(uri, []byte("/uploads")):
	default:
		return
	}
	length := h.ContentLength()
	if length == 0 || length < -1 {
		return
	}
	if bytes.EqualFold(h.Peek(fasthttp.HeaderExpect), []byte("100-continue")) {
		h.Del(fasthttp.HeaderExpect)
		h.Set(heldExpect, "1")
	}
	if length > 0 {
		h.Set(heldLength, strconv.Itoa(length))
		h.SetContentLength(-1)
	}
	return
}

const (
	leftMost   = 256 << 10       // of a refused body is read, to keep the connection
	lingerMost = 5 * time.Second // a connection is read after its answer, so that its client sees it
)

// bodyReadKey is of a local that tells that a handler has read its body to the end.
type bodyReadKey struct{}

// settleBody gives handlers the length of a held body, and sees to what they leave of it.
func (g *Gateway) settleBody(c *fiber.Ctx) error {
	request := &c.Context().Request
	if held := request.Header.Peek(heldLength); len(held) > 0 {
		length, err := strconv.Atoi(string(held))
		if err != nil {
			return err
		}
		request.Header.SetContentLength(length)
	}
	err := c.Next()
	if request.BodyStream() == nil || c.Context().Hijacked() || c.Response().Header.ConnectionClose() {
		return err
	}
	b, ok := c.Locals(uploadBodyKey{}).(*uploadBody)
	switch {
	case !ok && c.Locals(bodyReadKey{}) != nil:
	case !ok && request.Header.ContentLength() < 0: // nobody has read it: most handlers have no use for a body
		g.linger(c)
	case !ok:
		c.Context().Conn().SetReadDeadline(time.Now().Add(lingerMost))
		if n, readErr := io.CopyN(io.Discard, request.BodyStream(), leftMost); readErr != io.EOF || n == leftMost {
			g.linger(c)
		}
	default:
		if !b.whole && b.err == nil && !b.expected && b.length >= 0 && b.length-b.n <= leftMost {
			b.idle = lingerMost
			_, _ = io.Copy(io.Discard, b) // b knows whether it came to the end
		}
		if !b.whole {
			g.linger(c)
		}
	}
	return err
}

// linger has the answer sent at once and the connection closed, but not while the client is still sending: it would be reset,
// and its client might never see the answer.
func (g *Gateway) linger(c *fiber.Ctx) {
	request := c.Context()
	g.streams.Add(1)
	request.HijackSetNoResponse(true)
	request.Hijack(func(conn net.Conn) {
		defer g.streams.Done()
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(lingerMost))
		request.Response.Header.SetConnectionClose()
		w := bufio.NewWriter(conn)
		if request.Response.Write(w) != nil || w.Flush() != nil {
			return
		}
		if under, ok := conn.(interface{ UnsafeConn() net.Conn }); ok {
			if half, ok := under.UnsafeConn().(interface{ CloseWrite() error }); ok {
				_ = half.CloseWrite()
			}
		}
		_, _ = io.CopyN(io.Discard, conn, discardMost) // until the client has seen it
	})
}

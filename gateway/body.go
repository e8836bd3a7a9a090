package gateway

import (
	"bytes"
	"context"
	"io"
	"net"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/gofiber/fiber/v2"
)

const sendBytes = 64 << 10 // one write to a connection

// bodyWriter writes an answer of unknown length to the connection itself, in HTTP chunks: the framework's way copies each
// byte through a pipe and flushes every 4 KB.
type bodyWriter struct {
	conn    net.Conn
	chunked bool          // HTTP/1.1; before it, the connection's end is the body's
	stall   time.Duration // how long one write may stand still
	head    []byte        // what goes out before the next piece: headers, the chunk's size
	aborted atomic.Bool   // nothing more is to be sent
	ended   chan struct{} // closed once abort has done its work
}

// sendBody answers with the headers set so far and what write writes, and closes the connection; unless write returns nil,
// the client sees that the body is incomplete. write runs after the handler, until ctx ends at most, and is left out where
// only the headers were asked for; done runs in any case. Run waits for both.
func (g *Gateway) sendBody(ctx context.Context, c *fiber.Ctx, write func(io.Writer) error, done func()) {
	request := c.Context()
	if request.IsHead() {
		done()
		return
	}
	w := &bodyWriter{chunked: request.Request.Header.IsHTTP11(), stall: g.limits.fullWrite, ended: make(chan struct{})}
	header := &request.Response.Header
	header.SetConnectionClose()
	if header.SetContentLength(-2); w.chunked {
		header.SetContentLength(-1)
	}
	w.head = append(w.head, header.Header()...)
	g.streams.Add(1)
	request.HijackSetNoResponse(true)
	request.Hijack(func(conn net.Conn) {
		defer g.streams.Done()
		defer done()
		w.conn = conn
		stop := context.AfterFunc(ctx, w.abort)
		if write(w) == nil {
			w.finish()
		}
		if !stop() {
			<-w.ended
		}
		conn.Close()
	})
}

// abort ends the present write and all that follow.
func (w *bodyWriter) abort() {
	defer close(w.ended)
	w.aborted.Store(true) // before the deadline: send sets one and then looks
	w.conn.SetWriteDeadline(time.Unix(1, 0))
}

// Write sends p. Each piece has its own time limit: a slow client is served, one that stands still is cut off.
func (w *bodyWriter) Write(p []byte) (n int, err error) {
	for len(p) > 0 {
		piece := p[:min(len(p), sendBytes)]
		if !w.chunked {
			err = w.send(piece, nil)
		} else {
			w.head = append(strconv.AppendUint(w.head, uint64(len(piece)), 16), "\r\n"...)
			err = w.send(piece, crlf)
		}
		if err != nil {
			return n, err
		}
		n += len(piece)
		p = p[len(piece):]
	}
	return n, nil
}

var crlf = []byte("\r\n")

func (w *bodyWriter) send(piece, tail []byte) error {
	w.conn.SetWriteDeadline(time.Now().Add(w.stall))
	if w.aborted.Load() {
		return net.ErrClosed
	}
	buffers := net.Buffers{w.head, piece, tail}
	_, err := buffers.WriteTo(w.conn)
	w.head = w.head[:0]
	return err
}

// finish marks the body as complete.
func (w *bodyWriter) finish() {
	if w.chunked {
		w.head = append(w.head, "0\r\n\r\n"...)
	}
	w.send(nil, nil)
}

// sendHeld answers with body and releases its memory once it is written or given up.
func sendHeld(c *fiber.Ctx, body []byte, room *lease) {
	c.Context().SetBodyStream(&heldBody{bytes.NewReader(body), room}, len(body))
}

type heldBody struct {
	*bytes.Reader
	room *lease
}

// Close is called by the framework, whatever became of the answer.
func (b *heldBody) Close() error {
	b.room.release()
	return nil
}

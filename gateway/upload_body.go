package gateway

import (
	"errors"
	"io"
	"net"
	"sync/atomic"
	"time"

	"github.com/gofiber/fiber/v2"
)

// uploadIdle is how long the body of an upload may stand still.
const uploadIdle = 30 * time.Second

// uploadBody is the body of an upload, as long as it may be: it may take any time, but not stand still. Read is for one
// goroutine; interrupt may be called from any.
type uploadBody struct {
	r           io.Reader
	conn        net.Conn
	length      int64 // -1: not said
	expected    bool  // the client waits to be told that it may send
	idle        time.Duration
	interrupted atomic.Bool
	n           int64        // bytes read
	came        atomic.Int64 // the same, for others
	whole       bool         // nothing of it is left on the connection
	err         error        // why it ended, if not as its client meant it
}

// errInterrupted ends a body that is not wanted any more.
var errInterrupted = errors.New("the reading of the body was interrupted")

type uploadBodyKey struct{}

// uploadBody returns the request's body, always the same. The framework's time limit, which is one for the whole request,
// ends with the first read; a client that waits for 100 Continue is told then.
func (g *Gateway) uploadBody(c *fiber.Ctx) *uploadBody {
	if b, ok := c.Locals(uploadBodyKey{}).(*uploadBody); ok {
		return b
	}
	request := &c.Context().Request
	b := &uploadBody{r: request.BodyStream(), conn: c.Context().Conn(), length: int64(request.Header.ContentLength()),
		expected: len(request.Header.Peek(heldExpect)) > 0, idle: g.limits.idle}
	b.whole = b.r == nil || b.length == 0
	c.Locals(uploadBodyKey{}, b)
	return b
}

// Read returns io.EOF only where the client has sent all; a connection that ended before is io.ErrUnexpectedEOF.
func (b *uploadBody) Read(p []byte) (n int, err error) {
	switch {
	case b.err != nil:
		return 0, b.err
	case b.whole:
		return 0, io.EOF
	}
	if b.expected {
		b.expected = false
		b.conn.SetWriteDeadline(time.Now().Add(b.idle))
		if _, b.err = b.conn.Write(continueAnswer); b.err != nil {
			return 0, b.err
		}
	}
	b.conn.SetReadDeadline(time.Now().Add(b.idle))
	if b.interrupted.Load() { // after the deadline is set: interrupt sets one, too
		b.err = errInterrupted
		return 0, b.err
	}
	n, err = b.r.Read(p)
	b.n += int64(n)
	b.came.Store(b.n)
	if err == nil {
		return n, nil
	}
	// The framework takes the end of the connection for the end of the body, even within one whose length was said.
	if h, ok := b.conn.(*heardConn); err == io.EOF && (b.length >= 0 && b.n < b.length || b.length < 0 && ok && h.ended.Load()) {
		err = io.ErrUnexpectedEOF
	}
	if b.interrupted.Load() && err != io.EOF {
		err = errInterrupted
	}
	if b.whole = err == io.EOF; !b.whole {
		b.err = err
	}
	return n, err
}

var continueAnswer = []byte("HTTP/1.1 100 Continue\r\n\r\n")

// interrupt ends the present read and all that follow.
func (b *uploadBody) interrupt() {
	b.interrupted.Store(true) // before the deadline: Read sets one and then looks
	b.conn.SetReadDeadline(time.Unix(1, 0))
}

// problem says what became of a body that could not be read.
func (b *uploadBody) problem() *Problem {
	var timeout net.Error
	if errors.As(b.err, &timeout) && timeout.Timeout() {
		return (&Problem{Code: RequestTimeout, Detail: "nothing came for " + b.idle.String()}).Because(b.err)
	}
	return (&Problem{Code: InvalidRequest, Detail: "the body ended too early"}).Because(b.err)
}

// atMost reads what may have so many bytes, and fails where there are more.
type atMost struct {
	r    io.Reader
	left int64
	more error
}

// Read reads on.
func (a *atMost) Read(p []byte) (int, error) {
	n, err := a.r.Read(p)
	if a.left -= int64(n); a.left < 0 {
		return 0, a.more
	}
	return n, err
}

// heardListener makes connections that remember whether their client has ended them.
type heardListener struct{ net.Listener }

// Accept waits for a connection.
func (l heardListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if tcp, ok := conn.(*net.TCPConn); ok && err == nil {
		return &heardConn{TCPConn: tcp}, nil
	}
	return conn, err
}

// heardConn is a connection that remembers that it ended.
type heardConn struct {
	*net.TCPConn
	ended atomic.Bool // nothing more comes
}

// Read remembers the end.
func (c *heardConn) Read(p []byte) (int, error) {
	n, err := c.TCPConn.Read(p)
	var timeout net.Error
	if err != nil && !(errors.As(err, &timeout) && timeout.Timeout()) {
		c.ended.Store(true)
	}
	return n, err
}

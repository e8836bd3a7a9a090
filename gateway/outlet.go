package gateway

import (
	"encoding/binary"
	"net"
	"sync"
	"time"

	"github.com/fasthttp/websocket"
)

// gatherBytes is how much goes out in one write; larger frames aren't copied.
const gatherBytes = 16 << 10

// outlet is where a stream is written: many frames in one write, each write with a time limit of its own. The library's
// control frames go through it too. Safe for concurrent use.
type outlet struct {
	net.Conn
	mu    sync.Mutex
	limit time.Duration // of one write
}

// SetWriteDeadline does nothing: the library would set its own, for a pong, on a write of somebody else.
func (o *outlet) SetWriteDeadline(time.Time) error { return nil }

// hurry sets the limit of the writes that follow.
func (o *outlet) hurry(limit time.Duration) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.limit = limit
}

// Write sends p within the limit.
func (o *outlet) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.Conn.SetWriteDeadline(time.Now().Add(o.limit))
	return o.Conn.Write(p)
}

// writePieces sends what doesn't fit into one write. Each piece has its own limit: a slow client is served, one that stands
// still isn't.
func (o *outlet) writePieces(pieces ...[]byte) error {
	o.mu.Lock() // a frame must not be cut by another
	defer o.mu.Unlock()
	for _, p := range pieces {
		for len(p) > 0 {
			n := min(len(p), gatherBytes)
			o.Conn.SetWriteDeadline(time.Now().Add(o.limit))
			if _, err := o.Conn.Write(p[:n]); err != nil {
				return err
			}
			p = p[n:]
		}
	}
	return nil
}

// gathers are buffers for one round of frames, shared by all streams: an idle one needs none.
var gathers = sync.Pool{New: func() any { b := make([]byte, 0, 4<<10); return &b }}

// appendFrameHeader appends the header of a server's unfragmented text frame (RFC 6455, section 5.2).
func appendFrameHeader(b []byte, size int) []byte {
	b = append(b, 0x80|websocket.TextMessage)
	switch {
	case size < 126:
		return append(b, byte(size))
	case size < 1<<16:
		return binary.BigEndian.AppendUint16(append(b, 126), uint16(size))
	}
	return binary.BigEndian.AppendUint64(append(b, 127), uint64(size))
}

// gathered collects frames and writes them together. Drop it in any case.
type gathered struct {
	out *outlet
	buf *[]byte
}

func (o *outlet) gather() *gathered { return &gathered{out: o} }

// add adds a text frame made of parts.
func (g *gathered) add(parts ...[]byte) error {
	size := 0
	for _, p := range parts {
		size += len(p)
	}
	if size > gatherBytes {
		if err := g.flush(); err != nil {
			return err
		}
		return g.out.writePieces(append([][]byte{appendFrameHeader(nil, size)}, parts...)...)
	}
	if g.buf == nil {
		g.buf = gathers.Get().(*[]byte)
	}
	b := appendFrameHeader(*g.buf, size)
	for _, p := range parts {
		b = append(b, p...)
	}
	if *g.buf = b; len(b) >= gatherBytes {
		return g.flush()
	}
	return nil
}

// flush writes what was added.
func (g *gathered) flush() (err error) {
	if g.buf == nil {
		return nil
	}
	_, err = g.out.Write(*g.buf)
	g.drop()
	return err
}

// drop gives the buffer back.
func (g *gathered) drop() {
	if g.buf != nil {
		*g.buf = (*g.buf)[:0]
		gathers.Put(g.buf)
		g.buf = nil
	}
}

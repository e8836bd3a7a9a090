package gateway

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// download is the body of an answer. The framework hands over the connection (WriteTo) once the headers are written, and keeps
// it for further requests if all of it could be sent. It may take any time, but not stand still.
type download struct {
	g       *Gateway
	conn    net.Conn
	r       io.ReadCloser // nil: nothing is to be sent
	length  int64
	ctx     context.Context // of reading
	cancel  context.CancelFunc
	stop    func() bool
	aborted atomic.Bool
	began   time.Time
	sent    int64
	err     error
}

// downloadBuffers are what bytes pass through.
var downloadBuffers = sync.Pool{New: func() any { return new([256 << 10]byte) }}

// errNotSent is how a download ends that never began.
var errNotSent = errors.New("the client went before the bytes")

// abort ends the present write and all that follow.
func (d *download) abort() {
	d.aborted.Store(true) // before the deadline: send sets one and then looks
	d.conn.SetWriteDeadline(time.Unix(1, 0))
}

// WriteTo sends everything.
func (d *download) WriteTo(w io.Writer) (n int64, err error) {
	defer func() { d.sent, d.err = n, err }()
	if b, ok := w.(*bufio.Writer); ok { // the headers
		d.conn.SetWriteDeadline(time.Now().Add(d.g.limits.idle))
		if err := b.Flush(); err != nil {
			return 0, err
		}
	}
	if d.r == nil {
		return 0, nil
	}
	buf := downloadBuffers.Get().(*[256 << 10]byte)
	defer downloadBuffers.Put(buf)
	stalled := time.AfterFunc(d.g.limits.idle, d.cancel) // the store, too, may not stand still
	defer stalled.Stop()
	for n < d.length {
		stalled.Reset(d.g.limits.idle)
		got, err := d.r.Read(buf[:min(int64(len(buf)), d.length-n)])
		stalled.Stop()
		put, writeErr := d.send(buf[:got])
		if n += put; writeErr != nil {
			return n, writeErr
		}
		switch {
		case err == io.EOF && n < d.length:
			return n, io.ErrUnexpectedEOF
		case err != nil && err != io.EOF:
			return n, err
		}
	}
	return n, nil
}

// send sends p. A write that times out goes on where some of it went.
func (d *download) send(p []byte) (n int64, err error) {
	for len(p) > 0 {
		d.conn.SetWriteDeadline(time.Now().Add(d.g.limits.idle))
		if d.aborted.Load() {
			return n, net.ErrClosed
		}
		put, err := d.conn.Write(p)
		n += int64(put)
		p = p[put:]
		var timeout net.Error
		if err != nil && (put == 0 || !errors.As(err, &timeout) || !timeout.Timeout()) {
			return n, err
		}
	}
	return n, nil
}

// Read is for a framework that doesn't hand over its connection.
func (d *download) Read(p []byte) (int, error) {
	if d.r == nil {
		return 0, io.EOF
	}
	return d.r.Read(p)
}

// Close is called by the framework, whatever became of the answer.
func (d *download) Close() error {
	defer d.g.streams.Done()
	d.stop()
	d.g.metrics.attachmentEnded("get", d.began, d.err)
	d.g.metrics.attachmentBytes.WithLabelValues("sent").Add(float64(d.sent))
	d.g.metrics.writeFailed(d.err)
	if d.r == nil {
		d.cancel()
		return nil
	}
	err := d.r.Close()
	d.cancel()
	return err
}

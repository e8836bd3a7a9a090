package gateway

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/gofiber/fiber/v2"
	"golang.org/x/sync/errgroup"

	"github.com/walgate/walgate/changelog"
)

const (
	chunkRows    = 10_000 // of one snapshot
	chunkBytes   = 4 << 20
	partBytes    = 128 << 10        // what reading hands over to sending at a time
	streamWrite  = 30 * time.Second // how long a client of limit=all may stand still
	fullTimeMost = 2 * time.Hour
	// chunkTimeMost bounds the reading of one chunk, and of a page.
	chunkTimeMost = time.Minute
)

// fullAll streams everything in one answer. Each chunk is read in a snapshot of its own, and no snapshot, lock or
// connection is held while the client reads.
func (g *Gateway) fullAll(c *fiber.Ctx, f *feed, r fullRequest, enc encoding, release func()) error {
	ctx, cancel := context.WithTimeout(g.working, fullTimeMost)
	x := &export{g: g, feed: f, rows: chunkRows, bytes: chunkBytes, parts: newParts()}
	if err := x.within(ctx, func(ctx context.Context) error { return x.begin(ctx, r.since) }); err != nil {
		cancel()
		release()
		return err
	}
	x.headers(c)
	enc.header(c)
	g.sendBody(ctx, c, func(w io.Writer) error {
		err := x.streamAll(ctx, w, enc)
		if err != nil && ctx.Err() == nil {
			g.o.Logger.Warn("a full resync was cut short; its client sees no end line and starts anew", "error", err)
		}
		return err
	}, func() {
		x.drop(ctx)
		cancel()
		release()
	})
	return nil
}

// part is a piece of a chunk on its way from reading to sending.
type part struct {
	data []byte
	last bool // of its chunk
}

// parts carries what was read to what sends. It takes all that two chunks can be, so that reading, which holds a snapshot,
// never waits for the client within a chunk; before a chunk it waits for room.
type parts struct {
	ready chan part
	room  chan struct{} // a token for each chunk that is read or waits to be sent
	spare chan []byte
}

func newParts() *parts {
	const most = 2 * (chunkBytes/partBytes + 4)
	return &parts{ready: make(chan part, most), room: make(chan struct{}, 2), spare: make(chan []byte, most)}
}

func (p *parts) buffer() []byte {
	select {
	case b := <-p.spare:
		return b[:0]
	default:
		return make([]byte, 0, partBytes+partBytes/8)
	}
}

func (p *parts) recycle(b []byte) {
	if cap(b) > 4*partBytes {
		return // had a giant row
	}
	select {
	case p.spare <- b:
	default:
	}
}

// streamAll writes chunk after chunk. While one is compressed and sent, the next is read, so that the source and the
// client don't wait for each other in turn.
func (x *export) streamAll(ctx context.Context, w io.Writer, enc encoding) error {
	x.buf = x.parts.buffer()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return x.readAll(ctx) })
	g.Go(func() error { return x.parts.send(ctx, w, enc) })
	return g.Wait()
}

// send writes parts until they end. It flushes the compressor where nothing else is ready, for the client shall not wait.
func (p *parts) send(ctx context.Context, w io.Writer, enc encoding) error {
	gathered := bufio.NewWriterSize(w, sendBytes) // compressors write a few hundred bytes at a time
	out := enc.writer(gathered)
	for {
		var next part
		var more bool
		select {
		case next, more = <-p.ready:
		case <-ctx.Done(): // reading failed: without its end, a client sees that the answer was cut short
			return ctx.Err()
		}
		if !more {
			return errors.Join(out.Close(), gathered.Flush())
		}
		if _, err := out.Write(next.data); err != nil {
			return err
		}
		p.recycle(next.data)
		if next.last {
			<-p.room
		}
		if len(p.ready) == 0 {
			if err := errors.Join(out.Flush(), gathered.Flush()); err != nil {
				return err
			}
		}
	}
}

// readAll hands over every chunk, the end line with the last one, and then closes the parts.
func (x *export) readAll(ctx context.Context) error {
	for last := false; !last; {
		select {
		case x.parts.room <- struct{}{}:
		case <-ctx.Done():
			return ctx.Err()
		}
		if err := x.within(ctx, x.fill); err != nil {
			return err
		}
		if last = x.done(); last {
			var settles changelog.Version
			err := x.within(ctx, func(ctx context.Context) (err error) {
				settles, err = x.settle(ctx)
				return err
			})
			if err != nil {
				return err
			}
			x.buf = fmt.Appendf(x.buf, `{"end":true,"count":%d,"last_seq":"%s"`, x.count, x.feed.cursor(x.cur.Last, x.cur.History))
			if settles != 0 {
				x.buf = fmt.Appendf(x.buf, `,"settles":"%s"`, x.feed.cursor(settles, x.cur.History))
			}
			x.buf = append(x.buf, "}\n"...)
		}
		x.handOver(true)
	}
	close(x.parts.ready)
	return nil
}

// within bounds one step of limit=all: a source that fell silent must not keep a place among the full resyncs.
func (x *export) within(ctx context.Context, step func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, x.g.limits.chunk)
	defer cancel()
	return step(ctx)
}

// handOver gives what was read so far to the sender. A page has none and keeps it.
func (x *export) handOver(last bool) {
	if x.parts == nil {
		return
	}
	x.given += len(x.buf)
	x.parts.ready <- part{x.buf, last} // has room: see parts
	x.buf = x.parts.buffer()
	if last {
		x.given = 0
	}
}

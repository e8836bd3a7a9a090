package replication

import (
	"io"
	"time"
)

const (
	gatherBuffer = 128 << 10
	// gatherWithin is the pause between two reads below which they belong to one busy stretch.
	gatherWithin = 200 * time.Microsecond
	// gatherAfter is how many small reads in a row make a stretch busy: a few rows now and then are passed on at once.
	gatherAfter = 64
	gatherPause = 100 * time.Microsecond
)

// gatherer reads the replication connection in large pieces. The walsender sends each message by itself, and wakes a
// reader that waits for every one of them: under load that costs both sides more than the work. In a busy stretch the
// gatherer lets bytes come together before it reads on.
type gatherer struct {
	conn   io.Reader
	buf    []byte
	from   int
	to     int
	small  int // small reads in a row
	filled time.Time
}

func newGatherer(conn io.Reader) *gatherer {
	return &gatherer{conn: conn, buf: make([]byte, gatherBuffer)}
}

// Read implements io.Reader.
func (g *gatherer) Read(p []byte) (int, error) {
	if g.from == g.to {
		if len(p) >= len(g.buf) { // of a giant row
			return g.conn.Read(p)
		}
		if err := g.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(p, g.buf[g.from:g.to])
	g.from += n
	return n, nil
}

func (g *gatherer) fill() error {
	if g.small >= gatherAfter {
		time.Sleep(gatherPause)
	}
	n, err := g.conn.Read(g.buf)
	now := time.Now()
	switch {
	case n > len(g.buf)/8, now.Sub(g.filled) > gatherWithin+gatherPause:
		g.small = 0
	default:
		g.small++
	}
	g.filled = now
	if n > 0 {
		err = nil // it comes again
	}
	g.from, g.to = 0, max(n, 0)
	return err
}

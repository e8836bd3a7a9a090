package replication

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"
)

// arrivals is a connection on which a piece of bytes comes every so often.
type arrivals struct {
	pieces [][]byte
	every  time.Duration
	err    error // at the end
}

func (a *arrivals) Read(p []byte) (int, error) {
	if len(a.pieces) == 0 {
		return 0, a.err
	}
	time.Sleep(a.every) // by the clock of synctest's bubble: no time passes
	n := copy(p, a.pieces[0])
	if a.pieces[0] = a.pieces[0][n:]; len(a.pieces[0]) == 0 {
		a.pieces = a.pieces[1:]
	}
	if len(a.pieces) == 0 { // an error may come with bytes
		return n, a.err
	}
	return n, nil
}

func TestGathererPassesEverythingOn(t *testing.T) {
	t.Parallel()
	broken := errors.New("the connection broke")
	var want []byte
	in := &arrivals{err: broken}
	r := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		size := 1 + r.IntN(2000)
		if r.IntN(20) == 0 {
			size = 1 + r.IntN(3*gatherBuffer)
		}
		piece := make([]byte, size)
		for i := range piece {
			piece[i] = byte(r.Uint32())
		}
		in.pieces, want = append(in.pieces, piece), append(want, piece...)
	}
	synctest.Test(t, func(t *testing.T) {
		g := newGatherer(in)
		var got []byte
		for {
			p := make([]byte, 1+r.IntN(2*gatherBuffer))
			n, err := g.Read(p)
			got = append(got, p[:n]...)
			if err != nil {
				if !errors.Is(err, broken) {
					t.Errorf("ended with %v", err)
				}
				break
			}
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%d bytes came out differently than the %d that went in", len(got), len(want))
		}
	})
}

// TestGathererWaitsInBusyStretchesOnly: single transactions are read at once, however many follow each other.
func TestGathererWaitsInBusyStretchesOnly(t *testing.T) {
	t.Parallel()
	const messages = 1000
	for _, c := range []struct {
		name   string
		every  time.Duration
		size   int
		pauses bool
	}{
		{"busy", 10 * time.Microsecond, 300, true},
		{"a thousand a second", time.Millisecond, 300, false},
		{"large pieces", 10 * time.Microsecond, gatherBuffer / 4, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				in := &arrivals{every: c.every, err: io.EOF}
				for range messages {
					in.pieces = append(in.pieces, make([]byte, c.size))
				}
				g := newGatherer(in)
				began := time.Now()
				n, err := io.Copy(io.Discard, struct{ io.Reader }{g})
				if n != int64(messages*c.size) || err != nil {
					t.Fatalf("%d bytes, %v", n, err)
				}
				paused := time.Since(began) - messages*c.every
				if c.pauses && paused < (messages-gatherAfter-1)*gatherPause || !c.pauses && paused != 0 {
					t.Errorf("paused %s", paused)
				}
			})
		})
	}
}

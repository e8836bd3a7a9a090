package blobstore

import (
	"hash"
	"io"
	"sync"
)

// copyBuffer is what bytes pass through.
type copyBuffer struct {
	data [128 << 10]byte
	n    int
}

var copyBuffers = sync.Pool{New: func() any { return new(copyBuffer) }}

// copyTo writes all of the source. The digest is computed beside that, at most a buffer behind, for it takes about as long.
// wrote is told how much there is by now.
func (s *source) copyTo(w io.Writer, wrote func(int64)) error {
	s.later = true
	d := newDigester(s.hash)
	defer d.end()
	for {
		b := <-d.free
		n, err := s.Read(b.data[:])
		b.n = n
		d.work <- b // before it is written: both only read it
		if n > 0 {
			if _, err := w.Write(b.data[:n]); err != nil {
				return err
			}
			wrote(s.n)
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// digester computes a digest of two buffers' contents by turns.
type digester struct {
	work, free chan *copyBuffer
	ended      chan struct{}
}

func newDigester(h hash.Hash) *digester {
	d := &digester{make(chan *copyBuffer, 2), make(chan *copyBuffer, 2), make(chan struct{})}
	for range cap(d.free) {
		d.free <- copyBuffers.Get().(*copyBuffer)
	}
	go func() {
		defer close(d.ended)
		for b := range d.work {
			_, _ = h.Write(b.data[:b.n]) // never fails
			d.free <- b
		}
	}()
	return d
}

// end waits until everything is in the digest.
func (d *digester) end() {
	close(d.work)
	<-d.ended
	for range cap(d.free) {
		copyBuffers.Put(<-d.free)
	}
}

package blobstore

import (
	"context"
	"fmt"
	"io"
	"strconv"
)

// PartKey returns the key of a part of what is stored at a key.
func PartKey(key string, part int) string { return key + "." + strconv.Itoa(part) }

// partKeys returns the keys of the objects that hold what is stored at a key.
func partKeys(key string, parts []int64) []string {
	if parts == nil {
		return []string{key}
	}
	var keys []string
	for i, size := range parts {
		if size > 0 { // else a part that was begun and never came
			keys = append(keys, PartKey(key, i))
		}
	}
	return keys
}

// ReadParts reads length bytes from an offset on of what is stored at a key, in parts of the given sizes or, where parts is nil,
// as one object. What is shorter than that ends in io.ErrUnexpectedEOF. The first object is opened at once, so that its absence
// is told here, as ErrNotFound.
func (s *Store) ReadParts(ctx context.Context, key string, parts []int64, offset, length int64) (io.ReadCloser, error) {
	p := &partsReader{ctx: ctx, s: s, left: length}
	if parts == nil {
		p.spans = append(p.spans, span{key: key, offset: offset, length: length})
		parts, length = nil, 0
	}
	for i, size := range parts {
		if length == 0 {
			break
		}
		if offset >= size {
			offset -= size
			continue
		}
		n := min(size-offset, length)
		p.spans = append(p.spans, span{key: PartKey(key, i), offset: offset, length: n})
		offset, length = 0, length-n
	}
	if length > 0 {
		return nil, fmt.Errorf("read %s in the blob store: its parts end %d bytes early: %w", key, length, io.ErrUnexpectedEOF)
	}
	if p.left == 0 && len(p.spans) == 0 {
		return p, nil
	}
	return p, p.next()
}

type span struct {
	key            string
	offset, length int64
}

// partsReader reads spans of objects, one after the other.
type partsReader struct {
	ctx   context.Context
	s     *Store
	spans []span
	open  io.ReadCloser // nil: none
	here  int64         // bytes left of the open one
	left  int64         // of all
}

// next opens the next object.
func (p *partsReader) next() (err error) {
	at := p.spans[0]
	if p.open, err = p.s.Read(p.ctx, at.key, at.offset, at.length); err != nil {
		p.open = nil
		return err
	}
	p.spans, p.here = p.spans[1:], at.length
	return nil
}

// Read reads on.
func (p *partsReader) Read(b []byte) (int, error) {
	if p.left == 0 {
		return 0, io.EOF
	}
	if p.here == 0 {
		if err := p.Close(); err != nil {
			return 0, err
		}
		if err := p.next(); err != nil {
			return 0, err
		}
	}
	n, err := p.open.Read(b[:min(int64(len(b)), p.here)])
	p.here, p.left = p.here-int64(n), p.left-int64(n)
	switch {
	case err == io.EOF && p.here > 0:
		return n, io.ErrUnexpectedEOF
	case err == io.EOF:
		err = nil
	}
	return n, err
}

// Close ends it.
func (p *partsReader) Close() error {
	if p.open == nil {
		return nil
	}
	err := p.open.Close()
	p.open = nil
	return err
}

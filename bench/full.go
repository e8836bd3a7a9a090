package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/klauspost/compress/zstd"

	kgzip "github.com/klauspost/compress/gzip"
)

func runFull(ctx context.Context, b *bench) (results []result, err error) {
	d, err := b.newDatabase(ctx, open)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	count := b.of(1_000_000)
	if err := d.load(ctx, 1, count, owners); err != nil {
		return nil, err
	}
	if err := d.caughtUp(ctx); err != nil {
		return nil, err
	}
	if _, err := d.Exec(ctx, "VACUUM ANALYZE items"); err != nil {
		return nil, err
	}
	if err := d.settle(ctx); err != nil {
		return nil, err
	}
	first, err := d.firstByte(ctx)
	if err != nil {
		return nil, err
	}
	before := d.gateway.memory()
	d.gateway.forgetPeak()
	raw, err := d.copyOut(ctx, io.Discard)
	if err != nil {
		return nil, err
	}
	for _, e := range []struct {
		encoding string
		wanted   float64
	}{{"identity", 700_000}, {"gzip", 500_000}, {"zstd", 0}} {
		bare, err := d.bareFull(ctx, e.encoding)
		if err != nil {
			return nil, err
		}
		f, err := d.fullResync(ctx, e.encoding)
		if err != nil {
			return nil, err
		}
		if f.rows != count+1 { // and the mark
			return nil, fmt.Errorf("the resync with encoding %s had %d rows instead of %d", e.encoding, f.rows, count+1)
		}
		results = append(results, result{name: e.encoding, walgate: float64(f.rows) / f.took.Seconds(), bare: float64(f.rows) / bare.Seconds(), unit: "rows/s", wanted: e.wanted,
			note: fmt.Sprintf("%d rows, %.0f MB sent; bare COPY, discarded: %s rows/s", f.rows, float64(f.bytes)/1e6, number(float64(f.rows)/raw.Seconds()))})
	}
	return append(results,
		result{name: "first byte", walgate: first, unit: "ms", less: true, wanted: 20, note: fmt.Sprintf("median of %d warm requests", firstByteRequests)},
		result{name: "peak memory", walgate: d.gateway.peakMemory(), unit: "MB", less: true, note: fmt.Sprintf("RSS: %.0f MB before, %.0f MB after", before, d.gateway.memory())}), nil
}

const firstByteRequests = 7

// firstByte returns the milliseconds until the first byte of the body.
func (d *database) firstByte(ctx context.Context) (float64, error) {
	var took []float64
	for range firstByteRequests {
		began := time.Now()
		response, err := d.gateway.get(ctx, http.DefaultClient, "/sync/full?limit=all", "1", "identity")
		if err != nil {
			return 0, err
		}
		_, err = io.ReadFull(response.Body, make([]byte, 1))
		took = append(took, milliseconds(time.Since(began)))
		response.Body.Close() // the rest is cut off
		if err != nil {
			return 0, err
		}
	}
	return median(took), nil
}

// copyOut writes the table as COPY has it.
func (d *database) copyOut(ctx context.Context, to io.Writer) (time.Duration, error) {
	began := time.Now()
	_, err := d.PgConn().CopyTo(ctx, to, "COPY items TO STDOUT")
	return time.Since(began), err
}

// bareFull is a full resync without policy, server and socket: COPY, turned into JSON lines and compressed.
func (d *database) bareFull(ctx context.Context, encoding string) (time.Duration, error) {
	var to io.Writer = io.Discard
	end := func() error { return nil }
	switch encoding {
	case "gzip":
		z, err := kgzip.NewWriterLevel(io.Discard, kgzip.BestSpeed)
		if err != nil {
			return 0, err
		}
		to, end = z, z.Close
	case "zstd":
		z, err := zstd.NewWriter(io.Discard, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1))
		if err != nil {
			return 0, err
		}
		to, end = z, z.Close
	}
	lines := &copyLines{to: to}
	began := time.Now()
	_, err := d.copyOut(ctx, lines)
	if err == nil {
		err = lines.flush()
	}
	return time.Since(began), errors.Join(err, end())
}

// copyLines turns the rows of COPY into JSON lines. PostgreSQL sends one row a message, and no value here has anything
// that COPY would escape.
type copyLines struct {
	to  io.Writer
	buf []byte
}

var copyKeys = []string{`{"collection":"items","doc_id":`, `,"data":{"id":`, `,"owner":`, `,"title":`, `,"body":`, `,"done":`, `,"updated_at":`}

func (l *copyLines) Write(row []byte) (int, error) {
	rest := bytes.TrimSuffix(row, []byte("\n"))
	id, _, _ := bytes.Cut(rest, []byte("\t"))
	b := append(append(l.buf, copyKeys[0]...), '"')
	b = append(append(b, id...), '"')
	for i, key := range copyKeys[1:] {
		var value []byte
		value, rest, _ = bytes.Cut(rest, []byte("\t"))
		b = append(b, key...)
		switch {
		case i == 1: // owner
			b = append(b, value...)
		case i == 4 && value[0] == 't': // done
			b = append(b, "true"...)
		case i == 4:
			b = append(b, "false"...)
		default:
			b = appendQuoted(b, value)
		}
	}
	l.buf = append(b, "}}\n"...)
	if len(l.buf) < 64<<10 {
		return len(row), nil
	}
	return len(row), l.flush()
}

func (l *copyLines) flush() error {
	_, err := l.to.Write(l.buf)
	l.buf = l.buf[:0]
	return err
}

type fullAnswer struct {
	rows  int
	bytes int
	took  time.Duration
}

// fullResync downloads everything as a client would, and counts the documents; what is compressed is unpacked after the
// clock has stopped, for the client's work isn't measured here.
func (d *database) fullResync(ctx context.Context, encoding string) (*fullAnswer, error) {
	f := &fullAnswer{}
	began := time.Now()
	response, err := d.gateway.get(ctx, http.DefaultClient, "/sync/full?limit=all", "1", encoding)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	if got := response.Header.Get("Content-Encoding"); got != encoding && encoding != "identity" {
		return nil, fmt.Errorf("asked for %s, got %q", encoding, got)
	}
	var packed bytes.Buffer
	var counted lineCounter
	chunk := make([]byte, 256<<10)
	for {
		n, err := response.Body.Read(chunk)
		f.bytes += n
		if encoding == "identity" {
			counted.Write(chunk[:n])
		} else {
			packed.Write(chunk[:n])
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
	}
	f.took = time.Since(began)
	if err := unpack(&counted, &packed, encoding); err != nil {
		return nil, err
	}
	f.rows = int(counted) - 1 // without the last line
	return f, nil
}

func unpack(to io.Writer, packed io.Reader, encoding string) error {
	switch encoding {
	case "gzip":
		z, err := gzip.NewReader(packed)
		if err != nil {
			return err
		}
		_, err = io.Copy(to, z)
		return err
	case "zstd":
		z, err := zstd.NewReader(packed)
		if err != nil {
			return err
		}
		defer z.Close()
		_, err = io.Copy(to, z)
		return err
	}
	return nil
}

type lineCounter int

func (n *lineCounter) Write(b []byte) (int, error) {
	*n += lineCounter(bytes.Count(b, []byte("\n")))
	return len(b), nil
}

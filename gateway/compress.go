package gateway

import (
	"bytes"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/gofiber/fiber/v2"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// encoding is a content encoding: "", "gzip" or "zstd".
type encoding string

// chooseEncoding takes what the client likes best; of equals zstd, which costs least.
func chooseEncoding(accept string) encoding {
	best, quality := encoding(""), 0.0
	for part := range strings.SplitSeq(accept, ",") {
		name, params, _ := strings.Cut(strings.TrimSpace(part), ";")
		q := 1.0
		if v, ok := strings.CutPrefix(strings.TrimSpace(params), "q="); ok {
			q, _ = strconv.ParseFloat(v, 64)
		}
		e := encoding(strings.ToLower(strings.TrimSpace(name)))
		if e != "gzip" && e != "zstd" {
			continue
		}
		if q > quality || q == quality && q > 0 && e == "zstd" {
			best, quality = e, q
		}
	}
	return best
}

func (e encoding) header(c *fiber.Ctx) {
	c.Vary(fiber.HeaderAcceptEncoding)
	if e != "" {
		c.Set(fiber.HeaderContentEncoding, string(e))
	}
}

// flusher is a compressor, or none.
type flusher interface {
	io.WriteCloser
	Flush() error
}

type plain struct{ io.Writer }

func (plain) Flush() error { return nil }
func (plain) Close() error { return nil }

func (e encoding) writer(w io.Writer) flusher {
	switch e {
	case "gzip":
		z, _ := gzip.NewWriterLevel(w, gzip.BestSpeed) // a level that exists
		return z
	case "zstd":
		z, _ := zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1)) // valid options
		return z
	}
	return plain{w}
}

func (e encoding) compress(b []byte) ([]byte, error) {
	if e == "" {
		return b, nil
	}
	var out bytes.Buffer
	w := e.writer(&out)
	if _, err := w.Write(b); err != nil {
		return nil, fmt.Errorf("compress: %w", err)
	}
	err := w.Close()
	return out.Bytes(), err
}

package gateway

import (
	"bytes"
	"io"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// decompress returns an answer's body without its content encoding.
func decompress(t testing.TB, a *answer) []byte {
	t.Helper()
	var r io.Reader = bytes.NewReader(a.body)
	switch a.header.Get("Content-Encoding") {
	case "gzip":
		z, err := gzip.NewReader(r)
		ok(t, err)
		r = z
	case "zstd":
		z, err := zstd.NewReader(r)
		ok(t, err)
		defer z.Close()
		r = z
	}
	out, err := io.ReadAll(r)
	ok(t, err)
	return out
}

func TestChooseEncoding(t *testing.T) {
	t.Parallel()
	for accept, want := range map[string]encoding{
		"": "", "identity": "", "br": "", "gzip": "gzip", "GZIP": "gzip", "zstd": "zstd", "gzip, zstd": "zstd", "zstd, gzip": "zstd",
		"gzip;q=1.0, zstd;q=0.5": "gzip", "gzip;q=0": "", "gzip;q=0, zstd;q=0": "", "zstd; q=0.1, br": "zstd", "gzip;q=wrong": "", "*": "", ",,;": "",
	} {
		if got := chooseEncoding(accept); got != want {
			t.Errorf("%q: got %q, want %q", accept, got, want)
		}
	}
}

package gateway

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/valyala/fasthttp"
)

// bareFiles serves files of a directory with the HTTP library alone: what it is sent goes to a file, as it comes.
func bareFiles(t testing.TB, dir string) (base string) {
	t.Helper()
	server := &fasthttp.Server{StreamRequestBody: true, MaxRequestBodySize: 4 << 30, Handler: func(c *fasthttp.RequestCtx) {
		path := filepath.Join(dir, filepath.Base(string(c.Path())))
		if c.IsPut() {
			f, err := os.Create(path)
			if err == nil {
				_, err = io.Copy(f, c.RequestBodyStream())
				f.Close()
			}
			if err != nil {
				c.Error(err.Error(), 500)
			}
			return
		}
		f, err := os.Open(path)
		if err != nil {
			c.Error(err.Error(), 404)
			return
		}
		info, err := f.Stat()
		if err != nil {
			c.Error(err.Error(), 500)
			return
		}
		c.SetBodyStream(f, int(info.Size())) // which the kernel copies
	}}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ok(t, err)
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	t.Cleanup(func() {
		ok(t, server.Shutdown())
		ok(t, <-served)
	})
	return "http://" + l.Addr().String()
}

// BenchmarkAttachmentTransfer sends and reads 100 MB, in turn with a server that does nothing else with the same library.
func BenchmarkAttachmentTransfer(b *testing.B) {
	const size = 100 << 20
	dir := b.TempDir()
	e := newBytesEnv(b, "file://"+filepath.Join(dir, "blobs"), setup{})
	ana := editor(b, "ana")
	bare := bareFiles(b, dir)
	content := bytes.Repeat(pattern(1<<20), 100)
	transfer := func(method, url string, body io.Reader) time.Duration {
		began := time.Now()
		req, err := http.NewRequestWithContext(b.Context(), method, url, body)
		ok(b, err)
		req.Header.Set("Authorization", "Bearer "+ana)
		res, err := e.client.Do(req)
		ok(b, err)
		n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, res.Body, make([]byte, 1<<20))
		ok(b, err)
		res.Body.Close()
		if res.StatusCode >= 300 || method == http.MethodGet && n != size {
			b.Fatalf("%s %s: %d, %d bytes", method, url, res.StatusCode, n)
		}
		return time.Since(began)
	}
	times := map[string]time.Duration{}
	for i := range b.N + 1 {
		for _, x := range []struct{ name, method, url string }{
			{"up bare", http.MethodPut, bare + "/file"}, {"up", http.MethodPut, fmt.Sprintf("%s/attachments/f%d", e.base, i)},
			{"down bare", http.MethodGet, bare + "/file"}, {"down", http.MethodGet, fmt.Sprintf("%s/attachments/f%d", e.base, i)},
		} {
			var body io.Reader
			if x.method == http.MethodPut {
				body = bytes.NewReader(content)
			}
			if d := transfer(x.method, x.url, body); i > 0 { // the first warms up
				times[x.name] += d
			}
		}
	}
	for name, d := range times {
		b.ReportMetric(float64(size)*float64(b.N)/1e6/d.Seconds(), "MB/s-"+map[string]string{"up bare": "up-bare", "up": "up", "down bare": "down-bare", "down": "down"}[name])
	}
	b.ReportMetric(times["up bare"].Seconds()/times["up"].Seconds(), "up-ratio")
	b.ReportMetric(times["down bare"].Seconds()/times["down"].Seconds(), "down-ratio")
}

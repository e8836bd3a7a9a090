package gateway

import (
	"fmt"
	"io"
	"net/http"
	"testing"
)

const benchRows = 20_000

// benchEnv has rows of ana's, all of them in the log too.
func benchEnv(b *testing.B) (*env, string) {
	e := newEnv(b, setup{})
	e.exec(b, fmt.Sprintf(`INSERT INTO todos (id, owner, title) SELECT g, 'ana', repeat('x', 250) FROM generate_series(1, %d) g`, benchRows))
	e.sync(b)
	return e, tokenFor(b, "ana", nil)
}

// fetch reads an answer to its end and throws it away.
func (e *env) fetch(b *testing.B, path, token string) {
	req, err := http.NewRequestWithContext(b.Context(), http.MethodGet, e.base+path, nil)
	ok(b, err)
	req.Header.Set("Authorization", "Bearer "+token)
	res, err := http.DefaultClient.Do(req)
	ok(b, err)
	defer res.Body.Close()
	n, err := io.Copy(io.Discard, res.Body)
	ok(b, err)
	if res.StatusCode != http.StatusOK || n == 0 {
		b.Fatalf("%s: %s, %d bytes", path, res.Status, n)
	}
}

// BenchmarkFull streams everything over HTTP from the source's table.
func BenchmarkFull(b *testing.B) {
	e, token := benchEnv(b)
	for b.Loop() {
		e.fetch(b, "/sync/full?collections=todos&limit=all", token)
	}
	b.ReportMetric(float64(benchRows*b.N)/b.Elapsed().Seconds(), "rows/s")
}

// BenchmarkPull reads a page of 500 changes over HTTP from the log.
func BenchmarkPull(b *testing.B) {
	e, token := benchEnv(b)
	for b.Loop() {
		e.fetch(b, "/sync/pull?since=0&collections=todos&limit=500", token)
	}
}

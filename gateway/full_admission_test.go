package gateway

import (
	"encoding/json"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/walgate/walgate/internal/badlink"
)

// TestFullsAreAdmitted: as many full resyncs run as limits.full_concurrency says. Who comes while all places are taken is told
// when to come again, not the same moment for everybody, and what else the gateway serves goes on. In the end all have theirs.
func TestFullsAreAdmitted(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{options: func(o *Options) { o.FullConcurrency = 1 }})
	e.exec(t, `INSERT INTO news SELECT n, repeat('x', 1000) FROM generate_series(1, 30000) n`)
	e.sync(t)
	token := tokenFor(t, "ana", nil)
	link := badlink.New(t, strings.TrimPrefix(e.base, "http://"))
	slow := <-begin(t, link, "/sync/full?limit=all&collections=news", token)
	if _, err := slow.Body.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	const clients = 12
	full := func() *answer { return e.get(t, "/sync/full?limit=10&collections=news", token) }
	var mu sync.Mutex
	var all sync.WaitGroup
	told := map[int]int{}
	for range clients {
		all.Go(func() {
			a := full()
			var p struct{ Code string }
			after, err := strconv.Atoi(a.header.Get("Retry-After"))
			if a.status != http.StatusTooManyRequests || json.Unmarshal(a.body, &p) != nil || p.Code != string(RateLimited) || err != nil || after < 1 || after > 10 {
				t.Errorf("while the place is taken: %d %s, Retry-After %q", a.status, a.body, a.header.Get("Retry-After"))
			}
			mu.Lock()
			defer mu.Unlock()
			told[after]++
		})
	}
	e.pull(t, token, e.here(t, token))
	all.Wait()
	if len(told) < 2 {
		t.Errorf("all come again at the same moment: %v", told)
	}
	link.Cut()
	left := clients
	eventually(t, "each has its turn", func() bool {
		var served atomic.Int64
		for range left {
			all.Go(func() {
				if full().status == http.StatusOK {
					served.Add(1)
				}
			})
		}
		all.Wait()
		left -= int(served.Load())
		return left == 0
	})
}

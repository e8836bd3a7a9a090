package gateway

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"testing"
)

// BenchmarkPush pushes upserts of rows that exist, one or fifty at a time, by eight clients at once.
func BenchmarkPush(b *testing.B) {
	for _, size := range []int{1, 50} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			e := newPushEnv(b, setup{before: `INSERT INTO boards SELECT i, 'ana', '', '', 0 FROM generate_series(1, 10000) i;`,
				options: func(o *Options) { o.PushConcurrency = 8 }})
			e.client.Transport.(*http.Transport).MaxIdleConnsPerHost = 16
			b.SetParallelism(4)
			b.ResetTimer()
			b.RunParallel(func(pb *testing.PB) {
				token := tokenFor(b, fmt.Sprint(rand.Uint32()), nil)
				for pb.Next() {
					changes := make([]string, size)
					for i := range changes {
						changes[i] = fmt.Sprintf(`{"collection":"boards","operation":"upsert","doc_id":"%d","data":{"a":"%d","n":%d}}`, rand.IntN(200)*size+i+1, i, i)
					}
					body := `{"client_id":"phone","changes":[` + strings.Join(changes, ",") + `]}`
					req, _ := http.NewRequest(http.MethodPost, e.base+"/sync/push", strings.NewReader(body))
					req.Header.Set("Content-Type", "application/json")
					req.Header.Set("Authorization", "Bearer "+token)
					res, err := e.client.Do(req)
					ok(b, err)
					if res.StatusCode != http.StatusOK {
						b.Errorf("answered %d", res.StatusCode)
					}
					res.Body.Close()
				}
			})
			b.ReportMetric(float64(b.N*size)/b.Elapsed().Seconds(), "changes/s")
		})
	}
}

package gateway

import "testing"

// BenchmarkManifestPoll is a poll without news, over HTTP, by one client and by several at a time.
func BenchmarkManifestPoll(b *testing.B) {
	e := newFileEnv(b, setup{})
	token := tokenFor(b, "a", nil)
	since := e.manifest(b, token, "c", 0, 0).Current
	b.Run("one", func(b *testing.B) {
		for b.Loop() {
			since = e.manifest(b, token, "c", since, 0).Current
		}
	})
	b.Run("many", func(b *testing.B) {
		b.SetParallelism(8)
		b.RunParallel(func(p *testing.PB) {
			for p.Next() {
				e.manifest(b, token, "c", since, 0)
			}
		})
	})
}

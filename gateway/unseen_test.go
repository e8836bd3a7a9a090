package gateway

import (
	"bytes"
	"testing"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/policies"
)

// BenchmarkUnseen hands the hub batches of a hundred changes that none of its subscribers may see, beside those that one may.
func BenchmarkUnseen(b *testing.B) {
	for name, scope := range map[string]int{"unseen": 1_000_000, "seen by one": 0} {
		b.Run(name, func(b *testing.B) {
			h := newTestHub()
			for i := range 1000 {
				h.join(newTestSub(1<<40, i), 100)
			}
			batch := &changelog.Batch{History: testHistory}
			for i := range 100 {
				batch.Entries = append(batch.Entries, changelog.Entry{Scope: scopeKey(scope + i), Collection: 1, Op: byte(policies.Upsert),
					DocID: []byte("0190a1b2-0000-7000-8000-000000000000"), Data: bytes.Repeat([]byte("x"), 300)})
			}
			b.ReportAllocs()
			for prev := changelog.Version(100); b.Loop(); prev = batch.Last {
				batch.Prev, batch.Last = prev, prev+100
				for i := range batch.Entries {
					e := &batch.Entries[i]
					e.Version, e.Tx = prev+1+changelog.Version(i), prev+1
				}
				if !h.apply(b.Context(), batch) {
					b.Fatal("not taken")
				}
				if len(h.subs) > 0 && scope == 0 {
					for s := range h.subs {
						if frames, _, _, _ := s.take(nil); len(frames) > 0 {
							releaseAll(frames)
						}
					}
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/100, "ns/change")
		})
	}
}

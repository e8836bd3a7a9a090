package changelog

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

func hashed(kind string, n int) [16]byte {
	sum := sha256.Sum256(binary.BigEndian.AppendUint64([]byte(kind), uint64(n)))
	return [16]byte(sum[:])
}

// BenchmarkAppendReferences is BenchmarkAppend where each inserted row names one attachment, whose bytes nobody sent yet, or somebody
// did (then each makes an operation), in a log of a million attachments; or where there is none yet.
func BenchmarkAppendReferences(b *testing.B) {
	for _, kind := range []string{"none", "first", "unknown", "uploaded"} {
		for _, group := range []int{1, 100, 2000} {
			b.Run(fmt.Sprintf("bytes=%s/transactions=%d", kind, group), func(b *testing.B) {
				l, dsn := newLog(b)
				if kind != "first" {
					unattended(b, dsn)
					bulkReferences(b, dsn, 1_000_000)
				}
				a, c := lead(b, l, testClaim())
				before := processTime(b, a.dog.pid)
				clock, lsn := NewClock(c.Version), LSN(100)
				data := []byte(`{"id":1,"title":"` + strings.Repeat("x", 180) + `"}`)
				pieces := make([]Piece, group)
				n := 0
				b.ReportAllocs()
				for b.Loop() {
					for i := range pieces {
						v := clock.Next(time.Now().UnixMilli())
						lsn++
						n++
						pieces[i] = transaction(lsn, Entry{Version: v, Tx: v, Scope: scope(byte(i)), Collection: 1, Op: 'u', DocID: []byte("1"), Data: data})
						switch r := (Reference{Attachment: hashed("new", n), Scope: scope(byte(i)), Document: hashed("document", n), Version: v}); kind {
						case "uploaded":
							r.Attachment = hashed("a", n%1_000_000)
							fallthrough
						case "first", "unknown":
							pieces[i].References = []Reference{r}
						}
					}
					if err := a.append(b.Context(), pieces); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64(group)*float64(b.N)/b.Elapsed().Seconds(), "tx/s")
				b.ReportMetric(float64((processTime(b, a.dog.pid)-before).Microseconds())/float64(group)/float64(b.N), "server-µs/tx")
			})
		}
	}
}

// processTime is the processor time that a server's backend has taken: what the others on the machine do doesn't change it much.
func processTime(b *testing.B, pid int32) time.Duration {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0 // not Linux
	}
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	user, err1 := strconv.Atoi(fields[11])
	system, err2 := strconv.Atoi(fields[12])
	if err1 != nil || err2 != nil {
		b.Fatalf("/proc/%d/stat: %s", pid, text)
	}
	return time.Duration(user+system) * 10 * time.Millisecond // USER_HZ is 100
}

// unattended keeps autovacuum from analysing what is loaded.
func unattended(t testing.TB, dsn string) {
	for _, table := range []string{"references", "bytes", "operations"} {
		mustExec(t, session(t, dsn), `ALTER TABLE walgate.attachment_`+table+` SET (autovacuum_enabled = off)`)
	}
}

// bulkReferences fills the tables with n attachments of 1,000 scopes, without telling the planner.
func bulkReferences(t testing.TB, dsn string, n int) {
	conn := session(t, dsn)
	now := time.Now()
	for table, row := range map[string]func(i int) []any{
		"attachment_references": func(i int) []any { return []any{hashed("a", i), hashed("s", i%1000), hashed("d", i), int32(0)} },
		"attachment_bytes": func(i int) []any {
			return []any{hashed("a", i), fmt.Sprint("photo", i), int64(i), "u", int64(i), "image/png", []byte{1}, now, hashed("h", i), int64(i), int32(0)}
		},
		"attachment_operations": func(i int) []any {
			return []any{hashed("a", i), hashed("s", i%1000), int64(i + 1), "u", fmt.Sprint("photo", i), int64(i), "image/png", []byte{1}, now}
		},
	} {
		columns := map[string][]string{"attachment_references": {"attachment", "scope", "document", "fill"},
			"attachment_bytes":      {"key", "id", "event", "state", "size", "content_type", "sha256", "created_at", "home", "version", "fill"},
			"attachment_operations": {"attachment", "scope", "version", "op", "id", "size", "content_type", "sha256", "created_at"}}[table]
		for at := 0; at < n; at += 100_000 {
			if _, err := conn.CopyFrom(context.Background(), pgx.Identifier{"walgate", table}, columns, pgx.CopyFromSlice(min(100_000, n-at), func(i int) ([]any, error) { return row(at + i), nil })); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// BenchmarkOperations reads 10,000 operations of a million, right after they were loaded and as nobody has looked at them.
func BenchmarkOperations(b *testing.B) {
	l, dsn := newLog(b)
	lead(b, l, testClaim())
	unattended(b, dsn)
	bulkReferences(b, dsn, 1_000_000)
	mustExec(b, session(b, dsn), `UPDATE walgate.checkpoint SET version = 2000000`)
	for _, n := range []int{1, 10, 1000} {
		var scopes [][16]byte
		for i := range n {
			scopes = append(scopes, hashed("s", i))
		}
		b.Run(fmt.Sprintf("scopes=%d", n), func(b *testing.B) {
			var pid int32 // of the one connection that is used in turn
			if err := l.pool.QueryRow(b.Context(), `SELECT pg_backend_pid()`).Scan(&pid); err != nil {
				b.Fatal(err)
			}
			before := processTime(b, pid)
			for b.Loop() {
				p, err := l.Operations(b.Context(), OperationsRequest{Scopes: scopes, Limit: 10_000})
				if err != nil || len(p.Operations) < min(9_000, 1000*n) {
					b.Fatalf("%+v (%v)", len(p.Operations), err)
				}
			}
			b.ReportMetric(float64((processTime(b, pid)-before).Microseconds())/1000/float64(b.N), "server-ms/op")
		})
	}
}

package changelog

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

func upload(id int64, n int, v Version, scopes ...[16]byte) FileEvent {
	return FileEvent{ID: id, AttachmentID: fmt.Sprint("photo", n), Key: attachment(n), Event: 'u', Size: 7, ContentType: "image/png", SHA256: []byte{1}, Home: scope(99), Scopes: scopes, CreatedAt: v.Time(), Version: v}
}

func refer(n int, sc byte, document int, v Version) Reference {
	return Reference{Attachment: attachment(n), Scope: scope(sc), Document: documentKey(document), Version: v}
}

func unrefer(n int, sc byte, document int, v Version) Reference {
	r := refer(n, sc, document, v)
	r.Removed = true
	return r
}

// operationsOf renders what a caller of the scopes is told, in order.
func operationsOf(t *testing.T, l *Log, since Version, scopes ...byte) (out []string) {
	t.Helper()
	r := OperationsRequest{Since: since, Limit: 100}
	for _, s := range scopes {
		r.Scopes = append(r.Scopes, scope(s))
	}
	p, err := l.Operations(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range p.Operations {
		out = append(out, map[bool]string{false: "download ", true: "delete "}[o.Delete]+o.ID)
	}
	return out
}

// TestExpireDropsTombstones: what the longest retention has passed goes, downloads stay, and who comes from below is told.
func TestExpireDropsTombstones(t *testing.T) {
	t.Parallel()
	l, _ := newLog(t)
	a, c := restart(t, l, nil)
	v := c.Version
	appendNow(t, a, Piece{LSN: 100, Final: true, Version: v + 4, References: []Reference{refer(1, 1, 1, v+1), refer(2, 1, 2, v+2)}, Files: []FileEvent{upload(1, 1, v+3), upload(2, 2, v+4)}})
	appendNow(t, a, Piece{LSN: 101, Final: true, Version: v + 5, References: []Reference{unrefer(2, 1, 2, v+5)}})
	if got := operationsOf(t, l, 0, 1); !slices.Equal(got, []string{"download photo1", "delete photo2"}) {
		t.Fatalf("told %v", got)
	}
	for _, step := range []struct {
		after time.Duration
		want  []string
	}{{29 * 24 * time.Hour, []string{"download photo1", "delete photo2"}}, {31 * 24 * time.Hour, []string{"download photo1"}}} {
		now := (v + 5).Time().Add(step.after)
		if _, _, err := l.Expire(t.Context(), now, 0); err != nil {
			t.Fatal(err)
		}
		if got := operationsOf(t, l, 0, 1); !slices.Equal(got, step.want) {
			t.Errorf("%s later: told %v, want %v", step.after, got, step.want)
		}
		p, err := l.Operations(t.Context(), OperationsRequest{Scopes: [][16]byte{scope(1)}, Limit: 1})
		if dropped := len(step.want) == 1; err != nil || dropped != (p.Floor >= v+5) {
			t.Errorf("%s later: the floor is %d, the tombstone's version %d (%v)", step.after, p.Floor, v+5, err)
		}
	}
}

// TestAttachmentsProbeIndexes: whatever the planner believes right after a bulk load, no read of attachments and no append scans a table.
func TestAttachmentsProbeIndexes(t *testing.T) {
	t.Parallel()
	l, dsn := newLog(t)
	restart(t, l, nil)
	bulkReferences(t, dsn, 100_000)
	var scopes, keys [][16]byte
	var zeros []int64
	for i := range 20 {
		scopes, keys, zeros = append(scopes, hashed("s", i)), append(keys, hashed("a", i)), append(zeros, 1<<50)
	}
	conn := session(t, dsn)
	for _, mode := range []string{"force_custom_plan", "force_generic_plan"} {
		for name, q := range map[string]struct {
			sql  string
			args []any
		}{
			"operations": {operationsOfMany, []any{scopes, int64(0), int64(maxVersion), 101, 101}},
			"held":       {heldSQL, []any{keys, scopes}},
			"judge":      {judgeGiven, []any{keys, scopes, zeros}},
			"touch":      {touchStatement, []any{keys}},
			"event":      {writeEventSQL, []any{keys[0], "photo", int64(1 << 40), "u", int64(1), "image/png", []byte{2}, time.Now(), scopes[0], int64(1 << 50), int32(0), false}},
		} {
			t.Run(mode+"/"+name, func(t *testing.T) {
				tx, err := conn.Begin(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				defer tx.Rollback(t.Context())
				for k, v := range probingSession {
					if _, err := tx.Exec(t.Context(), fmt.Sprintf("SET LOCAL %s = %s", k, v)); err != nil {
						t.Fatal(err)
					}
				}
				if _, err := tx.Exec(t.Context(), "SET LOCAL plan_cache_mode = "+mode); err != nil {
					t.Fatal(err)
				}
				rows, err := tx.Query(t.Context(), `EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, SUMMARY OFF) `+q.sql, q.args...)
				if err != nil {
					t.Fatal(err)
				}
				lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
				if err != nil {
					t.Fatal(err)
				}
				for _, line := range lines {
					if strings.Contains(line, "Seq Scan on attachment_") || strings.Contains(line, "Rows Removed by Filter: 1000") {
						t.Errorf("%s\n%s", line, strings.Join(lines, "\n"))
					}
				}
			})
		}
	}
}

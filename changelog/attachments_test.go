package changelog

import (
	"fmt"
	"slices"
	"testing"
	"time"
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

// TestAttachmentsProbeIndexes: no read of attachments and no append scans a table, also by plans that were made while the tables
// were empty, and when nothing has analysed them since a bulk load.
func TestAttachmentsProbeIndexes(t *testing.T) {
	t.Parallel()
	l, dsn := newLog(t)
	restart(t, l, nil)
	unattended(t, dsn) // or the planner is told in the middle
	var scopes, keys [][16]byte
	var versions []int64
	for i := range 20 {
		scopes, keys, versions = append(scopes, hashed("s", i)), append(keys, hashed("a", i)), append(versions, 1<<50)
	}
	queries := map[string]struct {
		sql  string
		args []any
	}{
		"operations": {operationsSQL, []any{scopes, int64(0), int64(maxVersion), 101, 101}},
		"latest":     {latestSQL, []any{scopes, keys}},
		"held":       {heldSQL, []any{keys, scopes}},
		"judge":      {judgeGiven, []any{keys, scopes, versions}},
		"touch":      {touchStatement, []any{keys}},
		"event":      {writeEventSQL, []any{keys[0], "photo", int64(1 << 40), "u", int64(1), "image/png", []byte{2}, time.Now(), scopes[0], int64(1 << 50), int32(0), false}},
		"removal":    {removeSQL, []any{keys, scopes, scopes}},
	}
	conn := session(t, dsn)
	mustExec(t, conn, "SET enable_bitmapscan = off") // as in Open
	for k, v := range probingSession {
		mustExec(t, conn, fmt.Sprintf("SET %s = %s", k, v))
	}
	run := func(name string) int {
		tx, err := conn.Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer tx.Rollback(t.Context())
		const read = `SELECT coalesce(sum(seq_tup_read), 0)::int FROM pg_stat_xact_user_tables WHERE relname LIKE 'attachment%'`
		rows, err := tx.Query(t.Context(), queries[name].sql, queries[name].args...)
		if err == nil {
			for rows.Next() {
			}
			err = rows.Err()
		}
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		var n int
		if err := tx.QueryRow(t.Context(), read).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	for name := range queries {
		for range 2 {
			run(name)
		}
	}
	bulkReferences(t, dsn, 50_000)
	for name := range queries {
		if n := run(name); n > 0 {
			t.Errorf("%s read %d rows by scanning tables", name, n)
		}
	}
}

// TestOperationsOfWidelySharedAttachment: one that very many scopes hold is judged by those asked for.
func TestOperationsOfWidelySharedAttachment(t *testing.T) {
	t.Parallel()
	l, _ := newLog(t)
	a, c := restart(t, l, nil)
	v := c.Version + 1
	p := Piece{LSN: 100, Final: true, Files: []FileEvent{upload(1, 1, v)}}
	wide := func(n int) [16]byte { return hashed("wide", n) }
	for i := range 300 {
		p.References = append(p.References, Reference{Attachment: attachment(1), Scope: wide(i), Document: documentKey(1), Version: v})
	}
	p.Version = v
	appendNow(t, a, p)
	gone := func(i int) Piece {
		v++
		return Piece{LSN: LSN(100 + i), Final: true, Version: v, References: []Reference{{Attachment: attachment(1), Scope: wide(i), Document: documentKey(1), Version: v, Removed: true}}}
	}
	for _, step := range []struct {
		leaves int
		want   bool // deleted
	}{{7, false}, {8, true}} {
		appendNow(t, a, gone(step.leaves))
		page, err := l.Operations(t.Context(), OperationsRequest{Scopes: [][16]byte{wide(7), wide(8)}, Limit: 10})
		if err != nil || len(page.Operations) != 1 || page.Operations[0].Delete != step.want || page.Operations[0].Version != v {
			t.Errorf("after scope %d let go: %+v (%v), want one of version %d, deleted %v", step.leaves, page, err, v, step.want)
		}
	}
}

// TestRaisesAskForRefills: a floor that rises for any reason but retention's makes what a fill found before worthless.
func TestRaisesAskForRefills(t *testing.T) {
	t.Parallel()
	l, _ := newLog(t)
	a, c := restart(t, l, nil)
	if r := c.Collections[0].Refill; r != 0 {
		t.Errorf("an empty table asks for a refill at %d", r)
	}
	v := c.Version + 2
	appendNow(t, a, Piece{LSN: 100, Final: true, Version: v, Raises: []Raise{{Collection: c.Collections[0].ID, Version: v, Reason: "truncated"}}})
	if r := mustHead(t, l).Collections[0].Refill; r != v {
		t.Errorf("after a raise to %d: refill %d", v, r)
	}
	_, same := restart(t, l, nil)
	if r := same.Collections[0].Refill; r != v {
		t.Errorf("claimed again: refill %d, want %d", r, v)
	}
	_, changed := restart(t, l, func(c *Claim) { c.Collections[0].Fingerprint = "f2" })
	if k := changed.Collections[0]; k.Refill <= v || k.Refill != k.Floor {
		t.Errorf("after the policy changed: refill %d, floor %d", k.Refill, k.Floor)
	}
}

// TestHeldKnown: who could read an attachment since its upload may name it, also when nothing names it any more.
func TestHeldKnown(t *testing.T) {
	t.Parallel()
	l, _ := newLog(t)
	a, c := restart(t, l, nil)
	v := c.Version
	known := func(sc byte) bool {
		t.Helper()
		held, err := l.Held(t.Context(), [][16]byte{attachment(1)}, [][16]byte{scope(sc)})
		if err != nil {
			t.Fatal(err)
		}
		return held[0].Known
	}
	// Scope 2 named it before the upload, and its uploader may write in scope 1 only.
	appendNow(t, a, Piece{LSN: 100, Final: true, Version: v + 2, References: []Reference{refer(1, 1, 1, v+1), refer(1, 2, 2, v+1)}})
	appendNow(t, a, Piece{LSN: 101, Final: true, Version: v + 3, Files: []FileEvent{upload(1, 1, v+3, scope(1))}})
	if !known(1) || known(2) || known(3) {
		t.Errorf("named: scope 1 %v, withheld 2 %v, stranger 3 %v", known(1), known(2), known(3))
	}
	appendNow(t, a, Piece{LSN: 102, Final: true, Version: v + 4, References: []Reference{unrefer(1, 1, 1, v+4), unrefer(1, 2, 2, v+4)}})
	if !known(1) || known(2) || known(3) {
		t.Errorf("let go: scope 1 %v, withheld 2 %v, stranger 3 %v", known(1), known(2), known(3))
	}
	// Other bytes under the same id are another's: that scope 1 had the ones before says nothing.
	appendNow(t, a, Piece{LSN: 103, Final: true, Version: v + 5, Files: []FileEvent{{ID: 2, AttachmentID: "photo1", Key: attachment(1), Event: FileDeleted, Version: v + 5}}})
	appendNow(t, a, Piece{LSN: 104, Final: true, Version: v + 6, Files: []FileEvent{upload(3, 1, v+6, scope(3))}})
	if known(1) {
		t.Error("scope 1 had other bytes under this id, and may name these")
	}
}

// TestFillRowBeforeItsChange: within one log transaction a fill's row comes, and a change of its document after it. The row
// counts, as the change says only what it changed.
func TestFillRowBeforeItsChange(t *testing.T) {
	t.Parallel()
	l, _ := newLog(t)
	a, c := restart(t, l, nil)
	v, id := c.Version, c.Collections[0].ID
	appendNow(t, a, Piece{LSN: 100, Final: true, Version: v + 2, Fills: []FillStep{{Fill: 1, Collection: id, Version: v + 2, Start: true}}, Files: []FileEvent{upload(1, 1, v+1), upload(2, 2, v+1)}})
	row := FillRow{DocID: []byte("1"), Document: documentKey(1), Version: v + 3, References: []Reference{refer(1, 1, 1, v+3), refer(2, 1, 1, v+3)}}
	appendNow(t, a,
		Piece{LSN: 101, Final: true, Version: v + 4, Fills: []FillStep{{Fill: 1, Collection: id, Version: v + 4, Rows: []FillRow{row}, From: v + 3, Done: true}}},
		Piece{LSN: 102, Final: true, Xid: 7, Tx: v + 5, Version: v + 5, Entries: []Entry{upsert(v+5, v+5, 200, "1")}, References: []Reference{unrefer(1, 1, 1, v+5)}})
	if got := operationsOf(t, l, 0, 1); !slices.Equal(got, []string{"download photo2"}) {
		t.Errorf("told %v, want photo2, which the change leaves", got)
	}
}

// TestFillOfBytesIsOlder: what a fill read of the files before the stream told of a deletion doesn't bring the file back.
func TestFillOfBytesIsOlder(t *testing.T) {
	t.Parallel()
	l, _ := newLog(t)
	a, c := restart(t, l, nil)
	v := c.Version
	appendNow(t, a, Piece{LSN: 100, Final: true, Version: v + 3, References: []Reference{refer(1, 1, 1, v+1)}, Files: []FileEvent{upload(1, 1, v+2)}})
	appendNow(t, a, Piece{LSN: 101, Final: true, Version: v + 4, Fills: []FillStep{{Fill: 1, Version: v + 4, Start: true}}})
	appendNow(t, a, Piece{LSN: 102, Final: true, Version: v + 5, Files: []FileEvent{{ID: 2, AttachmentID: "photo1", Key: attachment(1), Event: FileDeleted, Version: v + 5}}})
	appendNow(t, a, Piece{LSN: 103, Final: true, Version: v + 6, Files: []FileEvent{upload(1, 1, v+6)}, Fills: []FillStep{{Fill: 1, Version: v + 6, Done: true}}})
	if got := operationsOf(t, l, 0, 1); !slices.Equal(got, []string{"delete photo1"}) {
		t.Errorf("told %v, want the deletion", got)
	}
}

// TestAnotherTypeIsTold: the same bytes under another type are another download, also where a deletion in between isn't told.
func TestAnotherTypeIsTold(t *testing.T) {
	t.Parallel()
	l, _ := newLog(t)
	a, c := restart(t, l, nil)
	v := c.Version
	appendNow(t, a, Piece{LSN: 100, Final: true, Version: v + 2, References: []Reference{refer(1, 1, 1, v+1)}, Files: []FileEvent{upload(1, 1, v+2)}})
	again := upload(3, 1, v+4)
	again.ContentType = "image/jpeg"
	appendNow(t, a, Piece{LSN: 101, Final: true, Version: v + 4, Files: []FileEvent{{ID: 2, AttachmentID: "photo1", Key: attachment(1), Event: FileDeleted, Version: v + 3}, again}})
	p, err := l.Operations(t.Context(), OperationsRequest{Scopes: [][16]byte{scope(1)}, Since: v + 2, Limit: 10})
	if err != nil || len(p.Operations) != 1 || p.Operations[0].Delete || p.Operations[0].ContentType != "image/jpeg" {
		t.Errorf("told %+v (%v), want a download of image/jpeg", p, err)
	}
}

package schema

import (
	"fmt"
	"testing"
	"time"
)

// TestForget: what is older than it is kept goes, in batches; what a client may still ask for stays, and a local id stays
// until its device has confirmed the row, however old it is.
func TestForget(t *testing.T) {
	t.Parallel()
	_, conn := database(t)
	if err := Migrate(t.Context(), conn); err != nil {
		t.Fatal(err)
	}
	const day = 24 * time.Hour
	for age, n := range map[string]int{"1 hour": 3, "9 days": 5, "11 days": forgetBatch + 7, "39 days": 2, "41 days": 4} {
		mustExec(t, conn, fmt.Sprintf(`INSERT INTO walgate.pushes (subject, client_id, created_at) SELECT 'a', 'x', now() - interval '%[1]s' FROM generate_series(1, %[2]d);
			INSERT INTO walgate.outcomes SELECT 'a', 'x', '%[1]s ' || n, '', 1, '{}', now() - interval '%[1]s' FROM generate_series(1, %[2]d) n;
			INSERT INTO walgate.local_ids (subject, client_id, collection, local_id, doc_id, push_id, created_at) SELECT 'a', 'x', 'unconfirmed', '%[1]s ' || n, '1', 1, now() - interval '%[1]s' FROM generate_series(1, %[2]d) n;
			INSERT INTO walgate.local_ids (subject, client_id, collection, local_id, doc_id, push_id, created_at, confirmed_at) SELECT 'a', 'x', 'confirmed', '%[1]s ' || n, '1', 1, now() - interval '100 days', now() - interval '%[1]s' FROM generate_series(1, %[2]d) n;
			INSERT INTO walgate.sessions (subject, device_uuid, sync_uuid, max_checkin, opened_at) SELECT 'a', '%[1]s ' || n, gen_random_uuid(), '', now() - interval '%[1]s' FROM generate_series(1, %[2]d) n;
			INSERT INTO walgate.manifests (subject, client_id, scope_hash, seen_at) SELECT 'a', '%[1]s ' || n, '', now() - interval '%[1]s' FROM generate_series(1, %[2]d) n`, age, n))
	}
	mustExec(t, conn, `CREATE TABLE by_time AS SELECT * FROM walgate.pushes ORDER BY created_at; DELETE FROM walgate.pushes;
		INSERT INTO walgate.pushes (subject, client_id, created_at) SELECT subject, client_id, created_at FROM by_time ORDER BY created_at; DROP TABLE by_time;
		INSERT INTO walgate.attachments (attachment_id, event, size, content_type, sha256, subject, created_at) SELECT 'x', 'u', 1, '', '', subject, created_at FROM walgate.pushes ORDER BY id`)
	rounds := 0
	for more := true; more; rounds++ {
		var err error
		if more, err = Forget(t.Context(), conn, Kept{Pushes: 10 * day, Sessions: 40 * day}); err != nil {
			t.Fatal(err)
		}
	}
	if rounds != 2 {
		t.Errorf("%d rounds for %d rows of a kind, want 2", rounds, forgetBatch+13)
	}
	for what, want := range map[string]int{"pushes": 8, "attachments": 8, "manifests": forgetBatch + 17, "outcomes": 8, "local_ids WHERE collection = 'confirmed'": 8,
		"local_ids WHERE collection = 'unconfirmed'": forgetBatch + 21, "sessions": forgetBatch + 17} {
		var n int
		if err := conn.QueryRow(t.Context(), `SELECT count(*) FROM walgate.`+what).Scan(&n); err != nil || n != want {
			t.Errorf("%d of %s are left, want %d (%v)", n, what, want, err)
		}
	}
}

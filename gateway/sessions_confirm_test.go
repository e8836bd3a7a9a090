package gateway

import (
	"fmt"
	"testing"
)

// TestLocalIDsAreConfirmed: a local id may be forgotten once its device has confirmed a version at or past its row's, and
// nobody else's confirmation counts. Within its session a row lies above everything that is confirmed.
func TestLocalIDsAreConfirmed(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{})
	a, b := tokenFor(t, "a", nil), tokenFor(t, "b", nil)
	for _, token := range []string{a, b} {
		e.synced(t, token, "phone")
		e.synced(t, token, "tablet")
	}
	push := func(subject, device string, id int) {
		e.pushed(t, subject, device, fmt.Sprintf(`INSERT INTO todos VALUES (%[3]d, '%[1]s');
			INSERT INTO walgate.local_ids (subject, client_id, collection, local_id, doc_id, push_id)
				VALUES ('%[1]s', '%[2]s', 'todos', 'local-%[3]d', '%[3]d', currval(pg_get_serial_sequence('walgate.pushes', 'id')))`, subject, device, id))
	}
	want := func(when, confirmed string) {
		t.Helper()
		var got string
		ok(t, e.db.QueryRow(t.Context(), `SELECT coalesce(string_agg(local_id, ' ' ORDER BY push_id), '') FROM walgate.local_ids WHERE confirmed_at IS NOT NULL`).Scan(&got))
		if got != confirmed {
			t.Errorf("%s: %q are confirmed, want %q", when, got, confirmed)
		}
	}
	s := e.openSession(t, a, "phone")
	push("b", "phone", 1)
	push("a", "phone", 2)
	push("a", "tablet", 3)
	push("a", "phone", 4)
	changes, last := e.pullWindow(t, a, s, "")
	if briefs(changes) != "upsert todos/2, upsert todos/4" {
		t.Fatalf("own rows: %s", briefs(changes))
	}
	e.complete(t, a, s, changes[1].Version)
	want("in the session of the pushes", "")
	e.complete(t, a, s, last)
	want("in the session of the pushes, again", "")
	first := changes[0].Version

	s = e.openSession(t, a, "phone")
	push("a", "phone", 5)
	want("another session is open", "")
	e.complete(t, a, s, first)
	want("the next session, nothing pulled", "")
	e.pullWindow(t, a, s, "")
	want("the next session, not completed", "")
	e.complete(t, a, s, first)
	want("confirmed up to the first", "local-2")
	e.complete(t, a, s, s.Checkin)
	want("confirmed up to the window's end", "local-2 local-4")

	s = e.openSession(t, b, "tablet")
	e.complete(t, b, s, s.Checkin)
	want("another device of b", "local-2 local-4")
	s = e.openSession(t, b, "phone")
	e.complete(t, b, s, s.Checkin)
	want("b's device", "local-1 local-2 local-4")
}

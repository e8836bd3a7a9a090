package replication

import (
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/walgate/walgate/changelog"
)

// TestRetentionOutlivesTenures: floors rise at once and partitions go an interval later, however many tenures lie between.
func TestRetentionOutlivesTenures(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{})
	s.exec(`INSERT INTO items VALUES (1)`)
	s.settle()
	day := changelog.VersionAt(time.Date(2021, 1, 2, 0, 0, 0, 0, time.UTC)) - changelog.VersionAt(time.Date(2021, 1, 1, 0, 0, 0, 0, time.UTC))
	past := changelog.VersionAt(time.Date(2021, 1, 1, 0, 0, 0, 0, time.UTC))
	for _, table := range []string{"changes", "transactions"} {
		s.exec(fmt.Sprintf(`CREATE TABLE walgate.%s_%016x PARTITION OF walgate.%[1]s FOR VALUES FROM (%[2]d) TO (%[3]d)`, table, int64(past), int64(past+day)))
	}
	s.exec(`UPDATE walgate.collections SET retention = '1 day'`)
	old := func() (n int) {
		return query[int](s, `SELECT count(*) FROM pg_inherits WHERE inhparent = 'walgate.changes'::regclass`)
	}
	had := old()
	l := NewLeader(Options{Log: s.log, Logger: slog.New(slog.NewTextHandler(s.logged, nil))})
	began := time.Now()
	for _, step := range []struct {
		after time.Duration
		want  int
	}{{0, had}, {expireInterval / 2, had}, {expireInterval, had - 1}} { // each as in a tenure of its own
		s.ok(l.expire(t.Context(), began.Add(step.after)))
		if got := old(); got != step.want {
			t.Errorf("after %s there are %d partitions, want %d", step.after, got, step.want)
		}
	}
	if c := s.collection("items"); c.Floor < past+day || !strings.Contains(c.FloorReason, "retention") {
		t.Errorf("the floor is %d (%s), want at least %d", c.Floor, c.FloorReason, past+day)
	}
}

// TestOldRecordsAreForgotten: records of pushes go when their retention has passed, a device's session only when the log
// doesn't reach back to it either; and nobody looks for them all the time.
func TestOldRecordsAreForgotten(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{})
	l := NewLeader(Options{Source: s.pool, Watcher: s.watcher, PushRetention: 24 * time.Hour})
	began := time.Now()
	for _, step := range []struct {
		after            time.Duration
		pushes, sessions int // that are left of one, and two, as below
	}{{0, 0, 1}, {expireInterval / 2, 1, 2}, {expireInterval, 0, 1}} {
		s.exec(`INSERT INTO walgate.pushes (subject, client_id, created_at) VALUES ('a', 'x', now() - interval '2 days')`)
		s.exec(`INSERT INTO walgate.sessions (subject, device_uuid, sync_uuid, max_checkin, opened_at) SELECT 'a', d, gen_random_uuid(), '', now() - make_interval(days => d::int)
			FROM unnest('{29,31}'::text[]) d ON CONFLICT DO NOTHING`)
		s.ok(l.forget(t.Context(), began.Add(step.after)))
		if n := query[int](s, `SELECT count(*) FROM walgate.pushes`); n != step.pushes {
			t.Errorf("after %s %d pushes are left, want %d", step.after, n, step.pushes)
		}
		if n := query[int](s, `SELECT count(*) FROM walgate.sessions`); n != step.sessions {
			t.Errorf("after %s %d sessions are left, want %d", step.after, n, step.sessions)
		}
	}
	s.exec(`INSERT INTO walgate.pushes (subject, client_id, created_at) VALUES ('a', 'x', now() - interval '2 days')`)
	s.ok(NewLeader(Options{Source: s.pool, Watcher: s.watcher}).forget(t.Context(), began))
	if n := query[int](s, `SELECT count(*) FROM walgate.pushes`); n != 1 {
		t.Error("a push is forgotten although none is to be")
	}
}

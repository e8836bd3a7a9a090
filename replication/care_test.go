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

package changelog

import (
	"testing"
	"time"
)

// TestGapAfterTheServerWasStartedAnew: versions go on from the present, and what lies between was never issued.
func TestGapAfterTheServerWasStartedAnew(t *testing.T) {
	t.Parallel()
	l, dsn := newLog(t)
	conn := session(t, dsn)
	a, first := restart(t, l, nil)
	v := first.Version + 5
	appendNow(t, a, transaction(100, upsert(v, v, 1, "a")))
	a.Close()
	if h := mustHead(t, l); len(h.Gaps) != 0 {
		t.Fatalf("gaps %v before any", h.Gaps)
	}
	mustExec(t, conn, `UPDATE walgate.checkpoint SET server_started = server_started - interval '1 day'`)
	ahead := time.Now().Add(time.Minute) // the source's clock, by which versions were issued that this log has forgotten
	a, second := restart(t, l, func(c *Claim) { c.SourceTime = ahead })
	if second.NewHistory != "" || second.History != first.History || second.LSN != 100 || second.Version <= VersionAt(ahead) {
		t.Fatalf("claimed %+v after %+v at %d", second, first, v)
	}
	a.Close()
	h := mustHead(t, l)
	for at, issued := range map[Version]bool{0: true, v - 1: true, v: true, v + 1: false, second.Version - 1: false, second.Version: true, second.Version + 1: false} {
		if h.Issued(at) != issued {
			t.Errorf("version %d issued: %v (log from %d, gap from %d to %d)", at, !issued, first.Version, v, second.Version)
		}
	}
	a, third := restart(t, l, nil)
	if third.Version != second.Version || len(mustHead(t, l).Gaps) != 2 {
		t.Errorf("a claim on the same server leaves gaps %v at %d, before %d", mustHead(t, l).Gaps, third.Version, second.Version)
	}
	a.Close()

	// Nothing was issued between two starts: two gaps that touch.
	mustExec(t, conn, `UPDATE walgate.checkpoint SET server_started = NULL`)
	a, fourth := restart(t, l, func(c *Claim) { c.SourceTime = ahead })
	h = mustHead(t, l)
	if h.Issued(second.Version-1) || !h.Issued(second.Version) || !h.Issued(fourth.Version) || fourth.Version <= second.Version {
		t.Errorf("gaps %v at %d after %d", h.Gaps, fourth.Version, second.Version)
	}
	a.Close()
	if _, fifth := restart(t, l, func(c *Claim) { c.SlotCreated = true }); fifth.NewHistory == "" || len(mustHead(t, l).Gaps) != 0 {
		t.Errorf("a new history keeps gaps %v, which lie below its floor", mustHead(t, l).Gaps)
	}
}

// TestGapsAreBounded: before the oldest gap that is remembered, clients start anew.
func TestGapsAreBounded(t *testing.T) {
	t.Parallel()
	l, dsn := newLog(t)
	restart(t, l, nil)
	mustExec(t, session(t, dsn), `INSERT INTO walgate.gaps SELECT 10 * n, 10 * n + 5 FROM generate_series(1, 1001) n; UPDATE walgate.checkpoint SET server_started = NULL`)
	_, c := restart(t, l, nil)
	h := mustHead(t, l)
	if len(h.Gaps) != 2*gapsMost || h.Floor != 25 || h.Gaps[0] != 30 || c.NewHistory != "" {
		t.Errorf("%d gaps from %d, floor %d, want %d gaps from 30 and floor 25", len(h.Gaps)/2, h.Gaps[0], h.Floor, gapsMost)
	}
}

// TestForgottenClaim: a leader that stands still in the middle of its claim doesn't keep the others out for good.
func TestForgottenClaim(t *testing.T) {
	t.Parallel()
	l, _ := newLog(t)
	a, first := restart(t, l, nil)
	a.Close()
	reached, proceed, ended := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	stuck := testClaim()
	stuck.Collections[0].Shape = "shape 2"
	stuck.Collections[0].Keep = func(string) bool {
		close(reached)
		<-proceed
		return true
	}
	go func() {
		a, _, err := l.NewAppender(t.Context(), NewMemoryBus(), stuck)
		if a != nil {
			a.Close()
		}
		ended <- err
	}()
	<-reached
	if _, second := restart(t, l, nil); second.Epoch != first.Epoch+1 {
		t.Errorf("epoch %d after %d", second.Epoch, first.Epoch)
	}
	close(proceed)
	if err := <-ended; err == nil {
		t.Error("the claim that stood still succeeded")
	}
}

package main

import (
	"errors"
	"net/http"
	"net/url"
	"syscall"
	"testing"
	"time"

	"github.com/walgate/walgate/internal/pgserver"
)

// TestRollingUpgrade: each of three gateways in turn is told to stop and started with the next configuration. Where a policy
// changes with it, its clients begin anew once; where none does, nobody does. Streams are told goodbye and go on elsewhere.
// At last an instance of the old configuration is alone: it serves what it can, never wrong data, and can't lead.
func TestRollingUpgrade(t *testing.T) {
	t.Parallel()
	for name, policy := range map[string]bool{"of a policy": true, "of nothing else": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFleet(t, pgserver.StartForTest(t, pgserver.Options{}), "", nil)
			f.exec(`INSERT INTO docs VALUES (50, 'u0', 'hidden')`)
			f.settle(f.present, f.absent)
			history, leader := historyOf(f.absent), f.leader()
			order := append([]*gatewayProcess{leader}, f.others(leader)...)
			f.door.Turn(t, order[1].base)
			stop, end := f.write(), f.during()
			for i, p := range order {
				p.rewrite("auto_init: true", "auto_init: true\nconfig_revision: 1")
				if policy {
					p.rewrite("claims.sub}}", "claims.sub}, where: \"row.body != 'hidden'\"}")
				}
				next := order[(i+1)%len(order)]
				f.door.Turn(t, next.base)
				streams := !policy || i == 0 // later an instance may be one that waits for its own configuration to lead
				if streams {
					stream := f.subscribe(p, f.absent.replica.cursor)
					must(t, p.cmd.Process.Signal(syscall.SIGTERM))
					f.frame(stream, "goodbye")
					f.subscribe(next, f.absent.replica.cursor)
					<-p.exited
				} else {
					must(t, p.end(syscall.SIGTERM))
				}
				f.leader() // another one, before this one returns
				must(t, p.start(t.Context()))
			}
			f.leader()
			stop()
			f.arrives(time.Now())
			end()
			for err := errAway; err != nil; pause(t.Context(), 20*time.Millisecond) {
				if err = f.absent.catchUp(t.Context()); err != nil && !errors.Is(err, errAway) {
					t.Fatal(err)
				}
			}
			if _, shown := f.absent.replica.documents["docs"]["50"]; shown == policy {
				t.Errorf("the row that the new policy hides is there: %t", shown)
			}
			f.exec(`DELETE FROM docs WHERE id = 50`)
			f.settle(f.present, f.absent)
			f.audit()
			want := 0
			if policy {
				want = 1
			}
			for _, c := range []*syncClient{f.absent, f.present} {
				if n := resynchronised(c); n != want || historyOf(c) != history {
					t.Errorf("client %s had to begin anew %d times, want %d: %v", c.name, n, want, c.counts)
				}
			}
			f.oldIsAlone(order[0], policy)
		})
	}
}

// oldIsAlone stops every gateway, and starts one with the old configuration.
func (f *fleet) oldIsAlone(p *gatewayProcess, policy bool) {
	f.t.Helper()
	for _, p := range f.all { // one may still take over from the other
		must(f.t, p.end(syscall.SIGTERM))
	}
	epoch := f.epoch()
	p.rewrite("config_revision: 1", "config_revision: 0")
	if policy {
		p.rewrite("where: \"row.body != 'hidden'\"", "where: \"row.body != 'other'\"")
	}
	must(f.t, p.start(f.t.Context()))
	resyncEventually(f.t, "it says that it can't lead", func() bool { return p.says("config_revision is lower than the change log's") > 2 })
	if active := sourceQuery[bool](f.followedSource, `SELECT active FROM pg_replication_slots WHERE slot_name = 'walgate'`); active || f.epoch() != epoch {
		f.t.Errorf("it holds the slot: %t, epoch %d after %d", active, f.epoch(), epoch)
	}
	f.absent.base = p.base
	r, err := http.NewRequestWithContext(f.t.Context(), http.MethodGet, p.base+"/sync/pull?"+url.Values{"since": {f.absent.replica.cursor}}.Encode(), nil)
	must(f.t, err)
	r.Header.Set("Authorization", "Bearer "+f.absent.token)
	res, err := f.absent.http.Do(r)
	must(f.t, err)
	res.Body.Close()
	if want := map[bool]int{true: http.StatusServiceUnavailable, false: http.StatusOK}[policy]; res.StatusCode != want {
		f.t.Errorf("a pull there: %d, want %d", res.StatusCode, want)
	}
}

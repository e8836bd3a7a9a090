package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/walgate/walgate/changelog"
)

const (
	soakEnv       = "WALGATE_TEST_SOAK"        // how long, such as 1h
	soakReportEnv = "WALGATE_TEST_SOAK_REPORT" // a file for the table of samples
	soakDefault   = 12 * time.Second
	soakPhase     = 3 * time.Minute // at most, between two quiet points
	// soakSeed puts the log on a server of its own.
	soakSeed = 2
)

// TestSoak holds one gateway process under an application, clients that come and go, and every fault that a process
// survives, and looks at it at quiet points: all clients gone, writes stopped. There every replica equals its tables, and
// goroutines, file descriptors and memory are back where they were before the first client came. Between them the
// log's old partitions expire under load.
//
// By default it lasts seconds, to keep itself alive; WALGATE_TEST_SOAK=1h makes it find leaks.
func TestSoak(t *testing.T) {
	t.Parallel()
	total := soakDefault
	if text := os.Getenv(soakEnv); text != "" {
		var err error
		if total, err = time.ParseDuration(text); err != nil {
			t.Fatalf("%s: %v", soakEnv, err)
		}
	}
	phase := min(soakPhase, total/3)
	s := newSoak(t, phase)
	defer s.report()
	first := s.quiet("before any client")
	began := time.Now()
	for n := uint64(0); n == 0 || time.Since(began)+phase < total; n++ {
		s.load(n, phase)
		s.v.settle(fmt.Sprintf("phase %d", n))
		if t.Failed() {
			return
		}
		s.returned(first, fmt.Sprintf("after phase %d", n))
		if t.Failed() {
			return
		}
	}
	s.checkGrowth()
}

// soak is a long-lived gateway and what was measured of it.
type soak struct {
	t     *testing.T
	v     *convergence
	log   *changelog.Log
	phase time.Duration

	mu      sync.Mutex
	samples []soakSample
	quiets  []soakSample
}

func newSoak(t *testing.T, phase time.Duration) *soak {
	v := &convergence{t: t, seed: soakSeed, faults: map[string]int{}, pace: 40 * time.Millisecond}
	v.begin(t)
	log, err := changelog.Open(t.Context(), v.storage, 2)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(log.Close)
	return &soak{t: t, v: v, log: log, phase: phase}
}

// load lets everything loose for a phase, samples, and expires the log's past.
func (s *soak) load(n uint64, phase time.Duration) {
	ctx, cancel := context.WithTimeout(s.t.Context(), phase)
	defer cancel()
	var beside sync.WaitGroup
	beside.Go(func() { s.sample(ctx, n) })
	beside.Go(func() { s.expire(ctx, n) })
	rng := s.v.rng(n + 1)
	s.v.run(ctx, n, n%2 == 0, func(ctx context.Context) {
		for ctx.Err() == nil && !s.t.Failed() {
			s.v.chaos(ctx, rng, deck(rng, faults), max(400*time.Millisecond, s.phase/10))
		}
	})
	beside.Wait()
}

// expire gives the log an empty partition of a past day and lets it expire, twice as the leader does: the first call
// raises the floors, the second one drops it.
func (s *soak) expire(ctx context.Context, n uint64) {
	pause(ctx, s.phase/2)
	span := changelog.VersionAt(time.Date(2020, 1, 2, 0, 0, 0, 0, time.UTC)) - changelog.VersionAt(time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC))
	lower := changelog.VersionAt(time.Date(2021, 1, 1, 0, 0, 0, 0, time.UTC)) + span*changelog.Version(n)
	for _, table := range []string{"changes", "transactions"} {
		for err := error(errAway); err != nil && ctx.Err() == nil; pause(ctx, 20*time.Millisecond) { // the log's server may be away
			err = s.v.askAt(ctx, s.v.storage, nil, fmt.Sprintf(`CREATE TABLE IF NOT EXISTS walgate.%s_%016x PARTITION OF walgate.%[1]s FOR VALUES FROM (%[2]d) TO (%[3]d)`, table, int64(lower), int64(lower+span)))
		}
	}
	var dropped []string
	for droppable := changelog.Version(0); len(dropped) == 0; pause(ctx, 100*time.Millisecond) {
		if ctx.Err() != nil {
			return // the next phase's call drops it
		}
		next, gone, err := s.log.Expire(ctx, time.Now(), droppable)
		if err != nil { // the log's server may be away
			continue
		}
		droppable, dropped = next, gone
	}
	s.v.count("log partition expired")
}

// sample measures every few seconds while ctx lasts.
func (s *soak) sample(ctx context.Context, n uint64) {
	for ; ctx.Err() == nil; pause(ctx, max(time.Second, s.phase/40)) {
		if m, err := s.measure(ctx, fmt.Sprintf("phase %d", n)); err == nil { // the process may be frozen, or the source away
			s.mu.Lock()
			s.samples = append(s.samples, m)
			s.mu.Unlock()
		}
	}
}

// quiet waits until the gateway has no client, and measures.
func (s *soak) quiet(when string) soakSample {
	s.t.Helper()
	for _, c := range s.v.clients {
		c.http.CloseIdleConnections()
	}
	var m soakSample
	s.await(when+", no client is left", func() (err error) {
		if m, err = s.measure(s.t.Context(), when); err == nil && m.sockets != 0 {
			err = fmt.Errorf("%.0f WebSockets", m.sockets)
		}
		return err
	})
	s.keep(m)
	return m
}

// returned waits until a quiet gateway is back where it was at first.
func (s *soak) returned(first soakSample, when string) {
	s.t.Helper()
	s.quiet(when)
	var m soakSample
	s.await(when+", goroutines and file descriptors are back", func() (err error) {
		if m, err = s.measure(s.t.Context(), when+", settled"); err != nil {
			return err
		}
		return m.exceeds(first)
	})
	s.keep(m)
	s.quiets = append(s.quiets, m)
}

func (s *soak) keep(m soakSample) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.samples = append(s.samples, m)
}

func (s *soak) await(what string, done func() error) {
	s.t.Helper()
	deadline := time.Now().Add(convergenceLimit)
	for err := done(); err != nil; err = done() {
		if time.Now().After(deadline) {
			s.t.Errorf("waited %s in vain until, %s: %v", convergenceLimit, what, err)
			return
		}
		pause(s.t.Context(), 250*time.Millisecond)
	}
}

// checkGrowth compares what is live on the heap at the first and the last quiet points.
func (s *soak) checkGrowth() {
	if len(s.quiets) < 3 {
		return
	}
	third := len(s.quiets) / 3
	mean := func(list []soakSample) (live float64) {
		for _, m := range list {
			live += m.live / float64(len(list))
		}
		return live
	}
	early, late := mean(s.quiets[:third]), mean(s.quiets[len(s.quiets)-third:])
	if late > 1.5*early+soakHeapSlack {
		s.t.Errorf("the heap grew: %.1f MB live at the first quiet points, %.1f MB at the last ones", early/1e6, late/1e6)
	}
}

// report logs what was injected and writes the samples where they are wanted.
func (s *soak) report() {
	var table strings.Builder
	fmt.Fprintf(&table, "%-12s %s\n", "time", soakSampleHeader)
	for _, m := range s.samples {
		fmt.Fprintf(&table, "%-12s %s\n", m.at.Format("15:04:05.0"), m)
	}
	if path := os.Getenv(soakReportEnv); path != "" {
		if err := os.WriteFile(path, []byte(table.String()), 0o600); err != nil {
			s.t.Error(err)
		}
	}
	s.t.Logf("%d commits, %v\n%-12s %s", s.v.commits.Load(), s.v.faults, "", soakSampleHeader)
	for _, m := range s.quiets {
		s.t.Logf("%s", m)
	}
}

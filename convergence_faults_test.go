package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/internal/badlink"
	"github.com/walgate/walgate/internal/failpoint"
	"github.com/walgate/walgate/internal/pgserver"
)

// fault is something that goes wrong from outside. It returns whether it really happened, and leaves everything well.
type fault struct {
	name  string
	times int // how often it is in a seed's deck
	do    func(v *convergence, ctx context.Context, rng *rand.Rand) (bool, error)
}

// deadlyFaults end the gateway's process, or what it can't go on without.
var deadlyFaults = []fault{
	{"gateway killed", 2, func(v *convergence, ctx context.Context, rng *rand.Rand) (bool, error) {
		return true, v.restartGateway(ctx, rng, syscall.SIGKILL)
	}},
	{"gateway stopped", 1, func(v *convergence, ctx context.Context, rng *rand.Rand) (bool, error) {
		return true, v.restartGateway(ctx, rng, syscall.SIGTERM)
	}},
	{"gateway killed at a step", 5, (*convergence).dieAtAStep},
	{"slot dropped", 1, (*convergence).dropSlot},
}

// faults are those that the gateway's process survives.
var faults = []fault{
	{"source crashed", 1, func(v *convergence, ctx context.Context, _ *rand.Rand) (bool, error) {
		return true, crash(ctx, v.server)
	}},
	{"source restarted", 1, func(v *convergence, ctx context.Context, _ *rand.Rand) (bool, error) {
		return true, v.server.Restart(context.WithoutCancel(ctx))
	}},
	{"log server crashed", 1, func(v *convergence, ctx context.Context, _ *rand.Rand) (bool, error) {
		return v.store != nil, crash(ctx, v.store)
	}},
	{"log server restarted", 1, func(v *convergence, ctx context.Context, _ *rand.Rand) (bool, error) {
		if v.store == nil {
			return false, nil
		}
		return true, v.store.Restart(context.WithoutCancel(ctx))
	}},
	{"walsender terminated", 2, func(v *convergence, ctx context.Context, _ *rand.Rand) (done bool, err error) {
		return done, v.ask(ctx, &done, `SELECT coalesce(bool_or(pg_terminate_backend(active_pid)), false) FROM pg_replication_slots WHERE active_pid IS NOT NULL`)
	}},
	{"gateway's backends terminated", 1, func(v *convergence, ctx context.Context, _ *rand.Rand) (done bool, err error) {
		return done, v.ask(ctx, &done, `SELECT coalesce(bool_or(pg_terminate_backend(pid)), false) FROM pg_stat_activity WHERE application_name = 'walgate' AND backend_type = 'client backend'`)
	}},
	{"checkpoint", 1, func(v *convergence, ctx context.Context, _ *rand.Rand) (bool, error) {
		return true, v.ask(ctx, nil, `CHECKPOINT`)
	}},
	{"gateway frozen", 1, (*convergence).freezeBriefly},
	{"gateway frozen past wal_sender_timeout", 1, (*convergence).freezeLong},
	{"link cut", 3, func(v *convergence, _ context.Context, rng *rand.Rand) (bool, error) {
		return v.link(rng).Cut() > 0, nil
	}},
	{"link down", 1, func(v *convergence, ctx context.Context, rng *rand.Rand) (bool, error) {
		l := v.link(rng)
		had := l.Open() > 0
		l.Down()
		defer l.Up()
		pause(ctx, time.Duration(100+rng.IntN(700))*time.Millisecond)
		return had, nil
	}},
	{"link stalled", 2, func(v *convergence, ctx context.Context, rng *rand.Rand) (bool, error) {
		l := v.link(rng)
		had := l.Open() > 0
		l.Stall()
		defer l.Resume()
		pause(ctx, time.Duration(200+rng.IntN(1500))*time.Millisecond)
		return had, nil
	}},
	{"link stalled, then cut", 2, func(v *convergence, ctx context.Context, rng *rand.Rand) (bool, error) {
		l := v.link(rng)
		l.Stall()
		defer l.Resume()
		pause(ctx, time.Duration(200+rng.IntN(800))*time.Millisecond)
		return l.Cut() > 0, nil
	}},
	{"link slow", 1, func(v *convergence, ctx context.Context, rng *rand.Rand) (bool, error) {
		l := v.link(rng)
		had := l.Open() > 0
		l.Slow(20_000 + rng.IntN(500_000))
		defer l.Slow(0)
		pause(ctx, time.Duration(300+rng.IntN(900))*time.Millisecond)
		return had, nil
	}},
}

// deck is every fault of the lists, as often as each asks for, in an order that follows from rng.
func deck(rng *rand.Rand, lists ...[]fault) (cards []fault) {
	for _, list := range lists {
		for _, f := range list {
			for range f.times {
				cards = append(cards, f)
			}
		}
	}
	rng.Shuffle(len(cards), func(i, j int) { cards[i], cards[j] = cards[j], cards[i] })
	return cards
}

func (v *convergence) link(rng *rand.Rand) *badlink.Link { return v.links[rng.IntN(len(v.links))] }

// chaos does what the cards say until ctx ends, with a pause after each, and returns the cards that are left.
func (v *convergence) chaos(ctx context.Context, rng *rand.Rand, cards []fault, longest time.Duration) []fault {
	for len(cards) > 0 && !v.t.Failed() {
		pause(ctx, 50*time.Millisecond+upTo(rng, longest))
		if ctx.Err() != nil {
			break
		}
		f := cards[0]
		cards = cards[1:]
		happened, err := f.do(v, ctx, rng)
		if err != nil {
			v.t.Errorf("%s: %v", f.name, err)
			break
		}
		if happened {
			v.count(f.name)
		}
	}
	return cards
}

func crash(ctx context.Context, s *pgserver.Server) error {
	if s == nil {
		return nil
	}
	if err := s.Crash(); err != nil {
		return err
	}
	return s.Restart(context.WithoutCancel(ctx))
}

// ask runs a statement in the source as the superuser; into nil takes nothing.
func (v *convergence) ask(ctx context.Context, into any, sql string) error {
	return v.askAt(ctx, v.dsn, into, sql)
}

func (v *convergence) askAt(ctx context.Context, dsn string, into any, sql string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), convergenceLimit)
	defer cancel()
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	if into == nil {
		_, err = conn.Exec(ctx, sql)
		return err
	}
	return conn.QueryRow(ctx, sql).Scan(into)
}

// await asks until the answer is true.
func (v *convergence) await(ctx context.Context, what, sql string) error {
	deadline := time.Now().Add(convergenceLimit)
	for done := false; ; pause(ctx, 10*time.Millisecond) {
		if err := v.ask(ctx, &done, sql); err != nil || done {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("waited %s in vain until %s", convergenceLimit, what)
		}
	}
}

func (v *convergence) restartGateway(ctx context.Context, rng *rand.Rand, signal syscall.Signal) error {
	v.tables.Lock() // a table that isn't there refuses a start
	defer v.tables.Unlock()
	if err := v.gateway.end(signal); err != nil {
		return err
	}
	pause(ctx, upTo(rng, 300*time.Millisecond))
	return v.gateway.start(context.WithoutCancel(ctx))
}

// dieAtAStep runs a gateway that ends itself at a step of its path, where that comes within a while.
func (v *convergence) dieAtAStep(ctx context.Context, rng *rand.Rand) (bool, error) {
	v.tables.Lock()
	defer v.tables.Unlock()
	if err := v.gateway.end(syscall.SIGKILL); err != nil {
		return false, err
	}
	at := failpoint.SlotTaken + failpoint.Point(rng.IntN(int(failpoint.Acknowledged-failpoint.SlotTaken)+1))
	hit := 1
	switch {
	case at == failpoint.Received || at == failpoint.Decoded:
		hit += rng.IntN(5000)
	case at > failpoint.Decoded && at < failpoint.Acknowledging:
		hit += rng.IntN(100)
	}
	if err := v.gateway.launchToDie(at, hit); err != nil {
		return false, err
	}
	limit := time.NewTimer(1500 * time.Millisecond)
	defer limit.Stop()
	died := false
	select {
	case <-v.gateway.exited:
		var err error
		if died, err = v.gateway.killedItself(); err != nil {
			return false, err
		}
		v.count("died at " + at.String())
	case <-limit.C:
		if err := v.gateway.end(syscall.SIGKILL); err != nil {
			return false, err
		}
	}
	return died, v.gateway.start(context.WithoutCancel(ctx))
}

// dropSlot drops the slot while no gateway runs.
func (v *convergence) dropSlot(ctx context.Context, _ *rand.Rand) (bool, error) {
	v.tables.Lock()
	defer v.tables.Unlock()
	if err := v.gateway.end(syscall.SIGKILL); err != nil {
		return false, err
	}
	if err := v.await(ctx, "the walsender is gone", `SELECT NOT bool_or(active) FROM pg_replication_slots`); err != nil {
		return false, err
	}
	v.altering.Lock() // PostgreSQL may decode by an old catalog what was altered while a slot was made
	defer v.altering.Unlock()
	if err := v.ask(ctx, nil, `SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots`); err != nil {
		return false, err
	}
	return true, v.gateway.start(context.WithoutCancel(ctx))
}

func (v *convergence) freezeBriefly(ctx context.Context, rng *rand.Rand) (bool, error) {
	if err := v.gateway.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		return false, err
	}
	pause(ctx, 100*time.Millisecond+upTo(rng, 900*time.Millisecond))
	return true, v.gateway.cmd.Process.Signal(syscall.SIGCONT)
}

// freezeLong stops the process until the source has given its walsender up. Every other seed has the time for it.
func (v *convergence) freezeLong(ctx context.Context, _ *rand.Rand) (bool, error) {
	if v.seed%2 != 0 {
		return false, nil
	}
	if err := v.await(ctx, "the gateway streams", `SELECT count(*) > 0 FROM pg_replication_slots WHERE active`); err != nil {
		return false, err
	}
	if err := v.gateway.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		return false, err
	}
	err := v.await(ctx, "the source gave the frozen gateway up", `SELECT NOT bool_or(active) FROM pg_replication_slots`)
	return true, errors.Join(err, v.gateway.cmd.Process.Signal(syscall.SIGCONT))
}

func upTo(rng *rand.Rand, d time.Duration) time.Duration { return time.Duration(rng.Int64N(int64(d))) }

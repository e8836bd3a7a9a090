package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"syscall"
	"time"

	"github.com/walgate/walgate/internal/failpoint"
)

// anyInstance chooses one.
func (r *run) anyInstance(rng *rand.Rand) *instance { return r.fleet[rng.IntN(len(r.fleet))] }

// leader finds the gateway that leads now; nil: none says so within a moment.
func (r *run) leader(ctx context.Context) *instance {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	for {
		for _, i := range r.fleet {
			if s, _, err := i.ask(ctx); err == nil && s.Leading {
				return i
			}
		}
		if !sleep(ctx, 50*time.Millisecond) {
			return nil
		}
	}
}

// restart ends a gateway, leaves it away for a while, and starts it again.
func (r *run) restart(ctx context.Context, i *instance, signal syscall.Signal, away time.Duration) (string, error) {
	return exclusively(ctx, []token{i.hold}, func() (string, error) {
		if err := i.end(signal); err != nil {
			return "", err
		}
		r.note("%s: %s, away for %s", i.name, signal, away)
		sleep(ctx, away)
		i.start("")
		return i.name, nil
	})
}

func (r *run) killLeader(ctx context.Context, rng *rand.Rand) (string, error) {
	away := upTo(rng, 700*time.Millisecond)
	i := r.leader(ctx)
	if i == nil {
		return "", nil
	}
	return r.restart(ctx, i, syscall.SIGKILL, away)
}

func (r *run) killOne(ctx context.Context, rng *rand.Rand) (string, error) {
	return r.restart(ctx, r.anyInstance(rng), syscall.SIGKILL, upTo(rng, 700*time.Millisecond))
}

func (r *run) stopOne(ctx context.Context, rng *rand.Rand) (string, error) {
	return r.restart(ctx, r.anyInstance(rng), syscall.SIGTERM, upTo(rng, 500*time.Millisecond))
}

func (r *run) killAll(ctx context.Context, rng *rand.Rand) (string, error) {
	away := upTo(rng, 300*time.Millisecond)
	return exclusively(ctx, r.holds(), func() (string, error) {
		if err := r.endAll(); err != nil {
			return "", err
		}
		r.note("all gateways killed")
		sleep(ctx, away)
		r.startAll()
		return "all", nil
	})
}

// endAll kills every gateway; the caller holds them.
func (r *run) endAll() (err error) {
	for _, i := range r.fleet {
		err = errors.Join(err, i.end(syscall.SIGKILL))
	}
	return err
}

func (r *run) startAll() {
	for _, i := range r.fleet {
		i.start("")
	}
}

// stepTakes is how long a gateway is waited for that shall die at a step: it must start, and lead or serve, before.
const stepTakes = 4 * time.Second

// dieAtAStep runs a gateway that ends itself at a step of its path. For the leader's steps the present leader is killed, so
// that another takes over.
func (r *run) dieAtAStep(ctx context.Context, rng *rand.Rand) (string, error) {
	i := r.anyInstance(rng)
	points := failpoint.All()[failpoint.SlotTaken : failpoint.BytesWritten+1]
	at, hit := points[rng.IntN(len(points))], 1
	switch {
	case at == failpoint.Received || at == failpoint.Decoded:
		hit += rng.IntN(60)
	case at > failpoint.Decoded && at <= failpoint.PushCommitted:
		hit += rng.IntN(4)
	}
	limit := between(rng, stepTakes*2/3, stepTakes)
	died := ""
	_, err := exclusively(ctx, []token{i.hold}, func() (string, error) {
		if err := i.end(syscall.SIGKILL); err != nil {
			return "", err
		}
		i.start(fmt.Sprintf("%s:%d", at, hit))
		r.note("%s dies at hit %d of %s", i.name, hit, at)
		return "", nil
	})
	if err != nil || ctx.Err() != nil {
		return "", err
	}
	if l := r.leader(ctx); at <= failpoint.Acknowledged && l != nil && l != i {
		if _, err := r.restart(ctx, l, syscall.SIGKILL, 300*time.Millisecond); err != nil {
			return "", err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for died = i.hasDied(); died == "" && sleep(ctx, 20*time.Millisecond); died = i.hasDied() {
	}
	if died != "" {
		r.count("died at " + at.String())
		died = i.name + " at " + died
	}
	// Unless it died, it may yet do so: the next start is without the step.
	_, err = exclusively(context.WithoutCancel(ctx), []token{i.hold}, func() (string, error) {
		if i.hasDied() != "" {
			return "", nil
		}
		if err := i.end(syscall.SIGKILL); err != nil {
			return "", err
		}
		i.start("")
		return "", nil
	})
	return died, err
}

// hasDied is the step at which the gateway killed itself since its last start.
func (i *instance) hasDied() string {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.died
}

// upgrade raises config_revision and restarts one gateway after the other, as a rolling deploy does.
func (r *run) upgrade(ctx context.Context, _ *rand.Rand) (string, error) {
	done := 0
	for _, i := range r.fleet {
		_, err := exclusively(context.WithoutCancel(ctx), []token{i.hold}, func() (string, error) {
			i.revision++
			if err := r.reconfigure(i); err != nil {
				return "", err
			}
			if err := i.end(syscall.SIGTERM); err != nil {
				return "", err
			}
			i.start("")
			r.note("%s: config_revision %d", i.name, i.revision)
			done++
			return "", nil
		})
		if err != nil {
			return "", err
		}
		// A deploy waits until what it started is ready, but not for ever.
		if err := i.awaitReady(ctx, 2*time.Second); err != nil && ctx.Err() == nil {
			r.note("the deploy goes on without waiting longer: %v", err)
		}
	}
	return fmt.Sprintf("%d gateways", done), nil
}

func (r *run) freezeOne(ctx context.Context, rng *rand.Rand) (string, error) {
	return r.freeze(ctx, r.anyInstance(rng), between(rng, 100*time.Millisecond, 1500*time.Millisecond))
}

func (r *run) freezeLeader(ctx context.Context, rng *rand.Rand) (string, error) {
	for_ := between(rng, 100*time.Millisecond, 1500*time.Millisecond)
	i := r.leader(ctx)
	if i == nil {
		return "", nil
	}
	return r.freeze(ctx, i, for_)
}

func (r *run) freezeBeyond(ctx context.Context, _ *rand.Rand) (string, error) {
	i := r.leader(ctx)
	if i == nil {
		return "", nil
	}
	return r.freeze(context.WithoutCancel(ctx), i, frozenBeyond)
}

func (r *run) freezeLong(ctx context.Context, _ *rand.Rand) (string, error) {
	i := r.leader(ctx)
	if i == nil {
		return "", nil
	}
	return r.freeze(context.WithoutCancel(ctx), i, frozenLong)
}

func (r *run) freeze(ctx context.Context, i *instance, d time.Duration) (string, error) {
	return exclusively(ctx, []token{i.hold}, func() (string, error) {
		if err := i.signal(syscall.SIGSTOP); err != nil {
			return "", err
		}
		r.note("%s frozen for %s", i.name, d)
		sleep(ctx, d)
		return i.name, i.signal(syscall.SIGCONT)
	})
}

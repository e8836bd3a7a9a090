package chaos

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/walgate/walgate/internal/pgserver"
)

// withSource runs what must have the source for itself.
func (r *run) withSource(ctx context.Context, do func() (string, error)) (string, error) {
	return exclusively(ctx, []token{r.sourceHold}, do)
}

func (r *run) withLog(ctx context.Context, do func() (string, error)) (string, error) {
	return exclusively(ctx, []token{r.logHold}, do)
}

// crash ends a server as a power cut would, and lets it recover.
func crash(ctx context.Context, s *pgserver.Server) (string, error) {
	if err := s.Crash(); err != nil {
		return "", err
	}
	return "recovered", s.Restart(context.WithoutCancel(ctx))
}

// restarted shuts a server down as an administrator who is in a hurry does.
func restarted(ctx context.Context, s *pgserver.Server) (string, error) {
	stopping, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second) // a walsender may hold it up
	defer cancel()
	if err := s.Stop(stopping); err != nil {
		return "", err
	}
	return "restarted", s.Restart(context.WithoutCancel(ctx))
}

func (r *run) crashSource(ctx context.Context, _ *rand.Rand) (string, error) {
	return r.withSource(ctx, func() (string, error) { return crash(ctx, r.source) })
}

func (r *run) restartSource(ctx context.Context, _ *rand.Rand) (string, error) {
	return r.withSource(ctx, func() (string, error) { return restarted(ctx, r.source) })
}

func (r *run) crashLog(ctx context.Context, _ *rand.Rand) (string, error) {
	return r.withLog(ctx, func() (string, error) { return crash(ctx, r.stack.log) })
}

func (r *run) restartLog(ctx context.Context, _ *rand.Rand) (string, error) {
	return r.withLog(ctx, func() (string, error) { return restarted(ctx, r.stack.log) })
}

// terminate ends backends of a server; the statement says how many.
func (r *run) terminate(ctx context.Context, server *pgserver.Server, sql string) (string, error) {
	var n int
	if err := r.ask(ctx, server, "postgres", &n, sql); err != nil || n == 0 {
		return "", err
	}
	return fmt.Sprintf("%d backends", n), nil
}

func (r *run) endWalsender(ctx context.Context, _ *rand.Rand) (string, error) {
	return r.withSource(ctx, func() (string, error) {
		return r.terminate(ctx, r.source, `SELECT count(pg_terminate_backend(active_pid)) FROM pg_replication_slots WHERE active_pid IS NOT NULL AND slot_type = 'logical'`)
	})
}

func (r *run) endBackends(ctx context.Context, rng *rand.Rand) (string, error) {
	const sql = `SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name LIKE 'walgate%' AND backend_type = 'client backend'`
	if r.setup.logElsewhere && rng.IntN(2) == 0 {
		return r.withLog(ctx, func() (string, error) { return r.terminate(ctx, r.stack.log, sql) })
	}
	return r.withSource(ctx, func() (string, error) { return r.terminate(ctx, r.source, sql) })
}

func (r *run) promoteCaughtUp(ctx context.Context, _ *rand.Rand) (string, error) {
	return r.withSource(ctx, func() (string, error) {
		if r.standby == nil || !r.slotSynchronised(ctx) {
			return "", nil
		}
		return "caught up", r.promote(context.WithoutCancel(ctx), false)
	})
}

func (r *run) promoteBehind(ctx context.Context, rng *rand.Rand) (string, error) {
	behind := between(rng, 50*time.Millisecond, 600*time.Millisecond)
	return r.withSource(ctx, func() (string, error) {
		if r.standby == nil || !r.slotSynchronised(ctx) {
			return "", nil
		}
		r.wal.Down()
		r.note("the standby gets nothing any more")
		sleep(ctx, behind)
		return fmt.Sprintf("%s behind", behind.Round(time.Millisecond)), r.promote(context.WithoutCancel(ctx), true)
	})
}

func (r *run) restoreSource(ctx context.Context, _ *rand.Rand) (string, error) {
	return r.withSource(ctx, func() (string, error) {
		for _, l := range r.toSource() {
			l.Down()
		}
		if err := restore(r.source, r.backupOf("source")); err != nil {
			return "", err
		}
		if err := r.source.Restart(context.WithoutCancel(ctx)); err != nil {
			return "", err
		}
		r.world.Lost("the source was restored from a backup")
		for _, l := range r.toSource() {
			l.Up()
		}
		return "from before the first round", nil
	})
}

func restore(s *pgserver.Server, from string) error {
	if err := s.Crash(); err != nil {
		return err
	}
	return s.Restore(from)
}

func (r *run) restoreLog(ctx context.Context, _ *rand.Rand) (string, error) {
	return r.withLog(ctx, func() (string, error) {
		if err := restore(r.stack.log, r.backupOf("log")); err != nil {
			return "", err
		}
		return "from before the first round", r.stack.log.Restart(context.WithoutCancel(ctx))
	})
}

func (r *run) jumpSource(ctx context.Context, rng *rand.Rand) (string, error) {
	return r.jump(ctx, rng, "source", r.sourceHold, func() *pgserver.Server { return r.source })
}

func (r *run) jumpLog(ctx context.Context, rng *rand.Rand) (string, error) {
	return r.jump(ctx, rng, "log", r.logHold, func() *pgserver.Server { return r.stack.log })
}

// jump sets a server's clock an hour forward or back, or right again; there it stays until the next jump.
func (r *run) jump(ctx context.Context, rng *rand.Rand, name string, hold token, server func() *pgserver.Server) (string, error) {
	by := []time.Duration{time.Hour, -time.Hour, 0}[rng.IntN(3)]
	return exclusively(ctx, []token{hold}, func() (string, error) {
		if err := r.stack.setClock(name, by); err != nil {
			return "", err
		}
		err := r.await(ctx, server(), "the clock has jumped", `SELECT abs(extract(epoch FROM clock_timestamp()) - $1) < 600`, time.Now().Add(by).Unix())
		return by.String(), err
	})
}

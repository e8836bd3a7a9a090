package chaos

import (
	"context"
	"math/rand/v2"
	"time"
)

// dropSlot drops the slot as an administrator does who wants it gone whoever reads from it.
func (r *run) dropSlot(ctx context.Context, _ *rand.Rand) (string, error) {
	return r.withSource(ctx, func() (string, error) {
		deadline := time.Now().Add(5 * time.Second)
		for {
			var left, had int
			err := r.ask(ctx, r.source, database, &had, `SELECT count(pg_terminate_backend(active_pid, 1000)) FROM pg_replication_slots WHERE active_pid IS NOT NULL AND slot_type = 'logical'`)
			if err != nil {
				return "", err
			}
			// Between the two a gateway may have taken it again.
			if err = r.ask(ctx, r.source, database, nil, `SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_type = 'logical' AND active_pid IS NULL`); err == nil {
				err = r.ask(ctx, r.source, database, &left, `SELECT count(*) FROM pg_replication_slots WHERE slot_type = 'logical' AND active_pid IS NOT NULL`)
			}
			if err == nil && left == 0 {
				return "slot walgate", nil
			}
			if time.Now().After(deadline) {
				return "", err
			}
		}
	})
}

// invalidateSlot lets the slot fall behind more WAL than max_slot_wal_keep_size allows, while no gateway runs or under the
// eyes of those that do.
func (r *run) invalidateSlot(ctx context.Context, rng *rand.Rand) (string, error) {
	running := rng.IntN(2) == 0
	tokens := append(r.holds(), r.sourceHold)
	if running {
		tokens = []token{r.sourceHold}
	}
	return exclusively(ctx, tokens, func() (what string, err error) {
		if r.standby != nil {
			return "", nil // it needs the WAL too
		}
		if !running {
			if err := r.endAll(); err != nil {
				return "", err
			}
			defer r.startAll()
		}
		for _, sql := range []string{`ALTER SYSTEM SET max_slot_wal_keep_size = '1MB'`, `ALTER SYSTEM SET wal_keep_size = 0`, `SELECT pg_reload_conf()`} {
			if err := r.ask(ctx, r.source, "postgres", nil, sql); err != nil {
				return "", err
			}
		}
		if err := r.await(ctx, r.source, "max_slot_wal_keep_size is small", `SELECT current_setting('max_slot_wal_keep_size') = '1MB'`); err != nil {
			return "", err
		}
		for range 4 {
			if err := r.ask(ctx, r.source, "postgres", nil, `SELECT pg_logical_emit_message(false, 'noise', repeat('x', 1000)), pg_switch_wal()`); err != nil {
				return "", err
			}
		}
		if err := r.ask(ctx, r.source, "postgres", nil, `CHECKPOINT`); err != nil {
			return "", err
		}
		var lost bool
		if err := r.ask(ctx, r.source, "postgres", &lost, `SELECT coalesce(bool_or(wal_status = 'lost'), false) FROM pg_replication_slots`); err != nil {
			return "", err
		}
		for _, sql := range []string{`ALTER SYSTEM RESET max_slot_wal_keep_size`, `SELECT pg_reload_conf()`} {
			if err := r.ask(ctx, r.source, "postgres", nil, sql); err != nil {
				return "", err
			}
		}
		switch {
		case !lost:
			return "", nil // it had been read far enough
		case running:
			return "while gateways ran", nil
		}
		return "while no gateway ran", nil
	})
}

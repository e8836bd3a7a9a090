package chaos

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/internal/badlink"
	"github.com/walgate/walgate/internal/pgserver"
)

// startStandby makes a streaming standby of the source; its way of WAL is a relay.
func (r *run) startStandby(ctx context.Context) (err error) {
	saved := filepath.Join(r.stack.dir, "saved")
	defer func() { err = errors.Join(err, os.RemoveAll(saved)) }()
	if err := r.ask(ctx, r.source, "postgres", nil, `ALTER SYSTEM SET wal_keep_size = '512MB'`); err != nil {
		return err
	}
	if r.setup.synced {
		if err := r.ask(ctx, r.source, "postgres", nil, `SELECT pg_create_physical_replication_slot('standby', true)`); err != nil {
			return err
		}
	}
	if err := r.copySource(ctx, saved); err != nil {
		return err
	}
	if r.wal, err = badlink.Start(address(r.source)); err != nil {
		return err
	}
	way, err := r.wal.Through(r.source.DSN("postgres"))
	if err != nil {
		return err
	}
	all := settings()
	all["primary_conninfo"] = way
	if r.setup.synced {
		all["sync_replication_slots"], all["hot_standby_feedback"], all["primary_slot_name"] = "on", "on", "standby"
	}
	r.standby, err = pgserver.StartCopy(ctx, pgserver.Copy{From: saved, DropSlots: true, StandbyOf: r.source, Settings: all, Install: r.stack.o.Install})
	return err
}

// copySource saves the source's files; for a moment it is down.
func (r *run) copySource(ctx context.Context, dir string) error {
	return errors.Join(r.source.Crash(), r.source.Save(dir), r.source.Restart(context.WithoutCancel(ctx)))
}

func (r *run) backupOf(name string) string { return filepath.Join(r.stack.dir, "backup-"+name) }

// backUp keeps a copy of the source's files, and of the log's where it is elsewhere, from which faults restore.
func (r *run) backUp(ctx context.Context) error {
	if err := r.copySource(ctx, r.backupOf("source")); err != nil || !r.setup.logElsewhere {
		return err
	}
	log := r.stack.log
	return errors.Join(log.Crash(), log.Save(r.backupOf("log")), log.Restart(context.WithoutCancel(ctx)))
}

// leaveSource gives the servers back as the next run wants them.
func (r *run) leaveSource() error {
	ctx, cancel := context.WithTimeout(context.Background(), serverLimit)
	defer cancel()
	var err error
	if r.source != r.stack.source { // promoted; the former primary lags behind
		former := r.stack.source
		r.stack.source = r.source
		err = errors.Join(former.Crash(), former.Close(ctx))
	}
	if r.standby != nil {
		err = errors.Join(err, r.standby.Crash(), r.standby.Close(ctx))
	}
	if r.setup.standby {
		err = errors.Join(err, r.ask(ctx, r.source, "postgres", nil, `ALTER SYSTEM RESET ALL`), r.ask(ctx, r.source, "postgres", nil, `SELECT pg_reload_conf()`))
	}
	for _, name := range []string{"source", "log"} {
		err = errors.Join(err, os.RemoveAll(r.backupOf(name)))
	}
	if r.setup.clock {
		err = errors.Join(err, r.stack.setClock("source", 0), r.stack.setClock("log", 0))
	}
	return err
}

// ask runs a statement as the superuser; into nil takes nothing.
func (r *run) ask(ctx context.Context, server *pgserver.Server, database string, into any, sql string, args ...any) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), serverLimit)
	defer cancel()
	conn, err := pgx.Connect(ctx, server.DSN(database))
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	if into == nil {
		_, err = conn.Exec(ctx, sql, args...)
		return err
	}
	return conn.QueryRow(ctx, sql, args...).Scan(into)
}

// await asks until the answer is true.
func (r *run) await(ctx context.Context, server *pgserver.Server, what, sql string, args ...any) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), serverLimit)
	defer cancel()
	for done := false; ; {
		if err := r.ask(ctx, server, "postgres", &done, sql, args...); err != nil {
			return err
		}
		if done {
			return nil
		}
		if !sleep(ctx, 10*time.Millisecond) {
			return fmt.Errorf("waited %s in vain until %s", serverLimit, what)
		}
	}
}

// noteSessions notes what the databases' sessions are at.
func (r *run) noteSessions() {
	for name, server := range map[string]*pgserver.Server{"source": r.source, "log": r.stack.log} {
		if server == nil {
			continue
		}
		var text string
		err := r.ask(context.Background(), server, "postgres", &text, `SELECT coalesce(string_agg(format('%s of %s, %s, waits %s/%s, blocked by %s, for %s: %s', pid, application_name, state, wait_event_type, wait_event,
			pg_blocking_pids(pid), clock_timestamp() - coalesce(xact_start, state_change), left(regexp_replace(query, '\s+', ' ', 'g'), 200)), E'\n'), '')
			FROM pg_stat_activity WHERE datname LIKE 'chaos%' AND (state <> 'idle' OR xact_start IS NOT NULL)`)
		r.note("sessions of the %s (%v):\n%s", name, err, text)
	}
}

// toSource are the relays to the source: everybody's who uses it.
func (r *run) toSource() []*badlink.Link {
	links := []*badlink.Link{r.app}
	for _, i := range r.fleet {
		links = append(links, i.source, i.replication)
		if !r.setup.logElsewhere {
			links = append(links, i.storage)
		}
	}
	return links
}

// isolateSource cuts everybody off from the source and waits until nobody but the harness and the standby is connected.
func (r *run) isolateSource(ctx context.Context) error {
	for _, l := range r.toSource() {
		l.Down()
	}
	return r.await(ctx, r.source, "nobody is connected to the source", `WITH gone AS (SELECT pg_terminate_backend(pid) FROM pg_stat_activity
		WHERE pid <> pg_backend_pid() AND datname LIKE 'chaos%' AND backend_type IN ('client backend', 'walsender')) SELECT count(*) = 0 FROM gone`)
}

// promote puts the standby in the source's place. behind says that it never gets the last commits.
func (r *run) promote(ctx context.Context, behind bool) error {
	if !behind {
		if err := r.isolateSource(ctx); err != nil {
			return err
		}
		var end string
		if err := r.ask(ctx, r.source, "postgres", &end, `SELECT pg_current_wal_flush_lsn()::text`); err != nil {
			return err
		}
		if err := r.await(ctx, r.standby, "the standby has replayed "+end, `SELECT pg_last_wal_replay_lsn() >= $1::pg_lsn`, end); err != nil {
			return err
		}
	}
	if err := r.source.Crash(); err != nil {
		return err
	}
	for _, l := range r.toSource() {
		l.Down() // nobody reaches the new primary before the world knows
	}
	if err := r.standby.Promote(ctx); err != nil {
		return err
	}
	r.source, r.standby = r.standby, nil
	if behind {
		r.world.Lost("a standby was promoted behind the source")
	}
	for _, l := range r.toSource() {
		l.TurnTo(address(r.source))
		l.Up()
	}
	return nil
}

// slotSynchronised waits, where the standby is to keep the gateways' slot, until it does; false: not in time.
func (r *run) slotSynchronised(ctx context.Context) bool {
	if !r.setup.synced {
		return true
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	for {
		var has bool
		err := r.ask(ctx, r.source, "postgres", nil, `SELECT pg_log_standby_snapshot()`) // lets the slot's restart position pass the standby's
		if err == nil {
			err = r.ask(ctx, r.standby, "postgres", &has, `SELECT EXISTS (SELECT FROM pg_replication_slots WHERE plugin = 'pgoutput' AND synced AND NOT temporary)`)
		}
		if err == nil && has {
			return true
		}
		if !sleep(ctx, 100*time.Millisecond) {
			r.note("the standby didn't get the gateways' slot in time: %v", err)
			return false
		}
	}
}

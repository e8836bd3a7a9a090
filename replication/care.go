package replication

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/schema"
)

// Fence commits a transactional logical message durably and returns its place. Once the log has passed that LSN, it
// holds every transaction that was visible before the call.
func Fence(ctx context.Context, source interface {
	BeginTx(context.Context, pgx.TxOptions) (pgx.Tx, error)
}) (changelog.LSN, error) {
	var lsn int64
	tx, err := source.BeginTx(ctx, pgx.TxOptions{})
	if err == nil {
		defer tx.Rollback(context.WithoutCancel(ctx))
		_, err = tx.Exec(ctx, `SELECT set_config('synchronous_commit', 'on', true) WHERE current_setting('synchronous_commit') IN ('off', 'local')`)
	}
	if err == nil {
		err = tx.QueryRow(ctx, `SELECT (pg_logical_emit_message(true, $1, '') - '0/0')::int8`, FencePrefix).Scan(&lsn)
	}
	if err == nil {
		err = tx.Commit(ctx)
	}
	if err != nil {
		return 0, fmt.Errorf("put a fence into the source's WAL: %w", err)
	}
	return changelog.LSN(lsn), nil
}

const (
	slotCheckInterval = 10 * time.Second
	expireInterval    = time.Hour // far above the longest read
)

// watchSlot looks at the slot now and then, whether or not this instance leads, and whenever it begins to.
func (l *Leader) watchSlot(ctx context.Context) {
	tick := time.NewTicker(l.o.timing.slot)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-l.lookAtSlot:
		}
		if err := l.checkSlot(ctx); err != nil && ctx.Err() == nil {
			l.o.Logger.Warn("the slot can't be watched; trying again", "error", err)
		}
	}
}

// care refuses to be a synchronous standby and applies retention while this instance leads.
func (l *Leader) care(ctx context.Context, walsender uint32, epoch int64) error {
	tick := time.NewTicker(slotCheckInterval)
	defer tick.Stop()
	for {
		if err := l.note(ctx, epoch); err != nil && ctx.Err() == nil {
			l.o.Logger.Warn("how far the log has come could not be noted in the source; trying again", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if err := l.refuseSynchronous(ctx, walsender); err != nil {
			return err
		}
		if err := l.expire(ctx, time.Now()); err != nil && ctx.Err() == nil {
			l.o.Logger.Warn("retention could not be applied to the change log; trying again", "error", err)
		}
		if err := l.forget(ctx, time.Now()); err != nil && ctx.Err() == nil {
			l.o.Logger.Warn("old records of pushes and sessions could not be deleted from the source; trying again", "error", err)
		}
	}
}

// note raises a number in the source and then in the log, where the log has moved. A source that was restored from a copy
// of its files, and has gone on since, may look like the one that was followed: this number is then behind the log's.
func (l *Leader) note(ctx context.Context, epoch int64) error {
	at := int64(l.o.Stats.Transactions.Load())
	if at == l.notedAt {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if _, err := l.o.Source.Exec(ctx, `UPDATE walgate.source SET noted = greatest(noted, $1)`, l.noted+1); err != nil {
		return err
	}
	if err := l.o.Log.Note(ctx, epoch, l.noted+1); err != nil {
		return err
	}
	l.noted, l.notedAt = l.noted+1, at
	return nil
}

// refuseSynchronous fails where the source counts this gateway as a synchronous standby: every commit of the application
// would wait for the log, and the log's own commits, in the same server, for themselves.
func (l *Leader) refuseSynchronous(ctx context.Context, walsender uint32) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var priority int
	err := l.o.Source.QueryRow(ctx, `SELECT coalesce(max(sync_priority), 0) FROM pg_stat_replication WHERE pid = $1`, int64(walsender)).Scan(&priority)
	if err != nil || priority == 0 {
		return nil // what can't be read shows elsewhere
	}
	return fmt.Errorf("synchronous_standby_names of the source includes walgate, so that its commits would wait for the gateway: name the standbys there instead of '*'")
}

// expire applies retention where it is due. What it remembers outlives a tenure: where a connection breaks now and then, no
// tenure may last as long as the interval.
func (l *Leader) expire(ctx context.Context, now time.Time) error {
	if now.Sub(l.expired) < expireInterval {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	h, err := l.o.Log.Head(ctx)
	if err != nil {
		return err
	}
	next, dropped, err := l.o.Log.Expire(ctx, h.Version.Time(), l.droppable)
	if len(dropped) > 0 {
		l.o.Logger.Info("dropped log partitions past their retention", "partitions", dropped)
	}
	if err == nil {
		l.droppable, l.expired = next, now
	}
	return err
}

// forgetBatches bounds what one round of forget deletes of each kind, so that care is soon back at its other duties.
const forgetBatches = 20

// forget deletes old records of pushes and sessions from the source: now and then, and again soon while some are left.
func (l *Leader) forget(ctx context.Context, now time.Time) error {
	if l.o.PushRetention == 0 || now.Sub(l.forgotten) < expireInterval {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	kept := schema.Kept{Pushes: l.o.PushRetention, Sessions: l.o.PushRetention}
	for _, c := range l.o.Watcher.Current().Set.Collections { // a device may come back for as long as the log holds what it lacks
		kept.Sessions = max(kept.Sessions, c.Retention)
	}
	for range forgetBatches {
		more, err := schema.Forget(ctx, l.o.Source, kept)
		if err != nil {
			return err
		}
		if !more {
			l.forgotten = now
			return nil
		}
	}
	return nil
}

func (l *Leader) checkSlot(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	var h SlotHealth
	err := l.o.Source.QueryRow(ctx, `SELECT coalesce(pg_current_wal_lsn() - restart_lsn, 0)::int8, coalesce(safe_wal_size, 0)::int8, coalesce(wal_status, '')
		FROM pg_replication_slots WHERE slot_name = $1`, l.o.Slot).Scan(&h.LagBytes, &h.SafeBytes, &h.Status)
	if err != nil {
		return fmt.Errorf("read the state of slot %s: %w", l.o.Slot, err)
	}
	l.o.Stats.setSlot(h)
	if n, err := l.o.Log.EstimatedRows(ctx); err == nil { // else the next check says so
		l.o.Stats.LogRows.Store(n)
	}
	if l.o.MaxSlotLag > 0 && h.LagBytes > l.o.MaxSlotLag/2 {
		l.o.Logger.Warn("the slot holds back much WAL on the source's disk; find the transaction that is open too long or why the log is slow",
			"slot", l.o.Slot, "lag_bytes", h.LagBytes, "limit_bytes", l.o.MaxSlotLag, "safe_bytes", h.SafeBytes, "wal_status", h.Status)
	}
	return nil
}

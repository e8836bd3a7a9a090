package replication

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/internal/failpoint"
)

// Slot is the state of the replication slot.
type Slot struct {
	Created   bool // just made
	Confirmed changelog.LSN
	Active    bool
}

// EnsureSlot returns the slot, making it where it is missing or was invalidated. The publications must exist before:
// WAL from before a publication can't be decoded under its name. Making a slot waits for every transaction that is
// running: the log says which one holds it up, and so does waiting, which may be nil.
func EnsureSlot(ctx context.Context, conn *pgx.Conn, name string, log *slog.Logger, waiting func(error)) (Slot, error) {
	var s Slot
	var plugin, database, status, reason string
	var confirmed int64
	short, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var remembered *string
	if err := conn.QueryRow(short, `SELECT min(history) FROM walgate.source`).Scan(&remembered); err != nil { // before the slot: see createSlot
		return s, fmt.Errorf("read what the source remembers of the change log: %w", err)
	}
	// A column that older servers don't have is null as a member of JSON.
	err := conn.QueryRow(short, `SELECT coalesce(plugin::text, 'none: it is physical'), coalesce(database::text, 'none'), active, coalesce(wal_status, ''),
		coalesce(to_jsonb(s) ->> 'invalidation_reason', ''), coalesce(confirmed_flush_lsn - '0/0', 0)::int8
		FROM pg_replication_slots s WHERE slot_name = $1`, name).Scan(&plugin, &database, &s.Active, &status, &reason, &confirmed)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return createSlot(ctx, conn, name, remembered, log, waiting)
	case err != nil:
		return s, fmt.Errorf("read the state of slot %s: %w", name, err)
	case plugin != "pgoutput" || database != conn.Config().Database:
		return s, fmt.Errorf("slot %s belongs to somebody else (plugin %s, database %s): drop it there, or set replication.slot to another name", name, plugin, database)
	case status == "lost": // for good; unreserved and extended still have their WAL
		log.Warn("the slot was invalidated; making a new one, clients will resynchronise", "slot", name, "reason", invalidation(reason))
		if err := dropSlot(ctx, conn, name, `wal_status = 'lost'`); err != nil {
			return s, err
		}
		return createSlot(ctx, conn, name, remembered, log, waiting)
	}
	s.Confirmed = changelog.LSN(confirmed)
	return s, nil
}

// invalidation says what made the server give a slot up, and which setting bounds it.
func invalidation(reason string) string {
	switch reason {
	case "wal_removed", "": // before 17 no reason is told, and on a primary there was but this one
		return "it held back more WAL than max_slot_wal_keep_size allows"
	case "idle_timeout":
		return "nobody read it for longer than idle_replication_slot_timeout"
	}
	return reason
}

// createSlot makes the slot. First it takes back what the source remembered of the log's history before the slot was found
// missing, nil where it never did: whatever becomes of this process, the next leader then knows that the slot is a new one.
// Where it remembers something else by now, another instance has made the slot and leads.
func createSlot(ctx context.Context, conn *pgx.Conn, name string, remembered *string, log *slog.Logger, waiting func(error)) (Slot, error) {
	failpoint.Here(failpoint.SlotMissing)
	short, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	done, err := conn.Exec(short, `UPDATE walgate.source SET history = $1 WHERE history = $2`, changelog.HistoryForgotten, remembered)
	if err != nil {
		return Slot{}, fmt.Errorf("note in the source that the slot is made anew: %w", err)
	}
	if remembered != nil && done.RowsAffected() == 0 {
		return EnsureSlot(ctx, conn, name, log, waiting)
	}
	var watch sync.WaitGroup
	watching, stop := context.WithCancel(ctx)
	watch.Go(func() { watchSlotCreation(watching, conn.Config(), conn.PgConn().PID(), name, log, waiting) })
	defer watch.Wait()
	defer stop()
	sql := fmt.Sprintf(`SELECT (lsn - '0/0')::int8 FROM %s`, slotCall(`$1`, major(conn)))
	var lsn int64
	if err := cancelled(ctx, conn, func(ctx context.Context) error { return conn.QueryRow(ctx, sql, name).Scan(&lsn) }); slotExists(err) {
		return EnsureSlot(ctx, conn, name, log, waiting) // somebody else was quicker: init beside a gateway
	} else if err != nil {
		return Slot{}, fmt.Errorf("create replication slot %s (needs wal_level = logical, a free slot, and the REPLICATION attribute): %w", name, err)
	}
	failpoint.Here(failpoint.SlotMade)
	return Slot{Created: true, Confirmed: changelog.LSN(lsn)}, nil
}

func slotExists(err error) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) && pg.Code == "42710" // duplicate_object
}

// cancelled runs a statement that may wait for very long. When ctx ends, the server is told to cancel it: one whose client
// is merely gone would go on waiting, and hold the slot.
func cancelled(ctx context.Context, conn *pgx.Conn, do func(context.Context) error) error {
	doing, giveUp := context.WithCancel(context.WithoutCancel(ctx))
	defer giveUp()
	asked := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(asked)
		asking, done := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer done()
		if err := conn.PgConn().CancelRequest(asking); err != nil {
			giveUp()
			return
		}
		time.AfterFunc(2*time.Second, giveUp)
	})
	err := do(doing)
	if !stop() {
		<-asked
	}
	return err
}

// slotCall is the call that makes a slot; from 17 on a promoted standby has it too.
func slotCall(name string, major int) string {
	if major >= 17 {
		return `pg_create_logical_replication_slot(` + name + `, 'pgoutput', failover => true)`
	}
	return `pg_create_logical_replication_slot(` + name + `, 'pgoutput')`
}

// SlotSQL is the statement that makes the slot, for a DBA.
func SlotSQL(name string, serverVersion int) string {
	return `SELECT ` + slotCall(`'`+strings.ReplaceAll(name, `'`, `''`)+`'`, serverVersion/10000) + `;`
}

// DropSlot drops the slot if it exists. A gateway that still reads from it is an error.
func DropSlot(ctx context.Context, conn *pgx.Conn, name string) error {
	return dropSlot(ctx, conn, name, `true`)
}

// dropSlot drops the slot if it exists and is still as the condition says: another instance may have made it anew since the
// caller looked. Parameters of the condition begin with $2.
func dropSlot(ctx context.Context, conn *pgx.Conn, name, condition string, args ...any) error {
	_, err := conn.Exec(ctx, `SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = $1 AND `+condition, append([]any{name}, args...)...)
	var pg *pgconn.PgError
	if errors.As(err, &pg) && pg.Code == "55006" { // object_in_use
		return fmt.Errorf("slot %s is in use: stop the gateway that reads from it first: %w", name, err)
	}
	if err != nil {
		return fmt.Errorf("drop slot %s: %w", name, err)
	}
	return nil
}

func major(conn *pgx.Conn) int {
	var n int
	fmt.Sscanf(conn.PgConn().ParameterStatus("server_version"), "%d", &n)
	return n
}

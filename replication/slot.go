package replication

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
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
// running; log says which one holds it up.
func EnsureSlot(ctx context.Context, conn *pgx.Conn, name string, log *slog.Logger) (Slot, error) {
	var s Slot
	var plugin, database, status string
	var confirmed int64
	short, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	err := conn.QueryRow(short, `SELECT plugin::text, database::text, active, coalesce(wal_status, ''), coalesce(confirmed_flush_lsn - '0/0', 0)::int8
		FROM pg_replication_slots WHERE slot_name = $1`, name).Scan(&plugin, &database, &s.Active, &status, &confirmed)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return createSlot(ctx, conn, name, log)
	case err != nil:
		return s, fmt.Errorf("read the state of slot %s: %w", name, err)
	case plugin != "pgoutput" || database != conn.Config().Database:
		return s, fmt.Errorf("slot %s belongs to somebody else (plugin %s, database %s): set replication.slot to another name", name, plugin, database)
	case status == "lost":
		log.Warn("the slot was invalidated because it held back too much WAL (max_slot_wal_keep_size); making a new one, clients will resynchronise", "slot", name)
		if err := DropSlot(ctx, conn, name); err != nil {
			return s, err
		}
		return createSlot(ctx, conn, name, log)
	}
	s.Confirmed = changelog.LSN(confirmed)
	return s, nil
}

func createSlot(ctx context.Context, conn *pgx.Conn, name string, log *slog.Logger) (Slot, error) {
	failpoint.Here(failpoint.SlotMissing)
	done := make(chan struct{})
	defer close(done)
	go watchSlotCreation(done, conn.Config(), conn.PgConn().PID(), name, log)
	sql := fmt.Sprintf(`SELECT (lsn - '0/0')::int8 FROM %s`, slotCall(`$1`, major(conn)))
	var lsn int64
	if err := conn.QueryRow(ctx, sql, name).Scan(&lsn); err != nil {
		return Slot{}, fmt.Errorf("create replication slot %s (needs wal_level = logical, a free slot, and the REPLICATION attribute): %w", name, err)
	}
	failpoint.Here(failpoint.SlotMade)
	return Slot{Created: true, Confirmed: changelog.LSN(lsn)}, nil
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

// watchSlotCreation names the oldest transaction while a slot's creation waits for it.
func watchSlotCreation(done <-chan struct{}, cfg *pgx.ConnConfig, pid uint32, slot string, log *slog.Logger) {
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-done:
			return
		case <-tick.C:
		}
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		var holder int64
		var age time.Duration
		c, err := pgx.ConnectConfig(ctx, cfg)
		if err == nil {
			err = c.QueryRow(ctx, `SELECT pid, clock_timestamp() - xact_start FROM pg_stat_activity
				WHERE backend_xid IS NOT NULL AND pid <> $1 ORDER BY xact_start LIMIT 1`, int64(pid)).Scan(&holder, &age)
			c.Close(ctx)
		}
		if err == nil {
			log.Warn("the slot's creation waits for a transaction that is still open; end it to go on", "slot", slot, "pid", holder, "open_for", age.String())
		}
		cancel()
	}
}

// DropSlot drops the slot if it exists. A gateway that still reads from it is an error.
func DropSlot(ctx context.Context, conn *pgx.Conn, name string) error {
	_, err := conn.Exec(ctx, `SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = $1`, name)
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

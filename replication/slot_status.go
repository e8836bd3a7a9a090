package replication

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// SlotStatus is all that the source tells of the slot, for an operator.
type SlotStatus struct {
	Exists       bool   `json:"exists"`
	Active       bool   `json:"active"`
	HolderPID    int64  `json:"holder_pid"` // 0: nobody
	Holder       string `json:"holder"`     // user, application and address, as far as the role may see them
	Ours         bool   `json:"ours"`       // the holder is a walgate
	WALStatus    string `json:"wal_status"` // reserved, extended, unreserved, lost
	Invalidation string `json:"invalidation_reason"`
	LagBytes     int64  `json:"lag_bytes"`
	Bounded      bool   `json:"bounded"` // max_slot_wal_keep_size is set
	SafeBytes    int64  `json:"safe_bytes"`
	Failover     bool   `json:"failover"`
	Synced       bool   `json:"synced"`
	RestartLSN   string `json:"restart_lsn"`
	ConfirmedLSN string `json:"confirmed_lsn"`
	// OldestTransaction is the one that has been open for longest and has written: decoding begins before it.
	OldestTransaction string `json:"oldest_transaction"`
	OldestSeconds     int64  `json:"oldest_transaction_seconds"`
}

// InTheMaking says whether the slot's maker still waits for open transactions: nobody can read from it yet.
func (s *SlotStatus) InTheMaking() bool { return s.Active && s.ConfirmedLSN == "" }

// ReadSlotStatus reads it on a connection to the source's primary.
func ReadSlotStatus(ctx context.Context, conn *pgx.Conn, slot string) (*SlotStatus, error) {
	s := &SlotStatus{Exists: true}
	// A column that older servers don't have is null as a member of JSON.
	err := conn.QueryRow(ctx, `SELECT s.active, coalesce(s.active_pid, 0)::int8, coalesce(`+whoSQL+`, ''), coalesce(a.application_name = 'walgate', false), coalesce(s.wal_status, ''),
			coalesce(to_jsonb(s) ->> 'invalidation_reason', ''), coalesce(pg_current_wal_lsn() - s.restart_lsn, 0)::int8, s.safe_wal_size IS NOT NULL, coalesce(s.safe_wal_size, 0)::int8,
			coalesce((to_jsonb(s) ->> 'failover')::bool, false), coalesce((to_jsonb(s) ->> 'synced')::bool, false), coalesce(s.restart_lsn::text, ''), coalesce(s.confirmed_flush_lsn::text, '')
		FROM pg_replication_slots s LEFT JOIN pg_stat_activity a ON a.pid = s.active_pid WHERE s.slot_name = $1`, slot).Scan(&s.Active, &s.HolderPID, &s.Holder, &s.Ours, &s.WALStatus,
		&s.Invalidation, &s.LagBytes, &s.Bounded, &s.SafeBytes, &s.Failover, &s.Synced, &s.RestartLSN, &s.ConfirmedLSN)
	if errors.Is(err, pgx.ErrNoRows) {
		s.Exists = false
	} else if err != nil {
		return nil, fmt.Errorf("read the state of slot %s: %w", slot, err)
	}
	if s.Invalidation != "" || s.WALStatus == "lost" {
		s.Invalidation = invalidation(s.Invalidation)
	}
	err = conn.QueryRow(ctx, `SELECT who, greatest(extract(epoch FROM clock_timestamp() - since), 0)::int8 FROM (
			SELECT 'process ' || a.pid || ' (' || concat_ws(', ', `+whoSQL+`, a.state) || ')' AS who, a.xact_start AS since FROM pg_stat_activity a WHERE a.backend_xid IS NOT NULL AND a.xact_start IS NOT NULL
			UNION ALL SELECT 'the prepared transaction ' || quote_literal(gid) || ' of ' || owner || ' in database ' || database, prepared FROM pg_prepared_xacts) o
		ORDER BY since LIMIT 1`).Scan(&s.OldestTransaction, &s.OldestSeconds)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return nil, fmt.Errorf("look for the oldest transaction: %w", err)
	}
	return s, nil
}

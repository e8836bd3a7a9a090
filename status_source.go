package main

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/replication"
)

// statusSource is the source's server.
type statusSource struct {
	Version             string `json:"version"`
	Standby             bool   `json:"standby"`
	WALLevel            string `json:"wal_level"`
	MaxSlotWALKeepSize  string `json:"max_slot_wal_keep_size"`
	System              string `json:"system"`
	Timeline            int64  `json:"timeline"`
	Standbys            int    `json:"standbys"` // physical ones that are connected
	SynchronizedStandby string `json:"synchronized_standby_slots"`
	number              int
}

// statusSlot is the slot, with the limit that it is held against.
type statusSlot struct {
	replication.SlotStatus
	Name     string `json:"name"`
	LagLimit int64  `json:"lag_limit"`
}

func (s *status) readSource(ctx context.Context, cfg *Config) {
	away := func(err error) {
		s.add(statusWrong, "source", "can't be read: "+err.Error(),
			"nothing new reaches clients, and what they push is refused; what is logged is served on", "see that PostgreSQL runs, and that host, port and password in database.url are right")
	}
	c, err := pgx.ParseConfig(string(cfg.Database.URL))
	if err != nil {
		away(err)
		return
	}
	c.RuntimeParams["default_transaction_read_only"], c.RuntimeParams["application_name"] = "on", "walgate status"
	conn, err := pgx.ConnectConfig(ctx, c)
	if err != nil {
		away(err)
		return
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var v statusSource
	err = conn.QueryRow(ctx, `SELECT current_setting('server_version'), current_setting('server_version_num')::int, pg_is_in_recovery(), current_setting('wal_level'), current_setting('max_slot_wal_keep_size'),
		(SELECT count(*) FROM pg_replication_slots WHERE slot_type = 'physical' AND active), coalesce(current_setting('synchronized_standby_slots', true), '')`).
		Scan(&v.Version, &v.number, &v.Standby, &v.WALLevel, &v.MaxSlotWALKeepSize, &v.Standbys, &v.SynchronizedStandby)
	if err != nil {
		away(err)
		return
	}
	s.Source = &v
	switch says := "PostgreSQL " + v.Version; {
	case v.Standby:
		s.add(statusWrong, "source", says+", a standby", "a standby can't be followed: nothing new reaches clients", "promote it, or let database.url name the primary")
		return
	case v.WALLevel != "logical":
		s.add(statusWrong, "source", says+", wal_level = "+v.WALLevel, "without wal_level = logical no change can be followed", "ALTER SYSTEM SET wal_level = logical; then restart the server")
	default:
		s.ok("source", "%s, a primary, wal_level = logical", says)
	}
	if at, err := changelog.ServerIdentity(ctx, conn); err == nil {
		v.System, v.Timeline = at.System, at.Timeline
	}
	slot, err := replication.ReadSlotStatus(ctx, conn, cfg.Replication.Slot)
	if err != nil {
		s.add(statusWrong, "slot", err.Error(), "whether changes are followed isn't known", "run walgate status again; if it stays, see what the source's log says")
		return
	}
	s.Slot = &statusSlot{*slot, cfg.Replication.Slot, int64(cfg.Limits.MaxSlotLag)}
	s.judgeLeader()
	s.judgeSlot()
	s.judgeBounds()
	s.judgeFailover()
}

func (s *status) judgeLeader() {
	slot := s.Slot
	switch {
	case !slot.Active:
		s.add(statusWrong, "leader", "nobody reads slot "+slot.Name, "no instance leads: nothing new reaches clients, and the source keeps its WAL on disk meanwhile",
			"see that walgate serve runs, and what it logs: it says each time why it can't lead")
	case !slot.Ours:
		s.add(statusWrong, "leader", fmt.Sprintf("slot %s is read by process %d (%s), which is no walgate", slot.Name, slot.HolderPID, slot.Holder), "no instance leads, and what that process reads is lost to clients",
			fmt.Sprintf("end it, or if a slot is being made wait for it: SELECT pg_terminate_backend(%d)", slot.HolderPID))
	case slot.InTheMaking():
		s.add(statusWrong, "leader", fmt.Sprintf("process %d of the source (%s) is still making slot %s, which waits until every transaction has ended that runs by now", slot.HolderPID, slot.Holder, slot.Name),
			"no instance leads: nothing new reaches clients", "end the oldest transaction, see below, unless it ends by itself soon")
	default:
		s.ok("leader", "process %d of the source (%s) reads slot %s", slot.HolderPID, slot.Holder, slot.Name)
	}
}

func (s *status) judgeSlot() {
	slot := s.Slot
	const newHistory = "a leader makes a new one by itself, and every client resynchronises in full"
	switch {
	case !slot.Exists:
		s.add(statusWrong, "slot", slot.Name+" doesn't exist", "changes since it went are lost to clients; "+newHistory, "let walgate serve run (or walgate init, the first time)")
		return
	case slot.WALStatus == "lost":
		s.add(statusWrong, "slot", slot.Name+" was invalidated: "+slot.Invalidation, "changes since are lost to clients; "+newHistory, "let walgate serve run; then raise the setting named, or find out why nobody read the slot")
		return
	case slot.WALStatus == "unreserved":
		s.add(statusWrong, "slot", slot.Name+" is unreserved", "with its next checkpoint the source may remove WAL that the slot needs; then "+newHistory, "raise max_slot_wal_keep_size now (ALTER SYSTEM, pg_reload_conf), and find what holds the slot back: see below")
	case slot.InTheMaking():
		s.add(statusWarning, "slot", slot.Name+" is being made", "see the leader", "see the leader")
		return
	default:
		s.ok("slot", "%s is %s, from %s, confirmed up to %s", slot.Name, slot.WALStatus, slot.RestartLSN, slot.ConfirmedLSN)
	}
	says := fmt.Sprintf("%s of WAL are held back; limits.max_slot_lag is %s", bytesText(slot.LagBytes), bytesText(slot.LagLimit))
	next := "if nobody leads, see above; else see the oldest transaction and the change log below"
	switch {
	case slot.LagLimit > 0 && slot.LagBytes > slot.LagLimit:
		s.add(statusWrong, "slot lag", says, "the source's disk fills up", next)
	case slot.LagLimit > 0 && slot.LagBytes > slot.LagLimit/2:
		s.add(statusWarning, "slot lag", says, "the source's disk fills up", next)
	default:
		s.ok("slot lag", "%s", says)
	}
	age := (time.Duration(slot.OldestSeconds) * time.Second).String()
	switch {
	case slot.OldestTransaction == "":
		s.ok("oldest transaction", "none is open that has written")
	case slot.OldestSeconds < oldTransaction:
		s.ok("oldest transaction", "%s, for %s", slot.OldestTransaction, age)
	default:
		s.add(statusWarning, "oldest transaction", slot.OldestTransaction+", open for "+age, "the slot can't move past its beginning while it is open, and no new slot can be made", "end it if it is forgotten: SELECT pg_terminate_backend(its process), or ROLLBACK PREPARED")
	}
}

// oldTransaction is how many seconds a transaction that has written is open before it is warned of.
const oldTransaction = 600

func (s *status) judgeBounds() {
	const name = "WAL bound"
	switch slot := s.Slot; {
	case s.Source.MaxSlotWALKeepSize == "-1":
		s.add(statusWarning, name, "max_slot_wal_keep_size is unlimited", "while no gateway runs, the source's WAL grows until its disk is full",
			"set it to what the disk can spare, above limits.max_slot_lag: past it the slot is given up and clients resynchronise, which hurts less")
	case slot.Bounded:
		s.ok(name, "max_slot_wal_keep_size is %s: %s more may be written before the slot is given up", s.Source.MaxSlotWALKeepSize, bytesText(slot.SafeBytes))
	default:
		s.ok(name, "max_slot_wal_keep_size is %s", s.Source.MaxSlotWALKeepSize)
	}
}

func (s *status) judgeFailover() {
	const name, first = "failover", 170000
	slot := s.Slot
	standby := "on each standby that may be promoted: sync_replication_slots = on, hot_standby_feedback = on, primary_slot_name, and a dbname in primary_conninfo"
	switch {
	case s.Source.number < first || !slot.Exists:
	case !slot.Failover:
		s.add(statusWarning, name, "slot "+slot.Name+" was made without failover", "a standby that is promoted doesn't have it: every client then resynchronises in full",
			"if there are standbys: psql 'replication=database dbname=… …' -c 'ALTER_REPLICATION_SLOT "+slot.Name+" (FAILOVER true)' while no gateway runs; and "+standby)
	case s.Source.Standbys > 0 && s.Source.SynchronizedStandby == "":
		s.add(statusWarning, name, fmt.Sprintf("slot %s may fail over, there are %d standbys, and synchronized_standby_slots is empty", slot.Name, s.Source.Standbys),
			"clients may see changes before a standby has them; if that one is promoted, every client resynchronises in full (it does so after any promotion)", "set synchronized_standby_slots to the standbys' physical slots; "+standby)
	default:
		s.ok(name, "slot %s may fail over", slot.Name)
	}
}

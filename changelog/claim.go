package changelog

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/internal/failpoint"
)

// FirstStart is Claimed.NewHistory where there never was a log.
const (
	FirstStart = "first start"
	logLost    = "the change log was lost"
)

// HistoryForgotten is what the source remembers in place of a history from the making of a slot until a leader has claimed
// the log with it.
const HistoryForgotten = "none"

const (
	// claimIdle frees the log from a claim whose process or host is gone without a word.
	claimIdle = "5s"
	// gapsMost bounds the remembered gaps; before the oldest of them clients resynchronise.
	gapsMost = 1000
)

// Claim is what a new leader knows when it takes the log over.
type Claim struct {
	Source         Server
	SourceTime     time.Time // the source's clock
	SlotCreated    bool      // the slot was just made: everything before SlotLSN is lost to the log
	SlotLSN        LSN       // the slot's confirmed_flush
	SourceEnd      LSN       // how far the source's WAL is flushed
	Noted          int64     // the source's number of the last Note
	Remembered     string    // the history that the source remembers, HistoryForgotten, or "": no log was ever started
	ConfigRevision int64
	Collections    []ClaimedCollection
	// Known is the log as it was before tables were looked at: where another leader has been at work since, what looked empty may
	// have been written to, and logged. Nil: nobody was.
	Known *Known
	// Again reads Remembered and Noted, when the leader before can't note anything in the log any more: what was read earlier may
	// be older than what the log holds. Nil: they hold.
	Again func(context.Context) (remembered string, noted int64, err error)
}

// ClaimedCollection is a collection as the new leader's configuration and catalog have it.
type ClaimedCollection struct {
	Name        string
	Fingerprint string
	Shape       string
	RaisedShape string // what is stored for Shape where the claim raises the floor
	Retention   time.Duration
	// Empty says that the table had no rows, and no writer, when looked at after the slot existed and after Claim.Known was read: the
	// log reaches back to its beginning.
	Empty bool
	// Keep says that the stored shape may become this one without clients noticing.
	Keep func(stored string) bool
	// Stopped says why the collection can't be logged now; its name is all else that is known of it then.
	Stopped string
}

// Claimed is where a new leader starts.
type Claimed struct {
	Epoch       int64
	Number      int64 // Head.Claim
	History     string
	NewHistory  string // why a new history began; empty: the old one goes on
	Version     Version
	LSN         LSN
	Collections []Collection
	Raised      []string // "collection: reason" of the floors that the claim raised
	Remembered  string   // Claim.Remembered and Claim.Noted, as they were judged
	Noted       int64
}

// claim makes the caller the log's only writer: it raises the epoch, decides whether the history goes on, and brings the
// collections' fingerprints, shapes and floors up to date, in one transaction.
func claim(ctx context.Context, conn *pgx.Conn, c Claim) (*Claimed, error) {
	storage, err := ServerIdentity(ctx, conn)
	if err != nil {
		return nil, err
	}
	out := &Claimed{}
	err = pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `SET LOCAL idle_in_transaction_session_timeout = '`+claimIdle+`'; LOCK TABLE walgate.checkpoint IN SHARE ROW EXCLUSIVE MODE`, pgx.QueryExecModeSimpleProtocol); err != nil {
			return err
		}
		if c.Again != nil {
			var err error
			if c.Remembered, c.Noted, err = c.Again(ctx); err != nil {
				return err
			}
		}
		out.Remembered, out.Noted = c.Remembered, c.Noted
		if err := claimCheckpoint(ctx, tx, c, storage, out); err != nil {
			return err
		}
		err := claimCollections(ctx, tx, c, out)
		failpoint.Here(failpoint.LogClaiming)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("take the change log over: %w", err)
	}
	return out, nil
}

// appenderName is the application_name of the one session that writes the log.
const appenderName = "walgate append"

// endPredecessor ends an earlier leader's session that stands still within a transaction, for the server would keep it, and
// what it locks and holds back from vacuum, until TCP gives up. The caller holds the slot, so that leader is deposed.
func endPredecessor(ctx context.Context, conn *pgx.Conn) error {
	_, err := conn.Exec(ctx, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
		WHERE application_name = $1 AND datname = current_database() AND usename = current_user AND pid <> pg_backend_pid()
			AND wait_event = 'ClientRead' AND xact_start IS NOT NULL`, appenderName)
	if err != nil {
		return fmt.Errorf("end an earlier leader's session in the change log's database: %w", err)
	}
	return nil
}

type stored struct {
	epoch, revision int64
	history         string
	version, floor  Version
	lsn             LSN
	source, storage Server
	serverTime      time.Time
	restarted       bool // the log's server was started anew since the last claim
	noted           int64
}

func claimCheckpoint(ctx context.Context, tx pgx.Tx, c Claim, storage Server, out *Claimed) error {
	var s stored
	err := tx.QueryRow(ctx, `SELECT epoch, config_revision, history, version, floor, lsn - '0/0'::pg_lsn,
		source_system, source_timeline, storage_system, storage_timeline, clock_timestamp(),
		server_started IS DISTINCT FROM pg_postmaster_start_time(), noted FROM walgate.checkpoint`).Scan(
		&s.epoch, &s.revision, &s.history, &s.version, &s.floor, (*pgLSN)(&s.lsn),
		&s.source.System, &s.source.Timeline, &s.storage.System, &s.storage.Timeline, &s.serverTime, &s.restarted, &s.noted)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		out.NewHistory = FirstStart
		if c.Remembered != "" {
			out.NewHistory = logLost
		}
	case err != nil:
		return err
	default:
		if c.ConfigRevision < s.revision {
			return olderConfig(c.ConfigRevision, s.revision)
		}
		out.NewHistory = broken(s, c, storage)
	}
	if c.Known != nil && (c.Known.Epoch != s.epoch || c.Known.LSN != s.lsn) {
		for i := range c.Collections {
			c.Collections[i].Empty = false
		}
	}
	out.Epoch, out.Number = s.epoch+1, mathrand.Int64()
	out.History, out.Version, out.LSN = s.history, s.version, s.lsn
	floor := s.floor
	if out.NewHistory != "" {
		out.History = newHistory(s.history)
		out.Version = firstVersion(s.version, c.SourceTime, s.serverTime, out.NewHistory == logLost)
		out.LSN = c.SlotLSN
		if floor = out.Version; out.NewHistory == FirstStart {
			floor = 0 // nothing was ever issued before
		}
		if _, err := tx.Exec(ctx, `DELETE FROM walgate.gaps`); err != nil { // they lie below the floor
			return err
		}
	} else if s.restarted {
		out.Version = firstVersion(s.version, c.SourceTime, s.serverTime, false)
		if floor, err = leaveGap(ctx, tx, s.version, out.Version, floor); err != nil {
			return err
		}
	}
	_, err = tx.Exec(ctx, `INSERT INTO walgate.checkpoint (epoch, writer, history, version, floor, lsn, source_system, source_timeline, storage_system, storage_timeline, config_revision, server_started, noted, claim)
		VALUES ($1, $1, $2, $3, $4, '0/0'::pg_lsn + $5::numeric, $6, $7, $8, $9, $10, pg_postmaster_start_time(), $11, $12)
		ON CONFLICT (one) DO UPDATE SET epoch = excluded.epoch, writer = excluded.writer, history = excluded.history, version = excluded.version,
			floor = excluded.floor, lsn = excluded.lsn, source_system = excluded.source_system, source_timeline = excluded.source_timeline,
			storage_system = excluded.storage_system, storage_timeline = excluded.storage_timeline, config_revision = excluded.config_revision,
			server_started = excluded.server_started, noted = excluded.noted, claim = excluded.claim`,
		out.Epoch, out.History, int64(out.Version), int64(floor), lsnNumeric(out.LSN), c.Source.System, c.Source.Timeline, storage.System, storage.Timeline, c.ConfigRevision, c.Noted, out.Number)
	return err
}

func olderConfig(here, there int64) error {
	return fmt.Errorf("%w: %d here, %d there: deploy the newer configuration", ErrConfigRevision, here, there)
}

// broken says why the stored log can't be continued, or "".
func broken(s stored, c Claim, storage Server) string {
	switch {
	case s.source != c.Source:
		return "the source is another server or timeline than before"
	case s.storage != storage:
		return "the change log is on another server or timeline than before"
	case c.SlotCreated || c.Remembered == HistoryForgotten:
		return "the replication slot was lost"
	case c.SlotLSN > s.lsn:
		return fmt.Sprintf("the slot confirms %s but the change log ends at %s", c.SlotLSN, s.lsn)
	case c.SourceEnd < s.lsn:
		return fmt.Sprintf("the source's WAL ends at %s but the change log holds it up to %s: the source was restored to an older state", c.SourceEnd, s.lsn)
	case c.Remembered != "" && c.Remembered != s.history:
		return fmt.Sprintf("the source remembers history %s but the change log is of %s: one of the two was restored to an older state, or two sources share this change log", c.Remembered, s.history)
	case c.Noted < s.noted:
		return "the source was restored to an older state than the change log has seen"
	case c.Noted > s.noted+1:
		return "the change log was restored to an older state than the source has seen"
	}
	return ""
}

// leaveGap remembers that no version between two was ever issued, and returns the floor. A server that was restored from a
// copy of its files has forgotten what it committed since, and can't know: to it, this is a start like any other. So after
// each start versions go on from the present time; a client that comes from within the gap has seen what was lost.
func leaveGap(ctx context.Context, tx pgx.Tx, last, first, floor Version) (Version, error) {
	if _, err := tx.Exec(ctx, `INSERT INTO walgate.gaps (after_version, first_version) VALUES ($1, $2)`, int64(last), int64(first)); err != nil {
		return 0, err
	}
	var forgotten Version
	err := tx.QueryRow(ctx, `WITH old AS (DELETE FROM walgate.gaps WHERE after_version IN (SELECT after_version FROM walgate.gaps ORDER BY after_version DESC OFFSET $1)
		RETURNING first_version) SELECT coalesce(max(first_version), 0) FROM old`, gapsMost).Scan(&forgotten)
	return max(floor, forgotten), err
}

// firstVersion lies above every version issued before.
func firstVersion(stored Version, source, storage time.Time, lost bool) Version {
	v := max(stored, VersionAt(source), VersionAt(storage)) // not our own clock: an instance's may be wrong
	if lost {                                               // nothing remembers what was issued, and a clock may have run ahead
		v += VersionAt(time.UnixMilli(epochMillis).Add(time.Hour))
	}
	return v + 1
}

// newHistory returns a random id that isn't the last one.
func newHistory(last string) string {
	for {
		var b [2]byte
		rand.Read(b[:]) // never fails
		if h := hex.EncodeToString(b[:]); h != last {
			return h
		}
	}
}

func claimCollections(ctx context.Context, tx pgx.Tx, c Claim, out *Claimed) error {
	rows, err := tx.Query(ctx, collectionsSQL)
	if err != nil {
		return err
	}
	have, err := pgx.CollectRows(rows, scanCollection)
	if err != nil {
		return err
	}
	raised := out.Version
	if out.NewHistory == "" {
		raised++ // else who has everything up to here would not be told
	}
	for _, want := range c.Collections {
		f, reason := Version(0), ""
		old := findCollection(have, want.Name)
		if want.Stopped != "" {
			if old != nil {
				old.Stopped = want.Stopped
				out.Collections = append(out.Collections, *old)
			}
			if _, err := tx.Exec(ctx, `UPDATE walgate.collections SET stopped = $2 WHERE name = $1`, want.Name, want.Stopped); err != nil {
				return err
			}
			continue
		}
		switch {
		case old == nil && want.Empty && !missed(out.NewHistory):
			reason = "from the beginning"
		case old == nil:
			f, reason = raised, "new collection"
		case out.NewHistory != "" && want.Empty && out.NewHistory == FirstStart:
			reason = "from the beginning"
		case out.NewHistory != "":
			f, reason = raised, "new history: "+out.NewHistory
		case old.Fingerprint != want.Fingerprint:
			f, reason = raised, "the policy changed"
		case old.Stopped != "":
			f, reason = raised, "was stopped: "+old.Stopped
		case old.Shape != want.Shape && !want.Keep(old.Shape):
			f, reason = raised, "the table's shape changed"
		default:
			f, reason = old.Floor, old.FloorReason
		}
		var refill Version
		if old == nil || f > old.Floor {
			refill = f
		}
		if old != nil && f > old.Floor {
			out.Raised = append(out.Raised, want.Name+": "+reason)
			want.Shape = cmp.Or(want.RaisedShape, want.Shape)
		}
		var st Collection
		err := tx.QueryRow(ctx, `INSERT INTO walgate.collections (name, fingerprint, shape, floor, floor_reason, retention, refill) VALUES ($1, $2, $3, $4, $5, $6, $7)
			ON CONFLICT (name) DO UPDATE SET fingerprint = excluded.fingerprint, shape = excluded.shape, floor = excluded.floor,
				floor_reason = excluded.floor_reason, stopped = '', retention = excluded.retention, refill = greatest(collections.refill, excluded.refill)
			RETURNING id, name, fingerprint, shape, floor, floor_reason, stopped, refill`,
			want.Name, want.Fingerprint, want.Shape, int64(f), reason, want.Retention, int64(refill)).Scan(&st.ID, &st.Name, &st.Fingerprint, &st.Shape, &st.Floor, &st.FloorReason, &st.Stopped, &st.Refill)
		if err != nil {
			return err
		}
		out.Collections = append(out.Collections, st)
		out.Version = max(out.Version, st.Floor)
	}
	if _, err := tx.Exec(ctx, `UPDATE walgate.checkpoint SET version = $1 WHERE version < $1`, int64(out.Version)); err != nil {
		return err
	}
	// A collection that is configured no longer isn't logged any more: coming back, it must start anew.
	names := make([]string, 0, len(c.Collections))
	for _, w := range c.Collections {
		names = append(names, w.Name)
	}
	_, err = tx.Exec(ctx, `UPDATE walgate.collections SET fingerprint = '', floor_reason = 'not configured' WHERE name <> ALL ($1)`, names)
	return err
}

// missed says whether a new history may have lost changes of a table that is empty now.
func missed(newHistory string) bool { return newHistory != "" && newHistory != FirstStart }

func findCollection(cs []Collection, name string) *Collection {
	for i := range cs {
		if cs[i].Name == name {
			return &cs[i]
		}
	}
	return nil
}

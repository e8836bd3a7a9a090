package blobstore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// ErrCareBusy says that another instance is looking after the store.
var ErrCareBusy = errors.New("another instance is looking after the attachments right now")

// References is what care asks the change log about the rows that name files. Ids go in and answers come out in the same order.
type References interface {
	// Unfilled says why the log doesn't know every row that names a file yet; empty: it does.
	Unfilled(ctx context.Context) (why string, err error)
	// Pass waits until the log holds every transaction that was visible before the call; an error says why it doesn't.
	Pass(ctx context.Context) error
	// Named says of each file whether a row names it.
	Named(ctx context.Context, ids []string) ([]bool, error)
	// Unwithheld says of each file which event the log holds of it; 0: none, or the file is withheld from a scope.
	Unwithheld(ctx context.Context, ids []string) ([]int64, error)
}

// objects is what care needs of the store.
type objects interface {
	List(ctx context.Context, after string) iter.Seq2[Object, error]
	Size(ctx context.Context, key string) (int64, error) // ErrNotFound, and only then, where there is no such object
	Delete(ctx context.Context, key string) error        // absent is no error
}

// CareOptions are what care is made of.
type CareOptions struct {
	Source     *pgxpool.Pool
	Store      *Store
	Records    *Records
	References References
	Grace      time.Duration // for which a file that no row names is kept
	UploadTTL  time.Duration // for which an upload may be under way
	Guard      int           // percent of the files, at least guardFloor files, that one round may find lost to the rows or to the store
	Logger     *slog.Logger
}

const (
	guardFloor        = 50
	reconcileInterval = 24 * time.Hour
	lookBatch         = 1000 // files per question to source and log
	actBatch          = 100  // files that are locked and changed together
	storeWorkers      = 8    // calls to the store at once
	batchTimeout      = 45 * time.Second
	careLock          = 0x77616c6763617265 // advisory: "walgcare" in ASCII
)

// Care deletes what no row needs any more, and keeps records and objects in step.
//
// A file that no row names is first noted as such (files.unreferenced_since). Unnamed for longer than the grace period, it is
// deleted: an event in the stream, state 'd'. Its bytes go with the next round, unless a row names it again by then: it returns.
// Every decision is taken under the file's lock, after the log has passed a fence, so that it rests on every row that was
// committed. Each file's record says where it is in this, so that a round that is cut off at any point is gone on with by the next.
type Care struct {
	o      CareOptions
	store  objects
	expire func(context.Context) (files, bytes int64, more bool, err error) // one batch of uploads
	now    func() time.Time                                                 // for the age of objects; that of records is the source's matter
}

// NewCare does nothing yet.
func NewCare(o CareOptions) *Care {
	expire := func(ctx context.Context) (int64, int64, bool, error) {
		n, bytes, more, err := o.Records.Expire(ctx, o.Store)
		return int64(n), bytes, more, err
	}
	return &Care{o: o, store: o.Store, expire: expire, now: time.Now}
}

// Interval returns how often a round is due.
func (c *Care) Interval() time.Duration { return max(min(c.o.Grace/4, 10*time.Minute), time.Second) }

// RoundOptions say how a round goes.
type RoundOptions struct {
	DryRun    bool // look, change nothing
	Force     bool // whatever the guard says
	Reconcile bool // hold the store against the records even where that isn't due
}

// HeldUp is something that a round didn't do.
type HeldUp struct {
	What  string `json:"what"`
	Why   string `json:"why"`
	Next  string `json:"next"`
	Guard bool   `json:"guard,omitempty"` // it is the guard that stopped it
}

// Tally counts files and their bytes.
type Tally struct {
	Files int64 `json:"files"`
	Bytes int64 `json:"bytes"`
}

func (t *Tally) add(o Tally) { t.Files, t.Bytes = t.Files+o.Files, t.Bytes+o.Bytes }

// Swept is what a sweep found and did; of a dry run, what it would do.
type Swept struct {
	Files    Tally    `json:"files"`    // that are not deleted, before the sweep
	Noted    Tally    `json:"noted"`    // found without a row that names them: they wait for the grace period
	Named    Tally    `json:"named"`    // noted by an earlier round, named again by now
	Waiting  Tally    `json:"waiting"`  // noted, within the grace period
	Due      Tally    `json:"due"`      // noted for longer than the grace period
	Deleted  Tally    `json:"deleted"`  // of those; their bytes go with the next round
	Returned Tally    `json:"returned"` // deleted by an earlier round, named again before their bytes were deleted
	Freed    Tally    `json:"freed"`    // whose bytes were deleted
	Uploads  Tally    `json:"uploads"`  // given up, with what had arrived
	Busy     int64    `json:"busy"`     // being written or named at this moment: the next round looks again
	HeldUp   []HeldUp `json:"held_up,omitempty"`
}

// Report is what a round found and did.
type Report struct {
	Sweep     Swept       `json:"sweep"`
	Reconcile *Reconciled `json:"reconcile"` // nil: it wasn't due
}

// HeldUp returns all that the round didn't do.
func (r *Report) HeldUp() []HeldUp {
	all := r.Sweep.HeldUp
	if r.Reconcile != nil {
		all = append(all[:len(all):len(all)], r.Reconcile.HeldUp...)
	}
	return all
}

// round is a round under way. Everything in the source happens on one connection, which holds the lock of all care: if it is
// lost, so is the round, and another instance may begin one.
type round struct {
	c    *Care
	conn *pgx.Conn
	o    RoundOptions
	Report
}

// Round sweeps, and reconciles where that is due. The report is of use beside an error too. ErrCareBusy where another
// instance is at it; a dry run disturbs nobody and isn't disturbed.
func (c *Care) Round(ctx context.Context, o RoundOptions) (*Report, error) {
	conn, err := c.o.Source.Acquire(ctx)
	if err != nil {
		return nil, fmt.Errorf("connect to the source: %w", err)
	}
	defer conn.Release()
	r := &round{c: c, conn: conn.Conn(), o: o}
	if !o.DryRun {
		var mine bool
		if err := r.conn.QueryRow(ctx, `SELECT pg_try_advisory_lock($1)`, int64(careLock)).Scan(&mine); err != nil {
			return nil, fmt.Errorf("take the lock of the attachments' care: %w", err)
		}
		if !mine {
			return nil, ErrCareBusy
		}
		defer r.unlock(ctx)
	}
	if err = r.sweep(ctx); ctx.Err() == nil {
		err = errors.Join(err, r.reconcileWhenDue(ctx))
	}
	return &r.Report, err
}

// unlock gives the lock back, or the whole connection where that fails.
func (r *round) unlock(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if _, err := r.conn.Exec(ctx, `SELECT pg_advisory_unlock($1)`, int64(careLock)); err != nil {
		_ = r.conn.Close(ctx)
	}
}

// jsonText is what walgate.care holds.
func jsonText(v any) []byte {
	text, _ := json.Marshal(v) // numbers, strings and times only
	return text
}

// beyond says whether n of total is more than one round may find lost. (The store being empty, or the references, is seldom meant.)
func (c *Care) beyond(n, total int64) bool {
	return n > guardFloor && n*100 > total*int64(c.o.Guard)
}

// CareStatus is how things stand, whichever instance looks after them.
type CareStatus struct {
	Uploaded, Missing, Unreferenced, Deleted Tally // Deleted: whose bytes are still there
	SweptAt, ReconciledAt                    time.Time
	Result                                   Report // of the last rounds
}

// GuardTripped says whether the guard stopped the last sweep or reconciliation.
func (s *CareStatus) GuardTripped() bool {
	return slices.ContainsFunc(s.Result.HeldUp(), func(h HeldUp) bool { return h.Guard })
}

// Status reads the numbers of files and the last results.
func (c *Care) Status(ctx context.Context) (*CareStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, batchTimeout)
	defer cancel()
	var s CareStatus
	var swept, reconciled *time.Time
	var text []byte
	err := c.o.Source.QueryRow(ctx, `SELECT
		count(*) FILTER (WHERE state = 'u'), coalesce(sum(size) FILTER (WHERE state = 'u'), 0)::int8,
		count(*) FILTER (WHERE state = 'm'), coalesce(sum(size) FILTER (WHERE state = 'm'), 0)::int8,
		count(*) FILTER (WHERE state <> 'd' AND unreferenced_since IS NOT NULL), coalesce(sum(size) FILTER (WHERE state <> 'd' AND unreferenced_since IS NOT NULL), 0)::int8,
		count(*) FILTER (WHERE state = 'd' AND NOT bytes_gone), coalesce(sum(size) FILTER (WHERE state = 'd' AND NOT bytes_gone), 0)::int8 FROM walgate.files`).Scan(
		&s.Uploaded.Files, &s.Uploaded.Bytes, &s.Missing.Files, &s.Missing.Bytes, &s.Unreferenced.Files, &s.Unreferenced.Bytes, &s.Deleted.Files, &s.Deleted.Bytes)
	if err == nil {
		err = c.o.Source.QueryRow(ctx, `SELECT swept_at, reconciled_at, result FROM walgate.care`).Scan(&swept, &reconciled, &text)
	}
	if err == nil {
		err = json.Unmarshal(text, &s.Result)
	}
	if err != nil {
		return nil, fmt.Errorf("read the state of the attachments: %w", err)
	}
	if swept != nil {
		s.SweptAt = *swept
	}
	if reconciled != nil {
		s.ReconciledAt = *reconciled
	}
	return &s, nil
}

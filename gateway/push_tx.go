package gateway

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/internal/failpoint"
	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/schema"
)

const (
	pushAttempts   = 5 // at a transaction that loses against others
	pushLockMost   = "10s"
	pushSelectMost = "30s"
	// pushFenceMost is how long a push waits for the log: the application may want the rows that it has locked meanwhile, and where
	// the log waits for a new slot, the making of that one waits for every transaction that is open.
	pushFenceMost = 3 * time.Second
)

// pushTx is one attempt at a push: one transaction of the source.
//
// It first tries all changes at once. Where one of them fails, it is done again with care, change by change within
// savepoints, so that it shows which one it was.
type pushTx struct {
	*push
	conn      *pgx.Conn
	careful   bool
	blame     bool // with care, and constraints are checked after each change
	now       string
	id        int64
	txid      int64
	outcomes  map[string]storedOutcome // by change_id
	locals    map[localID]string       // doc_ids
	made      []changelog.Local        // keys that the source gave in this transaction
	creators  map[localID]*pending
	found     map[*pending]schema.Found
	ahead     *pgx.Batch // of whatever the gateway asks next: it has yet to be sent
	begun     bool
	held      int        // bytes of rows that were read
	longest   int        // of them, the longest row
	wrote     bool       // with care: by the present change
	unchecked bool       // constraints that wait for the end of the transaction haven't been checked since the last write
	written   []pushWork // whose parents are to be looked at in the end
	rows      []schema.Row
	fenced    bool // the log has passed what the locked rows show
	known     map[*pending]changelog.DocumentKnown
	logHead   *changelog.Head // as of known
	asked     *pending        // the last change whose conflict a function was asked about
}

// localID is a client's own name of a row.
type localID struct {
	collection string
	id         string
}

// Why a transaction is done anew.
var (
	errAgain   = errors.New("the transaction lost against another one")
	errCareful = errors.New("some change fails: do them one by one")
	errBlame   = errors.New("some constraint fails in the end: check after each change")
)

// run brings the push into the source. The echo, which is never nil without an error, belongs to what was committed.
func (p *push) run(ctx context.Context) (*pushEcho, error) {
	if p.settled() { // nothing is left that the source could be asked for
		p.finish()
		return &pushEcho{}, nil
	}
	conn, err := p.g.o.Source.Acquire(ctx)
	if err != nil {
		return nil, (&Problem{Code: SourceUnavailable}).Because(err)
	}
	defer conn.Release()
	careful, blame := false, false
	for attempt := 1; ; attempt++ {
		x := &pushTx{push: p, conn: conn.Conn(), careful: careful, blame: blame, found: map[*pending]schema.Found{}}
		echo, err := x.attempt(ctx)
		if err == nil {
			return echo, nil
		}
		endTransaction(ctx, conn)
		switch {
		case errors.Is(err, errCareful) && !careful:
			careful = true
		case errors.Is(err, errBlame) && !blame:
			careful, blame = true, true
		case errors.Is(err, errAgain) && attempt < pushAttempts:
		case errors.Is(err, errAgain):
			return nil, (&Problem{Code: SourceUnavailable, Detail: "the rows are contended; nothing was written", RetryAfter: pushRetryAfter()}).Because(err)
		default:
			return nil, p.failed(ctx, err)
		}
		if conn.Conn().IsClosed() {
			return nil, (&Problem{Code: SourceUnavailable, Detail: "nothing was written"}).Because(err)
		}
	}
}

// settled says whether no change is left to look at in the source.
func (p *push) settled() bool {
	for i := range p.changes {
		if p.changes[i].fault == nil || p.changes[i].changeID != "" && p.changes[i].hash != nil {
			return false
		}
	}
	return true
}

// failed turns the failure of a transaction, of which nothing was committed, into what the client may know.
func (p *push) failed(ctx context.Context, err error) error {
	var problem *Problem
	switch f := schema.Classify(err); {
	case errors.As(err, &problem):
		return problem
	case f.Busy:
		return (&Problem{Code: SourceUnavailable, Detail: "the database is busy; nothing was written", RetryAfter: pushRetryAfter()}).Because(err)
	case ctx.Err() != nil:
		return (&Problem{Code: AnswerTimeout, Detail: "nothing was written"}).Because(err)
	}
	return (&Problem{Code: SourceUnavailable, Detail: "nothing was written"}).Because(err)
}

// endTransaction rolls back what is open; a connection that can't is closed, and the pool makes another.
func endTransaction(ctx context.Context, conn *pgxpool.Conn) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if conn.Conn().IsClosed() || conn.Conn().PgConn().TxStatus() == 'I' {
		return
	}
	if _, err := conn.Exec(ctx, `ROLLBACK`); err != nil {
		conn.Conn().Close(ctx)
	}
}

// attempt does all of it once.
func (x *pushTx) attempt(ctx context.Context) (*pushEcho, error) {
	for i := range x.changes {
		x.changes[i].reset()
	}
	if err := x.open(ctx); err != nil {
		return nil, err
	}
	failpoint.Here(failpoint.PushOpened)
	if err := x.recall(ctx); err != nil {
		return nil, err
	}
	if !(x.r.atomic && x.anyRejected()) {
		if err := x.apply(ctx); err != nil {
			return nil, err
		}
	}
	return x.close(ctx)
}

// reset forgets an attempt.
func (c *pending) reset() {
	c.result, c.resolved, c.values, c.believed = pushResult{docID: c.docID}, false, nil, nil
	if c.localID != "" {
		c.key = nil
	}
	if c.fault != nil {
		c.fail(c.fault.code, c.fault.detail)
	}
}

// fail rejects the change for good.
func (c *pending) fail(code, detail string) {
	c.result = pushResult{docID: cmp.Or(c.result.docID, c.docID), status: policies.Rejected, code: code, detail: detail}
}

func (x *pushTx) anyRejected() bool {
	for i := range x.changes {
		if x.changes[i].result.status == policies.Rejected {
			return true
		}
	}
	return false
}

// open begins the transaction: time limits, the client's turn, the mark, what is known of its changes. Where
// nothing has to be known before rows are locked, the lock's statement takes it along (Query).
func (x *pushTx) open(ctx context.Context) error {
	b := &pgx.Batch{}
	b.Queue(`BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE`)
	b.Queue(`WITH turn AS MATERIALIZED (SELECT set_config('lock_timeout', $3, true), set_config('statement_timeout', $4, true), pg_advisory_xact_lock($5))
		INSERT INTO walgate.pushes (subject, client_id) SELECT $1, $2 FROM turn RETURNING id, pg_current_xact_id()::text::int8, now()::text`,
		x.caller.Subject, x.r.client, pushLockMost, pushSelectMost, x.turn()).
		QueryRow(func(r pgx.Row) error { return r.Scan(&x.id, &x.txid, &x.now) })
	n := b.Len()
	x.queueOutcomes(b)
	x.queueLocals(b)
	if !x.careful && b.Len() == n {
		x.ahead = b
		return nil
	}
	return x.sendOpening(ctx, b)
}

func (x *pushTx) sendOpening(ctx context.Context, b *pgx.Batch) error {
	x.begun = true
	if err := x.conn.SendBatch(ctx, b).Close(); err != nil {
		return x.transient(fmt.Errorf("begin a push: %w", err))
	}
	return nil
}

// Query asks as the gateway, and sends what has to come before in the same round trip.
func (x *pushTx) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	rows, err := x.query(ctx, sql, args)
	if err != nil {
		return nil, err
	}
	return &heldRows{Rows: rows, x: x}, nil
}

func (x *pushTx) query(ctx context.Context, sql string, args []any) (pgx.Rows, error) {
	b := x.ahead
	if b == nil {
		return x.conn.Query(ctx, sql, args...)
	}
	x.ahead, x.begun = nil, true
	before := b.QueuedQueries
	b.Queue(sql, args...)
	results := x.conn.SendBatch(ctx, b)
	for _, q := range before {
		if q.Fn != nil {
			if err := q.Fn(results); err != nil {
				break // what follows says the same
			}
		} else if _, err := results.Exec(); err != nil {
			break
		}
	}
	rows, err := results.Query()
	if err != nil {
		results.Close()
		return nil, err
	}
	return &lastRows{rows, results}, nil
}

// heldRows bounds the memory that the rows of one push take: a short change may name a long row.
type heldRows struct {
	pgx.Rows
	x   *pushTx
	err error
}

// Next counts the row.
func (r *heldRows) Next() bool {
	if r.err != nil || !r.Rows.Next() {
		return false
	}
	size := 0
	for _, v := range r.RawValues() {
		size += len(v)
	}
	r.x.held, r.x.longest = r.x.held+size, max(r.x.longest, size)
	if most := rowsMemory * r.x.g.o.PushBody; r.x.held-r.x.longest > most { // one long row can always be pushed to
		r.err = NewProblem(RequestTooLarge, "the rows that the push is about hold more than %d bytes (%d times limits.push_body): send fewer changes at once", most, rowsMemory)
		r.Close()
		return false
	}
	return true
}

// Err is the reason for which no row follows.
func (r *heldRows) Err() error {
	if r.err != nil {
		return r.err
	}
	return r.Rows.Err()
}

// lastRows are the rows of a batch's last statement.
type lastRows struct {
	pgx.Rows
	results pgx.BatchResults
}

// Close closes the batch too.
func (r *lastRows) Close() {
	r.Rows.Close()
	r.results.Close()
}

// turn is the advisory lock of this client: two of its pushes at a time could both believe that they come first.
func (x *pushTx) turn() int64 {
	h := fnv.New64a()
	fmt.Fprintf(h, "walgate push %d:%s%s", len(x.caller.Subject), x.caller.Subject, x.r.client)
	return int64(h.Sum64())
}

// transient makes errAgain of failures that another attempt may escape.
func (x *pushTx) transient(err error) error {
	if err != nil && schema.Classify(err).Again {
		return fmt.Errorf("%w: %w", errAgain, err)
	}
	return err
}

// asUser makes the application's own rules hold: the role, its search path, who the end user is. asGateway ends that.
func (x *pushTx) asUser() pushStatement {
	return pushStatement{`SELECT pg_catalog.set_config('request.jwt.claims', $1, true), pg_catalog.set_config('row_security', 'on', true), pg_catalog.set_config('role', $2, true), pg_catalog.set_config('search_path', $3, true)`,
		[]any{x.claims, cmp.Or(x.g.o.PushRole, "none"), schema.ApplicationPath(x.conn)}}
}

var (
	// A trigger may have lowered synchronous_commit, which COMMIT would go by: an acknowledged push is on the disk.
	asGateway = pushStatement{`SELECT pg_catalog.set_config('role', 'none', true), pg_catalog.set_config('row_security', 'off', true), pg_catalog.set_config('search_path', 'pg_catalog', true),
		CASE WHEN pg_catalog.current_setting('synchronous_commit') IN ('off', 'local') THEN pg_catalog.set_config('synchronous_commit', 'on', true) END`, nil}
	// What a transaction has left behind in the session, which serves others next.
	leftovers = pushStatement{`SELECT CASE WHEN pg_catalog.current_setting('synchronous_commit') IN ('off', 'local') THEN 'synchronous_commit' WHEN pg_catalog.current_setting('search_path') <> 'pg_catalog' THEN 'search_path'
		WHEN pg_catalog.current_setting('role') <> 'none' THEN 'role' WHEN pg_catalog.current_setting('row_security') <> 'off' THEN 'row_security' ELSE '' END`, nil}
	// Both run as the application's user: deferred triggers run with the second.
	deferConstraints = pushStatement{`SET CONSTRAINTS ALL DEFERRED`, nil}
	checkConstraints = pushStatement{`SET CONSTRAINTS ALL IMMEDIATE`, nil}
)

// pushStatement is one statement with its arguments.
type pushStatement struct {
	sql  string
	args []any
}

// framed sends a batch between others, in the same round trip.
type framed struct {
	conn          *pgx.Conn
	before, after []pushStatement
}

// SendBatch returns the results of the batch and, to who closes them, of what follows it.
func (f framed) SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults {
	all := &pgx.Batch{}
	for _, s := range f.before {
		all.Queue(s.sql, s.args...)
	}
	all.QueuedQueries = append(all.QueuedQueries, b.QueuedQueries...)
	for _, s := range f.after {
		all.Queue(s.sql, s.args...)
	}
	results := f.conn.SendBatch(ctx, all)
	for range f.before {
		if _, err := results.Exec(); err != nil {
			break // the results that follow say the same
		}
	}
	return results
}

// do sends statements of which only the success matters.
func (x *pushTx) do(ctx context.Context, statements ...pushStatement) error {
	b := &pgx.Batch{}
	for _, s := range statements {
		b.Queue(s.sql, s.args...)
	}
	return x.conn.SendBatch(ctx, b).Close()
}

package changelog

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/walgate/walgate/internal/failpoint"
)

// announceLimit is how many bytes of entries one batch may carry over the bus; a larger one is announced by its
// position only.
const announceLimit = 2 << 20

// bufferKept is the most memory that is kept from one append to the next: more than what a queue's worth of rows needs, less
// than a giant row.
const bufferKept = 32 << 20

// Appender is the log's only writer: it owns one connection and belongs to one goroutine.
type Appender struct {
	log        *Log
	conn       *pgx.Conn
	dog        *watchdog
	bus        Bus
	epoch      int64
	claim      int64 // Head.Claim
	history    string
	version    Version // of the checkpoint, durable
	logged     atomic.Uint64
	parts      partitions
	open       bool // a log transaction has begun
	buf        []byte
	adds       []*Reference // of writeReferences
	sql        []byte
	txs        []Piece // of the open log transaction: transactions to record (entries left out)
	raises     []Raise
	entries    []Entry     // to announce
	operations []Operation // to announce
	held       int         // bytes of entries and operations
	omitted    bool
	batchRows  int
	att        attachments
	OnAppended func(Appended) // may be nil; called after each durable append, on the appender's goroutine
}

// Appended says what one log transaction appended.
type Appended struct {
	Transactions, Rows int
	Version            Version
	LSN                LSN
	Took               time.Duration
}

// NewAppender connects, takes the log over (see Claim), and returns its writer. Close it in any case.
func (l *Log) NewAppender(ctx context.Context, bus Bus, c Claim) (*Appender, *Claimed, error) {
	a, err := l.ConnectAppender(ctx, bus)
	if err != nil {
		return nil, nil, err
	}
	claimed, err := a.Claim(ctx, c)
	if err != nil {
		a.Close()
		return nil, nil, err
	}
	return a, claimed, nil
}

// ConnectAppender returns a writer that has yet to take the log over. Close it in any case.
func (l *Log) ConnectAppender(ctx context.Context, bus Bus) (*Appender, error) {
	a, err := l.connectAppender(ctx, bus)
	if err != nil {
		return nil, fmt.Errorf("connect to the change log's database: %w", Explain(err))
	}
	a.log = l
	return a, nil
}

// Known is what a log held at a moment. The zero value is that of a log that was never begun.
type Known struct {
	Collections map[string]bool
	Epoch       int64
	LSN         LSN
}

// Known returns what the log holds. ErrConfigRevision where it was taken over with a newer configuration.
func (a *Appender) Known(ctx context.Context, revision int64) (*Known, error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	var stored int64
	var names []string
	known := &Known{}
	err := a.conn.QueryRow(ctx, `SELECT config_revision, ARRAY(SELECT name FROM walgate.collections), epoch, lsn - '0/0'::pg_lsn FROM walgate.checkpoint`).
		Scan(&stored, &names, &known.Epoch, (*pgLSN)(&known.LSN))
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return known, nil
	case err != nil:
		return nil, fmt.Errorf("read the change log's state: %w", Explain(err))
	case revision < stored:
		return nil, olderConfig(revision, stored)
	}
	known.Collections = make(map[string]bool, len(names))
	for _, n := range names {
		known.Collections[n] = true
	}
	return known, nil
}

// Claim takes the log over. The caller holds the slot.
func (a *Appender) Claim(ctx context.Context, c Claim) (*Claimed, error) {
	stop := a.dog.run(ctx)
	defer stop()
	var claimed *Claimed
	err := a.dog.call(func() (err error) {
		if err = endPredecessor(ctx, a.conn); err != nil {
			return err
		}
		if claimed, err = claim(ctx, a.conn, c); err != nil {
			return err
		}
		failpoint.Here(failpoint.LogClaimed)
		if err = a.att.load(ctx, a.conn); err != nil {
			return err
		}
		return a.parts.load(ctx, a.conn)
	})
	if err != nil {
		return nil, Explain(err)
	}
	a.epoch, a.claim, a.history, a.version = claimed.Epoch, claimed.Number, claimed.History, claimed.Version
	a.logged.Store(uint64(claimed.LSN))
	a.log.pool.Reset() // readers must not go on with connections to a server that held the log before
	a.bus.Publish(&Batch{Claim: a.claim, History: a.history, Prev: claimed.Version, Last: claimed.Version, LSN: claimed.LSN, Omitted: true})
	return claimed, nil
}

func (l *Log) connectAppender(ctx context.Context, bus Bus) (*Appender, error) {
	cfg := l.pool.Config().ConnConfig
	cfg.RuntimeParams["application_name"] = appenderName
	cfg.RuntimeParams["idle_in_transaction_session_timeout"] = "0" // the next row of a transaction may be long on its way
	maps.Copy(cfg.RuntimeParams, probingSession)
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return nil, err
	}
	a := &Appender{conn: conn, bus: bus, dog: &watchdog{cfg: l.pool.Config().ConnConfig, conn: conn.PgConn(), patience: cmp.Or(l.Patience, defaultPatience), waiting: l.OnWaiting}}
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	if err = durable(ctx, conn); err == nil {
		err = conn.QueryRow(ctx, `SELECT pg_backend_pid()`).Scan(&a.dog.pid)
	}
	if err != nil {
		a.Close()
		return nil, err
	}
	return a, nil
}

// Close ends the connection; an append that wasn't committed leaves nothing.
func (a *Appender) Close() {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	a.conn.Close(ctx)
}

// Logged returns the position up to which every commit of the source is durable in the log. Safe for concurrent use.
func (a *Appender) Logged() LSN { return LSN(a.logged.Load()) }

// Run appends what the queue brings until ctx ends (nil) or an append fails. After an error the log is as the last
// durable append left it, or, where the connection broke during a commit, with that commit: claim again and see.
func (a *Appender) Run(ctx context.Context, q *Queue) error {
	defer a.dog.run(ctx)()
	var pieces []Piece
	for {
		clear(pieces)
		var err error
		pieces, err = q.Take(ctx, pieces[:0])
		if err != nil {
			return nil // ctx ended: what isn't committed comes again from the slot
		}
		if err := a.dog.call(func() error { return a.append(ctx, pieces) }); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("append to the change log: %w", appendError(err))
		}
	}
}

func appendError(err error) error {
	var pg *pgconn.PgError
	if errors.As(err, &pg) && pg.ConstraintName == "deposed_leader" {
		return ErrDeposed
	}
	return Explain(err)
}

// append writes pieces; it commits when the last one ends its source transaction.
func (a *Appender) append(ctx context.Context, pieces []Piece) error {
	start := time.Now()
	last := &pieces[len(pieces)-1]
	if !a.open && !writes(pieces) {
		return a.finish(ctx, start, last) // only the checkpoint moves
	}
	if err := a.ensurePartitions(ctx, pieces); err != nil {
		return err
	}
	if err := a.copyEntries(ctx, pieces); err != nil {
		return err
	}
	if err := a.writeAttachments(ctx, pieces); err != nil {
		return err
	}
	a.collect(pieces)
	if !last.Final {
		return nil
	}
	if err := a.judge(ctx); err != nil {
		return err
	}
	return a.finish(ctx, start, last)
}

func writes(pieces []Piece) bool {
	for i := range pieces {
		if len(pieces[i].Entries) > 0 || len(pieces[i].Raises) > 0 || pieces[i].Push != nil || !pieces[i].Final || len(pieces[i].References)+len(pieces[i].Files)+len(pieces[i].Fills) > 0 {
			return true
		}
	}
	return false
}

// ensurePartitions makes the partitions that the pieces need, before the log transaction begins where it can.
func (a *Appender) ensurePartitions(ctx context.Context, pieces []Piece) error {
	for i := range pieces {
		versions := []Version{pieces[i].Tx}
		if n := len(pieces[i].Entries); n > 0 {
			versions = append(versions, pieces[i].Entries[0].Version, pieces[i].Entries[n-1].Version)
		}
		if pieces[i].Tx != 0 {
			for _, v := range versions {
				if err := a.parts.ensure(ctx, a.conn, v); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// collect remembers what the commit and the announcement need.
func (a *Appender) collect(pieces []Piece) {
	for i := range pieces {
		p := &pieces[i]
		a.batchRows += len(p.Entries)
		a.raises = append(a.raises, p.Raises...)
		if p.Final && p.Tx != 0 {
			a.txs = append(a.txs, Piece{Tx: p.Tx, Xid: p.Xid, Version: p.Version, Push: p.Push})
		}
		a.held += p.Size
		if a.omitted = a.omitted || a.held > announceLimit; a.omitted {
			a.entries = nil
			continue
		}
		a.entries = append(a.entries, p.Entries...)
	}
}

var copyHeader = append([]byte("PGCOPY\n\xff\r\n\x00"), 0, 0, 0, 0, 0, 0, 0, 0)

const copyColumns = `COPY walgate.changes (version, tx, scope, collection, op, size, doc_id, data, guard, changed, document) FROM STDIN BINARY`

func (a *Appender) copyEntries(ctx context.Context, pieces []Piece) error {
	sql := copyColumns
	if !a.open {
		sql = `BEGIN; ` + copyColumns
		a.open = true
	}
	a.buf = append(a.buf[:0], copyHeader...)
	for i := range pieces {
		for j := range pieces[i].Entries {
			a.buf = appendCopyRow(a.buf, &pieces[i].Entries[j])
		}
	}
	a.buf = append(a.buf, 0xff, 0xff)
	_, err := a.conn.PgConn().CopyFrom(ctx, bytes.NewReader(a.buf), sql)
	failpoint.Here(failpoint.Appended)
	if cap(a.buf) > bufferKept {
		a.buf = nil
	}
	return err
}

func appendCopyRow(b []byte, e *Entry) []byte {
	be := binary.BigEndian
	b = append(b, 0, 11, 0, 0, 0, 8)
	b = be.AppendUint64(b, uint64(e.Version))
	b = append(b, 0, 0, 0, 8)
	b = be.AppendUint64(b, uint64(e.Tx))
	b = append(b, 0, 0, 0, 16)
	b = append(b, e.Scope[:]...)
	b = append(b, 0, 0, 0, 4)
	b = be.AppendUint32(b, uint32(e.Collection))
	b = append(b, 0, 0, 0, 1, e.Op, 0, 0, 0, 4)
	b = be.AppendUint32(b, uint32(len(e.Data)))
	b = be.AppendUint32(b, uint32(len(e.DocID)))
	b = append(b, e.DocID...)
	b = appendField(b, e.Data)
	b = appendField(b, e.Guard)
	b = appendField(b, e.Changed)
	b = append(b, 0, 0, 0, 8)
	return be.AppendUint64(b, uint64(documentHash(e.Collection, e.DocID)))
}

func appendField(b, v []byte) []byte {
	if v == nil {
		return append(b, 0xff, 0xff, 0xff, 0xff)
	}
	b = binary.BigEndian.AppendUint32(b, uint32(len(v)))
	return append(b, v...)
}

// finish moves the checkpoint, commits, and announces. The three go in one round trip; everything in the text is a
// number made here or passed through quote.
func (a *Appender) finish(ctx context.Context, start time.Time, last *Piece) error {
	b, pushes, err := appendTransactions(a.sql[:0], a.txs)
	if err != nil {
		return err
	}
	for i := range a.raises {
		b = appendRaise(b, &a.raises[i])
	}
	version := max(a.version, last.Version)
	b = fmt.Appendf(b, `UPDATE walgate.checkpoint SET version = %d, lsn = '%s', writer = %d, written_at = clock_timestamp()`, version, last.LSN, a.epoch)
	if a.open {
		b = append(b, `; COMMIT`...)
	}
	a.sql = b
	failpoint.Here(failpoint.Committing)
	answer := a.conn.PgConn().Exec(ctx, string(b))
	failpoint.Here(failpoint.CommitSent)
	if _, err := answer.ReadAll(); err != nil {
		return err
	}
	failpoint.Here(failpoint.Committed)
	batch := &Batch{Claim: a.claim, History: a.history, Prev: a.version, Last: version, LSN: last.LSN, Entries: a.entries, Omitted: a.omitted, Raises: a.raises, Pushes: pushes, Operations: a.operations}
	done := Appended{Transactions: len(a.txs), Rows: a.batchRows, Version: version, LSN: last.LSN, Took: time.Since(start)}
	a.version = version
	a.open, a.entries, a.operations, a.raises, a.omitted, a.held, a.batchRows = false, nil, nil, nil, false, 0, 0
	a.txs = a.txs[:0]
	a.logged.Store(uint64(last.LSN)) // the one place that moves "logged"
	a.bus.Publish(batch)
	failpoint.Here(failpoint.Announced)
	if a.OnAppended != nil {
		a.OnAppended(done)
	}
	return nil
}

// appendTransactions appends the statements that record the transactions, and returns the pushes among them.
func appendTransactions(b []byte, txs []Piece) ([]byte, []Pushed, error) {
	var pushes []Pushed
	plain := 0
	for i := range txs {
		t := &txs[i]
		if t.Push != nil {
			pushes = append(pushes, Pushed{Tx: t.Tx, Last: t.Version, Push: *t.Push})
			continue
		}
		if plain++; plain == 1 {
			b = append(b, `INSERT INTO walgate.transactions (tx, xid) VALUES (`...)
		} else {
			b = append(b, `,(`...)
		}
		b = strconv.AppendInt(b, int64(t.Tx), 10)
		b = append(b, ',')
		b = strconv.AppendUint(b, t.Xid, 10)
		b = append(b, ')')
	}
	if plain > 0 {
		b = append(b, ';')
	}
	if len(pushes) == 0 {
		return b, nil, nil
	}
	b = append(b, `INSERT INTO walgate.transactions (tx, xid, last, push, subject, client_id, locals) VALUES `...)
	sep := ""
	for i := range txs {
		if txs[i].Push == nil {
			continue
		}
		var err error
		if b, err = appendPush(append(b, sep...), &txs[i]); err != nil {
			return b, nil, err
		}
		sep = ","
	}
	return append(b, ';'), pushes, nil
}

func appendRaise(b []byte, r *Raise) []byte {
	b = append(b, `UPDATE walgate.collections SET name = name`...)
	if r.Version != 0 {
		b = fmt.Appendf(b, `, floor = %[1]d, floor_reason = %[2]s, refill = %[1]d`, r.Version, quote(r.Reason))
	}
	if r.Shape != "" {
		b = append(b, `, shape = `+quote(r.Shape)...)
	}
	if r.SetStopped {
		b = append(b, `, stopped = `+quote(r.Stopped)...)
	}
	return fmt.Appendf(b, ` WHERE id = %d;`, r.Collection)
}

// quote returns s as an SQL literal that is safe whatever standard_conforming_strings says.
func quote(s string) string {
	b := []byte(" E'")
	for i := range len(s) {
		switch c := s[i]; c {
		case '\'', '\\':
			b = append(b, '\\', c)
		case 0:
		default:
			b = append(b, c)
		}
	}
	return string(append(b, '\''))
}

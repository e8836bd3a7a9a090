package replication

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/internal/failpoint"
	"github.com/walgate/walgate/schema"
)

const (
	// senderTimeout is what the server's walsender waits for a status: a dead gateway frees the slot after it.
	senderTimeout  = 5 * time.Second
	statusInterval = time.Second
	// stallTimeout is silence that no live server keeps: at half its timeout it sends a keepalive.
	stallTimeout = 2 * senderTimeout
	// idlePersist is how often the position of an idle source is stored.
	idlePersist = 10 * time.Second
	// callTimeout bounds the leader's short calls to the source: what TCP can't notice must not hold it for ever.
	callTimeout = 10 * time.Second
)

// timing is those times, but for tests that can't wait that long.
type timing struct{ sender, status, stall, idle, slot time.Duration }

var defaultTiming = timing{senderTimeout, statusInterval, stallTimeout, idlePersist, slotCheckInterval}

// stream reads the slot. All its methods but post run on one goroutine, the only one that touches the connection.
type stream struct {
	conn    *pgconn.PgConn
	timing  timing
	seq     *sequencer
	queue   *changelog.Queue
	logged  func() changelog.LSN
	resolve func(ctx context.Context, r *relation) (*target, error)
	stats   *Stats
	log     *slog.Logger

	msg         message
	at          changelog.LSN // of the message being handled
	received    changelog.LSN // all commits that end at or before it were handled
	handed      changelog.LSN // the newest position given to the appender
	idleAsked   time.Time     // when an idle position was last handed over
	insisted    time.Time     // when the server last asked for a reply
	heard       time.Time
	nextStatus  time.Time
	failed      error // set by posted work: the session must start anew
	controlLock sync.Mutex
	control     []work // to run between transactions
}

// work is something to do between transactions, once everything up to an LSN was handled.
type work struct {
	after changelog.LSN
	do    func()
}

// connect opens the replication connection with the display settings that the codec needs.
func connect(ctx context.Context, url, encoding string, sender time.Duration) (*pgconn.PgConn, error) {
	cfg, err := pgconn.ParseConfig(url)
	if err != nil {
		return nil, fmt.Errorf("replication url: %w", err)
	}
	cfg.BuildFrontend = func(r io.Reader, w io.Writer) *pgproto3.Frontend { return pgproto3.NewFrontend(newGatherer(r), w) }
	cfg.RuntimeParams["replication"] = "database"
	cfg.RuntimeParams["application_name"] = "walgate"
	cfg.RuntimeParams["wal_sender_timeout"] = fmt.Sprint(sender.Milliseconds())
	for _, s := range schema.SessionSettings {
		cfg.RuntimeParams[s.Name] = s.Value
	}
	cfg.RuntimeParams["client_encoding"] = schema.ClientEncoding(encoding)
	schema.BoundConnection(cfg)
	onWire(cfg)
	conn, err := pgconn.ConnectConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("open the replication connection (it must reach PostgreSQL directly, not through a pooler): %w", err)
	}
	return conn, nil
}

// start begins streaming where the slot stands.
func start(ctx context.Context, conn *pgconn.PgConn, slot string, p schema.Publications) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	names := strings.ReplaceAll(ident(p.Rows)+","+ident(p.Events), "'", "''")
	err := pglogrepl.StartReplication(ctx, conn, slot, 0, pglogrepl.StartReplicationOptions{PluginArgs: []string{
		"proto_version '1'", "publication_names '" + names + "'", "messages 'true'",
	}})
	if err != nil {
		return fmt.Errorf("start replication from slot %s: %w", slot, err)
	}
	return nil
}

// ident quotes a name for SQL.
func ident(s string) string { return `"` + strings.ReplaceAll(s, `"`, `""`) + `"` }

// post asks for do to run between two transactions, soon after everything up to an LSN was handled. What it adds to the
// sequencer's piece is handed over at once. Safe for concurrent use.
func (s *stream) post(after changelog.LSN, do func()) {
	s.controlLock.Lock()
	s.control = append(s.control, work{after, do})
	s.controlLock.Unlock()
	s.conn.Conn().SetReadDeadline(time.Unix(1, 0)) // wakes the reader
}

// run handles messages until ctx ends (nil) or something fails.
func (s *stream) run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { s.conn.Conn().SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	s.heard = time.Now()
	s.seq.put = func(p changelog.Piece) error { return s.put(ctx, p) }
	if err := s.tick(ctx); err != nil {
		return err
	}
	for ctx.Err() == nil {
		m, err := s.conn.ReceiveMessage(context.Background())
		if err != nil {
			var timeout net.Error
			if !errors.As(err, &timeout) || !timeout.Timeout() {
				return fmt.Errorf("read the replication stream: %w", err)
			}
			if err := s.tick(ctx); err != nil {
				return err
			}
			continue
		}
		switch m := m.(type) {
		case *pgproto3.CopyData:
			err = s.handle(ctx, m.Data)
		case *pgproto3.ErrorResponse:
			err = s.ended(pgconn.ErrorResponseToPgError(m))
		}
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
	}
	return nil
}

// ended tells a server that stops or lacks something from one that can't decode its WAL: it won't the next time either.
func (s *stream) ended(cause *pgconn.PgError) error {
	if !slices.Contains([]string{"08", "53", "55", "57", "58"}, cause.Code[:min(2, len(cause.Code))]) && !publicationMissing(cause) {
		return &undecodableError{cause, s.received}
	}
	return fmt.Errorf("the server ended the replication stream: %w", cause)
}

// undecodableError: PostgreSQL itself fails to decode what it wrote, as for tables that were altered while the slot was made.
type undecodableError struct {
	cause *pgconn.PgError
	after changelog.LSN
}

func (e *undecodableError) Error() string {
	return fmt.Sprintf("PostgreSQL can't decode its WAL after %s (if this stays so, a new slot is made and clients resynchronise): %v", e.after, e.cause)
}

func (e *undecodableError) Unwrap() error { return e.cause }

// tick runs at least once a status interval, whatever else goes on.
func (s *stream) tick(ctx context.Context) error {
	now := time.Now()
	if !now.Before(s.nextStatus) {
		if err := s.sendStatus(); err != nil {
			return err
		}
		s.nextStatus = now.Add(s.timing.status)
	}
	if last := lastByte(s.conn.Conn()); last.After(s.heard) {
		s.hear(last)
	}
	if now.Sub(s.heard) > s.timing.stall {
		return errStalled
	}
	s.conn.Conn().SetReadDeadline(s.nextStatus)
	if ctx.Err() != nil {
		return nil
	}
	if s.seq.inTx {
		return nil
	}
	if err := s.runControl(ctx); err != nil {
		return err
	}
	return s.persistIdle(ctx, now)
}

func (s *stream) runControl(ctx context.Context) error {
	s.controlLock.Lock()
	var due []work
	s.control = slices.DeleteFunc(s.control, func(w work) bool {
		if w.after <= s.received {
			due = append(due, w)
			return true
		}
		return false
	})
	s.controlLock.Unlock()
	if len(due) == 0 {
		return nil
	}
	for _, w := range due {
		w.do()
	}
	if s.failed != nil {
		return s.failed
	}
	return s.handOver(ctx)
}

// persistIdle stores how far an idle source was read, now and then: only what is stored may be acknowledged.
func (s *stream) persistIdle(ctx context.Context, now time.Time) error {
	if s.received <= s.handed || s.logged() < s.handed || now.Sub(s.idleAsked) < s.timing.idle {
		return nil
	}
	s.idleAsked = now
	return s.handOver(ctx)
}

// handOver gives the received position to the appender, with whatever the sequencer holds.
func (s *stream) handOver(ctx context.Context) error {
	p := s.seq.piece
	s.seq.piece = changelog.Piece{}
	p.LSN, p.Final, p.Version = max(s.received, s.handed), true, s.seq.clock.Last()
	return s.put(ctx, p)
}

// put queues a piece, keeping the server informed while the queue is full.
func (s *stream) put(ctx context.Context, p changelog.Piece) error {
	p.Size += 64
	if p.Final {
		s.handed = max(s.handed, p.LSN)
	}
	for !s.queue.TryPut(p) {
		if err := s.queue.WaitRoom(ctx, s.timing.status/2); err != nil {
			return &appendFailure{err}
		}
		s.stats.QueueBytes.Store(int64(s.queue.Len())) // while nothing is appended, nobody else says so
		s.hear(time.Now())                             // it is us who aren't listening
		if !s.heard.Before(s.nextStatus) {
			if err := s.sendStatus(); err != nil {
				return &appendFailure{err}
			}
			s.nextStatus = s.heard.Add(s.timing.status)
		}
	}
	failpoint.Here(failpoint.HandedOver)
	return nil
}

func (s *stream) hear(at time.Time) {
	s.heard = at
	s.stats.WireNanos.Store(at.UnixNano())
}

// handle reads one message of the copy stream.
func (s *stream) handle(ctx context.Context, data []byte) error {
	s.hear(time.Now())
	switch {
	case len(data) == 18 && data[0] == pglogrepl.PrimaryKeepaliveMessageByteID:
		return s.keepalive(ctx, changelog.LSN(binary.BigEndian.Uint64(data[1:])), data[17] == 1)
	case len(data) > 25 && data[0] == pglogrepl.XLogDataByteID:
		failpoint.Here(failpoint.Received)
		s.at = changelog.LSN(binary.BigEndian.Uint64(data[1:]))
		if err := s.message(ctx, data[25:]); err != nil {
			return s.located(s.at, err)
		}
		return nil
	}
	return fmt.Errorf("unknown message %q of %d bytes in the replication stream", data[:min(1, len(data))], len(data))
}

// located adds the place to an error of decoding; errors of putting stay as they are.
func (s *stream) located(at changelog.LSN, err error) error {
	var lost *DecodeError
	var broken *appendFailure
	if errors.As(err, &lost) || errors.As(err, &broken) || errors.Is(err, errReclaim) {
		return err
	}
	name := ""
	if t := s.seq.targets[s.msg.relation]; t != nil && t.relation != nil {
		name = t.relation.schema + "." + t.relation.name
	}
	return &DecodeError{LSN: at, Relation: name, Err: err}
}

func (s *stream) keepalive(ctx context.Context, end changelog.LSN, reply bool) error {
	if !s.seq.inTx { // within a transaction its end says nothing about what was handled
		s.setReceived(end)
		if err := s.runControl(ctx); err != nil {
			return err
		}
	}
	if !reply {
		return nil
	}
	// A server that shuts down asks again and again until all of its WAL is acknowledged.
	if !s.seq.inTx && s.received > s.handed && s.logged() >= s.handed && s.heard.Sub(s.insisted) < s.timing.sender/4 {
		s.idleAsked = s.heard
		if err := s.handOver(ctx); err != nil {
			return err
		}
	}
	s.insisted = s.heard
	return s.sendStatus()
}

func (s *stream) setReceived(l changelog.LSN) {
	s.received = max(s.received, l)
	s.stats.Received.Store(uint64(s.received))
}

// message decodes and handles one pgoutput message.
func (s *stream) message(ctx context.Context, b []byte) error {
	m := &s.msg
	if err := m.decode(b); err != nil {
		return err
	}
	failpoint.Here(failpoint.Decoded)
	switch m.kind {
	case msgBegin:
		s.seq.begin(m)
	case msgCommit:
		return s.commit(ctx, m)
	case msgRelation:
		return s.relation(ctx, m.rel)
	case msgMessage:
		if s.seq.inTx && !s.seq.skipping && string(m.prefix) == FencePrefix {
			s.seq.fence = true
		}
	case msgTruncate:
		for _, oid := range m.relations {
			if t := s.seq.targets[oid]; t != nil && t.stopped == "" && !s.seq.skipping {
				s.seq.raise(changelog.Raise{Collection: t.id, Reason: "truncated"})
			}
		}
	case msgInsert, msgUpdate, msgDelete:
		return s.change(ctx, m)
	}
	return nil
}

func (s *stream) change(ctx context.Context, m *message) error {
	t, ok := s.seq.targets[m.relation]
	if !ok {
		return fmt.Errorf("row of relation %d, which was never described", m.relation)
	}
	if s.seq.skipping {
		return nil
	}
	if s.seq.marks != nil && m.relation == s.seq.marks.relation && m.kind == msgInsert {
		s.seq.mark(m.new, s.at)
		return nil
	}
	if s.seq.events != nil && m.relation == s.seq.events.relation && m.kind == msgInsert {
		return s.seq.event(m.new, s.at)
	}
	if t == nil || t.stopped != "" {
		return nil
	}
	err := s.seq.change(t, m)
	var broken *appendFailure
	if err == nil || errors.As(err, &broken) {
		return err
	}
	return s.retryChange(ctx, t, m, err)
}

// retryChange handles a row that can't be turned into a document: its types may have been altered, so they are read anew;
// if that doesn't help, the collection stops, with the place, and the others go on.
func (s *stream) retryChange(ctx context.Context, t *target, m *message, cause error) error {
	fresh, err := s.resolve(ctx, t.relation)
	if err == nil && fresh != nil && fresh.stopped == "" {
		s.seq.targets[m.relation] = fresh
		t = fresh
		var broken *appendFailure
		if err := s.seq.change(t, m); err == nil || errors.As(err, &broken) {
			return err
		}
	}
	if err != nil {
		return err
	}
	t.stopped = s.located(s.at, cause).Error()
	s.log.Error("collection stopped", "collection", t.collection.Name, "reason", t.stopped)
	s.seq.raise(changelog.Raise{Collection: t.id, SetStopped: true, Stopped: t.stopped})
	return nil
}

func (s *stream) commit(ctx context.Context, m *message) error {
	_, err := s.seq.commit(m)
	s.setReceived(m.end)
	if err != nil {
		return err
	}
	return s.runControl(ctx)
}

// relation binds the collection to a new layout.
func (s *stream) relation(ctx context.Context, r *relation) error {
	if m := marksOf(r); m != nil {
		s.seq.marks, s.seq.targets[r.oid] = m, nil
		return nil
	}
	if e := eventsOf(r); e != nil {
		s.seq.events, s.seq.targets[r.oid] = e, nil
		return nil
	}
	t, err := s.resolve(ctx, r)
	if err != nil {
		return err
	}
	old, known := s.seq.targets[r.oid]
	s.seq.targets[r.oid] = t
	if t == nil {
		return nil
	}
	switch {
	case t.stopped != "" && (!known || old == nil || old.stopped != t.stopped):
		s.log.Error("collection stopped", "collection", t.collection.Name, "table", r.schema+"."+r.name, "reason", t.stopped)
		s.seq.raise(changelog.Raise{Collection: t.id, SetStopped: true, Stopped: t.stopped})
	case t.stopped == "" && known && old != nil && old.stopped != "" && !s.halts(t.id, r.oid): // another partition may still be stopped
		s.log.Info("collection goes on; its clients resynchronise", "collection", t.collection.Name)
		s.seq.raise(changelog.Raise{Collection: t.id, Reason: "was stopped: " + old.stopped, SetStopped: true})
	}
	return nil
}

// halts says whether a relation of a collection is stopped, other than the one named.
func (s *stream) halts(id int32, but uint32) bool {
	for oid, t := range s.seq.targets {
		if t != nil && oid != but && t.id == id && t.stopped != "" {
			return true
		}
	}
	return false
}

// sendStatus tells the server how far everything is logged. All three positions are set: a zero flush would be taken
// for the write position.
func (s *stream) sendStatus() error {
	ack := pglogrepl.LSN(s.logged())
	failpoint.Here(failpoint.Acknowledging)
	err := pglogrepl.SendStandbyStatusUpdate(context.Background(), s.conn, pglogrepl.StandbyStatusUpdate{
		WALWritePosition: max(ack, pglogrepl.LSN(s.received)), WALFlushPosition: ack, WALApplyPosition: ack,
		// Our statuses keep the server from sending keepalives of its own: on a silent source, ask for one.
		ReplyRequested: time.Since(s.heard) > s.timing.sender/2,
	})
	if err != nil {
		return fmt.Errorf("send status to the server: %w", err)
	}
	failpoint.Here(failpoint.Acknowledged)
	s.stats.Acknowledged.Store(uint64(ack)) // the one place that moves "acknowledged"
	return nil
}

// appendFailure is a failure to hand something over; it says nothing about the row.
type appendFailure struct{ error }

func (f *appendFailure) Unwrap() error { return f.error }

// FencePrefix marks the logical messages that the gateway waits for.
const FencePrefix = "walgate"

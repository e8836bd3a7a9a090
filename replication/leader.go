package replication

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/errgroup"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/internal/failpoint"
	"github.com/walgate/walgate/schema"
)

// queueBytes bounds what waits between stream and appender.
const queueBytes = 8 << 20

// Options is what a leader needs.
type Options struct {
	Source         *pgxpool.Pool // ordinary connections to the source
	ReplicationURL string        // a direct connection to the source
	Slot           string
	Publications   schema.Publications
	ConfigRevision int64
	MaxSlotLag     int64         // bytes that the slot may hold back before it is warned of
	PushRetention  time.Duration // how long the source's records of pushes are kept; 0: for ever
	Log            *changelog.Log
	Bus            changelog.Bus
	Watcher        *Watcher
	Stats          *Stats
	Logger         *slog.Logger

	timing   timing // zero: defaultTiming
	fillRows int    // of one step of a fill; 0: fillRows
}

// Leader tails the source into the log for as long as it holds the slot.
type Leader struct {
	o          Options
	lookAtSlot chan struct{}     // capacity 1
	unreadable string            // why the slot can't be read on; empty: it can
	unreadTo   changelog.LSN     // where that slot, or the log, stood then: one that confirms more was made anew meanwhile
	confirmed  changelog.LSN     // by the slot when last looked at
	failure    string            // with which PostgreSQL last failed to decode
	failures   int               // how often it has in a row
	heldBy     string            // who holds the slot, as last logged
	expired    time.Time         // when retention was last applied
	droppable  changelog.Version // log partitions below it may go with the next time
	forgotten  time.Time         // when nothing was left to forget in the source
	server     changelog.Server  // the source as last seen
	noted      int64             // the last number that source and log both hold
	notedAt    int64             // how many transactions were logged then; -1: it is due
}

// NewLeader returns a leader; Run does the work.
func NewLeader(o Options) *Leader {
	o.timing = cmp.Or(o.timing, defaultTiming)
	return &Leader{o: o, lookAtSlot: make(chan struct{}, 1)}
}

const (
	firstBackoff = 50 * time.Millisecond
	lastBackoff  = 5 * time.Second
)

// Run holds the slot and appends until ctx ends, then returns nil. While another process holds the slot it waits; whatever
// fails (the source, the log's database) is shown in Stats and tried again with growing pauses: serving goes on meanwhile.
func (l *Leader) Run(ctx context.Context) error {
	var watching sync.WaitGroup
	defer watching.Wait() // the slot's lag matters most while nothing reads from it
	watching.Go(func() { l.watchSlot(ctx) })
	l.o.Log.OnWaiting = l.waiting
	pause := firstBackoff
	for {
		if l.awaitSlot(ctx) {
			pause = firstBackoff // what failed once has nothing to do with what comes now
		}
		began := time.Now()
		err := l.session(ctx)
		if ctx.Err() != nil {
			l.o.Stats.setState(false, nil)
			return nil
		}
		if slotBusy(err) { // another instance was quicker, or ours of before isn't gone yet
			sleep(ctx, spread(firstBackoff))
			continue
		}
		l.judgeSlot(err)
		l.o.Stats.setState(false, err)
		l.o.Stats.Reconnects.Add(1)
		if time.Since(began) > time.Minute {
			pause, l.failures = firstBackoff, 0
		}
		if errors.Is(err, errReclaim) {
			l.o.Logger.Info("beginning a new session", "reason", err)
			if time.Since(began) > lastBackoff { // else it may be one after the other
				pause = firstBackoff
			}
		} else {
			l.o.Logger.Error("replication stopped; trying again", "error", err, "pause", pause.String())
		}
		sleep(ctx, spread(pause))
		pause = min(pause*2, lastBackoff)
	}
}

// spread keeps instances from doing the same at the same moment: half of d to all of it.
func spread(d time.Duration) time.Duration { return d/2 + rand.N(d/2+1) }

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// waiting shows why the change log takes long, and says it once.
func (l *Leader) waiting(why string) {
	if was := l.o.Stats.setWaiting(why); (was == "") != (why == "") {
		l.o.Logger.Warn("the change log holds replication up; the source keeps its WAL meanwhile", "reason", cmp.Or(why, "over: it goes on"))
	}
}

// publicationMissing says that the WAL at the slot's position comes from a time without publication: it decodes by the
// catalog of that time, whatever exists now.
func publicationMissing(err error) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) && pg.Code == "42704" && strings.Contains(pg.Message, "publication") // undefined_object
}

// undecodableTries is how often in a row PostgreSQL must fail to decode the slot's WAL in the same way: some seconds.
const undecodableTries = 8

// judgeSlot notes whether the slot can be read on after a session that ended with err. A publication that was missing when
// something was written, and WAL that PostgreSQL fails to decode again and again, are lost to it.
func (l *Leader) judgeSlot(err error) {
	var undecodable *undecodableError
	switch {
	case publicationMissing(err):
		l.lose("the publication was missing for a while")
	case errors.As(err, &undecodable):
		if cause := undecodable.cause.Error(); cause != l.failure {
			l.failure, l.failures = cause, 0
		}
		if l.failures++; l.failures >= undecodableTries {
			l.lose(undecodable.Error())
		}
	}
}

// lose notes that the slot can't be read on.
func (l *Leader) lose(why string) {
	l.unreadable, l.unreadTo = why, max(l.confirmed, changelog.LSN(l.o.Stats.Logged.Load()))
}

// session is one tenure: take the slot, take the log over, stream until something fails.
func (l *Leader) session(ctx context.Context) error {
	if err := l.o.Watcher.Reload(ctx); err != nil {
		return err
	}
	appender, err := l.o.Log.ConnectAppender(ctx, l.o.Bus) // first: who can't reach the log must not keep the slot from who can
	if err != nil {
		return err
	}
	defer appender.Close()
	known, err := appender.Known(ctx, l.o.ConfigRevision)
	if err != nil {
		return err
	}
	src, err := l.prepare(ctx, known)
	if err != nil {
		return err
	}
	conn, err := connect(ctx, l.o.ReplicationURL, src.encoding, l.o.timing.sender)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	if err := l.identify(ctx, conn, &src.claim); err != nil {
		return err
	}
	if err := start(ctx, conn, l.o.Slot, l.o.Publications); err != nil {
		return err
	}
	if err := l.verify(ctx, conn.PID(), &src.claim); err != nil {
		return err
	}
	if err := l.refuseSynchronous(ctx, conn.PID()); err != nil {
		return err
	}
	failpoint.Here(failpoint.SlotTaken)
	stop := reassure(conn, src.claim.SlotLSN, l.o.timing.status)
	src.claim.Again = l.remembered
	claimed, err := appender.Claim(ctx, src.claim)
	if err == nil {
		err = l.rememberHistory(ctx, claimed)
	}
	if stop(); err != nil {
		return err
	}
	failpoint.Here(failpoint.HistoryNoted)
	l.noted, l.notedAt = claimed.Noted, -1
	l.report(claimed)
	return l.stream(ctx, conn, appender, claimed, src.xmax)
}

func closeConn(conn *pgconn.PgConn) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	conn.Close(ctx)
}

func (l *Leader) report(c *changelog.Claimed) {
	log := l.o.Logger.With("slot", l.o.Slot, "history", c.History, "lsn", c.LSN.String(), "epoch", c.Epoch)
	switch c.NewHistory {
	case "":
	case changelog.FirstStart:
		log.Info("the change log begins")
	default:
		l.o.Stats.Histories.Add(1)
		log.Warn("a new history begins; clients will resynchronise", "reason", c.NewHistory)
	}
	for _, r := range c.Raised {
		log.Warn("clients of this collection will resynchronise", "collection", r)
	}
	l.heldBy = ""
	log.Info("leading: streaming from the slot into the change log")
	l.o.Stats.Logged.Store(uint64(c.LSN))
	l.o.Stats.setState(true, nil)
	select {
	case l.lookAtSlot <- struct{}{}:
	default:
	}
}

// sourceState is what a leader must know of the source before it takes over.
type sourceState struct {
	encoding string
	xmax     uint64
	claim    changelog.Claim
}

// prepare reads it; known is what the log holds.
func (l *Leader) prepare(ctx context.Context, known *changelog.Known) (*sourceState, error) {
	short, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	pooled, err := l.o.Source.Acquire(short)
	if err != nil {
		return nil, fmt.Errorf("connect to the source: %w", err)
	}
	defer pooled.Release()
	conn := pooled.Conn()
	var standby bool
	if err := conn.QueryRow(short, `SELECT pg_is_in_recovery()`).Scan(&standby); err != nil {
		return nil, fmt.Errorf("read the source's state: %w", err)
	}
	if standby {
		return nil, errStandby
	}
	has, err := schema.ReadPublished(short, conn, l.o.Publications)
	if err != nil {
		return nil, err
	}
	if !has.Rows || !has.Events {
		return nil, fmt.Errorf("publication %s or %s is missing: run walgate init", l.o.Publications.Rows, l.o.Publications.Events)
	}
	slot, err := EnsureSlot(ctx, conn, l.o.Slot, l.o.Logger, func(why error) { l.o.Stats.setState(false, why) }) // may wait for long to make one
	if err != nil {
		return nil, err
	}
	short, cancel = context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if l.unreadable != "" && !slot.Created && slot.Confirmed <= l.unreadTo { // else another instance has made a new one
		l.o.Logger.Warn("the slot can't be read on; making a new one, clients will resynchronise", "slot", l.o.Slot, "reason", l.unreadable)
		if err := dropSlot(short, conn, l.o.Slot, `confirmed_flush_lsn <= $2`, l.unreadTo.String()); err != nil {
			return nil, err
		}
		if slot, err = EnsureSlot(ctx, conn, l.o.Slot, l.o.Logger, func(why error) { l.o.Stats.setState(false, why) }); err != nil {
			return nil, err
		}
	}
	l.confirmed = slot.Confirmed
	if l.unreadable != "" {
		l.unreadable, l.failures = "", 0
	}
	ctx, cancel = context.WithTimeout(ctx, callTimeout)
	defer cancel()
	s := &sourceState{claim: changelog.Claim{SlotLSN: slot.Confirmed, ConfigRevision: l.o.ConfigRevision, Known: known}}
	var xmax int64
	err = conn.QueryRow(ctx, `SELECT current_setting('server_encoding'), pg_snapshot_xmax(pg_current_snapshot())::text::int8, clock_timestamp()`).Scan(&s.encoding, &xmax, &s.claim.SourceTime)
	if err != nil {
		return nil, fmt.Errorf("read the source's state: %w", err)
	}
	s.xmax = uint64(xmax)
	s.claim.SlotCreated = slot.Created
	s.claim.Collections = l.claimed(ctx, conn, known.Collections)
	return s, nil
}

// identify asks the replication connection itself which server it is on and where its WAL ends: the pool may still be
// connected to a server that was the source before.
func (l *Leader) identify(ctx context.Context, conn *pgconn.PgConn, c *changelog.Claim) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	s, err := pglogrepl.IdentifySystem(ctx, conn)
	if err != nil {
		return fmt.Errorf("identify the source: %w", err)
	}
	c.Source = changelog.Server{System: s.SystemID, Timeline: int64(s.Timeline)}
	c.SourceEnd = changelog.LSN(s.XLogPos)
	if c.Source != l.server {
		l.server = c.Source
		l.o.Source.Reset()
	}
	return nil
}

// verify makes sure, now that the slot is ours and nobody else can move it, that it is the one that was looked at, and
// that the pool's connections reach the same server as the replication connection.
func (l *Leader) verify(ctx context.Context, walsender uint32, c *changelog.Claim) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var now, end int64
	var active bool
	err := l.o.Source.QueryRow(ctx, `SELECT (confirmed_flush_lsn - '0/0')::int8, active, (pg_current_wal_flush_lsn() - '0/0')::int8
		FROM pg_replication_slots WHERE slot_name = $1 AND coalesce(active_pid, $2) = $2`,
		l.o.Slot, int64(walsender)).Scan(&now, &active, &end)
	switch {
	case err == nil && !active:
		l.o.Source.Reset()
		return fmt.Errorf("slot %s isn't read by process %d any more: it ended at once (the server's log says why), or database.url and database.replication_url reach different servers", l.o.Slot, walsender)
	case errors.Is(err, pgx.ErrNoRows):
		l.o.Source.Reset()
		return fmt.Errorf("database.url and database.replication_url reach different servers, or a pooler stands between: slot %s is read by process %d on one, and not on the other", l.o.Slot, walsender)
	case err != nil:
		return fmt.Errorf("read the state of slot %s: %w", l.o.Slot, err)
	case changelog.LSN(now) != c.SlotLSN:
		return fmt.Errorf("slot %s moved from %s to %s while it was taken: looking again", l.o.Slot, c.SlotLSN, changelog.LSN(now))
	}
	c.SourceEnd = max(c.SourceEnd, changelog.LSN(end))
	return nil
}

// remembered reads what the source remembers of the log.
func (l *Leader) remembered(ctx context.Context) (history string, noted int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	err = l.o.Source.QueryRow(ctx, `SELECT coalesce(min(history), ''), coalesce(min(noted), 0) FROM walgate.source`).Scan(&history, &noted)
	if err != nil {
		return "", 0, fmt.Errorf("read what the source remembers of the change log: %w", err)
	}
	return history, noted, nil
}

// rememberHistory notes in the source that a log exists, so that losing the log is noticed. It replaces only what the claim
// saw: who was held up meanwhile may have been deposed, and must not undo what its successor noted.
func (l *Leader) rememberHistory(ctx context.Context, c *changelog.Claimed) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	done, err := l.o.Source.Exec(ctx, `INSERT INTO walgate.source AS s (history) VALUES ($1) ON CONFLICT (one) DO UPDATE SET history = excluded.history WHERE s.history = $2`, c.History, c.Remembered)
	if err == nil && done.RowsAffected() == 0 {
		err = errors.New("another instance has taken over meanwhile")
	}
	if err != nil {
		return fmt.Errorf("note the history in the source: %w", err)
	}
	return nil
}

// stream runs the stream, the appender and the care around them until one of them ends.
func (l *Leader) stream(ctx context.Context, conn *pgconn.PgConn, appender *changelog.Appender, c *changelog.Claimed, xmax uint64) error {
	fills, err := l.o.Log.Fills(ctx)
	if err != nil {
		return err
	}
	head, err := l.o.Log.Head(ctx)
	if err != nil {
		return err
	}
	queue := changelog.NewQueue(queueBytes)
	t := &tenure{leader: l, ids: map[string]changelog.Collection{}, halted: map[string]bool{}, gaps: map[string]uint64{}}
	for _, col := range c.Collections {
		if shape := schema.CloseGap(col.Shape); shape != col.Shape {
			t.gaps[col.Name], col.Shape = 0, shape
		}
		t.ids[col.Name] = col
	}
	s := &stream{
		conn: conn, timing: l.o.timing, queue: queue, logged: appender.Logged, stats: l.o.Stats, log: l.o.Logger, resolve: t.resolve,
		received: c.LSN, handed: c.LSN,
		seq: &sequencer{clock: changelog.NewClock(c.Version), targets: map[uint32]*target{}, stats: l.o.Stats, log: l.o.Logger,
			logged: c.LSN, widen: xidWidener{near: xmax}},
	}
	t.stream = s
	t.filler = newFiller(t, appender.Logged)
	t.prepareFills(fills, head)
	appender.OnAppended = func(a changelog.Appended) {
		l.o.Stats.appended(a)
		l.o.Stats.QueueBytes.Store(int64(queue.Len()))
		t.filler.moved(a.Version)
	}
	defer l.o.Watcher.OnChange(t.changed)()
	t.changed()

	g, gctx := errgroup.WithContext(ctx)
	appending, stopAppending := context.WithCancel(context.WithoutCancel(ctx))
	defer stopAppending()
	g.Go(func() error {
		defer stopAppending() // after the stream: what it handed over and isn't committed comes again
		return s.run(gctx)
	})
	g.Go(func() error {
		err := appender.Run(appending, queue)
		if err == nil && gctx.Err() == nil && ctx.Err() == nil {
			err = errors.New("the appender ended")
		}
		return err
	})
	g.Go(func() error { return l.care(gctx, conn.PID(), c.Epoch) })
	g.Go(func() error { return t.filler.run(gctx) })
	err = g.Wait()
	if conn.IsClosed() { // pgconn may still be taking leave of it
		return err
	}
	if ferr := s.sendStatus(); err == nil && ctx.Err() == nil {
		err = ferr
	}
	return err
}

package replication

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/walgate/walgate/changelog"
)

const (
	// firstLook and lastLook are how soon, at first and later, an instance that waits for the slot asks for it again.
	firstLook = 25 * time.Millisecond
	lastLook  = 250 * time.Millisecond
	// silence is how many times what the server allows a walsender's reader may be silent before one that waits for the slot
	// ends it. The server does so itself, but by its clock, which may have been set back.
	silence = 3
)

// awaitSlot returns once no other process holds the slot, or when the source can't be asked, which the session then tells. It
// says whether it waited.
func (l *Leader) awaitSlot(ctx context.Context) (waited bool) {
	var h holding
	var looked time.Time
	pause := firstLook
	for ctx.Err() == nil {
		pid, err := l.holder(ctx)
		if err != nil || pid == 0 {
			return waited
		}
		waited = true
		if pid != h.pid || time.Since(looked) > waitLook {
			looked = time.Now()
			if err := h.look(ctx, l.o.Source, l.o.Slot, pid); err == nil {
				l.holds(&h)
				l.endSilent(ctx, &h)
			}
		}
		sleep(ctx, spread(pause))
		pause = min(pause*2, lastLook)
	}
	return waited
}

// holder returns the process that holds the slot; 0: none, or there is no slot.
func (l *Leader) holder(ctx context.Context) (pid int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	err = l.o.Source.QueryRow(ctx, `SELECT coalesce((SELECT active_pid FROM pg_replication_slots WHERE slot_name = $1), 0)::int8`, l.o.Slot).Scan(&pid)
	return pid, err
}

// holding is what is known of the process that holds the slot.
type holding struct {
	pid     int64
	who     string
	waits   obstacle  // what the making of the slot waits for
	ours    bool      // it belongs to an instance
	reader  bool      // it is an instance's walsender, and we may see what that one says
	replied time.Time // when that one last wrote, by its own clock
	since   time.Time // when we first saw that
}

// look asks the source about the holder.
func (h *holding) look(ctx context.Context, q querier, slot string, pid int64) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	now := holding{pid: pid}
	var replied *time.Time
	err := q.QueryRow(ctx, `SELECT `+whoSQL+`, coalesce(a.application_name = 'walgate', false), r.state IS NOT NULL, r.reply_time
		FROM pg_replication_slots s LEFT JOIN pg_stat_activity a ON a.pid = s.active_pid LEFT JOIN pg_stat_replication r ON r.pid = s.active_pid
		WHERE s.slot_name = $1 AND s.active_pid = $2`, slot, pid).Scan(&now.who, &now.ours, &now.reader, &replied)
	if err != nil { // free again
		return err
	}
	now.reader = now.reader && now.ours
	if replied != nil {
		now.replied = *replied
	}
	if now.since = time.Now(); h.pid == pid && h.replied.Equal(now.replied) {
		now.since = h.since
	}
	if o, err := waitsFor(ctx, q, uint32(pid)); err == nil {
		now.waits = o
	}
	*h = now
	return nil
}

// holds shows who holds the slot, and logs it when that changes.
func (l *Leader) holds(h *holding) {
	level, more := slog.LevelInfo, ""
	if !h.ours {
		level = slog.LevelWarn
	}
	if h.waits.key != "" {
		level, more = slog.LevelWarn, "; it is still making the slot, which waits for "+h.waits.who
	}
	err := fmt.Errorf("slot %s is held by process %d of the source (%s)%s: this instance serves what is logged and takes over once the slot is free", l.o.Slot, h.pid, h.who, more)
	if h.ours && more == "" {
		l.o.Stats.setStandby(err)
	} else {
		l.o.Stats.setState(false, err)
	}
	if key := fmt.Sprint(h.pid, " ", h.waits.key); key != l.heldBy {
		l.heldBy = key
		l.o.Logger.Log(context.Background(), level, "another process holds the slot; waiting to take over", "slot", l.o.Slot, "reason", err)
	}
}

// endSilent ends a walsender whose reader is gone and that the server, by a clock that was set back, takes for alive. A
// leader writes a status each second, also within a transaction of an hour, from the goroutine that does the work.
func (l *Leader) endSilent(ctx context.Context, h *holding) {
	if !h.reader || time.Since(h.since) < silence*l.o.timing.sender {
		return
	}
	h.since = time.Now() // whatever comes of it, not at once again
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var ended bool
	err := l.o.Source.QueryRow(ctx, `SELECT coalesce(bool_or(pg_terminate_backend(active_pid)), false) FROM pg_replication_slots WHERE slot_name = $1 AND active_pid = $2`, l.o.Slot, h.pid).Scan(&ended)
	log := l.o.Logger.With("slot", l.o.Slot, "process", h.pid, "who", h.who)
	switch {
	case err != nil:
		log.Error("the instance that holds the slot is silent for longer than the server should allow, and its walsender can't be ended from here: run SELECT pg_terminate_backend(process) on the source", "error", err)
	case ended:
		log.Warn("ended the walsender of an instance that was silent for longer than the server should allow, as when a clock is set back")
	}
}

// reassure tells the server now and then that we are alive, until stop is called, which waits for it: taking the log over may
// last longer than the server waits for a word. Nobody else may touch the connection meanwhile.
func reassure(conn *pgconn.PgConn, confirmed changelog.LSN, every time.Duration) (stop func()) {
	at := pglogrepl.LSN(confirmed)
	ending, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(every)
		defer tick.Stop()
		for {
			select {
			case <-ending:
				return
			case <-tick.C:
			}
			if err := pglogrepl.SendStandbyStatusUpdate(context.Background(), conn, pglogrepl.StandbyStatusUpdate{WALWritePosition: at, WALFlushPosition: at, WALApplyPosition: at}); err != nil {
				return // the stream will say why
			}
		}
	}()
	return func() { close(ending); <-ended }
}

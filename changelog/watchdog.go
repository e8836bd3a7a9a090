package changelog

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// defaultPatience is how long a call of the appender may take before its server is asked about it.
const defaultPatience = 10 * time.Second

// watchdog tells a call of the appender that rightly takes long (behind a lock, a slow disk, a synchronous standby, on a slow
// network) from one whose connection died without a word, where the reply may never come. No deadline can: so it asks the
// server over a new connection. A server that waits for us, and has got nothing since it was last asked, means a dead
// connection; so does one that can't be asked twice in a row. Then the connection is closed, which ends the call.
type watchdog struct {
	cfg      *pgx.ConnConfig
	conn     *pgconn.PgConn
	pid      int32 // as the server has it: a pooler tells another
	patience time.Duration
	waiting  func(why string) // called when a call begins or ceases to take long; "" then

	began atomic.Int64 // when the call under way began, Unix ns; 0: none
	lost  atomic.Pointer[error]
}

// call runs one call; an error says so if the connection was given up meanwhile.
func (w *watchdog) call(do func() error) error {
	w.began.Store(time.Now().UnixNano())
	err := do()
	w.began.Store(0)
	if lost := w.lost.Load(); lost != nil && err != nil {
		return *lost
	}
	return err
}

// run watches until stop is called, which waits for it.
func (w *watchdog) run(ctx context.Context) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	var done sync.WaitGroup
	done.Go(func() { w.watch(ctx) })
	return func() { cancel(); done.Wait() }
}

func (w *watchdog) watch(ctx context.Context) {
	next := time.NewTimer(0)
	defer next.Stop()
	told := false
	defer func() {
		if told {
			w.waiting("")
		}
	}()
	var began int64
	var last inspection
	for {
		next.Reset(w.patience / 2) // from here: two inspections that follow at once would see no progress between them
		select {
		case <-ctx.Done():
			return
		case <-next.C:
		}
		now := w.began.Load()
		if now == 0 || time.Since(time.Unix(0, now)) < w.patience {
			if told {
				w.waiting("")
			}
			told, last = false, inspection{}
			continue
		}
		if now != began {
			began, last = now, inspection{}
		}
		seen := w.inspect(ctx)
		if ctx.Err() != nil || w.began.Load() != began {
			continue
		}
		if why := seen.dead(last); why != nil {
			w.giveUp(why)
			return
		}
		last = seen
		if w.waiting != nil {
			told = true
			w.waiting(fmt.Sprintf("an append has been waiting for %s: %s", time.Since(time.Unix(0, began)).Round(time.Second), seen.what()))
		}
	}
}

// giveUp closes the connection under the call that waits on it.
func (w *watchdog) giveUp(why error) {
	why = fmt.Errorf("gave the connection to the change log's database up: %w", why)
	w.lost.Store(&why)
	w.conn.Conn().Close()
}

// inspection is what the server says of the appender's session.
type inspection struct {
	asked    bool
	err      error  // it couldn't be asked
	gone     bool   // it has no such session
	idle     bool   // it waits for us
	progress string // changes with whatever reaches the session
	waits    string // for what, in PostgreSQL's words
	blockers string // pids that hold a lock it wants
}

// dead says why the connection must be dead, judging by this inspection and the one before.
func (i inspection) dead(last inspection) error {
	switch {
	case i.gone:
		return errors.New("the server has ended the session")
	case i.err != nil && last.err != nil:
		return fmt.Errorf("no answer, and the server can't be asked: %w", i.err)
	case i.err == nil && i.idle && last.asked && last.idle && i.progress == last.progress:
		return errors.New("no answer, and the server itself waits for the gateway: something between the two lets nothing through")
	}
	return nil
}

// what says what the server is doing meanwhile.
func (i inspection) what() string {
	switch {
	case i.err != nil:
		return "the change log's database can't be asked why: " + i.err.Error()
	case i.blockers != "":
		return "pid " + i.blockers + " of the change log's database holds a lock that it needs; end that session if it doesn't end by itself"
	case i.idle:
		return "the change log's database has not got all of it: the network to it is slow"
	case i.waits != "":
		return "the change log's database waits for " + i.waits
	}
	return "the change log's database is working on it: it is slow"
}

// inspect asks the server.
func (w *watchdog) inspect(ctx context.Context) (i inspection) {
	ctx, cancel := context.WithTimeout(ctx, max(time.Second, w.patience/2))
	defer cancel()
	conn, err := pgx.ConnectConfig(ctx, w.cfg)
	if err == nil {
		defer func() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			conn.Close(ctx)
		}()
		err = conn.QueryRow(ctx, `SELECT coalesce(state, '') <> 'active' OR coalesce(wait_event, '') = 'ClientRead',
			concat_ws(' ', query_start, state_change, bytes_processed), concat_ws('/', wait_event_type, wait_event), array_to_string(pg_blocking_pids(a.pid), ', ')
			FROM pg_stat_activity a LEFT JOIN pg_stat_progress_copy USING (pid) WHERE a.pid = $1`, w.pid).Scan(&i.idle, &i.progress, &i.waits, &i.blockers)
	}
	var pg *pgconn.PgError
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		i.gone = true
	case errors.As(err, &pg) && pg.Code == "53300": // too_many_connections: it is alive, and that is all it says
	default:
		i.err, i.asked = err, err == nil
	}
	return i
}

package replication

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// How often the reason of a wait is looked for, and how often one that stays the same is logged again.
const (
	waitLook  = time.Second
	waitAgain = time.Minute
)

type querier interface {
	QueryRow(context.Context, string, ...any) pgx.Row
}

// slotBusy says whether an error is that of a slot that another process holds.
func slotBusy(err error) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) && pg.Code == "55006" // object_in_use
}

// whoSQL describes the session a; what the role may not see is left out.
const whoSQL = `concat_ws(', ', 'user ' || a.usename, 'application ' || nullif(a.application_name, ''),
	CASE WHEN a.client_addr IS NOT NULL THEN 'client ' || host(a.client_addr) || ':' || a.client_port END)`

// obstacle is a transaction that somebody waits for.
type obstacle struct {
	key string // names it while it lasts
	who string
}

// waitsFor returns the transaction that a process waits for; pgx.ErrNoRows: none.
func waitsFor(ctx context.Context, q querier, pid uint32) (o obstacle, err error) {
	err = q.QueryRow(ctx, `SELECT w.transactionid::text, coalesce(
			'the prepared transaction ' || quote_literal(p.gid) || ' of ' || p.owner || ' in database ' || p.database || ', prepared ' || date_trunc('second', clock_timestamp() - p.prepared)
				|| ' ago: end it there with COMMIT PREPARED or ROLLBACK PREPARED',
			'the transaction of process ' || h.pid || ' (' || concat_ws(', ', `+whoSQL+`, a.state) || ')' || coalesce(', open for ' || date_trunc('second', clock_timestamp() - a.xact_start), '')
				|| coalesce(', whose last statement began ' || date_trunc('second', clock_timestamp() - a.query_start) || ' ago', '')
				|| ': end it, or run SELECT pg_terminate_backend(' || h.pid || ')',
			'transaction ' || w.transactionid)
		FROM pg_locks w
		LEFT JOIN pg_locks h ON h.locktype = 'transactionid' AND h.transactionid = w.transactionid AND h.granted
		LEFT JOIN pg_stat_activity a ON a.pid = h.pid
		LEFT JOIN pg_prepared_xacts p ON p.transaction = w.transactionid
		WHERE w.pid = $1 AND w.locktype = 'transactionid' AND NOT w.granted`, pid).Scan(&o.key, &o.who)
	return o, err
}

// watchSlotCreation names the transaction that a slot's creation waits for, until ctx ends.
func watchSlotCreation(ctx context.Context, cfg *pgx.ConnConfig, pid uint32, slot string, log *slog.Logger, waiting func(error)) {
	tick := time.NewTicker(waitLook)
	defer tick.Stop()
	var last string
	var logged time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		o, err := lookAtWait(ctx, cfg, pid)
		if err != nil {
			continue // it doesn't wait, or the source can't be asked
		}
		if waiting != nil {
			waiting(fmt.Errorf("the creation of slot %s waits for %s", slot, o.who))
		}
		if o.key != last || time.Since(logged) > waitAgain {
			last, logged = o.key, time.Now()
			log.Warn("the slot's creation waits for a transaction that is still open", "slot", slot, "waits_for", o.who)
		}
	}
}

func lookAtWait(ctx context.Context, cfg *pgx.ConnConfig, pid uint32) (o obstacle, err error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return o, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	return waitsFor(ctx, conn, pid)
}

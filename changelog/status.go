package changelog

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// Status is what the log tells of itself, for an operator.
type Status struct {
	Head
	Epoch, ConfigRevision int64
	Source, Storage       Server        // as of the last takeover
	Now                   Server        // the server that the log is on
	Age                   time.Duration // since the checkpoint moved; an idle source moves it every 10 s
	Bytes                 int64         // of schema walgate in the log's database
}

// Status reads it. ErrNotInitialised where no leader has begun the log.
func (l *Log) Status(ctx context.Context) (*Status, error) {
	h, err := l.Head(ctx)
	if err != nil {
		return nil, err
	}
	s := &Status{Head: *h}
	var seconds float64
	err = l.pool.QueryRow(ctx, `SELECT epoch, config_revision, source_system, source_timeline, storage_system, storage_timeline, extract(epoch FROM clock_timestamp() - written_at)::float8,
			(SELECT coalesce(sum(pg_total_relation_size(oid)), 0)::int8 FROM pg_class WHERE relnamespace = 'walgate'::regnamespace AND relkind = 'r') FROM walgate.checkpoint`).
		Scan(&s.Epoch, &s.ConfigRevision, &s.Source.System, &s.Source.Timeline, &s.Storage.System, &s.Storage.Timeline, &seconds, &s.Bytes)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, ErrNotInitialised
	}
	if err != nil {
		return nil, fmt.Errorf("read the change log's state: %w", Explain(err))
	}
	s.Age = time.Duration(seconds * float64(time.Second))
	if s.Now, err = ServerIdentity(ctx, l.pool); err != nil {
		return nil, Explain(err)
	}
	return s, nil
}

package gateway

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/walgate/walgate/internal/failpoint"
	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/schema"
)

// close commits, unless nothing came of the push but rejections.
func (x *pushTx) close(ctx context.Context) (*pushEcho, error) {
	rejected := x.anyRejected()
	if x.r.atomic && rejected {
		x.written, x.rows = nil, nil
		for i := range x.changes {
			if c := &x.changes[i]; c.result.status != policies.Rejected && !c.result.duplicate {
				c.fail(codeBatchRejected, "another change of the batch was rejected, so nothing of it was written")
			}
		}
	}
	if err := x.examineParents(ctx, x.written, x.rows, func(p *pushParent) bool { return p.fk.Deferrable }); err != nil {
		return nil, err
	}
	for i := range x.written {
		if x.written[i].c.result.status == policies.Rejected {
			return nil, errBlame
		}
	}
	x.versions(ctx)
	commits := false
	for i := range x.changes {
		r := &x.changes[i].result
		commits = commits || r.status != policies.Rejected && !r.duplicate
	}
	if !commits {
		if x.begun {
			if _, err := x.conn.Exec(ctx, `ROLLBACK`); err != nil {
				return nil, err
			}
		}
		x.finish()
		return x.echoOfDuplicates(nil), nil
	}
	if x.unchecked {
		err := x.do(ctx, x.asUser(), checkConstraints, asGateway)
		var pg *pgconn.PgError
		switch f := schema.Classify(err); {
		case err == nil:
		case errors.As(err, &pg) && !f.Again && !f.Busy && !x.blame:
			return nil, fmt.Errorf("%w: %w", errBlame, err)
		default:
			return nil, x.transient(err)
		}
	}
	done, forget := x.g.hub.awaitPush(x.id)
	echo := x.echoOfDuplicates(&awaitedPush{id: x.id, done: done, forget: forget})
	if err := x.commit(ctx); err != nil {
		echo.end()
		return nil, err
	}
	x.push.id, x.push.txid = x.id, x.txid
	x.finish()
	return echo, nil
}

// commit writes down what has to be remembered and commits, in one round trip.
func (x *pushTx) commit(ctx context.Context) error {
	b := &pgx.Batch{}
	if x.ahead != nil {
		b = x.ahead
	}
	if err := x.remember(b); err != nil {
		return err
	}
	b.Queue(`COMMIT`)
	n := b.Len()
	b.Queue(leftovers.sql)
	failpoint.Here(failpoint.PushWritten)
	results := x.conn.SendBatch(ctx, b)
	failpoint.Here(failpoint.PushSent)
	var tag pgconn.CommandTag
	var err error
	for range n {
		if tag, err = results.Exec(); err != nil {
			break
		}
	}
	if err == nil && strings.HasPrefix(tag.String(), "COMMIT") {
		failpoint.Here(failpoint.PushCommitted)
		x.tidy(ctx, results) // whatever becomes of the connection now
		return nil
	}
	if e := results.Close(); err == nil {
		err = e
	}
	var pg *pgconn.PgError
	switch {
	case errors.As(err, &pg) && pg.Severity != "FATAL" && pg.Severity != "PANIC": // the server says that nothing was committed
		if f := schema.Classify(err); !f.Again && !f.Busy && !x.careful {
			return fmt.Errorf("%w: %w", errCareful, err) // a constraint that was deferred to the end
		}
		return x.transient(fmt.Errorf("commit a push: %w", err))
	case err != nil:
		return (&Problem{Code: SourceUnavailable, RetryAfter: pushRetryAfter(),
			Detail: "the database did not say whether the push was committed: repeat it with the same change_ids, and what was done is not done again"}).Because(err)
	}
	return fmt.Errorf("commit a push: the server answered %s", tag)
}

// tidy closes the connection where the application's triggers or functions changed a setting for the whole session: others
// would write values in another form, or commit less durably.
func (x *pushTx) tidy(ctx context.Context, results pgx.BatchResults) {
	var setting string
	err := results.QueryRow().Scan(&setting)
	if e := results.Close(); err == nil {
		err = e
	}
	if setting = cmp.Or(setting, schema.Altered(x.conn)); setting != "" {
		x.g.o.Logger.Warn("a trigger or function of the application changed a setting for the whole session, so its connection is closed: let it use SET LOCAL, or a SET clause", "setting", setting)
	}
	if err != nil || setting != "" {
		x.conn.Close(context.WithoutCancel(ctx))
	}
}

package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/changelog"
)

// askLog runs a statement in the change log's database.
func (r *run) askLog(ctx context.Context, into any, sql string, args ...any) error {
	return r.ask(ctx, r.storage(), r.logDatabase, into, sql, args...)
}

// fillDisk lets every append fail as PostgreSQL fails on a full disk. A file system that is really full needs a mount, which
// not everybody may make.
func (r *run) fillDisk(ctx context.Context, rng *rand.Rand) (string, error) {
	full := between(rng, 200*time.Millisecond, 1200*time.Millisecond)
	return exclusively(ctx, []token{r.storageHold()}, func() (string, error) {
		const trigger = `CREATE OR REPLACE FUNCTION walgate.no_space() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN
				RAISE EXCEPTION USING ERRCODE = 'disk_full', MESSAGE = 'could not extend file: No space left on device'; END$$;
			CREATE TRIGGER no_space BEFORE INSERT ON walgate.changes FOR EACH STATEMENT EXECUTE FUNCTION walgate.no_space()`
		if err := r.askLog(ctx, nil, `DO $do$ BEGIN SET LOCAL lock_timeout = '5s'; EXECUTE $sql$`+trigger+`$sql$; END $do$`); err != nil {
			return "", err
		}
		r.note("the log's disk is full for %s", full)
		sleep(ctx, full)
		return full.String(), r.askLog(ctx, nil, `DROP FUNCTION walgate.no_space CASCADE`)
	})
}

// day is how many versions a partition of the log holds.
const day = int64(24*time.Hour/time.Millisecond) << 12

// dropPartition turns the day, as a clock that ran ahead would have, and drops the partition of the day before under whoever
// reads there: floors first, as retention does.
func (r *run) dropPartition(ctx context.Context, rng *rand.Rand) (string, error) {
	before := between(rng, 100*time.Millisecond, 600*time.Millisecond)
	return exclusively(ctx, append(r.holds(), r.storageHold()), func() (string, error) {
		var began bool
		if err := r.askLog(ctx, &began, `SELECT to_regclass('walgate.checkpoint') IS NOT NULL`); err != nil || !began {
			return "", err
		}
		if err := r.endAll(); err != nil {
			return "", err
		}
		var end int64
		// Only where a leader has claimed the log since its server started: it has noted which versions were never issued.
		err := r.askLog(ctx, &end, `UPDATE walgate.checkpoint SET version = (version / $1 + 1) * $1 + 1 WHERE server_started = pg_postmaster_start_time() RETURNING version - 1`, day)
		r.startAll()
		if errors.Is(err, pgx.ErrNoRows) {
			return "", nil
		}
		if err != nil {
			return "", err
		}
		r.note("the log's day turned to %s", changelog.Version(end).Time().Format(time.DateOnly))
		sleep(ctx, before)
		if err := r.askLog(ctx, nil, `UPDATE walgate.collections SET floor = $1, floor_reason = 'retention' WHERE floor < $1`, end); err != nil {
			return "", err
		}
		sleep(ctx, before)
		name := fmt.Sprintf("%016x", end-day)
		for _, table := range []string{"changes", "transactions"} {
			if err := r.askLog(ctx, nil, fmt.Sprintf(`DROP TABLE IF EXISTS walgate.%s_%s`, table, name)); err != nil {
				return "", err
			}
		}
		return "changes_" + name, nil
	})
}

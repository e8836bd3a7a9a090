package blobstore

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/jackc/pgx/v5"
)

// Usage is what a subject keeps.
type Usage struct {
	Used     int64 // by files, until their bytes are gone
	Reserved int64 // by uploads
	Quota    int64 // 0: no limit
}

// Usage returns what a subject keeps.
func (r *Records) Usage(ctx context.Context, subject string) (Usage, error) {
	u := Usage{Quota: r.o.Quota}
	err := r.pool.QueryRow(ctx, `SELECT used, reserved FROM walgate.quotas WHERE subject = $1`, subject).Scan(&u.Used, &u.Reserved)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return u, fmt.Errorf("read walgate.quotas: %w", err)
	}
	return u, nil
}

// reserve takes bytes of a subject's quota: its row is locked, so that concurrent uploads never take more together.
func (r *Records) reserve(ctx context.Context, tx pgx.Tx, subject string, bytes int64) error {
	if bytes == 0 {
		return nil
	}
	if r.o.Quota > 0 && bytes > r.o.Quota {
		return fmt.Errorf("%d bytes of at most %d: %w", bytes, r.o.Quota, ErrQuota)
	}
	tag, err := tx.Exec(ctx, `INSERT INTO walgate.quotas AS q (subject, reserved) VALUES ($1, $2)
		ON CONFLICT (subject) DO UPDATE SET reserved = q.reserved + $2 WHERE $3::bigint = 0 OR q.used + q.reserved + $2 <= $3`, subject, bytes, r.o.Quota)
	if err == nil && tag.RowsAffected() == 0 {
		err = fmt.Errorf("%d bytes more than %d in all: %w", bytes, r.o.Quota, ErrQuota)
	}
	return err
}

// quotaChange is added to a subject's row.
type quotaChange struct{ used, reserved int64 }

// changeQuotas adds to the subjects' rows, whatever the quota is, in the order of subjects in which everybody locks them. What an
// operator took out of the table doesn't stop anything.
func changeQuotas(ctx context.Context, tx pgx.Tx, changes map[string]quotaChange) error {
	for _, subject := range slices.Sorted(maps.Keys(changes)) {
		c := changes[subject]
		if c == (quotaChange{}) {
			continue
		}
		if _, err := tx.Exec(ctx, `INSERT INTO walgate.quotas AS q (subject, used, reserved) VALUES ($1, greatest($2::bigint, 0), greatest($3::bigint, 0))
			ON CONFLICT (subject) DO UPDATE SET used = greatest(q.used + $2, 0), reserved = greatest(q.reserved + $3, 0)`, subject, c.used, c.reserved); err != nil {
			return fmt.Errorf("change the quota of %s: %w", subject, err)
		}
	}
	return nil
}

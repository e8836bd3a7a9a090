package changelog

import (
	"context"

	"github.com/jackc/pgx/v5"
)

// holdersSQL reads one more holder of each attachment than is wanted, which shows that there are too many.
const holdersSQL = `SELECT k.key, ARRAY(SELECT o.scope FROM walgate.attachment_operations o WHERE o.attachment = k.key AND o.op <> 'd' LIMIT $2)
	FROM (SELECT DISTINCT key FROM unnest($1::uuid[]) AS u(key)) k`

// Holders returns the scopes that hold each of the attachments now; those that more than most scopes hold are left out.
func (l *Log) Holders(ctx context.Context, attachments [][16]byte, most int) (map[[16]byte][][16]byte, error) {
	out := make(map[[16]byte][][16]byte, len(attachments))
	b := &pgx.Batch{}
	queueProbing(b)
	b.Queue(holdersSQL, attachments, most+1).Query(func(rows pgx.Rows) error {
		var key [16]byte
		var scopes [][16]byte
		_, err := pgx.ForEachRow(rows, []any{&key, &scopes}, func() error {
			if len(scopes) <= most {
				out[key] = scopes
			}
			scopes = nil
			return nil
		})
		return err
	})
	b.Queue(`COMMIT`)
	if err := l.pool.SendBatch(ctx, b).Close(); err != nil {
		return nil, readError(err)
	}
	return out, nil
}

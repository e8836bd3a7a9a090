package gateway

import (
	"context"
	"slices"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/blobstore"
	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/schema"
)

// examineAttachments refuses what would name an attachment that the caller neither can read nor uploaded: a reference is a
// right to read. An id that was never uploaded may be named by everybody; who uploads it then decides who may read it
// (changelog.FileEvent.Scopes). So that one comes first for certain, the shared lock of each id is held until the commit.
func (x *pushTx) examineAttachments(ctx context.Context, works []pushWork, writes []schema.Write, rows []schema.Row) error {
	added := map[string][]*pending{}
	for i := range works {
		w := &works[i]
		if w.c.result.status == policies.Rejected || w.deleting || rows[i] == nil || !w.c.plan.c.HasAttachments() {
			continue
		}
		b, err := w.c.plan.binding()
		if err != nil {
			return err
		}
		ids, err := b.AddedIDs(w.before, rows[i], writes[i].Columns)
		w.c.plan.release(b)
		if err != nil {
			x.g.policyFailed(w.c.collection, err)
		}
		for _, id := range ids {
			added[id] = append(added[id], w.c)
		}
	}
	if len(added) == 0 {
		return nil
	}
	unknown, err := x.lockAttachments(ctx, added)
	if err == nil && len(unknown) > 0 {
		unknown, err = x.unknownAttachments(ctx, unknown)
	}
	for _, id := range unknown {
		for _, c := range added[id] {
			c.fail(codeAttachmentMissing, "the row names an attachment that this caller doesn't know")
		}
	}
	return err
}

// pushLocksMost is how many ids a push locks one by one. Locks lie in memory that the whole server shares.
const pushLocksMost = 100

// lockAttachments locks the ids, and returns those that somebody else uploaded and that are there, or return when a row names
// them: swept, and their bytes not deleted yet.
func (x *pushTx) lockAttachments(ctx context.Context, added map[string][]*pending) (foreign []string, err error) {
	ids, locks := make([]string, 0, len(added)), make([]int64, 0, len(added))
	for id := range added {
		ids, locks = append(ids, id), append(locks, blobstore.LockKey(id))
	}
	slices.Sort(locks) // one order for all, against deadlocks
	lock := `SELECT count(pg_advisory_xact_lock_shared(lock)) FROM unnest($1::bigint[]) AS lock`
	if len(locks) > pushLocksMost { // the server has no room for one of each
		locks, lock = []int64{blobstore.LockAll}, `SELECT pg_advisory_xact_lock(($1::bigint[])[1])`
	}
	b := x.ahead
	if x.ahead = nil; b == nil {
		b = &pgx.Batch{}
	}
	b.Queue(lock, locks)
	b.Queue(`SELECT attachment_id FROM walgate.files WHERE attachment_id = ANY ($1) AND (state IN ('u', 'm') OR state = 'd' AND unreferenced_since IS NOT NULL AND NOT bytes_gone)
		AND subject <> $2 ORDER BY 1`, ids, x.caller.Subject).
		Query(func(rows pgx.Rows) (err error) { // a snapshot after the locks
			foreign, err = pgx.CollectRows(rows, pgx.RowTo[string])
			return err
		})
	return foreign, x.sendOpening(ctx, b)
}

// unknownAttachments returns those of the ids that the caller has no row for, nor had since they were uploaded. The log must
// hold all that the source held when they were locked.
func (x *pushTx) unknownAttachments(ctx context.Context, ids []string) (unknown []string, err error) {
	x.fenced = false
	if err := x.passFence(ctx); err != nil {
		return nil, err
	}
	release, err := x.g.admitReader(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	keys := make([][16]byte, len(ids))
	for i, id := range ids {
		keys[i] = policies.AttachmentKey([]byte(id))
	}
	var scopes [][16]byte
	for _, key := range x.caller.ReadableScopes() {
		scopes = append(scopes, key, policies.HiddenScope(key)) // a row that is out of sight gave it to who could see the row
	}
	held, err := x.g.o.Log.Held(ctx, keys, scopes)
	if err != nil {
		return nil, x.g.logProblem(err)
	}
	for i, id := range ids {
		if !held[i].Known {
			unknown = append(unknown, id)
		}
	}
	return unknown, nil
}

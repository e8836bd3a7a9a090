package blobstore

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/walgate/walgate/internal/failpoint"
)

// record is a row of walgate.files, as far as care looks at it.
type record struct {
	ID      string
	Event   int64
	State   byte
	Key     string
	Parts   []int64
	Size    int64
	Swept   bool // deleted because no row named it, not by somebody
	Noted   bool // no row named it when it was last looked at
	Due     bool // and that for longer than the grace period
	Subject string
	Scoped  bool // its uploader could not write everywhere
}

// records reads those rows of walgate.files that a condition is true of, whose arguments begin with $2.
func (r *round) records(ctx context.Context, where string, args ...any) ([]record, error) {
	rows, _ := r.conn.Query(ctx, `SELECT attachment_id, event_id, state::text, storage_key, parts, size, state = 'd' AND unreferenced_since IS NOT NULL,
		unreferenced_since IS NOT NULL, coalesce(unreferenced_since < now() - $1::interval, false), subject, scopes IS NOT NULL FROM walgate.files WHERE `+where, append([]any{r.c.o.Grace}, args...)...)
	list, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (f record, err error) {
		var state string
		if err = row.Scan(&f.ID, &f.Event, &state, &f.Key, &f.Parts, &f.Size, &f.Swept, &f.Noted, &f.Due, &f.Subject, &f.Scoped); err == nil {
			f.State = state[0]
		}
		return f, err
	})
	if err != nil {
		return nil, fmt.Errorf("read walgate.files: %w", err)
	}
	return list, nil
}

// each calls do with the records that a condition is true of, batch by batch in the order of their ids.
func (r *round) each(ctx context.Context, where string, batch int, do func(context.Context, []record) error) error {
	for after := ""; ; {
		list, err := r.records(ctx, where+` AND attachment_id > $2 ORDER BY attachment_id LIMIT $3`, after, batch)
		if err != nil || len(list) == 0 {
			return err
		}
		if err := do(ctx, list); err != nil {
			return err
		}
		after = list[len(list)-1].ID
	}
}

// acting calls work within a transaction that holds the locks of those records' ids, with those that are as they were read.
// What is being written or named at this moment isn't waited for: it counts as busy, and the next round looks again.
func (r *round) acting(ctx context.Context, list []record, work func(context.Context, []record) error) error {
	if r.o.DryRun {
		return work(ctx, list)
	}
	ctx, cancel := context.WithTimeout(ctx, batchTimeout)
	defer cancel()
	return pgx.BeginTxFunc(ctx, r.conn, pgx.TxOptions{IsoLevel: pgx.ReadCommitted}, func(pgx.Tx) error {
		keys := make([]int64, len(list))
		for i, f := range list {
			keys[i] = LockKey(f.ID)
		}
		rows, _ := r.conn.Query(ctx, `WITH none AS MATERIALIZED (SELECT pg_try_advisory_xact_lock_shared($3) AS free)
			SELECT id FROM unnest($1::text[], $2::int8[]) AS t(id, key) WHERE CASE WHEN (SELECT free FROM none) THEN pg_try_advisory_xact_lock(key) ELSE false END`, ids(list), keys, int64(LockAll))
		locked, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			return fmt.Errorf("lock files: %w", err)
		}
		now, err := r.records(ctx, `attachment_id = ANY($2)`, locked)
		if err != nil {
			return err
		}
		same := now[:0]
		for _, f := range now {
			if slices.ContainsFunc(list, func(was record) bool { return was.ID == f.ID && was.Event == f.Event && was.Key == f.Key }) {
				same = append(same, f)
			}
		}
		r.Sweep.Busy += int64(len(list) - len(same))
		if len(same) == 0 {
			return nil
		}
		return work(ctx, same)
	})
}

// write runs a statement, unless this is a dry run.
func (r *round) write(ctx context.Context, what, sql string, args ...any) error {
	if r.o.DryRun {
		return nil
	}
	if _, err := r.conn.Exec(ctx, sql, args...); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// named tells those files that rows name from the others, as the log has it.
func (r *round) named(ctx context.Context, list []record) (yes, no []record, err error) {
	if len(list) == 0 {
		return nil, nil, nil
	}
	named, err := r.c.o.References.Named(ctx, ids(list))
	if err == nil && len(named) != len(list) {
		err = fmt.Errorf("%d answers to %d questions", len(named), len(list))
	}
	if err != nil {
		return nil, nil, fmt.Errorf("ask the change log which files rows name: %w", err)
	}
	for i, f := range list {
		if named[i] {
			yes = append(yes, f)
		} else {
			no = append(no, f)
		}
	}
	return yes, no, nil
}

// namedNow is named by every row that was committed before the call.
func (r *round) namedNow(ctx context.Context, list []record) (yes, no []record, err error) {
	if len(list) == 0 {
		return nil, nil, nil
	}
	if err := r.c.o.References.Pass(ctx); err != nil {
		return nil, nil, err
	}
	if why, err := r.c.o.References.Unfilled(ctx); err != nil || why != "" { // rows may come that were never looked through
		return nil, nil, cmp.Or(err, errors.New(why))
	}
	return r.named(ctx, list)
}

func ids(list []record) []string {
	out := make([]string, len(list))
	for i := range list {
		out[i] = list[i].ID
	}
	return out
}

func tally(list []record) (t Tally) {
	for _, f := range list {
		t.add(Tally{1, f.Size})
	}
	return t
}

// What care tells the stream of a file.
const (
	eventDeleted  = "d"
	eventMissing  = "m"
	eventReturned = "r" // its bytes are there again, or a row names it again: as u, but nobody gets to see it who didn't before
)

// tell writes an event of each file and what it means for its record, in the open transaction.
func (r *round) tell(ctx context.Context, event string, list []record) error {
	if len(list) == 0 {
		return nil
	}
	state := event
	if event == eventReturned {
		state = "u"
	}
	return r.write(ctx, "write events of files", `WITH e AS (INSERT INTO walgate.attachments (attachment_id, event, size, content_type, sha256, subject, client_id, scopes)
			SELECT attachment_id, $2::text::"char", size, content_type, sha256, subject, client_id, scopes FROM walgate.files WHERE attachment_id = ANY($1) RETURNING id, attachment_id)
		UPDATE walgate.files f SET event_id = e.id, state = $3::text::"char", deleted_at = CASE $2::text WHEN 'd' THEN now() END,
			unreferenced_since = CASE $2::text WHEN 'r' THEN NULL ELSE unreferenced_since END FROM e WHERE f.attachment_id = e.attachment_id`, ids(list), event, state)
}

// sweep deletes what no row names.
func (r *round) sweep(ctx context.Context) error {
	s := &r.Sweep
	err := r.conn.QueryRow(ctx, `SELECT count(*), coalesce(sum(size), 0)::int8 FROM walgate.files WHERE state <> 'd'`).Scan(&s.Files.Files, &s.Files.Bytes)
	if err != nil {
		return fmt.Errorf("count walgate.files: %w", err)
	}
	unsure := r.unsure(ctx)
	err = r.free(ctx, unsure == nil)
	if unsure != nil {
		s.HeldUp = append(s.HeldUp, *unsure)
	} else if noted := r.note(ctx); noted != nil {
		err = errors.Join(err, noted)
	} else {
		err = errors.Join(err, r.delete(ctx))
	}
	err = errors.Join(err, r.forget(ctx), r.giveUp(ctx))
	if err != nil {
		return fmt.Errorf("sweep the attachments: %w", err)
	}
	return r.write(ctx, "note what was swept", `UPDATE walgate.care SET swept_at = now(), result = (result::jsonb || jsonb_build_object('sweep', $1::jsonb))::json`, jsonText(s))
}

// unsure says why the log can't tell which files rows name; nil: it can.
func (r *round) unsure(ctx context.Context) *HeldUp {
	why, err := r.c.o.References.Unfilled(ctx)
	if err == nil && why == "" {
		err = r.c.o.References.Pass(ctx)
	}
	if err != nil {
		why = err.Error()
	}
	if why == "" {
		return nil
	}
	return &HeldUp{What: "no file was swept: it isn't certain which ones rows name", Why: why,
		Next: "nothing is lost, and the next round tries again; see that walgate serve runs and /readyz says ready"}
}

// free deletes the bytes of files that an earlier round or somebody deleted. Of the former, those that a row names by now
// return. Where it isn't sure what rows name, only what somebody deleted goes.
func (r *round) free(ctx context.Context, sure bool) error {
	where := `state = 'd' AND NOT bytes_gone`
	if !sure {
		where += ` AND unreferenced_since IS NULL`
	}
	return r.each(ctx, where, actBatch, func(ctx context.Context, list []record) error {
		return r.acting(ctx, list, func(ctx context.Context, list []record) error {
			back, gone, err := r.returning(ctx, list)
			if err == nil {
				err = r.tell(ctx, eventReturned, back)
			}
			if err == nil {
				gone, err = r.removeObjects(ctx, gone)
			}
			if err == nil {
				failpoint.Here(failpoint.BytesDeleted)
				err = r.settle(ctx, gone)
			}
			if err == nil {
				r.Sweep.Returned.add(tally(back))
				r.Sweep.Freed.add(tally(gone))
			}
			return err
		})
	})
}

// deletedKept is for how long it is known of a file at least that it was deleted; after that its id is like one that nobody has
// uploaded. The change log keeps by itself what it has to tell clients.
const deletedKept = 30 * 24 * time.Hour

// forget deletes the records of files that were deleted long ago.
func (r *round) forget(ctx context.Context) error {
	if r.o.DryRun {
		return nil
	}
	for {
		done, err := r.conn.Exec(ctx, `DELETE FROM walgate.files WHERE attachment_id = ANY (ARRAY(SELECT attachment_id FROM walgate.files
			WHERE state = 'd' AND bytes_gone AND deleted_at < now() - $1::interval LIMIT $2)) AND state = 'd' AND bytes_gone`, max(r.c.o.Grace, deletedKept), lookBatch)
		if err != nil {
			return fmt.Errorf("forget deleted files: %w", err)
		}
		if done.RowsAffected() < lookBatch {
			return nil
		}
	}
}

// returning tells the deleted files that are to return, for a row names them and all their bytes are there, from those whose
// bytes are to go.
func (r *round) returning(ctx context.Context, list []record) (back, gone []record, err error) {
	var swept []record
	for _, f := range list {
		if f.Swept {
			swept = append(swept, f)
		} else {
			gone = append(gone, f)
		}
	}
	named, not, err := r.namedNow(ctx, swept)
	if err != nil {
		return nil, nil, err
	}
	whole, err := r.whole(ctx, named)
	for i, f := range named {
		if err == nil && whole[i] {
			back = append(back, f)
		} else {
			gone = append(gone, f)
		}
	}
	return back, append(gone, not...), err
}

// settle notes that bytes are gone and gives their quota back, once: who finds them noted gives nothing.
func (r *round) settle(ctx context.Context, list []record) error {
	if len(list) == 0 {
		return nil
	}
	err := r.write(ctx, "lock quotas", `SELECT FROM walgate.quotas WHERE subject IN (SELECT subject FROM walgate.files WHERE attachment_id = ANY($1)) ORDER BY subject FOR UPDATE`, ids(list))
	if err != nil {
		return err
	}
	return r.write(ctx, "note that bytes are gone", `WITH gone AS (UPDATE walgate.files SET bytes_gone = true WHERE attachment_id = ANY($1) AND NOT bytes_gone RETURNING subject, size)
		UPDATE walgate.quotas q SET used = greatest(q.used - g.size, 0) FROM (SELECT subject, sum(size)::int8 AS size FROM gone GROUP BY subject) g WHERE q.subject = g.subject`, ids(list))
}

// note looks at every file and notes which ones no row names.
func (r *round) note(ctx context.Context) error {
	s := &r.Sweep
	return r.each(ctx, `state <> 'd'`, lookBatch, func(ctx context.Context, list []record) error {
		named, not, err := r.named(ctx, list)
		if err != nil {
			return err
		}
		var noted, again []string
		for _, f := range not {
			one := Tally{1, f.Size}
			switch {
			case f.Due:
				s.Due.add(one)
			case f.Noted:
				s.Waiting.add(one)
			default:
				noted = append(noted, f.ID)
				s.Noted.add(one)
			}
		}
		for _, f := range named {
			if f.Noted {
				again = append(again, f.ID)
				s.Named.add(Tally{1, f.Size})
			}
		}
		return errors.Join(r.mark(ctx, noted, again), r.unscope(ctx, list))
	})
}

// unscope forgets where the uploaders of files may write once the log holds the upload and has withheld the file from nobody.
// A log that begins anew finds all references at once, and would else withhold the file from rows that came after it.
func (r *round) unscope(ctx context.Context, list []record) error {
	list = slices.DeleteFunc(slices.Clone(list), func(f record) bool { return !f.Scoped })
	if len(list) == 0 || r.o.DryRun {
		return nil
	}
	events, err := r.c.o.References.Unwithheld(ctx, ids(list))
	if err != nil {
		return fmt.Errorf("ask the change log what is withheld: %w", err)
	}
	return r.write(ctx, "note what is withheld from nobody", `UPDATE walgate.files f SET scopes = NULL FROM unnest($1::text[], $2::int8[]) AS t(id, event)
		WHERE f.attachment_id = t.id AND f.event_id = t.event AND f.scopes IS NOT NULL`, ids(list), events)
}

// mark notes since when no row names files.
func (r *round) mark(ctx context.Context, not, named []string) (err error) {
	if len(not) > 0 {
		err = r.write(ctx, "note files without references", `UPDATE walgate.files SET unreferenced_since = now() WHERE attachment_id = ANY($1) AND state <> 'd' AND unreferenced_since IS NULL`, not)
	}
	if err == nil && len(named) > 0 {
		err = r.write(ctx, "note files with references", `UPDATE walgate.files SET unreferenced_since = NULL WHERE attachment_id = ANY($1) AND state <> 'd'`, named)
	}
	return err
}

// delete deletes the files that no row has named for the grace period, if they aren't suspiciously many.
func (r *round) delete(ctx context.Context) error {
	s := &r.Sweep
	if r.c.beyond(s.Due.Files, s.Files.Files) && !r.o.Force {
		s.HeldUp = append(s.HeldUp, HeldUp{Guard: true, What: "no file was deleted: they are suspiciously many",
			Why:  fmt.Sprintf("no row has named %d of %d files for %s; attachments.sweep_guard is %d percent", s.Due.Files, s.Files.Files, r.c.o.Grace, r.c.o.Guard),
			Next: "if rows were lost or a policy no longer says where they name files, mend that: the files are still there. If it is meant, run walgate attachments gc --force"})
		return nil
	}
	return r.each(ctx, `state <> 'd' AND unreferenced_since < now() - $1::interval`, actBatch, func(ctx context.Context, list []record) error {
		defer failpoint.Here(failpoint.FileDeleted)
		return r.acting(ctx, list, func(ctx context.Context, list []record) error {
			list = slices.DeleteFunc(list, func(f record) bool { return !f.Due }) // uploaded anew meanwhile
			named, not, err := r.namedNow(ctx, list)
			if err == nil {
				err = r.mark(ctx, nil, ids(named))
			}
			if err == nil {
				err = r.tell(ctx, eventDeleted, not)
			}
			if err == nil {
				failpoint.Here(failpoint.FileDeleting)
				s.Deleted.add(tally(not))
			}
			return err
		})
	})
}

// giveUp ends uploads that have come to no end in their time, and deletes what others have left.
func (r *round) giveUp(ctx context.Context) error {
	if r.o.DryRun {
		err := r.conn.QueryRow(ctx, `SELECT count(*), coalesce(sum(greatest(received, reserved)), 0)::int8 FROM walgate.uploads WHERE expires_at < now()`).Scan(&r.Sweep.Uploads.Files, &r.Sweep.Uploads.Bytes)
		if err != nil {
			return fmt.Errorf("count walgate.uploads: %w", err)
		}
		return nil
	}
	for more := true; more; {
		var t Tally
		var err error
		if t.Files, t.Bytes, more, err = r.c.expire(ctx); err != nil {
			return err
		}
		r.Sweep.Uploads.add(t)
	}
	return nil
}

package blobstore

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"regexp"
	"slices"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"

	"github.com/walgate/walgate/internal/failpoint"
)

// ourKey matches the keys that walgate makes: the storage key and, after it, a part, or what the driver of files writes to at
// first and leaves where it is killed.
var ourKey = regexp.MustCompile(`^(` + keyPrefix + `[0-9a-f]{2}/[0-9a-f]{32})(?:\..+)?$`)

// walk goes through the store's listing and the records side by side, in the order of storage keys, each a page at a time.
// What it finds is mended in batches, before the place that it has come to is noted.
type walk struct {
	*round
	p     *progress
	found *Reconciled
	mend  bool

	holders []holder // read, not yet compared
	all     bool     // they were the last
	steps   int      // since the place was noted

	orphans    []orphan
	lost, back []record
}

// holder is who has a storage key: a file, or an upload (nil), whose objects aren't looked at.
type holder struct {
	key  string
	file *record
}

// orphan is an object that is too much.
type orphan struct {
	Object
	storage string // storage key that nobody has; empty: it is too much beside the parts of a file
}

// group is the objects of one storage key.
type group struct {
	key     string
	objects []Object
}

// run walks to the end. An error of the store ends it: what wasn't listed isn't missing.
func (w *walk) run(ctx context.Context) error {
	next, stop := iter.Pull2(w.groups(ctx))
	defer stop()
	var g *group
	for listing := true; ; {
		if g == nil && listing {
			one, err, ok := next()
			if err != nil {
				return fmt.Errorf("list the blob store: %w", err)
			}
			if listing = ok; ok {
				g = &one
			}
		}
		h, err := w.holder(ctx)
		if err != nil {
			return err
		}
		var at string
		switch {
		case g == nil && h == nil:
			return w.flush(ctx)
		case h == nil || g != nil && g.key < h.key:
			w.unheld(g)
			at, g = g.key, nil
		case g == nil || h.key < g.key:
			w.compare(h, nil)
			at, w.holders = h.key, w.holders[1:]
		default:
			w.compare(h, g.objects)
			at, w.holders, g = h.key, w.holders[1:], nil
		}
		w.p.After = at
		if w.steps++; w.steps < lookBatch {
			continue
		}
		if err := w.flush(ctx); err != nil {
			return err
		}
	}
}

// groups lists the store. It counts what is there, and leaves out what isn't ours.
func (w *walk) groups(ctx context.Context) iter.Seq2[group, error] {
	after := w.p.After
	if after != "" {
		after += "/" // behind its parts
	}
	return func(yield func(group, error) bool) {
		var g group
		for o, err := range w.c.store.List(ctx, after) {
			if err != nil {
				yield(group{}, err)
				return
			}
			w.found.Objects.add(Tally{1, o.Size})
			m := ourKey.FindStringSubmatch(o.Key)
			if m == nil {
				w.found.Foreign.add(Tally{1, o.Size})
				continue
			}
			if m[1] != g.key {
				if g.key != "" && !yield(g, nil) {
					return
				}
				g = group{key: m[1]}
			}
			g.objects = append(g.objects, o)
		}
		if g.key != "" {
			yield(g, nil)
		}
	}
}

// holder returns the first one that isn't compared yet, nil after the last.
func (w *walk) holder(ctx context.Context) (*holder, error) {
	if len(w.holders) == 0 && !w.all {
		const sql = `(SELECT storage_key, attachment_id, event_id, state::text, parts, size FROM walgate.files WHERE NOT bytes_gone AND storage_key > $1 ORDER BY storage_key LIMIT $2)
			UNION ALL (SELECT storage_key, NULL, 0, '', NULL, 0 FROM walgate.uploads WHERE storage_key > $1 ORDER BY storage_key LIMIT $2) ORDER BY storage_key LIMIT $2`
		rows, _ := w.conn.Query(ctx, sql, w.p.After, lookBatch)
		list, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (h holder, err error) {
			var f record
			var id *string
			var state string
			if err = row.Scan(&h.key, &id, &f.Event, &state, &f.Parts, &f.Size); err == nil && id != nil {
				f.ID, f.Key, f.State, h.file = *id, h.key, state[0], &f
			}
			return h, err
		})
		if err != nil {
			return nil, fmt.Errorf("read who has which storage key: %w", err)
		}
		w.holders, w.all = list, len(list) < lookBatch
	}
	if len(w.holders) == 0 {
		return nil, nil
	}
	return &w.holders[0], nil
}

// unheld looks at objects whose storage key nobody has.
func (w *walk) unheld(g *group) {
	for _, o := range g.objects {
		w.tooMuch(o, g.key)
	}
}

// tooMuch notes an object that is to go, unless it is so young that its upload may be under way.
func (w *walk) tooMuch(o Object, storage string) {
	if w.c.now().Sub(o.ModTime) <= max(w.c.o.Grace, w.c.o.UploadTTL) {
		return
	}
	w.found.Orphans.add(Tally{1, o.Size})
	w.orphans = append(w.orphans, orphan{o, storage})
}

// compare looks at the objects of a storage key that somebody has.
func (w *walk) compare(h *holder, objects []Object) {
	f := h.file
	if f == nil {
		return
	}
	wanted, there := f.objects(), 0
	for _, o := range objects {
		size, ok := wanted[o.Key]
		if !ok {
			w.tooMuch(o, "")
		} else if o.Size == size {
			there++
		}
	}
	one, whole := Tally{1, f.Size}, there == len(wanted)
	if !whole && f.State != 'd' {
		w.found.Missing.add(one)
	}
	if !whole && f.State == 'u' {
		w.lost = append(w.lost, *f)
		if !w.mend {
			w.found.Lost.add(one)
		}
	}
	if whole && f.State == 'm' {
		w.back = append(w.back, *f)
		if !w.mend {
			w.found.Returned.add(one)
		}
	}
}

// flush mends what was found, and then notes the place.
func (w *walk) flush(ctx context.Context) error {
	if w.mend {
		if err := w.act(ctx); err != nil {
			return err
		}
	}
	w.steps, w.orphans, w.lost, w.back = 0, w.orphans[:0], w.lost[:0], w.back[:0]
	w.p.At = w.c.now()
	return w.write(ctx, "note how far the store was gone through", `UPDATE walgate.care SET progress = $1`, jsonText(w.p))
}

func (w *walk) act(ctx context.Context) error {
	counted, now := &w.p.Found, *w.found
	now.Lost.Files += int64(len(w.lost))
	if !w.o.Force && (now.Lost.Files > counted.Lost.Files+guardFloor || now.Orphans.Files > counted.Orphans.Files+guardFloor) {
		return errors.New("much more is amiss than a moment ago: something is happening to the blob store; mending stops here")
	}
	if err := w.deleteOrphans(ctx); err != nil {
		return err
	}
	failpoint.Here(failpoint.OrphansDeleted)
	for list := range slices.Chunk(w.lost, actBatch) {
		if err := w.tellWhere(ctx, list, eventMissing, false, &w.found.Lost); err != nil {
			return err
		}
		failpoint.Here(failpoint.MissingTold)
	}
	for list := range slices.Chunk(w.back, actBatch) {
		if err := w.tellWhere(ctx, list, eventReturned, true, &w.found.Returned); err != nil {
			return err
		}
	}
	return nil
}

// tellWhere tells the event of those files whose bytes, looked for one by one, are there or aren't.
func (w *walk) tellWhere(ctx context.Context, list []record, event string, there bool, done *Tally) error {
	return w.acting(ctx, list, func(ctx context.Context, list []record) error {
		whole, err := w.whole(ctx, list)
		if err != nil {
			return err
		}
		var told []record
		for i, f := range list {
			if whole[i] == there {
				told = append(told, f)
			}
		}
		if err := w.tell(ctx, event, told); err != nil {
			return err
		}
		done.add(tally(told))
		return nil
	})
}

// deleteOrphans deletes what nobody has, asked once more: an object is listed before its record may be read.
func (w *walk) deleteOrphans(ctx context.Context) error {
	var keys []string
	for _, o := range w.orphans {
		keys = append(keys, o.storage)
	}
	rows, _ := w.conn.Query(ctx, `SELECT storage_key FROM walgate.files WHERE storage_key = ANY($1) AND NOT bytes_gone
		UNION ALL SELECT storage_key FROM walgate.uploads WHERE storage_key = ANY($1)`, keys)
	held, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return fmt.Errorf("read who has which storage key: %w", err)
	}
	var work errgroup.Group
	work.SetLimit(storeWorkers)
	for _, o := range w.orphans {
		if slices.Contains(held, o.storage) {
			continue
		}
		w.found.Deleted.add(Tally{1, o.Size})
		work.Go(func() error { return w.c.store.Delete(ctx, o.Key) })
	}
	if err := work.Wait(); err != nil {
		return fmt.Errorf("delete an object that no record has: %w", err)
	}
	return nil
}

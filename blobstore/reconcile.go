package blobstore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// Reconciled is what holding the store against the records found, and what was mended; of a dry run, what would be.
type Reconciled struct {
	Objects  Tally    `json:"objects"`  // in the store
	Foreign  Tally    `json:"foreign"`  // of those, objects that walgate can't have written: they stay
	Orphans  Tally    `json:"orphans"`  // objects that no file and no upload has, old enough to be no upload under way
	Deleted  Tally    `json:"deleted"`  // of those
	Missing  Tally    `json:"missing"`  // files whose bytes are not, or not wholly, in the store
	Lost     Tally    `json:"lost"`     // of those, found so for the first time: told to clients
	Returned Tally    `json:"returned"` // files whose bytes were missing and are back
	HeldUp   []HeldUp `json:"held_up,omitempty"`
}

// progress is how far a reconciliation has come.
type progress struct {
	Step  string     `json:"step,omitempty"`  // look, mend; empty: none is under way
	After string     `json:"after,omitempty"` // the storage key after which it goes on
	At    time.Time  `json:"at,omitzero"`
	Found Reconciled `json:"found,omitzero"` // by looking
	Done  Reconciled `json:"done,omitzero"`  // by mending
}

const (
	stepLook  = "look" // counts: what is found must not be suspiciously much
	stepMend  = "mend"
	resumable = time.Hour // an interrupted walk that is older begins anew: the store may have become another one
)

// reconcileWhenDue holds the store against the records once a day, and goes on with what was interrupted.
func (r *round) reconcileWhenDue(ctx context.Context) error {
	var due bool
	var text []byte
	var p progress
	err := r.conn.QueryRow(ctx, `SELECT coalesce(reconciled_at < now() - $1::interval, true), progress FROM walgate.care`, reconcileInterval).Scan(&due, &text)
	if err == nil {
		err = json.Unmarshal(text, &p)
	}
	if err != nil {
		return fmt.Errorf("read walgate.care: %w", err)
	}
	if !due && !r.o.Reconcile {
		return nil
	}
	if other := r.otherStore(ctx); other != nil {
		r.Reconcile = &Reconciled{HeldUp: []HeldUp{*other}}
		return r.noteFound(ctx, `result`, r.Reconcile)
	}
	if p.Step == "" || r.o.DryRun || r.c.now().Sub(p.At).Abs() > resumable {
		p = progress{Step: stepLook}
	}
	if err := r.reconcile(ctx, &p); err != nil {
		return fmt.Errorf("hold the blob store against the records: %w", err)
	}
	return nil
}

// reconcile looks first, and mends only where what it found isn't suspiciously much.
func (r *round) reconcile(ctx context.Context, p *progress) error {
	if p.Step == stepLook {
		w := &walk{round: r, p: p, found: &p.Found}
		if err := w.run(ctx); err != nil {
			return err
		}
		p.Step, p.After = stepMend, ""
	}
	r.Reconcile, p.Found.HeldUp = &p.Found, r.suspicious(&p.Found)
	f := &p.Found
	if !r.o.DryRun && len(f.HeldUp) == 0 && f.Orphans.Files+f.Lost.Files+f.Returned.Files > 0 {
		w := &walk{round: r, p: p, found: &p.Done, mend: true}
		err := w.run(ctx)
		f.Deleted, f.Lost, f.Returned, f.HeldUp = p.Done.Deleted, p.Done.Lost, p.Done.Returned, p.Done.HeldUp
		if err != nil {
			return err
		}
	}
	return r.noteFound(ctx, `reconciled_at = now(), progress = '{}', result`, f)
}

// noteFound keeps what was found, for the metrics of all instances.
func (r *round) noteFound(ctx context.Context, set string, f *Reconciled) error {
	return r.write(ctx, "note what was found", `UPDATE walgate.care SET `+set+` = (result::jsonb || jsonb_build_object('reconcile', $1::jsonb))::json`, jsonText(f))
}

// otherStore says that the store isn't the one in which the files are; nil: it is, or can't be asked, which walking it will tell.
func (r *round) otherStore(ctx context.Context) *HeldUp {
	if r.o.DryRun {
		return nil
	}
	if err := r.c.o.Records.Bind(ctx, r.c.o.Store); errors.Is(err, ErrOtherStore) {
		return &HeldUp{Guard: true, What: "the blob store was not held against the records", Why: err.Error(), Next: "nothing was deleted, and no client was told that files are missing; mend that, and the next round looks again"}
	}
	return nil
}

// suspicious says what of it is more than one round may find; nothing is mended then.
func (r *round) suspicious(f *Reconciled) (held []HeldUp) {
	if r.o.Force {
		return nil
	}
	files, lost, stay := r.Sweep.Files.Files, f.Lost.Files, "; of what was found there, no client was told and nothing was deleted"
	switch {
	case f.Objects.Files == 0 && lost > 0:
		held = append(held, HeldUp{Guard: true, What: "the blob store is empty" + stay, Why: fmt.Sprintf("it should hold the bytes of %d files", lost),
			Next: "see that blobs.url names the right store and that its volume is mounted. If the bytes are lost, run walgate attachments gc --force: the files count as missing, devices keep their copies, and whoever has one may upload it anew"})
	case r.c.beyond(lost, files):
		held = append(held, HeldUp{Guard: true, What: "the bytes of suspiciously many files are not in the blob store" + stay,
			Why:  fmt.Sprintf("%d of %d files; attachments.sweep_guard is %d percent", lost, files, r.c.o.Guard),
			Next: "see that blobs.url names the right store. If the bytes are lost, run walgate attachments gc --force: the files count as missing, devices keep their copies, and whoever has one may upload it anew"})
	}
	if r.c.beyond(f.Orphans.Files, f.Objects.Files) {
		held = append(held, HeldUp{Guard: true, What: "the blob store holds suspiciously many objects that no record has" + stay,
			Why:  fmt.Sprintf("%d of %d objects; attachments.sweep_guard is %d percent", f.Orphans.Files, f.Objects.Files, r.c.o.Guard),
			Next: "see that no other walgate uses this store, and whether the source was restored from an older copy. If the objects are to go, run walgate attachments gc --force"})
	}
	return held
}

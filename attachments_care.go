package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/walgate/walgate/blobstore"
	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/replication"
)

// newCare makes the care of the attachments; nil where no collection has any.
func (p *parts) newCare(cfg *Config, logger *slog.Logger) *blobstore.Care {
	if p.files == nil {
		return nil
	}
	refs := &references{log: p.log, source: p.source, policies: p.policies}
	for name, spec := range cfg.Collections {
		if spec.Attachments != nil {
			refs.collections = append(refs.collections, name)
		}
	}
	return blobstore.NewCare(blobstore.CareOptions{Source: p.source, Store: p.blobs, Records: p.files, References: refs, Grace: cfg.Attachments.Grace,
		UploadTTL: cfg.Attachments.UploadTTL, Guard: cfg.Attachments.SweepGuard, Logger: logger})
}

// references is what the change log knows of the rows that name files.
type references struct {
	log         *changelog.Log
	source      *pgxpool.Pool
	policies    func() *policies.Set
	collections []string // that have attachments
}

// Unfilled says why the log doesn't know every row that names a file.
func (r *references) Unfilled(ctx context.Context) (string, error) {
	h, err := r.log.Head(ctx)
	if errors.Is(err, changelog.ErrNotInitialised) {
		return "the change log has not begun", nil
	}
	if err != nil {
		return "", err
	}
	fills, err := r.log.Fills(ctx)
	if err != nil {
		return "", err
	}
	newest := map[int32]changelog.Fill{}
	for _, f := range fills { // rising
		newest[f.Collection] = f
	}
	stored := map[string]changelog.Collection{}
	for _, c := range h.Collections {
		stored[c.Name] = c
	}
	set := r.policies()
	for _, name := range r.collections {
		if why := unfilled(set.ByName(name), stored[name], newest); why != "" {
			return fmt.Sprintf("collection %s: %s", name, why), nil
		}
	}
	return "", nil
}

// unfilled says why the log doesn't know which files the rows of one collection name: c as configured, s as the log has it.
func unfilled(c *policies.Collection, s changelog.Collection, newest map[int32]changelog.Fill) string {
	f, looked := newest[s.ID]
	switch {
	case s.Name == "":
		return "the change log does not have it yet"
	case s.Stopped != "":
		return "it is stopped: " + s.Stopped
	case c == nil:
		return "its table does not fit its policy"
	case c.Fingerprint != s.Fingerprint:
		return "the change log follows another version of its policy"
	case !looked || f.Version < s.Refill:
		return "its rows are yet to be looked through for the files that they name"
	case !f.Done:
		return fmt.Sprintf("its rows are being looked through for the files that they name: %d of about %d", f.Rows, f.Estimate)
	}
	return ""
}

// passTimeout bounds how long the log may take to reach the source's present state.
const passTimeout = 15 * time.Second

// Pass waits until the log holds what was committed before the call.
func (r *references) Pass(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, passTimeout)
	defer cancel()
	fence, err := replication.Fence(ctx, r.source)
	if err != nil {
		return err
	}
	for pause := 2 * time.Millisecond; ; pause = min(2*pause, 200*time.Millisecond) {
		h, err := r.log.Head(ctx)
		if err == nil && h.LSN >= fence {
			return nil
		}
		select {
		case <-ctx.Done():
			if err == nil {
				err = fmt.Errorf("the change log is at %s and not at %s, where the source is", h.LSN, fence)
			}
			return fmt.Errorf("the change log did not reach the source's present state within %s: %w", passTimeout, err)
		case <-time.After(pause):
		}
	}
}

// Named says of each file whether a row names it.
func (r *references) Named(ctx context.Context, ids []string) ([]bool, error) {
	keys := make([][16]byte, len(ids))
	for i, id := range ids {
		keys[i] = policies.AttachmentKey([]byte(id))
	}
	held, err := r.log.Held(ctx, keys, nil)
	if err != nil {
		return nil, err
	}
	named := make([]bool, len(held))
	for i := range held {
		named[i] = held[i].Any
	}
	return named, nil
}

// Unwithheld says of each file which event the log holds of it, unless it is withheld from a scope.
func (r *references) Unwithheld(ctx context.Context, ids []string) ([]int64, error) {
	keys := make([][16]byte, len(ids))
	for i, id := range ids {
		keys[i] = policies.AttachmentKey([]byte(id))
	}
	return r.log.Unwithheld(ctx, keys)
}

// careLoop has a round go whenever one is due, and keeps what there is to see of it fresh, until ctx ends.
type careLoop struct {
	care   *blobstore.Care
	status atomic.Pointer[blobstore.CareStatus] // nil: not known yet
	rounds atomic.Uint64                        // of this instance, that ended well
	failed atomic.Uint64
	logger *slog.Logger
}

func (l *careLoop) run(ctx context.Context) error {
	tick := time.NewTicker(l.care.Interval())
	defer tick.Stop()
	for {
		if s, err := l.care.Status(ctx); err == nil {
			l.status.Store(s)
		} else if ctx.Err() == nil {
			l.logger.Warn("the state of the attachments can't be read; trying again", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		l.round(ctx)
	}
}

func (l *careLoop) round(ctx context.Context) {
	report, err := l.care.Round(ctx, blobstore.RoundOptions{})
	switch {
	case errors.Is(err, blobstore.ErrCareBusy), ctx.Err() != nil:
		return
	case err != nil:
		l.failed.Add(1)
		l.logger.Warn("the attachments could not be looked after; trying again", "error", err)
	default:
		l.rounds.Add(1)
	}
	if report == nil {
		return
	}
	for _, h := range report.HeldUp() {
		level := slog.LevelWarn
		if h.Guard {
			level = slog.LevelError
		}
		l.logger.Log(ctx, level, "attachments: "+h.What, "why", h.Why, "next", h.Next)
	}
	if s := &report.Sweep; s.Deleted.Files+s.Returned.Files+s.Freed.Files+s.Uploads.Files > 0 {
		l.logger.Info("swept the attachments", "deleted", s.Deleted.Files, "returned", s.Returned.Files, "freed", s.Freed.Files, "freed_bytes", s.Freed.Bytes, "uploads_given_up", s.Uploads.Files)
	}
	if r := report.Reconcile; r != nil && r.Deleted.Files+r.Lost.Files+r.Returned.Files > 0 {
		l.logger.Warn("the blob store and the records of attachments differed", "orphans_deleted", r.Deleted.Files, "files_missing", r.Lost.Files, "files_back", r.Returned.Files)
	}
}

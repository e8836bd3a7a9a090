package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/walgate/walgate/blobstore"
)

func attachmentsCommand(load loader) *cobra.Command {
	c := &cobra.Command{Use: "attachments", Short: "Look after the files that rows name", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() }}
	c.AddCommand(attachmentsGCCommand(load))
	return c
}

func attachmentsGCCommand(load loader) *cobra.Command {
	var o blobstore.RoundOptions
	c := &cobra.Command{Use: "gc", Short: "Delete files that no row needs, and hold the blob store against the records", Args: cobra.NoArgs,
		Long: "gc does at once what serve does now and then: it notes files that no row names, deletes those that no row has named for\n" +
			"attachments.grace, deletes the bytes of files that were deleted before, gives up expired uploads, deletes objects that no\n" +
			"record has, and notes which files' bytes are missing. walgate serve has to run somewhere, for the change log to be up to\n" +
			"date. Where suspiciously much would go (attachments.sweep_guard), nothing does, and the exit status is 1.",
		Example: "  walgate attachments gc --dry-run",
		RunE: func(c *cobra.Command, _ []string) error {
			cfg, err := load()
			if err != nil {
				return err
			}
			return collectGarbage(c.Context(), cfg, o, c.OutOrStdout(), c.ErrOrStderr())
		}}
	c.Flags().BoolVar(&o.DryRun, "dry-run", false, "say what would go, change nothing")
	c.Flags().BoolVar(&o.Force, "force", false, "go on whatever attachments.sweep_guard says")
	return c
}

func collectGarbage(ctx context.Context, cfg *Config, o blobstore.RoundOptions, out, log io.Writer) error {
	if !cfg.hasAttachments() {
		return errors.New("no collection has attachments: there is nothing to look after")
	}
	logger := newLogger(cfg, log)
	p, err := open(ctx, cfg, toServe, logger)
	if err != nil {
		return err
	}
	defer p.close()
	if err := p.openBlobs(ctx, cfg, logger); err != nil {
		return err
	}
	if p.blobs.Scheme() == "mem" {
		return errors.New("blobs.url is mem://: the bytes are in the memory of the process that serves, which looks after them itself")
	}
	if err := p.openFiles(ctx, cfg); err != nil {
		return err
	}
	o.Reconcile = true
	report, err := p.newCare(cfg, logger).Round(ctx, o)
	if report != nil {
		printReport(out, report, o.DryRun, cfg.Attachments.Grace)
	}
	if errors.Is(err, blobstore.ErrCareBusy) {
		return fmt.Errorf("%w: wait until it is done, or look with --dry-run", err)
	}
	if err != nil {
		return fmt.Errorf("%w\nnothing is lost: what was begun is gone on with when this runs again", err)
	}
	if n := len(report.HeldUp()); n > 0 {
		return errors.New("not everything was done: see above")
	}
	return nil
}

// printReport tells an operator what went and what not.
func printReport(out io.Writer, r *blobstore.Report, dry bool, grace time.Duration) {
	s, did := &r.Sweep, func(done, would string) string { return done }
	if dry {
		did = func(done, would string) string { return would }
		fmt.Fprint(out, "Dry run: nothing is changed.\n\n")
	}
	line := func(t blobstore.Tally, what string) {
		if t.Files > 0 {
			fmt.Fprintf(out, "%8d  %9s  %s\n", t.Files, bytesText(t.Bytes), what)
		}
	}
	kept := grace.String()
	fmt.Fprintf(out, "%8d  %9s  files that aren't deleted\n", s.Files.Files, bytesText(s.Files.Bytes))
	line(s.Noted, "no row names them, for the first time: they stay for "+kept)
	line(s.Waiting, "no row names them, yet not for "+kept+": they stay")
	line(s.Named, "a row names them again: they stay")
	line(s.Due, "no row has named them for "+kept)
	line(s.Deleted, did("were deleted; their bytes go with the next round", "would be deleted; their bytes would go with the round after"))
	line(s.Returned, did("had been deleted, and returned: a row names them again", "are deleted, and would return: a row names them again"))
	line(s.Freed, did("whose bytes were deleted: that room is free", "are deleted, and their bytes would go"))
	line(s.Uploads, did("uploads were given up, and left-overs deleted", "uploads have expired or left something behind, and would be given up"))
	if s.Busy > 0 {
		fmt.Fprintf(out, "%8d             are being written or named right now: the next round looks again\n", s.Busy)
	}
	if c := r.Reconcile; c != nil {
		fmt.Fprintf(out, "%8d  %9s  objects in the blob store\n", c.Objects.Files, bytesText(c.Objects.Bytes))
		line(c.Orphans, "objects that no record has")
		line(c.Deleted, "of these were deleted")
		line(c.Missing, "files whose bytes the blob store doesn't have")
		if len(c.HeldUp) > 0 {
			did = func(done, would string) string { return would }
		}
		line(c.Lost, did("of these count as missing from now on: devices keep what they have, and nobody is sent for them", "of these would count as missing: devices keep what they have, and nobody is sent for them"))
		line(c.Returned, did("files were missing, and their bytes are back", "files are missing, and their bytes are back"))
		line(c.Foreign, "objects that walgate didn't write: they stay")
	}
	for _, h := range r.HeldUp() {
		fmt.Fprintf(out, "\nNot done: %s.\n  why:  %s\n  next: %s\n", h.What, h.Why, h.Next)
	}
}

// bytesText is a number of bytes to look at.
func bytesText(n int64) string {
	const step = 1000
	if n < step {
		return fmt.Sprintf("%d B", n)
	}
	v, unit := float64(n)/step, 0
	for ; v >= step && unit < 4; unit++ {
		v /= step
	}
	return fmt.Sprintf("%.1f %cB", v, "kMGTP"[unit])
}

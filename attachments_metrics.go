package main

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// The metrics of the attachments' care. All but the last two are the same on every instance, whichever does the work.
var (
	filesMetric      = prometheus.NewDesc("walgate_attachment_files", "Files by state: uploaded, missing (the store lost their bytes), deleted (their bytes are yet to go). unreferenced are those of the former two that no row names.", []string{"state"}, nil)
	fileBytesMetric  = prometheus.NewDesc("walgate_attachment_bytes", "Bytes of files by state, as walgate_attachment_files.", []string{"state"}, nil)
	sweptMetric      = prometheus.NewDesc("walgate_attachment_sweep_timestamp_seconds", "When the last sweep ended.", nil, nil)
	reconciledMetric = prometheus.NewDesc("walgate_attachment_reconcile_timestamp_seconds", "When the blob store was last held against the records.", nil, nil)
	guardMetric      = prometheus.NewDesc("walgate_attachment_guard_tripped", "1 while suspiciously many files were found to be deleted or missing, so that none was; see the log and walgate attachments gc --dry-run.", nil, nil)
	heldUpMetric     = prometheus.NewDesc("walgate_attachment_held_up", "Things that the last sweep and reconciliation didn't do; the log says why.", nil, nil)
	findingsMetric   = prometheus.NewDesc("walgate_attachment_reconcile_findings", "Findings of the last reconciliation: orphans (objects without a record), missing (files without their bytes), returned (missing ones that are back), foreign (objects that aren't walgate's).", []string{"kind"}, nil)
	roundsMetric     = prometheus.NewDesc("walgate_attachment_rounds_total", "Rounds of care that this instance ended well.", nil, nil)
	failedMetric     = prometheus.NewDesc("walgate_attachment_rounds_failed_total", "Rounds of care that failed on this instance.", nil, nil)
)

// Describe implements prometheus.Collector.
func (l *careLoop) Describe(to chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{filesMetric, fileBytesMetric, sweptMetric, reconciledMetric, guardMetric, heldUpMetric, findingsMetric, roundsMetric, failedMetric} {
		to <- d
	}
}

// Collect implements prometheus.Collector. It tells what the last look found, and doesn't ask the source.
func (l *careLoop) Collect(to chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		to <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	to <- prometheus.MustNewConstMetric(roundsMetric, prometheus.CounterValue, float64(l.rounds.Load()))
	to <- prometheus.MustNewConstMetric(failedMetric, prometheus.CounterValue, float64(l.failed.Load()))
	s := l.status.Load()
	if s == nil {
		return
	}
	files := map[string]struct{ files, bytes int64 }{
		"uploaded": {s.Uploaded.Files, s.Uploaded.Bytes}, "missing": {s.Missing.Files, s.Missing.Bytes},
		"unreferenced": {s.Unreferenced.Files, s.Unreferenced.Bytes}, "deleted": {s.Deleted.Files, s.Deleted.Bytes},
	}
	for state, n := range files {
		gauge(filesMetric, float64(n.files), state)
		gauge(fileBytesMetric, float64(n.bytes), state)
	}
	for d, at := range map[*prometheus.Desc]time.Time{sweptMetric: s.SweptAt, reconciledMetric: s.ReconciledAt} {
		if !at.IsZero() {
			gauge(d, float64(at.UnixMilli())/1000)
		}
	}
	tripped := 0.0
	if s.GuardTripped() {
		tripped = 1
	}
	gauge(guardMetric, tripped)
	gauge(heldUpMetric, float64(len(s.Result.HeldUp())))
	if r := s.Result.Reconcile; r != nil {
		gauge(findingsMetric, float64(r.Orphans.Files), "orphans")
		gauge(findingsMetric, float64(r.Missing.Files), "missing")
		gauge(findingsMetric, float64(r.Returned.Files), "returned")
		gauge(findingsMetric, float64(r.Foreign.Files), "foreign")
	}
}

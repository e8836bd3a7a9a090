package gateway

import (
	"errors"
	"net"
	"time"

	"github.com/gofiber/fiber/v2"
	"github.com/gofiber/fiber/v2/middleware/adaptor"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metrics are the gateway's Prometheus metrics. The sync_ names are those that sync servers of this kind share; what is
// walgate's own begins with walgate_.
type metrics struct {
	registry    *prometheus.Registry
	pulls       prometheus.Counter
	pullChanges prometheus.Counter
	fulls       prometheus.Counter
	resyncs     prometheus.Counter
	streams     prometheus.Gauge
	slow        prometheus.Counter
	stuck       prometheus.Counter
	limited     *prometheus.CounterVec // by whose bucket was empty

	pushing      prometheus.Gauge
	pushed       *prometheus.CounterVec // by status of the answer
	pushChanges  *prometheus.CounterVec // by status of the change
	conflicts    *prometheus.CounterVec // by collection
	pushSeconds  prometheus.Histogram
	echoesMissed prometheus.Counter

	attachments       *prometheus.CounterVec // by operation and outcome
	attachmentBytes   *prometheus.CounterVec // by direction
	attachmentSeconds *prometheus.HistogramVec

	manifests          *prometheus.CounterVec // by answer
	manifestOperations *prometheus.CounterVec // by operation
	manifestSeconds    prometheus.Histogram
}

func newMetrics(g *Gateway) *metrics {
	r := prometheus.NewRegistry()
	m := &metrics{registry: r}
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
		r.MustRegister(c)
		return c
	}
	gauge := func(name, help string, value func() float64) {
		r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value))
	}
	total := func(name, help string, value func() float64) {
		r.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help}, value))
	}
	m.pulls = counter("sync_pull_total", "Pull requests.")
	m.pullChanges = counter("sync_pull_changes_served", "Changes returned by pulls.")
	m.fulls = counter("sync_full_resync_total", "Full resync requests.")
	m.resyncs = counter("walgate_resync_required_total", "Pulls and streams that were told to resynchronise in full.")
	m.slow = counter("walgate_stream_catch_up_total", "Times a stream left the live path to read the log: at its start, or because its queue was full.")
	m.stuck = counter("walgate_stream_stuck_total", "Streams closed because a write to the client timed out.")
	m.limited = newLimited()
	r.MustRegister(m.limited)
	m.registerPushes()
	m.registerAttachments()
	m.registerManifests()
	m.streams = prometheus.NewGauge(prometheus.GaugeOpts{Name: "sync_websocket_connections", Help: "Subscribed WebSockets."})
	r.MustRegister(g.o.Collectors...)
	r.MustRegister(fillMetrics{g}, m.streams, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))

	status := func(value func(SourceStatus) float64) func() float64 {
		return func() float64 { return value(g.o.SourceStatus()) }
	}
	gauge("walgate_leading", "1 while this instance holds the slot and appends.", status(func(s SourceStatus) float64 {
		if s.Leading {
			return 1
		}
		return 0
	}))
	gauge("walgate_slot_lag_bytes", "WAL that the slot holds back on the source's disk.", status(func(s SourceStatus) float64 { return float64(s.SlotLag) }))
	gauge("walgate_slot_safe_bytes", "WAL that may be written before the source gives the slot up (max_slot_wal_keep_size); 0: no bound is set.", status(func(s SourceStatus) float64 { return float64(s.SlotSafe) }))
	gauge("walgate_slot_lost", "1 while the slot is invalidated: a leader makes another, and clients resynchronise.", status(func(s SourceStatus) float64 {
		if s.SlotStatus == "lost" {
			return 1
		}
		return 0
	}))
	gauge("sync_oplog_size", "Rows of the change log, about.", status(func(s SourceStatus) float64 { return float64(s.LogRows) }))
	gauge("walgate_append_lag_bytes", "WAL received but not yet durable in the change log.", status(func(s SourceStatus) float64 {
		return float64(max(int64(s.Received)-int64(s.Logged), 0))
	}))
	gauge("walgate_acknowledge_lag_bytes", "WAL durable in the change log but not yet acknowledged to the source.", status(func(s SourceStatus) float64 {
		return float64(max(int64(s.Logged)-int64(s.Acknowledged), 0))
	}))
	gauge("walgate_commit_age_seconds", "Age of the newest logged transaction of the source.", status(func(s SourceStatus) float64 { return since(s.LastCommit) }))
	gauge("walgate_stream_silence_seconds", "Time since the source's walsender was last heard.", status(func(s SourceStatus) float64 { return since(s.LastHeard) }))
	gauge("walgate_append_waiting", "1 while one append to the change log takes unusually long; /readyz says why.", status(func(s SourceStatus) float64 {
		if s.Waiting != "" {
			return 1
		}
		return 0
	}))
	gauge("walgate_append_queue_bytes", "Decoded changes that wait for the change log.", status(func(s SourceStatus) float64 { return float64(s.QueueBytes) }))
	gauge("walgate_send_memory_bytes", "Documents that wait to be sent to clients; limits.send_memory bounds it.", func() float64 { return float64(g.memory.held.Load()) })
	gauge("walgate_collections_stopped", "Collections that are stopped until their table fits their policy again.", status(func(s SourceStatus) float64 { return float64(len(s.Stopped)) }))
	total("walgate_transactions_total", "Source transactions logged by this instance.", status(func(s SourceStatus) float64 { return float64(s.Transactions) }))
	total("walgate_changes_total", "Changes logged by this instance, one for each scope that they touch.", status(func(s SourceStatus) float64 { return float64(s.Rows) }))
	total("walgate_new_histories_total", "Times this instance, leading, began a new history, as after the loss of the slot or of a server: every client resynchronises.", status(func(s SourceStatus) float64 { return float64(s.Histories) }))
	total("walgate_reconnects_total", "Times replication stopped and was tried again.", status(func(s SourceStatus) float64 { return float64(s.Reconnects) }))
	if g.fleet != nil {
		total("walgate_rate_alone_total", "Requests that this instance alone held to their subject's rate, because Redis did not answer.", func() float64 { return float64(g.fleet.alone.Load()) })
	}
	total("walgate_log_looks_total", "Times this instance looked at the change log itself, a page at a time, because the bus had told it nothing for a second, or not all.", func() float64 { return float64(g.hub.looks.Load()) })
	total("walgate_policy_errors_total", "Rows that nobody sees because their policy failed.", func() float64 {
		return float64(g.o.SourceStatus().PolicyErrors + g.policyN.Load())
	})
	return m
}

func newLimited() *prometheus.CounterVec {
	return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "walgate_rate_limited_total",
		Help: "Requests and streams refused because their subject makes too many: by what this instance counts, or by what all of the fleet count in Redis."}, []string{"by"})
}

// since returns the seconds since t, 0 for the zero time; never negative, for the clocks of two machines differ.
func since(t time.Time) float64 {
	if t.IsZero() || t.Unix() <= 0 {
		return 0
	}
	return max(time.Since(t).Seconds(), 0)
}

func (m *metrics) handler() fiber.Handler {
	return adaptor.HTTPHandler(promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}))
}

// writeFailed counts the clients that did not read in time.
func (m *metrics) writeFailed(err error) {
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		m.stuck.Inc()
	}
}

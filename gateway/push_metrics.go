package gateway

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/walgate/walgate/policies"
)

func (m *metrics) registerPushes() {
	vector := func(name, help, label string) *prometheus.CounterVec {
		v := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, []string{label})
		m.registry.MustRegister(v)
		return v
	}
	m.pushed = vector("sync_push_total", "Push requests, by how they ended: ok, or the code of the error.", "status")
	m.pushChanges = vector("sync_push_changes_total", "Pushed changes, by outcome.", "status")
	m.conflicts = vector("sync_conflict_total", "Pushed changes that met a conflict, resolved or refused.", "collection")
	m.pushing = prometheus.NewGauge(prometheus.GaugeOpts{Name: "walgate_pushes_running", Help: "Pushes that are being received, written or waited for."})
	m.pushSeconds = prometheus.NewHistogram(prometheus.HistogramOpts{Name: "sync_push_duration_seconds", Help: "Duration of pushes, with the wait for their echo.",
		Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30}})
	m.echoesMissed = prometheus.NewCounter(prometheus.CounterOpts{Name: "walgate_push_echoes_missed_total", Help: "Pushes answered without versions because the change log was late."})
	m.registry.MustRegister(m.pushing, m.pushSeconds, m.echoesMissed)
}

// pushEnded counts a push.
func (m *metrics) pushEnded(began time.Time, err error) {
	m.pushSeconds.Observe(time.Since(began).Seconds())
	status := "ok"
	if err != nil {
		status = string(asProblem(err).Code)
	}
	m.pushed.WithLabelValues(status).Inc()
}

// pushResults counts what became of the changes.
func (m *metrics) pushResults(p *push) {
	counts := map[string]int{}
	for i := range p.changes {
		c := &p.changes[i]
		r := &c.result
		switch {
		case r.duplicate:
			counts["duplicate"]++
			continue
		case r.status == policies.ConflictResolved, r.code == policies.CodeConflict:
			m.conflicts.WithLabelValues(c.plan.c.Name).Inc()
		}
		counts[string(r.status)]++
	}
	for status, n := range counts {
		m.pushChanges.WithLabelValues(status).Add(float64(n))
	}
}

package gateway

import "github.com/prometheus/client_golang/prometheus"

func (m *metrics) registerManifests() {
	m.manifests = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "walgate_manifest_total",
		Help: "Manifests of attachments answered: read from the log, known without it, or resync_required."}, []string{"answer"})
	m.manifestOperations = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "walgate_manifest_operations_total",
		Help: "Operations in manifests, by kind."}, []string{"operation"})
	m.manifestSeconds = prometheus.NewHistogram(prometheus.HistogramOpts{Name: "walgate_manifest_seconds", Help: "Time to answer a manifest.",
		Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5}})
	m.registry.MustRegister(m.manifests, m.manifestOperations, m.manifestSeconds)
}

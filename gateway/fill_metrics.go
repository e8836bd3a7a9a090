package gateway

import "github.com/prometheus/client_golang/prometheus"

// FillStatus is how far existing rows of a collection were looked through for attachments.
type FillStatus struct {
	Rows, Estimate int64 // looked at, and about how many there are; 0: not known
	Done           bool
}

// fillMetrics tells FillStatus of each collection.
type fillMetrics struct{ g *Gateway }

var (
	fillRowsDesc = prometheus.NewDesc("walgate_attachment_fill_rows", "Existing rows of a collection that were looked through for attachments.", []string{"collection"}, nil)
	fillDoneDesc = prometheus.NewDesc("walgate_attachment_fill_done", "1 once all of them were; the collection's attachments are not complete before.", []string{"collection"}, nil)
)

// Describe implements prometheus.Collector.
func (m fillMetrics) Describe(out chan<- *prometheus.Desc) { out <- fillRowsDesc; out <- fillDoneDesc }

// Collect implements prometheus.Collector.
func (m fillMetrics) Collect(out chan<- prometheus.Metric) {
	for name, f := range m.g.o.SourceStatus().Fills {
		done := 0.0
		if f.Done {
			done = 1
		}
		out <- prometheus.MustNewConstMetric(fillRowsDesc, prometheus.GaugeValue, float64(f.Rows), name)
		out <- prometheus.MustNewConstMetric(fillDoneDesc, prometheus.GaugeValue, done, name)
	}
}

package gateway

import (
	"time"

	"github.com/gofiber/fiber/v2"
	"github.com/prometheus/client_golang/prometheus"
)

func (m *metrics) registerAttachments() {
	m.attachments = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "walgate_attachment_requests_total", Help: "Requests about attachments, by operation and by how they ended: ok, cut, or the code of the error."}, []string{"operation", "outcome"})
	m.attachmentBytes = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "walgate_attachment_bytes_total", Help: "Bytes of attachments received from and sent to clients."}, []string{"direction"})
	m.attachmentSeconds = prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "walgate_attachment_duration_seconds", Help: "Duration of requests about attachments, with the transfer of their bytes.",
		Buckets: []float64{.001, .005, .01, .05, .1, .5, 1, 5, 10, 30, 60, 300, 1800}}, []string{"operation"})
	m.registry.MustRegister(m.attachments, m.attachmentBytes, m.attachmentSeconds)
}

// attachmentEnded counts a request. err may be a client's that went away in the middle.
func (m *metrics) attachmentEnded(operation string, began time.Time, err error) {
	m.attachmentSeconds.WithLabelValues(operation).Observe(time.Since(began).Seconds())
	outcome := "ok"
	if err != nil {
		if outcome = string(asProblem(err).Code); outcome == string(Internal) && operation == "get" {
			outcome = "cut"
		}
	}
	m.attachments.WithLabelValues(operation, outcome).Inc()
}

// counted counts the requests of a handler. Those whose bytes are still to be sent are counted when they are.
func (g *Gateway) counted(operation string, handler fiber.Handler) fiber.Handler {
	return func(c *fiber.Ctx) error {
		began := time.Now()
		err := handler(c)
		if err != nil || !c.Context().Response.IsBodyStream() {
			g.metrics.attachmentEnded(operation, began, err)
		}
		return err
	}
}

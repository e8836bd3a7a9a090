package main

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/walgate/walgate/changelog"
)

var (
	redisUpMetric      = prometheus.NewDesc("walgate_redis_up", "1 while Redis can be used; 0: instances learn of changes from the change log, a moment later.", nil, nil)
	busPublishedMetric = prometheus.NewDesc("walgate_bus_published_total", "Batches of changes that this instance told the others: whole, or by their position only because they are large.", []string{"as"}, nil)
	busDroppedMetric   = prometheus.NewDesc("walgate_bus_dropped_total", "Batches that Redis didn't take in time; the others read them from the change log.", nil, nil)
	busReceivedMetric  = prometheus.NewDesc("walgate_bus_received_total", "Batches that other instances told this one.", nil, nil)
	busUnreadMetric    = prometheus.NewDesc("walgate_bus_unreadable_total", "Messages of Redis that could not be read, such as those of another version of walgate; the change log is read instead.", nil, nil)
	busSubscribeMetric = prometheus.NewDesc("walgate_bus_subscriptions_total", "How often this instance subscribed to Redis: more than once means that the connection was lost.", nil, nil)
)

// redisMetrics are those of the bus over Redis.
type redisMetrics struct {
	redis *changelog.Redis
	stats *changelog.RedisBusStats
}

// Describe implements prometheus.Collector.
func (m redisMetrics) Describe(to chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{redisUpMetric, busPublishedMetric, busDroppedMetric, busReceivedMetric, busUnreadMetric, busSubscribeMetric} {
		to <- d
	}
}

// Collect implements prometheus.Collector.
func (m redisMetrics) Collect(to chan<- prometheus.Metric) {
	count := func(d *prometheus.Desc, n uint64, labels ...string) {
		to <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(n), labels...)
	}
	up := 0.0
	if why, _ := m.redis.Down(); why == "" && m.stats.Subscribed.Load() > 0 {
		up = 1
	}
	to <- prometheus.MustNewConstMetric(redisUpMetric, prometheus.GaugeValue, up)
	positions := m.stats.Positions.Load()
	count(busPublishedMetric, m.stats.Published.Load()-positions, "whole")
	count(busPublishedMetric, positions, "position")
	count(busDroppedMetric, m.stats.Dropped.Load())
	count(busReceivedMetric, m.stats.Received.Load())
	count(busUnreadMetric, m.stats.Unreadable.Load())
	count(busSubscribeMetric, m.stats.Subscribed.Load())
}

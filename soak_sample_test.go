package main

import (
	"bufio"
	"context"
	"fmt"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"
)

const (
	// A quiet gateway may differ from a fresh one by what PostgreSQL's driver and HTTP's keep for a moment.
	soakSlack     = 3
	soakHeapSlack = 8 << 20
	// soakBackends bounds the gateway's connections: both pools at their defaults, replication, appender, and a spare.
	soakBackends = 20 + 16 + 4
)

// soakSample is what a gateway uses at a moment.
type soakSample struct {
	at         time.Time
	when       string
	goroutines float64
	files      int     // open file descriptors
	inUse      float64 // bytes of heap spans in use
	live       float64 // bytes that the last garbage collection found live
	rss        float64 // bytes
	backends   int     // connections to source and log
	sockets    float64 // subscribed WebSockets
	commits    int64   // of the application so far
}

const soakSampleHeader = "goroutines files backends sockets  heap MB  live MB   rss MB  commits  when"

func (m soakSample) String() string {
	return fmt.Sprintf("%10.0f %5d %8d %7.0f %8.1f %8.1f %8.1f %8d  %s",
		m.goroutines, m.files, m.backends, m.sockets, m.inUse/1e6, m.live/1e6, m.rss/1e6, m.commits, m.when)
}

// exceeds says what is more than at first. Connections to the databases stay in their pools, which are bounded.
func (m soakSample) exceeds(first soakSample) error {
	if m.goroutines > first.goroutines+soakSlack {
		return fmt.Errorf("%.0f goroutines, %.0f at first", m.goroutines, first.goroutines)
	}
	if have, had := m.files-m.backends, first.files-first.backends; have > had+soakSlack {
		return fmt.Errorf("%d open files beside %d connections to PostgreSQL, %d at first", have, m.backends, had)
	}
	if m.backends > soakBackends {
		return fmt.Errorf("%d connections to PostgreSQL, and the pools allow %d", m.backends, soakBackends)
	}
	return nil
}

// measure asks process, metrics and databases.
func (s *soak) measure(ctx context.Context, when string) (soakSample, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	m := soakSample{at: time.Now(), when: when, commits: s.v.commits.Load()}
	values, err := s.metrics(ctx)
	if err != nil {
		return m, err
	}
	next, gogc := values["go_memstats_next_gc_bytes"], 2.0 // the collector's target is twice what it found live
	m.goroutines, m.inUse, m.live, m.sockets = values["go_goroutines"], values["go_memstats_heap_inuse_bytes"], next/gogc, values["sync_websocket_connections"]
	m.rss = values["process_resident_memory_bytes"]
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.v.gateway.cmd.Process.Pid))
	if err != nil {
		return m, err
	}
	m.files = len(files) - 1 // the connection that asked for the metrics, closed by now on this side only
	for _, dsn := range []string{s.v.dsn, s.v.storage} {
		n := 0
		if err := s.v.askAt(ctx, dsn, &n, `SELECT count(*) FROM pg_stat_activity WHERE application_name = 'walgate'`); err != nil {
			return m, err
		}
		m.backends += n
	}
	return m, nil
}

// metrics reads the gateway's plain metrics over a connection of its own, which ends with it.
func (s *soak) metrics(ctx context.Context) (map[string]float64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.v.gateway.base+"/metrics", nil)
	if err != nil {
		return nil, err
	}
	res, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	values := map[string]float64{}
	lines := bufio.NewScanner(res.Body)
	for lines.Scan() {
		name, text, ok := strings.Cut(lines.Text(), " ")
		if v, err := strconv.ParseFloat(text, 64); ok && err == nil {
			values[name] = v
		}
	}
	if values["go_goroutines"] == 0 {
		return nil, fmt.Errorf("no metrics: %s", res.Status)
	}
	return values, lines.Err()
}

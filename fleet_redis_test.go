package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/walgate/walgate/internal/pgserver"
	"github.com/walgate/walgate/internal/redisserver"
)

// metric reads one of a gateway's metrics; -1: it isn't there.
func (p *gatewayProcess) metric(t *testing.T, name string) float64 {
	t.Helper()
	res, err := http.Get(p.base + "/metrics")
	must(t, err)
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	must(t, err)
	m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(name) + ` (\S+)$`).FindSubmatch(text)
	if m == nil {
		return -1
	}
	v, err := strconv.ParseFloat(string(m[1]), 64)
	must(t, err)
	return v
}

func (p *gatewayProcess) health(t *testing.T) (h health) {
	t.Helper()
	res, err := http.Get(p.base + "/readyz")
	must(t, err)
	defer res.Body.Close()
	h.code = res.StatusCode
	must(t, json.NewDecoder(res.Body).Decode(&h))
	return h
}

// TestFleetOverRedis: changes reach the clients of every instance through Redis; without it they do so from the log, the instances
// stay ready and say what is wrong, and all is well again once Redis is back, without anybody's doing.
func TestFleetOverRedis(t *testing.T) {
	t.Parallel()
	server := redisserver.StartForTest(t, redisserver.Options{})
	withRedis := func(config string) string {
		return strings.Replace(config, "log: {", fmt.Sprintf("redis: {url: %q}\nlog: {", server.URL()), 1)
	}
	f := newFleet(t, pgserver.StartForTest(t, pgserver.Options{}), "", withRedis)
	f.gateway.rewrite("log: {", fmt.Sprintf("redis: {url: %q}\nlog: {", server.URL()))
	must(t, f.gateway.end(syscall.SIGTERM))
	must(t, f.gateway.start(t.Context()))
	history := historyOf(f.absent)
	leader := f.leader()
	f.settle(f.absent)
	next := 100
	var streams []func(id int)
	for _, p := range f.all {
		stream := f.subscribe(p, f.absent.replica.cursor)
		streams = append(streams, func(id int) {
			t.Helper()
			if got := f.frame(stream, ""); got.DocID != fmt.Sprint(id) {
				t.Fatalf("document %s arrived where %d is due", got.DocID, id)
			}
		})
	}
	arrives := func() {
		t.Helper()
		f.exec(`INSERT INTO docs VALUES ($1, 'u0', 'new')`, next)
		for _, arrived := range streams {
			arrived(next)
		}
		next++
	}
	allAre := func(up float64, status string) {
		t.Helper()
		for _, p := range f.all {
			resyncEventually(t, fmt.Sprintf("Redis is up: %v", up), func() bool { return p.metric(t, "walgate_redis_up") == up })
			if h := p.health(t); h.code != http.StatusOK || up == 0 && !strings.Contains(h.Problems["redis"], status) || up == 1 && h.Problems["redis"] != "" {
				t.Errorf("/readyz: %+v", h)
			}
		}
	}
	allAre(1, "")
	for range 20 {
		arrives()
	}
	for _, p := range f.others(leader) {
		if n := p.metric(t, "walgate_bus_received_total"); n < 20 {
			t.Errorf("an instance received %v batches of 20", n)
		}
	}
	must(t, server.Kill())
	arrives()
	allAre(0, "can't be used since")
	arrives()
	must(t, server.Restart(t.Context()))
	allAre(1, "")
	received := f.others(leader)[0].metric(t, "walgate_bus_received_total")
	arrives()
	resyncEventually(t, "Redis carries changes again", func() bool {
		arrives()
		return f.others(leader)[0].metric(t, "walgate_bus_received_total") > received
	})
	must(t, server.Pause())
	arrives()
	allAre(0, "can't be used since")
	arrives()
	must(t, server.Resume())
	allAre(1, "")
	arrives()
	must(t, leader.end(syscall.SIGKILL))
	f.settle(f.absent)
	f.unbroken(history)
}

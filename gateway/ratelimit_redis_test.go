package gateway

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/internal/redisserver"
)

// openRedis is what instances share in a test.
func openRedis(t testing.TB, url string) *changelog.Redis {
	t.Helper()
	r, err := changelog.OpenRedis(changelog.RedisOptions{URL: url, Namespace: strings.ToLower(t.Name()), Logger: slog.New(slog.DiscardHandler)})
	ok(t, err)
	t.Cleanup(func() { ok(t, r.Close()) })
	return r
}

// patientRate waits for Redis as long as tests do: what is shown of it is not its haste.
func patientRate(r *changelog.Redis, perSecond, burst int) *fleetRate {
	f := newFleetRate(r, perSecond, burst, slog.New(slog.DiscardHandler))
	f.most = patience
	return f
}

// rated is an instance that counts and nothing else.
func rated(t testing.TB, url string, perSecond, burst int) *Gateway {
	t.Helper()
	g := &Gateway{limiter: newRateLimiter(perSecond, burst, maxRateSubjects, time.Now), metrics: &metrics{limited: newLimited()}}
	if url != "" {
		g.fleet = newFleetRate(openRedis(t, url), perSecond, burst, slog.New(slog.DiscardHandler))
	}
	return g
}

// TestFleetRate: however many requests a subject makes at however many instances at once, they let through what one would alone;
// another subject has its own; and who was refused is told when to come again.
func TestFleetRate(t *testing.T) {
	t.Parallel()
	server := redisserver.StartForTest(t, redisserver.Options{})
	const perSecond, burst = 20, 30
	var f []*Gateway
	for range 3 {
		f = append(f, rated(t, server.URL(), perSecond, burst))
	}
	for _, g := range f {
		g.fleet = patientRate(f[0].fleet.redis, perSecond, burst)
	}
	var passed atomic.Int64
	var wg sync.WaitGroup
	ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
	defer cancel()
	began := time.Now()
	for i := range 12 {
		wg.Go(func() {
			for n := i; ctx.Err() == nil; n++ {
				err := f[n%3].admit(t.Context(), "ana")
				if err == nil {
					passed.Add(1)
				} else if p := asProblem(err); p.Code != RateLimited || p.RetryAfter <= 0 || p.RetryAfter > time.Second/perSecond {
					t.Errorf("refused with %v, retry after %v", err, p.RetryAfter)
					return
				}
			}
		})
	}
	wg.Wait()
	took := time.Since(began).Seconds()
	most := burst + int64(math.Ceil(took*perSecond)) + 1
	if n := passed.Load(); n > most || n < burst+int64(took*perSecond)/2 {
		t.Errorf("%d requests of %d + %d a second passed in %.2f s", n, burst, perSecond, took)
	}
	if err := f[1].admit(t.Context(), "ben"); err != nil {
		t.Errorf("another subject: %v", err)
	}
	for i, g := range f {
		if n := g.fleet.alone.Load(); n != 0 {
			t.Errorf("instance %d didn't ask Redis %d times", i, n)
		}
	}
}

// TestFleetRateWaits: who comes when it was told to is let through, at another instance too; a token that Redis refused isn't
// missing in the instance's own bucket.
func TestFleetRateWaits(t *testing.T) {
	t.Parallel()
	server := redisserver.StartForTest(t, redisserver.Options{})
	redis := openRedis(t, server.URL())
	a, b := rated(t, "", 2, 4), rated(t, "", 2, 4)
	for _, g := range []*Gateway{a, b} {
		g.fleet = patientRate(redis, 2, 4)
	}
	for range 4 {
		ok(t, a.admit(t.Context(), "ana"))
	}
	for i := range 3 {
		err := b.admit(t.Context(), "ana")
		if err == nil {
			t.Fatalf("request %d beyond the burst", i)
		}
		p := asProblem(err)
		timer := time.NewTimer(p.RetryAfter)
		for refused := time.Now(); time.Since(refused) < p.RetryAfter/4; { // which costs b nothing
			if b.admit(t.Context(), "ana") == nil {
				t.Fatal("nobody has a token")
			}
		}
		<-timer.C
		if err := b.admit(t.Context(), "ana"); err != nil {
			t.Fatalf("after the %v that it was told: %v", p.RetryAfter, asProblem(err).RetryAfter)
		}
	}
	ttl, err := server.Do(t.Context(), "EVAL", `local n = 0; for _, k in ipairs(redis.call('KEYS', '*')) do n = math.max(n, redis.call('PTTL', k)); if redis.call('PTTL', k) < 0 then return -1 end end return n`, "0")
	ok(t, err)
	if n, err := strconv.Atoi(ttl); err != nil || n < 0 || n > 2000 {
		t.Errorf("a bucket that is full again after 2000 ms is kept for %s ms", ttl)
	}
}

// TestFleetRateWithoutRedis: whatever becomes of Redis, requests go on, none waits for long and soon none waits at all, each
// instance holds its own limit, and what it counted alone is counted. Once Redis is back, it counts again.
func TestFleetRateWithoutRedis(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]struct {
		begin, end func(*redisserver.Server, context.Context) error
	}{
		"killed": {func(s *redisserver.Server, _ context.Context) error { return s.Kill() }, func(s *redisserver.Server, ctx context.Context) error { return s.Restart(ctx) }},
		"silent": {func(s *redisserver.Server, _ context.Context) error { return s.Pause() }, func(s *redisserver.Server, _ context.Context) error { return s.Resume() }},
		"full": {func(s *redisserver.Server, ctx context.Context) error {
			_, err := s.Do(ctx, "CONFIG", "SET", "maxmemory", "1")
			return err
		}, func(s *redisserver.Server, ctx context.Context) error {
			_, err := s.Do(ctx, "CONFIG", "SET", "maxmemory", "0")
			return err
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := redisserver.StartForTest(t, redisserver.Options{Settings: []string{"maxmemory-policy noeviction"}})
			g := rated(t, server.URL(), 1, 50)
			g.fleet.most = patience
			ok(t, g.admit(t.Context(), "ana"))
			g.fleet.most = fleetRateMost
			ok(t, fault.begin(server, t.Context()))
			began := time.Now()
			for i := range 49 {
				if err := g.admit(t.Context(), "ana"); err != nil {
					t.Fatalf("request %d: %v", i, err)
				}
			}
			if took := time.Since(began); took > 10*fleetRateMost { // the first of them waits
				t.Errorf("49 requests took %v", took)
			}
			if err := g.admit(t.Context(), "ana"); err == nil || asProblem(err).Code != RateLimited {
				t.Errorf("beyond its own limit: %v", err)
			}
			if n := g.fleet.alone.Load(); n != 49 {
				t.Errorf("%d requests are said to be counted by it alone, want 49", n)
			}
			ok(t, fault.end(server, t.Context()))
			eventually(t, "Redis counts again", func() bool {
				began, before := time.Now(), g.fleet.alone.Load()
				ok(t, g.admit(t.Context(), fmt.Sprint(before, began.UnixNano())))
				return g.fleet.alone.Load() == before
			})
		})
	}
}

// TestFleetRateClock: a clock of Redis that was set back, or a value that is far ahead, shuts nobody out for longer than a bucket
// takes to fill.
func TestFleetRateClock(t *testing.T) {
	t.Parallel()
	server := redisserver.StartForTest(t, redisserver.Options{})
	f := patientRate(openRedis(t, server.URL()), 2, 3)
	_, allowed := f.allow(t.Context(), "ana")
	if !allowed {
		t.Fatal("the first request is refused")
	}
	_, err := server.Do(t.Context(), "EVAL", `for _, k in ipairs(redis.call('KEYS', '*')) do redis.call('SET', k, string.format('%.0f', redis.call('GET', k) + 3600 * 1000000)) end`, "0")
	ok(t, err)
	if wait, allowed := f.allow(t.Context(), "ana"); allowed || wait > time.Second/2 {
		t.Errorf("with an hour ahead: %v, after %v", allowed, wait)
	}
}

// TestFleetRateOnACluster: a bucket is one key, so that any node's script holds it; scripts that a server forgets are sent anew.
func TestFleetRateOnACluster(t *testing.T) {
	t.Parallel()
	server := redisserver.StartForTest(t, redisserver.Options{Settings: []string{"cluster-enabled yes"}})
	_, err := server.Do(t.Context(), "CLUSTER", "ADDSLOTSRANGE", "0", "16383")
	ok(t, err)
	eventually(t, "the cluster is whole", func() bool {
		info, err := server.Do(t.Context(), "CLUSTER", "INFO")
		ok(t, err)
		return strings.Contains(info, "cluster_state:ok")
	})
	f := patientRate(openRedis(t, server.URL()+"?cluster=true"), 1, 2)
	for i := range 40 { // over many slots
		subject := fmt.Sprint(i)
		for n := range 3 {
			if i == 20 {
				_, err := server.Do(t.Context(), "SCRIPT", "FLUSH")
				ok(t, err)
			}
			if _, allowed := f.allow(t.Context(), subject); allowed != (n < 2) {
				t.Fatalf("request %d of subject %d: %v", n, i, allowed)
			}
		}
	}
	if n := f.alone.Load(); n != 0 {
		t.Errorf("%d weren't counted", n)
	}
}

// TestFleetRateOverHTTP: pulls, manifests and streams of one subject are counted together, at two instances; a user of Redis with
// no more rights than are named does.
func TestFleetRateOverHTTP(t *testing.T) {
	t.Parallel()
	server := redisserver.StartForTest(t, redisserver.Options{})
	_, err := server.Do(t.Context(), "ACL", "SETUSER", "walgate", "on", ">secret", "~walgate:*", "+evalsha", "+eval", "+time", "+get", "+set")
	ok(t, err)
	redis := openRedis(t, strings.Replace(server.URL(), "redis://", "redis://walgate:secret@", 1))
	patient := func(g *Gateway) { g.fleet.most = patience }
	e := newEnv(t, setup{options: func(o *Options) { o.Redis, o.RequestsPerSecond, o.Burst = redis, 1, 10 }, gateway: patient})
	f := fleet{e, e.another(t, setup{gateway: patient})}
	ana := tokenFor(t, "ana", nil)
	for i := range 9 {
		if a := f.at(i).get(t, "/sync/pull?since=0", ana); a.status != http.StatusOK {
			t.Fatalf("request %d: %d %s", i, a.status, a.body)
		}
	}
	f.at(0).subscribe(t, ana, "0", "").want(t, "ready")
	var limited *answer
	for i := 0; limited == nil; i++ {
		if a := f.at(1).get(t, "/sync/pull?since=0", ana); a.status != http.StatusOK {
			limited = a
		} else if i == 5 {
			t.Fatal("16 requests passed at a rate of 1 a second")
		}
	}
	limited.problem(t, RateLimited)
	if after := limited.header.Get("Retry-After"); after != "1" {
		t.Errorf("Retry-After is %s", after)
	}
	if text := string(f.at(1).get(t, "/metrics", "").body); !strings.Contains(text, `walgate_rate_limited_total{by="fleet"} 1`) || !strings.Contains(text, "walgate_rate_alone_total 0") {
		t.Error("the refusal isn't counted")
	}
}

func BenchmarkFleetRate(b *testing.B) {
	server := redisserver.StartForTest(b, redisserver.Options{})
	g := rated(b, server.URL(), 1e6, 1e6)
	b.Run("one", func(b *testing.B) {
		for b.Loop() {
			ok(b, g.admit(b.Context(), "ana"))
		}
	})
	b.Run("many", func(b *testing.B) {
		b.SetParallelism(32)
		b.RunParallel(func(p *testing.PB) {
			for p.Next() {
				ok(b, g.admit(b.Context(), "ana"))
			}
		})
	})
}

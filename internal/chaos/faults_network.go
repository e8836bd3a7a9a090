package chaos

import (
	"context"
	"math/rand/v2"
	"time"

	"github.com/walgate/walgate/internal/badlink"
)

// way is the network between two.
type way struct {
	name  string
	links []*badlink.Link
}

// anyWay chooses two that talk to each other.
func (r *run) anyWay(rng *rand.Rand) way {
	i := r.anyInstance(rng)
	ways := []way{
		{i.name + " and the source", []*badlink.Link{i.source, i.replication}},
		{i.name + "'s replication and the source", []*badlink.Link{i.replication}},
		{i.name + "'s queries and the source", []*badlink.Link{i.source}},
		{i.name + " and the log", []*badlink.Link{i.storage}},
		{"the load balancer and " + i.name, []*badlink.Link{i.front}},
	}
	if i.redis != nil {
		ways = append(ways, way{i.name + " and Redis", []*badlink.Link{i.redis}})
	}
	return ways[rng.IntN(len(ways))]
}

// during lets something be the matter with a way for a while.
func (r *run) during(ctx context.Context, w way, what string, d time.Duration, begin, end func(*badlink.Link)) (string, error) {
	for _, l := range w.links {
		begin(l)
	}
	r.note("%s between %s for %s", what, w.name, d)
	sleep(ctx, d)
	for _, l := range w.links {
		end(l)
	}
	return w.name, nil
}

func (r *run) cut(_ context.Context, rng *rand.Rand) (string, error) {
	w, n := r.anyWay(rng), 0
	for _, l := range w.links {
		n += l.Cut()
	}
	if n == 0 {
		return "", nil
	}
	return w.name, nil
}

func (r *run) down(ctx context.Context, rng *rand.Rand) (string, error) {
	return r.during(ctx, r.anyWay(rng), "network down", between(rng, 100*time.Millisecond, time.Second), (*badlink.Link).Down, (*badlink.Link).Up)
}

func (r *run) stall(ctx context.Context, rng *rand.Rand) (string, error) {
	return r.during(ctx, r.anyWay(rng), "network stalled", between(rng, 200*time.Millisecond, 1700*time.Millisecond), (*badlink.Link).Stall, (*badlink.Link).Resume)
}

func (r *run) stallLong(ctx context.Context, rng *rand.Rand) (string, error) {
	return r.during(context.WithoutCancel(ctx), r.anyWay(rng), "network stalled", silentLong, (*badlink.Link).Stall, (*badlink.Link).Resume)
}

func (r *run) stallOneWay(ctx context.Context, rng *rand.Rand) (string, error) {
	w, begin, what := r.anyWay(rng), (*badlink.Link).StallRequests, "requests stalled"
	if rng.IntN(2) == 0 {
		begin, what = (*badlink.Link).StallAnswers, "answers stalled"
	}
	return r.during(ctx, w, what, between(rng, 200*time.Millisecond, 1700*time.Millisecond), begin, (*badlink.Link).Resume)
}

func (r *run) stallThenCut(ctx context.Context, rng *rand.Rand) (string, error) {
	return r.during(ctx, r.anyWay(rng), "network stalled, to be cut,", between(rng, 200*time.Millisecond, time.Second), (*badlink.Link).Stall, func(l *badlink.Link) {
		l.Cut()
		l.Resume()
	})
}

func (r *run) slow(ctx context.Context, rng *rand.Rand) (string, error) {
	rate := 20_000 + rng.IntN(500_000)
	return r.during(ctx, r.anyWay(rng), "network slow", between(rng, 300*time.Millisecond, 1200*time.Millisecond),
		func(l *badlink.Link) { l.Slow(rate) }, func(l *badlink.Link) { l.Slow(0) })
}

// partition cuts a gateway off from some servers and leaves it the others.
func partition(source, log, redis bool) func(*run, context.Context, *rand.Rand) (string, error) {
	return func(r *run, ctx context.Context, rng *rand.Rand) (string, error) {
		i := r.anyInstance(rng)
		w := way{name: i.name + " and"}
		add := func(cut bool, name string, links ...*badlink.Link) {
			if cut && links[0] != nil {
				w.name += " " + name
				w.links = append(w.links, links...)
			}
		}
		add(source, "source", i.source, i.replication)
		add(log, "log", i.storage)
		add(redis, "Redis", i.redis)
		return r.during(ctx, w, "partition", between(rng, 300*time.Millisecond, 1500*time.Millisecond), (*badlink.Link).Down, (*badlink.Link).Up)
	}
}

func (r *run) allLoseRedis(ctx context.Context, rng *rand.Rand) (string, error) {
	w := way{name: "all gateways and Redis"}
	for _, i := range r.fleet {
		w.links = append(w.links, i.redis)
	}
	return r.during(ctx, w, "partition", between(rng, 300*time.Millisecond, 1500*time.Millisecond), (*badlink.Link).Down, (*badlink.Link).Up)
}

func (r *run) cutClients(context.Context, *rand.Rand) (string, error) {
	if r.clients.Cut() == 0 {
		return "", nil
	}
	return "all clients", nil
}

// strandClients lets the clients' present connections stand still for good; new ones are well. At the end they are cut.
func (r *run) strandClients(ctx context.Context, rng *rand.Rand) (string, error) {
	n := r.clients.Open()
	if n == 0 {
		return "", nil
	}
	return r.during(ctx, way{"the clients of that moment and the load balancer", []*badlink.Link{r.clients}}, "dead connections", between(rng, 500*time.Millisecond, 1800*time.Millisecond),
		(*badlink.Link).Strand, func(l *badlink.Link) { l.Cut() })
}

func (r *run) slowClients(ctx context.Context, rng *rand.Rand) (string, error) {
	rate := 30_000 + rng.IntN(200_000)
	return r.during(ctx, way{"clients and the load balancer", []*badlink.Link{r.clients}}, "network slow", between(rng, 300*time.Millisecond, 1200*time.Millisecond),
		func(l *badlink.Link) { l.Slow(rate) }, func(l *badlink.Link) { l.Slow(0) })
}

func (r *run) cutApplication(context.Context, *rand.Rand) (string, error) {
	if r.app.Cut() == 0 {
		return "", nil
	}
	return "the application's connections", nil
}

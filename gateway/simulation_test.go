package gateway

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"regexp"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/internal/pgserver"
	"github.com/walgate/walgate/internal/redisserver"
	"github.com/walgate/walgate/policies"
)

// simulation is a fleet in one process: the log, its appender, the buses and the hubs are the real ones, Redis is a real server.
// The load and the subscribers, which have no sockets, are synthetic.
type simulation struct {
	redis        bool
	instances    int // with the leader
	subscribers  int // of each instance
	scopes       int // the subscribers go round them
	used         int // scopes that have changes; those above scopes are nobody's
	transactions int
	changes      int // of a transaction, each in the next scope
	document     int // bytes
}

// What the formulas of docs/scaling.md say of a simulation.
func (s simulation) total() int { return s.transactions * s.changes }

// messageBytes is the size of a message on its way: the protocol's part with the channel's name, the head, and for each change its id, its
// document and what the format adds: a scope, two versions and some lengths.
func (s simulation) messageBytes() int {
	const protocol, head, change = 58, 45, 39
	return protocol + head + s.changes*(change+6+s.document)
}

func (s simulation) redisIn() int  { return s.transactions * s.messageBytes() }
func (s simulation) redisOut() int { return s.instances * s.redisIn() }

// deliveries are the frames of changes that all subscribers together get.
func (s simulation) deliveries() int {
	n := 0
	for scope := range min(s.used, s.scopes) {
		n += s.of(s.total(), s.used, scope) * s.of(s.subscribers, s.scopes, scope)
	}
	return s.instances * n
}

// of is how many of total things that go round so many places fall to one of them.
func (s simulation) of(total, places, place int) int {
	n := total / places
	if place < total%places {
		n++
	}
	return n
}

func (s simulation) String() string {
	bus := "one process"
	if s.redis {
		bus = "Redis"
	}
	return fmt.Sprintf("%s, %d instances of %d subscribers in %d scopes, %d transactions of %d changes in %d scopes", bus, s.instances, s.subscribers, s.scopes, s.transactions, s.changes, s.used)
}

// TestSimulation holds the formulas of docs/scaling.md against the real hub and bus: messages, bytes and deliveries, each exactly
// once and in order. WALGATE_TEST_LONG=1 has a hundred instances; -v shows what they cost.
func TestSimulation(t *testing.T) {
	t.Parallel()
	all := []simulation{
		{redis: true, instances: 10, subscribers: 60, scopes: 20, used: 20, transactions: 40, changes: 25, document: 300},
		{redis: true, instances: 10, subscribers: 60, scopes: 20, used: 2000, transactions: 40, changes: 25, document: 300},
		{instances: 10, subscribers: 60, scopes: 20, used: 20, transactions: 40, changes: 25, document: 300},
	}
	if os.Getenv("WALGATE_TEST_LONG") != "" {
		for _, instances := range []int{1, 10, 100} {
			all = append(all,
				simulation{redis: true, instances: instances, subscribers: 1000, scopes: 1000, used: 1000, transactions: 200, changes: 100, document: 300},
				simulation{redis: true, instances: instances, subscribers: 1000, scopes: 1000, used: 1_000_000, transactions: 200, changes: 100, document: 300},
				simulation{redis: true, instances: instances, subscribers: 1000, scopes: 1000, used: 1000, transactions: 2000, changes: 1, document: 300})
		}
	}
	for _, s := range all {
		t.Run(s.String(), func(t *testing.T) {
			if os.Getenv("WALGATE_TEST_LONG") == "" {
				t.Parallel()
			}
			s.run(t)
		})
	}
}

// run lets the appender write all transactions, one after the other, and waits until every hub has handed them out.
func (s simulation) run(t *testing.T) {
	log, err := changelog.Open(t.Context(), pgserver.ForTest(t).Database(t), 8)
	ok(t, err)
	t.Cleanup(log.Close)
	ok(t, log.Migrate(t.Context()))
	var server *redisserver.Server
	if s.redis {
		server = redisserver.StartForTest(t, redisserver.Options{Settings: []string{"client-output-buffer-limit pubsub 0 0 0"}})
	}
	buses := s.buses(t, server)
	appender, claimed, err := log.NewAppender(t.Context(), buses[0], changelog.Claim{Source: changelog.Server{System: "7", Timeline: 1}, SourceTime: time.Now(), SlotLSN: 16, SourceEnd: 1 << 40,
		Collections: []changelog.ClaimedCollection{{Name: "todos", Fingerprint: "f", Shape: "s", Retention: time.Hour, Empty: true, Keep: func(string) bool { return false }}}})
	ok(t, err)
	t.Cleanup(appender.Close)
	hubs, subs := s.hubs(t, log, buses)
	before, cpu := redisBytes(t, server), processorTime()

	appended := make(chan struct{}, 1)
	appender.OnAppended = func(changelog.Appended) { appended <- struct{}{} }
	queue := changelog.NewQueue(64 << 20)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- appender.Run(ctx, queue) }()
	began := time.Now()
	for n := range s.transactions {
		if !queue.TryPut(s.piece(claimed.Version+1, n)) {
			t.Fatal("the queue is full")
		}
		<-appended // each is a batch of its own
	}
	for _, h := range hubs {
		wait, cancel := context.WithTimeout(t.Context(), patience)
		ok(t, h.waitLSN(wait, changelog.LSN(100+s.transactions)))
		cancel()
	}
	took, used := time.Since(began), processorTime()-cpu
	stop()
	ok(t, <-ended)

	if got := s.collect(t, subs); got != s.deliveries() {
		t.Errorf("%d deliveries, the formula says %d", got, s.deliveries())
	}
	t.Logf("%d changes in %s: %.2f µs of CPU for each change and instance (all of it: the appender, the buses and the hubs)", s.total(), took.Round(time.Millisecond),
		float64(used.Nanoseconds())/1000/float64(s.total()*s.instances))
	if s.redis {
		s.checkBus(t, buses, before, redisBytes(t, server))
	}
}

// checkBus holds the counts of messages and bytes against the formulas.
func (s simulation) checkBus(t *testing.T, buses []changelog.Bus, before, after [2]int) {
	for i, b := range buses {
		stats := b.(*changelog.RedisBus).Stats()
		sent, received := uint64(0), uint64(s.transactions)
		if i == 0 {
			sent, received = uint64(s.transactions)+1, 0 // and the taking over of the log
		}
		if got := stats.Published.Load(); got != sent {
			t.Errorf("instance %d published %d messages, the formula says %d", i, got, sent)
		}
		if got := stats.Received.Load(); got != received && got != received+min(received, 1) { // the taking over, if it was there by then
			t.Errorf("instance %d received %d messages, the formula says %d", i, got, received)
		}
		if d := stats.Dropped.Load(); d != 0 {
			t.Errorf("instance %d dropped %d messages", i, d)
		}
	}
	for i, c := range []struct {
		what    string
		formula int
	}{{"Redis received", s.redisIn()}, {"Redis sent", s.redisOut()}} {
		got := after[i] - before[i]
		deviation := float64(got)/float64(c.formula) - 1
		t.Logf("%s %d bytes, the formula says %d: %+.1f %%", c.what, got, c.formula, 100*deviation)
		if deviation < -0.01 || deviation > 0.01 {
			t.Errorf("%s %d bytes, the formula says %d", c.what, got, c.formula)
		}
	}
}

// buses are one for each instance; over Redis, each has its own connections.
func (s simulation) buses(t *testing.T, server *redisserver.Server) (all []changelog.Bus) {
	if !s.redis {
		one := changelog.NewMemoryBus()
		for range s.instances {
			all = append(all, one)
		}
		return all
	}
	for range s.instances {
		r, err := changelog.OpenRedis(changelog.RedisOptions{URL: server.URL(), Namespace: "simulated", Logger: slog.New(slog.DiscardHandler)})
		ok(t, err)
		b := changelog.NewRedisBus(r)
		ctx, stop := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() { ended <- b.Run(ctx) }()
		t.Cleanup(func() { stop(); ok(t, <-ended); ok(t, r.Close()) })
		eventually(t, "the bus subscribes", func() bool { return b.Stats().Subscribed.Load() > 0 })
		all = append(all, b)
	}
	return all
}

// hubs start a hub for each bus, with its subscribers.
func (s simulation) hubs(t *testing.T, log *changelog.Log, buses []changelog.Bus) (hubs []*hub, subs []*subscriber) {
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	t.Cleanup(func() { stop(); running.Wait() })
	for _, b := range buses {
		h := newHub(log, b, slog.New(slog.DiscardHandler), newBudget(1<<40), func(string, error) { t.Error("a policy failed") })
		hubs = append(hubs, h)
		running.Go(func() { _ = h.run(ctx) }) // it returns nil
		ok(t, h.awaitStart(t.Context()))
		for i := range s.subscribers {
			sub := newTestSub(1<<40, i%s.scopes)
			h.join(sub, 0)
			subs = append(subs, sub)
		}
	}
	return hubs, subs
}

// piece is the n-th transaction.
func (s simulation) piece(first changelog.Version, n int) changelog.Piece {
	v := first + changelog.Version(n*s.changes)
	p := changelog.Piece{Tx: v, Xid: uint64(n + 1), LSN: changelog.LSN(101 + n), Final: true, Size: s.changes * s.document}
	for i := range s.changes {
		at := n*s.changes + i
		p.Version = v + changelog.Version(i)
		p.Entries = append(p.Entries, changelog.Entry{Version: p.Version, Tx: v, Scope: scopeKey(at % s.used), Collection: 1, Op: byte(policies.Upsert),
			DocID: fmt.Appendf(nil, "%06d", at), Data: append(append([]byte(`{"x":"`), bytes.Repeat([]byte("x"), s.document-8)...), `"}`...)})
	}
	return p
}

// collect counts what the subscribers got, and fails unless each got the changes of its scope once and in order.
func (s simulation) collect(t *testing.T, subs []*subscriber) (n int) {
	for i, sub := range subs {
		frames, live, _, _ := sub.take(nil)
		next, step := i%s.subscribers%s.scopes, s.used
		for _, f := range frames {
			if f.kind != frameChange {
				continue
			}
			if want := fmt.Appendf(nil, `"doc_id":"%06d"`, next); !bytes.Contains(f.data, want) {
				t.Fatalf("subscriber %d: want %s, got %.200s", i, want, f.data)
			}
			next += step
			n++
		}
		if !live {
			t.Errorf("subscriber %d isn't live", i)
		}
		releaseAll(frames)
	}
	return n
}

var redisByteLines = regexp.MustCompile(`total_net_(?:in|out)put_bytes:(\d+)`)

// redisBytes are what a server has received and sent.
func redisBytes(t *testing.T, server *redisserver.Server) (n [2]int) {
	if server == nil {
		return n
	}
	info, err := server.Do(t.Context(), "INFO", "stats")
	ok(t, err)
	for i, m := range redisByteLines.FindAllStringSubmatch(info, 2) {
		n[i], err = strconv.Atoi(m[1])
		ok(t, err)
	}
	return n
}

func processorTime() time.Duration {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

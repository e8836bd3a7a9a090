package changelog

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
	"golang.org/x/sync/errgroup"
)

const (
	// messageMost is how many bytes one message to Redis may have, about. A larger batch is announced by its position only: Redis
	// would hold it for each instance, and who lags behind reads the log faster than that.
	messageMost = 256 << 10
	// publishDepth bounds what waits for Redis; what doesn't fit is dropped, and found missing by the message after it.
	publishDepth = 64
	// silenceMost is how long the subscription may be silent before Redis is taken for dead; it is asked for life twice as often.
	silenceMost = 4 * time.Second
	// publishProbe is how often Redis is tried after a message could not be published, where none follows.
	publishProbe = 2 * time.Second
	// downPoll is how often the log is looked at while Redis can't be used.
	downPoll = 250 * time.Millisecond
	// longestRetry bounds the pause between two tries to subscribe.
	longestRetry = 2 * time.Second
)

// RedisBus is the bus of an installation of several instances. What this instance appends goes to its own subscribers at once,
// and to the others' through Redis. Run does the work. Safe for concurrent use.
type RedisBus struct {
	redis   *Redis
	local   *MemoryBus
	queue   chan *Batch
	sender  uint64 // of this process
	channel string
	stats   RedisBusStats
}

// RedisBusStats counts messages. All are safe for concurrent use.
type RedisBusStats struct {
	Published  atomic.Uint64 // batches
	Positions  atomic.Uint64 // those of them that were too large, and announced by their position
	Dropped    atomic.Uint64 // batches that Redis didn't take in time
	Received   atomic.Uint64 // from other instances
	Unreadable atomic.Uint64 // of them, such as those of another version of walgate
	Subscribed atomic.Uint64 // how often the subscription began
}

// NewRedisBus returns a bus over r.
func NewRedisBus(r *Redis) *RedisBus {
	return &RedisBus{redis: r, local: NewMemoryBus(), queue: make(chan *Batch, publishDepth), sender: rand.Uint64(), channel: r.Key("changes")}
}

// Stats returns the counters.
func (b *RedisBus) Stats() *RedisBusStats { return &b.stats }

// Subscribe implements Bus.
func (b *RedisBus) Subscribe(ctx context.Context) <-chan *Batch { return b.local.Subscribe(ctx) }

// Publish implements Bus.
func (b *RedisBus) Publish(batch *Batch) {
	b.local.Publish(batch)
	select {
	case b.queue <- announced(batch):
	default:
		b.stats.Dropped.Add(1)
	}
}

// announced is the batch as it goes to Redis.
func announced(b *Batch) *Batch {
	if b.size() <= messageMost {
		return b
	}
	return &Batch{Claim: b.Claim, History: b.History, Prev: b.Prev, Last: b.Last, LSN: b.LSN, Omitted: true}
}

// size is about what the message takes, or any number above messageMost.
func (b *Batch) size() int {
	n := 100
	for i := 0; i < len(b.Entries) && n <= messageMost; i++ {
		e := &b.Entries[i]
		n += 50 + len(e.DocID) + len(e.Data) + len(e.Guard) + len(e.Changed)
	}
	for i := 0; i < len(b.Operations) && n <= messageMost; i++ {
		n += 120 + len(b.Operations[i].ID) + len(b.Operations[i].ContentType)
	}
	for i := range b.Pushes {
		n += b.Pushes[i].Size()
	}
	for i := range b.Raises {
		n += 50 + len(b.Raises[i].Reason) + len(b.Raises[i].Shape) + len(b.Raises[i].Stopped)
	}
	return n
}

// Run publishes and receives until ctx ends. Whatever fails is tried again: serving goes on from the log meanwhile.
func (b *RedisBus) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { b.publish(ctx); return nil })
	g.Go(func() error { b.receive(ctx); return nil })
	return g.Wait()
}

// publish sends what is queued, all that there is in one round trip.
func (b *RedisBus) publish(ctx context.Context) {
	var messages [][]byte
	var probe <-chan time.Time // nil while all is well
	for {
		select {
		case <-ctx.Done():
			return
		case batch := <-b.queue:
			messages = append(messages[:0], appendBatch(make([]byte, 0, batch.size()), b.sender, batch))
			b.count(batch)
		case <-probe: // another instance may lead by now, and nothing follow
			messages = append(messages[:0], appendBatch(nil, b.sender, &Batch{Omitted: true}))
		}
		for size := len(messages[0]); len(b.queue) > 0 && size < messageMost; size += len(messages[len(messages)-1]) {
			batch := <-b.queue // nobody else takes from it
			messages = append(messages, appendBatch(make([]byte, 0, batch.size()), b.sender, batch))
			b.count(batch)
		}
		err := b.send(ctx, messages)
		if probe = nil; err != nil {
			b.stats.Dropped.Add(uint64(len(messages)))
			probe = time.After(publishProbe)
		}
		if ctx.Err() == nil {
			b.redis.judge("publish", err)
		}
	}
}

func (b *RedisBus) count(batch *Batch) {
	b.stats.Published.Add(1)
	if batch.Omitted {
		b.stats.Positions.Add(1)
	}
}

func (b *RedisBus) send(ctx context.Context, messages [][]byte) error {
	ctx, cancel := context.WithTimeout(ctx, redisPatience)
	defer cancel()
	p := b.redis.client.Pipeline()
	for _, m := range messages {
		if b.redis.sharded {
			p.SPublish(ctx, b.channel, m)
		} else {
			p.Publish(ctx, b.channel, m)
		}
	}
	_, err := p.Exec(ctx)
	return err
}

// receive keeps the subscription alive; while there is none it has the subscribers look at the log.
func (b *RedisBus) receive(ctx context.Context) {
	pause := firstRetry
	for ctx.Err() == nil {
		began := time.Now()
		err := b.subscription(ctx)
		if ctx.Err() != nil {
			return
		}
		b.redis.judge("subscribe", err)
		if time.Since(began) > 10*longestRetry {
			pause = firstRetry
		}
		b.pollFor(ctx, pause/2+rand.N(pause))
		pause = min(2*pause, longestRetry)
	}
}

const firstRetry = 50 * time.Millisecond

// pollFor has the subscribers look at the log every downPoll.
func (b *RedisBus) pollFor(ctx context.Context, d time.Duration) {
	end := time.NewTimer(d)
	defer end.Stop()
	look := time.NewTicker(downPoll)
	defer look.Stop()
	b.hint()
	for {
		select {
		case <-ctx.Done():
			return
		case <-end.C:
			return
		case <-look.C:
			b.hint()
		}
	}
}

// hint has the subscribers look at the log: there may be more than they know of.
func (b *RedisBus) hint() { b.local.Publish(&Batch{Omitted: true}) }

var (
	errSilent = errors.New("it answers no more")
	errEnded  = errors.New("it ended the subscription")
)

// subscription subscribes and hands on what comes until something fails. A read that timed out may have ended within a message:
// what follows on that connection is no protocol any more.
func (b *RedisBus) subscription(ctx context.Context) (err error) {
	defer func() {
		if p := recover(); p != nil { // the library takes answers of a kind that no Redis gives for impossible
			err = fmt.Errorf("it doesn't speak as Redis does: %v", p)
		}
	}()
	var poll sync.WaitGroup
	defer poll.Wait()
	polling, stopPolling := context.WithCancel(ctx) // until the first answer
	defer stopPolling()
	asking, stopAsking := context.WithCancel(ctx)
	defer stopAsking()
	poll.Go(func() { b.pollFor(polling, time.Hour) }) // however long the library tries
	subscribe := b.redis.client.Subscribe
	if b.redis.sharded {
		subscribe = b.redis.client.SSubscribe
	}
	s := subscribe(ctx, b.channel)
	defer s.Close()
	defer context.AfterFunc(ctx, func() { _ = s.Close() })() // a read doesn't end with its context
	for {
		m, err := s.ReceiveTimeout(ctx, silenceMost)
		var network net.Error
		if errors.As(err, &network) && network.Timeout() {
			return errSilent
		} else if err != nil {
			return err
		}
		switch m := m.(type) {
		case *redis.Subscription:
			if m.Kind != "subscribe" && m.Kind != "ssubscribe" { // the channel has moved to another node of the cluster
				return errEnded
			}
			if polling.Err() == nil {
				stopPolling()
				poll.Go(func() { askForLife(asking, s) })
			}
			b.stats.Subscribed.Add(1)
			b.redis.judge("subscribe", nil)
			b.hint() // what was announced meanwhile is missed
		case *redis.Message:
			b.deliver([]byte(m.Payload))
		}
	}
}

// askForLife has the server say something now and then, so that silence means that it is gone.
func askForLife(ctx context.Context, s *redis.PubSub) {
	tick := time.NewTicker(silenceMost / 2)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			_ = s.Ping(ctx) // the read tells
		}
	}
}

// deliver hands a message on to the subscribers, unless it is our own.
func (b *RedisBus) deliver(message []byte) {
	batch, sender, err := parseBatch(message)
	if sender == b.sender {
		return
	}
	b.stats.Received.Add(1)
	if err != nil {
		b.stats.Unreadable.Add(1)
		b.hint()
		return
	}
	b.local.Publish(batch)
}

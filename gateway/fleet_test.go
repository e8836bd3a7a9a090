package gateway

import (
	"context"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/walgate/walgate/blobstore"
	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/replication"
	"github.com/walgate/walgate/schema"
)

// another is a further instance over the same source and log, which gets no messages of the bus unless s says so: it reads the log.
func (e *env) another(t testing.TB, s setup) *env {
	t.Helper()
	o := e.g.o
	dsn := e.db.Config().ConnString()
	source, err := schema.OpenPool(t.Context(), dsn, 12)
	ok(t, err)
	log, err := changelog.Open(t.Context(), dsn, 8)
	ok(t, err)
	t.Cleanup(func() { source.Close(); log.Close() })
	o.Source, o.Log, o.Bus = source, log, changelog.NewMemoryBus()
	o.Fence = func(ctx context.Context) (changelog.LSN, error) { return replication.Fence(ctx, source) }
	if o.Files != nil {
		o.Files = blobstore.NewRecords(source, blobstore.RecordsOptions{Quota: o.Quota, UploadTTL: o.UploadTTL})
	}
	if s.bus != nil {
		o.Bus = s.bus(e.g.o.Bus)
	}
	if s.options != nil {
		s.options(&o)
	}
	other := *e
	other.g = New(o)
	if s.gateway != nil {
		s.gateway(other.g)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ok(t, err)
	other.base = "http://" + l.Addr().String()
	serving, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- other.g.Run(serving, l) }()
	t.Cleanup(func() {
		e.client.CloseIdleConnections()
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	ok(t, other.g.hub.awaitStart(t.Context()))
	return &other
}

// fleet is several instances over one source and one log, of which the first leads. at is the one that a load balancer picks for
// the i-th request.
type fleet []*env

func (f fleet) at(i int) *env { return f[i%len(f)] }

// deaf is an instance that hears nothing, neither by a bus nor by looking at the log now and then.
var deaf = setup{gateway: func(g *Gateway) { g.hub.every = time.Hour }}

// alone is an instance that hears by this bus alone.
func (f *farBus) alone() setup { return f.with(time.Hour) }

// with is an instance that hears by this bus, and looks at the log so often.
func (f *farBus) with(every time.Duration) setup {
	return setup{bus: func(leader changelog.Bus) changelog.Bus { f.Bus = leader; return f }, gateway: func(g *Gateway) { g.hub.every = every }}
}

// farBus brings what another bus publishes late, or not at all. Safe for concurrent use.
type farBus struct {
	changelog.Bus
	delay time.Duration

	mu   sync.Mutex
	lost bool // nothing comes
	held bool // nothing comes until release
	late []*changelog.Batch
	out  chan *changelog.Batch
	gone int // messages
}

// losses are the messages that didn't come.
func (f *farBus) losses() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.gone
}

func (f *farBus) Subscribe(ctx context.Context) <-chan *changelog.Batch {
	in := f.Bus.Subscribe(ctx)
	f.out = make(chan *changelog.Batch, 1024)
	go func() {
		defer close(f.out)
		for b := range in {
			if f.delay == 0 || !within(f.delay, ctx.Done()) {
				f.pass(b)
			}
		}
	}()
	return f.out
}

func (f *farBus) pass(b *changelog.Batch) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.lost:
		f.gone++
	case f.held:
		f.late = append(f.late, b)
	default:
		f.out <- b
	}
}

// set says what becomes of messages from now on; those held back are delivered where held ends.
func (f *farBus) set(lost, held bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.lost, f.held = lost, held; !held {
		for _, b := range f.late {
			f.out <- b
		}
		f.late = nil
	}
}

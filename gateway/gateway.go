package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gofiber/fiber/v2"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/semaphore"

	"github.com/walgate/walgate/blobstore"
	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/schema"
)

// Options is what a gateway needs.
type Options struct {
	Log          *changelog.Log
	Bus          changelog.Bus
	Redis        *changelog.Redis // what instances share; nil: none
	Source       *pgxpool.Pool    // reads of the source's tables; see OpenSource
	Types        *schema.Types
	Policies     func() *policies.Set // the newest; never nil
	SourceStatus func() SourceStatus  // of this instance's replication
	Fence        func(context.Context) (changelog.LSN, error)
	Auth         *Authenticator
	Logger       *slog.Logger

	PublicURL          string
	AllowedOrigins     []string
	TrustedProxies     []string
	FrameLimit         int // bytes of one client frame
	RequestsPerSecond  int // of one subject
	Burst              int
	StreamConnections  int           // open WebSockets of this instance
	StreamsPerSubject  int           // open WebSockets of one subject
	FullConcurrency    int           // full resyncs at a time
	Drain              time.Duration // how long shutdown waits for clients
	ReadersConcurrency int           // reads of the log at a time
	SendMemory         int64         // bytes of documents that may wait to be sent to clients
	PushBody           int           // bytes of one push
	PushRole           string        // writes as this role of the source; empty: as Source's own
	PushConcurrency    int           // pushes that use the source at a time
	EchoTimeout        time.Duration // how long a push's answer waits for its versions

	Blobs                 *blobstore.Store   // the bytes of attachments; nil: no collection has any
	Files                 *blobstore.Records // which there are; nil with Blobs
	ClientsKept           time.Duration      // how long the source keeps what is known of clients that don't come; 0: for ever
	AttachmentLimit       int64              // bytes of one attachment
	Quota                 int64              // bytes of all that a subject uploaded
	AttachmentTypes       []string           // media types, or image/* for all of a kind; none: any
	AttachmentReplace     bool               // PUT with If-Match replaces bytes
	AttachmentDeleteRoles []string           // delete whatever they see
	AttachmentURLTTL      time.Duration      // how long a download URL holds
	AttachmentSigningKey  []byte             // of download URLs
	AttachmentDirect      bool               // clients may be sent to the bucket
	UploadTTL             time.Duration      // how long an unfinished upload is kept

	Collectors []prometheus.Collector // whose metrics are served with the gateway's own
}

// SourceStatus is what an operator wants to know of replication.
type SourceStatus struct {
	Leading      bool
	Err          string
	Standby      string // which instance leads in place of this one; empty: Err says why nobody is known to, or this one does
	Waiting      string // why the change log holds replication up
	Received     changelog.LSN
	Logged       changelog.LSN
	Acknowledged changelog.LSN
	Transactions uint64
	Rows         uint64
	Reconnects   uint64
	Histories    uint64 // new ones that this instance began
	PolicyErrors uint64
	LastCommit   time.Time
	LastHeard    time.Time
	QueueBytes   int64
	SlotLag      int64
	SlotSafe     int64 // until the source gives the slot up; 0: no bound is set
	LogRows      int64 // about
	SlotStatus   string
	Stopped      map[string]string     // collections, and why
	Impaired     map[string]string     // collections that go on but not in all ways, and why
	Fills        map[string]FillStatus // by collection, while this instance leads; "files" is that of the bytes
}

// Gateway serves clients. Make it with New; Run does everything else.
type Gateway struct {
	o        Options
	auth     *Authenticator
	hub      *hub
	memory   *budget
	limiter  *rateLimiter
	fleet    *fleetRate // nil: there is no Redis
	metrics  *metrics
	app      *fiber.App
	fulls    *semaphore.Weighted
	readers  *semaphore.Weighted
	pushes   *semaphore.Weighted
	bodies   *budget // of pushes that are being received
	queued   atomic.Int64
	plans    atomic.Pointer[pushPlans]
	pages    manifestPages
	looked   looked
	streams  underway
	open     atomic.Int64
	subjects subjectCounts
	uploads  subjectCounts // under way
	turns    uploadTurns   // of resumable uploads
	draining atomic.Bool
	policyN  atomic.Uint64
	serving  context.Context // ends when draining begins: nobody waits for changes any more
	stop     context.CancelFunc
	working  context.Context // ends when draining is over; the framework's own contexts end later still
	cut      context.CancelFunc

	limits limits
}

// limits are times and sizes that no operator needs to choose. They are fields for tests, which can't wait that long.
type limits struct {
	subscribe time.Duration // from the handshake to the subscribe frame
	heartbeat time.Duration
	ping      time.Duration
	write     time.Duration // one write to a stream
	fullWrite time.Duration // one write of limit=all
	fence     time.Duration
	idle      time.Duration // how long the body of an upload may stand still
	chunk     time.Duration // the reading of one chunk of a full resync
	queue     int           // bytes of frames that wait for one session
	page      int           // bytes of documents in one page
}

func defaultLimits() limits {
	return limits{subscribe: subscribeTimeout, heartbeat: heartbeatInterval, ping: pingInterval, write: writeTimeout,
		fullWrite: streamWrite, fence: fenceTimeout, idle: uploadIdle, chunk: chunkTimeMost, queue: queueLimit, page: pageBytes}
}

// New checks nothing over the network; it makes the routes.
func New(o Options) *Gateway {
	g := &Gateway{o: o, auth: o.Auth, limits: defaultLimits(),
		fulls: semaphore.NewWeighted(int64(max(1, o.FullConcurrency))), readers: semaphore.NewWeighted(int64(max(1, o.ReadersConcurrency))),
		pushes: semaphore.NewWeighted(int64(max(1, o.PushConcurrency))), bodies: newBudget(2 * bodiesMemory * int64(o.PushBody)),
		limiter: newRateLimiter(o.RequestsPerSecond, o.Burst, maxRateSubjects, time.Now)}
	g.serving, g.stop = context.WithCancel(context.Background())
	g.working, g.cut = context.WithCancel(context.Background())
	if o.Redis != nil {
		g.fleet = newFleetRate(o.Redis, o.RequestsPerSecond, o.Burst, o.Logger)
	}
	g.memory = newBudget(o.SendMemory)
	g.hub = newHub(o.Log, o.Bus, o.Logger, g.memory, g.policyFailed)
	g.hub.url = func(o *changelog.Operation) []byte {
		return g.newURLSigner(g.urlExpiry(time.Now()).Unix()).appendURL(nil, o.ID, o.SHA256)
	}
	g.metrics = newMetrics(g)
	g.app = g.routes()
	return g
}

// Run serves on the listener until ctx ends; then it says goodbye to the clients, waits for them up to Drain, and returns
// nil. Nothing of it runs afterwards.
func (g *Gateway) Run(ctx context.Context, l net.Listener) error {
	hubCtx, stopHub := context.WithCancel(context.WithoutCancel(ctx))
	defer stopHub()
	hubDone := make(chan error, 1)
	go func() { hubDone <- g.hub.run(hubCtx) }()
	served := make(chan error, 1)
	go func() {
		served <- g.app.Listener(heardListener{l})
		close(served)
	}()
	var err error
	select {
	case err = <-served:
	case <-ctx.Done():
	}
	g.drain()
	_ = l.Close() // a server that had not begun to accept when it was shut down would begin now
	<-served
	stopHub()
	<-hubDone
	if err != nil {
		return fmt.Errorf("serve HTTP: %w", err)
	}
	return nil
}

// drain ends the streams first, for the HTTP server doesn't know of them, then the requests.
func (g *Gateway) drain() {
	g.draining.Store(true)
	g.stop()
	over := time.Now().Add(g.o.Drain)
	if !within(g.o.Drain, g.streams.ended()) {
		g.o.Logger.Warn("clients were still connected when the drain time was over", "streams", g.open.Load())
	}
	if err := g.app.ShutdownWithTimeout(max(time.Until(over), drainLeast)); err != nil && !errors.Is(err, net.ErrClosed) {
		g.o.Logger.Warn("requests were cut off when the drain time was over", "error", err)
	}
	g.cut()
	within(afterCut, g.streams.ended())
}

// drainLeast is what requests have after streams and transfers took all of the drain time.
const drainLeast = 100 * time.Millisecond

// afterCut is how long what was cut off may take to notice.
const afterCut = 2 * time.Second

// within says whether done was closed within d.
func within(d time.Duration, done <-chan struct{}) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-done:
		return true
	case <-timer.C:
		return false
	}
}

// reconnectAfter spreads the clients of a stopping instance over a few seconds.
func (g *Gateway) reconnectAfter() time.Duration {
	return 500*time.Millisecond + rand.N(3*time.Second)
}

// feedFor makes the caller's view of the collections that it names.
func (g *Gateway) feedFor(id *Identity, names []string) (*feed, error) {
	set := g.o.Policies()
	for name := range g.o.SourceStatus().Stopped { // its policy doesn't compile, so the set doesn't have it
		if slices.Contains(names, name) {
			return nil, NewProblem(CollectionUnavailable, "collection %s is stopped", name)
		}
	}
	caller, err := set.NewCaller(id.Subject, id.Roles, id.Claims)
	if errors.Is(err, policies.ErrTooManyScopes) {
		return nil, NewProblem(TooManyScopes, "the token's claims select more than %d scopes", changelog.MaxScopes)
	}
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		if set.ByName(name) == nil && g.o.SourceStatus().Stopped[name] != "" { // configured, and left out of the set meanwhile
			return nil, NewProblem(CollectionUnavailable, "collection %s is stopped", name)
		}
	}
	return newFeed(set, caller, names)
}

// policyFailed counts a row that a caller doesn't see because a filter failed on it.
func (g *Gateway) policyFailed(collection string, err error) {
	if n := g.policyN.Add(1); n == 1 || n%1000 == 0 {
		g.o.Logger.Warn("a row is visible to nobody because its policy failed; mend the policy's where", "collection", collection, "count", n, "error", err)
	}
}

// read reads the log and makes problems of failures.
func (g *Gateway) read(ctx context.Context, r changelog.Request) (*changelog.Page, error) {
	ctx, cancel := context.WithTimeout(ctx, readMost)
	defer cancel()
	p, err := g.o.Log.Read(ctx, r)
	return p, g.logProblem(err)
}

func (g *Gateway) logProblem(err error) error {
	switch {
	case err == nil:
		return nil
	case g.draining.Load():
		return (&Problem{Code: ShuttingDown}).Because(err)
	case errors.Is(err, changelog.ErrNotInitialised):
		return (&Problem{Code: NotReady}).Because(err)
	}
	return (&Problem{Code: LogUnavailable}).Because(err)
}

// readPage reads the log once there is memory for a page and its encoding, and a reader's place.
func (g *Gateway) readPage(ctx context.Context, r changelog.Request) (*changelog.Page, *lease, error) {
	r.Largest = max(r.MaxBytes, leastPage)
	for {
		room, err := g.memory.acquire(ctx, 2*r.Largest)
		if err != nil {
			if g.draining.Load() {
				err = (&Problem{Code: ShuttingDown}).Because(err)
			}
			return nil, nil, err
		}
		p, err := g.readAdmitted(ctx, r)
		if err != nil {
			room.release()
			return nil, nil, err
		}
		if p.Withheld == 0 {
			size := 0
			for i := range p.Entries {
				size += 2*len(p.Entries[i].Data) + 512
			}
			room.shrink(size)
			return p, room, nil
		}
		room.release() // giant documents wait for their turn before they are read
		r.Largest = p.Withheld
	}
}

// readAdmitted reads the log once a reader's place is free.
func (g *Gateway) readAdmitted(ctx context.Context, r changelog.Request) (*changelog.Page, error) {
	release, err := g.admitReader(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	return g.read(ctx, r)
}

// admitReader bounds how many read the log at a time, so that a storm of clients after a restart queues here instead of in
// the database.
func (g *Gateway) admitReader(ctx context.Context) (release func(), err error) {
	if err := g.readers.Acquire(ctx, 1); err != nil {
		return nil, g.logProblem(err)
	}
	return func() { g.readers.Release(1) }, nil
}

// subjectCounts counts the open streams of each subject. Safe for concurrent use.
type subjectCounts struct {
	mu sync.Mutex
	n  map[string]int
}

// add counts one more stream unless the subject has most of them.
func (c *subjectCounts) add(subject string, most int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n == nil {
		c.n = map[string]int{}
	}
	if most > 0 && c.n[subject] >= most {
		return false
	}
	c.n[subject]++
	return true
}

func (c *subjectCounts) remove(subject string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n[subject]--; c.n[subject] <= 0 {
		delete(c.n, subject)
	}
}

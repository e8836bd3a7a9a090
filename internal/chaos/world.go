package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/policies"
)

// WorldOptions say what application the world is, and where it finds its parts.
type WorldOptions struct {
	// Seed decides what writers and clients do; how they interleave it doesn't.
	Seed uint64
	// App is the connection string of the application's writers. The way may break at any time, and lead elsewhere later.
	App string
	// Oracle returns a connection string of a superuser, straight to the present source. Only NewWorld and Settle use it.
	Oracle func() string
	// Gateway is the load balancer's base URL; clients know nothing else.
	Gateway string
	// Token signs a token for a subject with roles and further claims.
	Token func(subject string, roles []string, claims map[string]any) string
	// Config is the path of the gateway's configuration, for messages.
	Config string
	// Collections are the policies of that configuration.
	Collections map[string]policies.Spec
	// Clients and Writers are how many there are.
	Clients, Writers int
	// Logf takes what is worth knowing and is no violation.
	Logf func(string, ...any)
}

// World is an application's writers and its clients, with what each of them was told, and with what must hold of it.
type World struct {
	o        WorldOptions
	set      *policies.Set
	tables   []*table
	pools    map[string]*pool
	scalar   map[string]bool // claims that conditions and write.set use, which take no lists
	roles    []string
	subjects []string
	uploads  []string // ids of attachments
	clients  []*client
	ledger   *ledger
	rounds   uint64

	mu         sync.Mutex
	counts     map[string]int
	violations []string
	losses     int
}

const (
	worldLimit      = 60 * time.Second // where Settle's context has no deadline
	shownViolations = 10
)

// NewWorld reads the catalog of the collections' tables, and decides who the clients are.
func NewWorld(ctx context.Context, o WorldOptions) (*World, error) {
	if o.Logf == nil {
		o.Logf = func(string, ...any) {}
	}
	w := &World{o: o, counts: map[string]int{}, scalar: map[string]bool{}}
	conn, err := pgx.Connect(ctx, o.Oracle())
	if err != nil {
		return nil, fmt.Errorf("the world can't read the application's tables: %w", err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if w.set, w.tables, err = readTables(ctx, conn, o.Collections); err != nil {
		return nil, fmt.Errorf("the world of %s: %w", o.Config, err)
	}
	if len(w.tables) == 0 {
		return nil, fmt.Errorf("%s has no collections: there is nothing to run", o.Config)
	}
	w.pools, w.roles, w.uploads, w.ledger = claimPools(w.tables), roles(w.tables), uploads(w.tables), newLedger()
	w.subjects = w.pools["sub"].values
	for _, t := range w.tables {
		text := t.spec.Where
		if t.spec.Write != nil {
			text += " " + t.spec.Write.Check
			for _, claim := range t.spec.Write.Set {
				w.scalar[strings.TrimPrefix(claim, "claims.")] = true
			}
		}
		for _, m := range claimInExpression.FindAllStringSubmatch(text, -1) {
			w.scalar[m[1][1:]] = true
		}
	}
	for n := range o.Clients {
		c, err := newClient(w, n, w.rng(1000+uint64(n)))
		if err != nil {
			return nil, err
		}
		w.clients = append(w.clients, c)
	}
	return w, nil
}

func (w *World) rng(stream uint64) *rand.Rand { return rand.New(rand.NewPCG(w.o.Seed, stream)) }

func (w *World) table(collection string) *table {
	if i := slices.IndexFunc(w.tables, func(t *table) bool { return t.name == collection }); i >= 0 {
		return w.tables[i]
	}
	return nil
}

// counted says whether the application notes the pushes that it applied.
func (w *World) counted() bool {
	return slices.ContainsFunc(w.tables, func(t *table) bool { return t.counted != "" })
}

// Run lets writers and clients loose until ctx ends, and returns when all have stopped. What breaks on their way is no
// error; what no client should be told is kept for Settle.
func (w *World) Run(ctx context.Context) {
	var all sync.WaitGroup
	w.rounds++
	for n := range uint64(w.o.Writers) {
		a := &writer{w: w, rng: w.rng(w.rounds<<16 + n)}
		all.Go(func() { a.run(ctx) })
	}
	for _, c := range w.clients {
		c.calm = false
		all.Go(func() { c.run(ctx) })
	}
	all.Wait()
	for _, c := range w.clients {
		c.http.CloseIdleConnections()
	}
}

// renew gives a client a token with other claims, as after a change of its rights. What it holds stays with it until the
// gateway tells it to resynchronise.
func (c *client) renew() {
	before := c.names
	if err := c.claim(); err != nil {
		c.w.o.Logf("new claims of client %d: %v", c.n, err)
		return
	}
	c.turn("new claims")
	c.w.count("clients: new claims")
	c.promises = nil
	c.w.ledger.mu.Lock()
	for _, d := range c.edits.own { // a row that it may not see any more is deleted without effect, as one that isn't there
		d.vague = true
	}
	c.w.ledger.mu.Unlock()
	for name := range c.documents {
		if !slices.Contains(c.names, name) {
			delete(c.documents, name)
		}
	}
	for _, name := range c.names {
		if !slices.Contains(before, name) && c.cursor != "" && !slices.Contains(c.lost, name) {
			c.lost = append(c.lost, name)
		}
	}
}

// Lost says that commits which were acknowledged until now may be gone: a standby took over that lacked them, or a server
// without fsync crashed. Pushes acknowledged before are judged leniently from now on; clients must converge all the same.
func (w *World) Lost(what string) {
	w.mu.Lock()
	w.losses++
	w.mu.Unlock()
	w.count("lost: " + what)
}

func (w *World) lossCount() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.losses
}

// Settle is called when faults are over and Run has returned. Every client continues until it holds what SELECT under its
// policy returns; then each push is looked for in the tables. The error lists what was violated since the last Settle, each
// with the story of its client.
func (w *World) Settle(ctx context.Context) error {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, worldLimit)
		defer cancel()
	}
	began := time.Now()
	for _, c := range w.clients {
		c.calm = true
	}
	w.each(func(c *client) { c.settlePushes(ctx) })
	w.each(func(c *client) { w.settle(ctx, c, began) })
	if err := w.audit(ctx); err != nil {
		w.violation("the ledger can be read", err.Error())
	}
	for _, c := range w.clients {
		c.http.CloseIdleConnections()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	found := w.violations
	w.violations = nil
	if len(found) == 0 {
		return nil
	}
	more := ""
	if len(found) > shownViolations {
		more = fmt.Sprintf("\n\n… and %d more", len(found)-shownViolations)
	}
	return fmt.Errorf("%d violations:\n\n%s%s", len(found), strings.Join(found[:min(len(found), shownViolations)], "\n\n"), more)
}

func (w *World) each(do func(*client)) {
	var all sync.WaitGroup
	for _, c := range w.clients {
		all.Go(func() { do(c) })
	}
	all.Wait()
}

// settle lets one client go on, by pull or by stream, until it holds what it must.
func (w *World) settle(ctx context.Context, c *client, began time.Time) {
	var o *oracle
	defer func() {
		if o != nil {
			o.close()
		}
	}()
	last := errors.New("it was never up to date")
	for wait := 20 * time.Millisecond; ; wait = min(2*wait, 250*time.Millisecond) {
		err := func() (err error) {
			switch {
			case c.keepless:
				err = c.session(ctx)
			case c.cursor != "" && len(c.lost) == 0 && len(c.names) > 0 && c.rng.IntN(2) == 0:
				err = c.follow(ctx, true)
			default:
				err = c.catchUp(ctx)
			}
			if err == nil && len(w.uploads) > 0 {
				err = c.syncFiles(ctx)
			}
			if err != nil {
				return err
			}
			if o == nil || o.conn.IsClosed() {
				if o, err = w.openOracle(ctx); err != nil {
					o = nil
					return err
				}
			}
			if err = o.compare(ctx, c); err == nil && len(w.uploads) > 0 {
				err = o.compareFiles(ctx, c)
			}
			return err
		}()
		if err == nil {
			break
		}
		if ctx.Err() == nil || errors.Is(err, errDiffers) {
			last = err // of the last attempt that had its time
		}
		if ctx.Err() != nil {
			c.violation("clients converge", "no convergence within %s; the last attempt: %v", time.Since(began).Round(time.Millisecond), last)
			return
		}
		pause(ctx, wait)
	}
	if left := len(c.promises); left > 0 {
		c.w.add("pushes: promises beyond the end", left)
	}
	c.note("settled at %s", c.cursor)
}

// Counts returns what happened so far, by name.
func (w *World) Counts() map[string]int {
	w.mu.Lock()
	defer w.mu.Unlock()
	out := map[string]int{}
	for name, n := range w.counts {
		out[name] = n
	}
	return out
}

func (w *World) count(what string) { w.add(what, 1) }

func (w *World) add(what string, n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.counts[what] += n
}

func (w *World) violation(rule, text string) {
	w.count("violations: " + rule)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.violations = append(w.violations, "VIOLATION of “"+rule+"”: "+text)
}

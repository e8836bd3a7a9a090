package chaos

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/walgate/walgate/internal/badlink"
	"github.com/walgate/walgate/internal/pgserver"
	"github.com/walgate/walgate/internal/ports"
)

const (
	instances   = 3
	settleSlow  = 20 * time.Second // after which it is noted who waits for whom
	settleLimit = 60 * time.Second // for clients to hold what SELECT returns, once all is well
)

// run is one seed's: the fleet, its networks and what is known of it.
type run struct {
	stack *Stack
	seed  uint64
	setup setup
	plan  [][]step
	dir   string
	blobs string // directory
	began time.Time

	source      *pgserver.Server // the present primary
	standby     *pgserver.Server // nil: none, or promoted
	logDatabase string           // name
	fleet       []*instance
	balancer    *balancer
	app         *badlink.Link // from the application to the source
	clients     *badlink.Link // from the clients to the balancer
	wal         *badlink.Link // from the standby to the primary
	world       *World

	sourceHold, logHold, redisHold token // held by the fault that ends or stops the server

	mu     sync.Mutex
	faults map[string]int
	wrong  []error
	events []string
}

func newRun(s *Stack, seed uint64) *run {
	r := &run{stack: s, seed: seed, setup: choose(s.o, seed), began: time.Now(), source: s.source,
		sourceHold: newToken(), logHold: newToken(), redisHold: newToken(), faults: map[string]int{}}
	r.plan = schedule(s.o, seed, r.setup)
	r.logDatabase = logDatabase
	if !r.setup.logApart && !r.setup.logElsewhere {
		r.logDatabase = database
	}
	return r
}

// storage is the server of the change log.
func (r *run) storage() *pgserver.Server {
	if r.setup.logElsewhere {
		return r.stack.log
	}
	return r.source
}

// note remembers what happened, for the story of a failed run.
func (r *run) note(format string, a ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	event := fmt.Sprintf("%s %7.3fs  ", time.Now().UTC().Format("15:04:05.000"), time.Since(r.began).Seconds()) + fmt.Sprintf(format, a...)
	r.events = append(r.events, event)
	if r.stack.o.Event != nil {
		r.stack.o.Event(fmt.Sprintf("seed %d: %s", r.seed, event))
	}
}

// broken notes that the product, or the harness, failed. The run goes on to the end of its round.
func (r *run) broken(format string, a ...any) {
	err := fmt.Errorf(format, a...)
	r.note("FAILED: %v", err)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.wrong = append(r.wrong, err)
}

func (r *run) violations() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return errors.Join(r.wrong...)
}

func (r *run) count(what string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.faults[what]++
}

// begin makes databases, networks, gateways and the world.
func (r *run) begin(ctx context.Context) (err error) {
	if r.dir, err = os.MkdirTemp(r.stack.o.Keep, fmt.Sprintf("walgate-chaos-seed-%d-", r.seed)); err != nil {
		return err
	}
	r.blobs = filepath.Join(r.dir, "blobs")
	if err := os.Mkdir(r.blobs, 0o700); err != nil {
		return err
	}
	r.note("seed %d: %s", r.seed, r.setup)
	if err := r.stack.prepare(ctx, r.setup); err != nil {
		return fmt.Errorf("prepare the servers: %w", err)
	}
	r.note("servers prepared")
	if err := loadSchema(ctx, r.source.DSN(database), r.stack.o.Schema); err != nil {
		return err
	}
	r.note("schema loaded")
	if err := r.startFleet(); err != nil {
		return err
	}
	for _, i := range r.fleet {
		if err := i.awaitReady(ctx, readyLimit); err != nil {
			return err
		}
	}
	r.note("gateways ready")
	r.world, err = NewWorld(ctx, WorldOptions{
		Seed: r.seed, App: r.throughApp(), Oracle: r.oracle, Gateway: "http://" + r.clients.Addr(), Token: signToken,
		Collections: r.stack.o.Collections, Clients: r.stack.o.Clients, Writers: r.stack.o.Writers, Logf: r.note,
	})
	if err != nil {
		return fmt.Errorf("the world: %w", err)
	}
	if r.setup.standby {
		if err := r.startStandby(ctx); err != nil {
			return fmt.Errorf("start the standby: %w", err)
		}
	}
	if r.setup.backup {
		if err := r.backUp(ctx); err != nil {
			return fmt.Errorf("back up: %w", err)
		}
	}
	return r.awaitFleet(ctx)
}

// awaitFleet waits until the balancer sends clients to every gateway.
func (r *run) awaitFleet(ctx context.Context) error {
	for _, i := range r.fleet {
		if err := i.awaitReady(ctx, readyLimit); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, readyLimit)
	defer cancel()
	for !r.balancer.allReady() {
		if !sleep(ctx, 20*time.Millisecond) {
			return fmt.Errorf("the load balancer doesn't find every gateway ready within %s", readyLimit)
		}
	}
	return nil
}

func (r *run) oracle() string { return r.source.DSN(database) }

func (r *run) balancerURL() string { return "http://" + r.clients.Addr() }

func (r *run) throughApp() string {
	dsn, err := r.app.Through(r.source.DSN(database))
	if err != nil {
		panic(err) // pgserver writes URLs
	}
	return dsn
}

func address(s *pgserver.Server) string { return net.JoinHostPort("127.0.0.1", fmt.Sprint(s.Port())) }

// startFleet makes the networks and starts balancer and gateways.
func (r *run) startFleet() (err error) {
	if r.app, err = badlink.Start(address(r.source)); err != nil {
		return err
	}
	if r.clients, err = badlink.Start(""); err != nil { // the balancer comes later
		return err
	}
	var fronts []string
	for n := range instances {
		i, err := r.newInstance(n)
		if err != nil {
			return err
		}
		fronts = append(fronts, i.front.Addr())
	}
	if r.balancer, err = startBalancer(fronts); err != nil {
		return err
	}
	u, err := url.Parse(r.balancer.base)
	if err != nil {
		return err
	}
	r.clients.TurnTo(u.Host)
	for _, i := range r.fleet {
		i.start("")
	}
	return nil
}

func (r *run) newInstance(n int) (*instance, error) {
	port, release, err := ports.Reserve()
	if err != nil {
		return nil, err
	}
	i := &instance{
		name: fmt.Sprintf("gateway %d", n+1), binary: r.stack.o.Binary, config: filepath.Join(r.dir, fmt.Sprintf("gateway-%d.yaml", n+1)),
		log: filepath.Join(r.dir, fmt.Sprintf("gateway-%d.log", n+1)), base: fmt.Sprintf("http://127.0.0.1:%d", port), port: port, release: release,
		hold: newToken(), broken: r.broken,
	}
	r.fleet = append(r.fleet, i) // from now on its links are closed with the run
	for _, l := range []struct {
		link **badlink.Link
		to   string
	}{{&i.source, address(r.source)}, {&i.replication, address(r.source)}, {&i.storage, address(r.storage())}, {&i.front, fmt.Sprintf("127.0.0.1:%d", port)}} {
		if *l.link, err = badlink.Start(l.to); err != nil {
			return nil, err
		}
	}
	if r.setup.redis {
		if i.redis, err = badlink.Start(r.stack.redis.Addr()); err != nil {
			return nil, err
		}
	}
	return i, r.configure(i)
}

func (r *run) configure(i *instance) error {
	c, err := r.networkConfig(i, i.port)
	if err != nil {
		return err
	}
	return i.writeConfig(c)
}

// heal ends everything that a fault may have left, and waits until all gateways take clients.
func (r *run) heal(ctx context.Context) error {
	links := []*badlink.Link{r.app, r.clients}
	for _, i := range r.fleet {
		links = append(links, i.links()...)
	}
	for _, l := range links {
		l.Up()
		l.Resume()
		l.Slow(0)
	}
	if r.setup.redis {
		if _, err := r.stack.redis.Do(ctx, "PING"); err != nil {
			return fmt.Errorf("the harness left Redis broken: %w", err)
		}
	}
	// A standby or a backup may hold what the fault has removed from the server of before.
	if err := r.askLog(ctx, nil, `DROP FUNCTION IF EXISTS walgate.no_space CASCADE`); err != nil {
		return fmt.Errorf("make room in the log: %w", err)
	}
	if err := r.awaitFleet(ctx); err != nil {
		return fmt.Errorf("all faults are over: %w", err)
	}
	return nil
}

// end stops everything. well says that gateways must stop as they should.
func (r *run) end(well bool) error {
	signal := syscall.SIGKILL
	if well {
		signal = syscall.SIGTERM
	}
	var all sync.WaitGroup
	errs := make([]error, len(r.fleet))
	for n, i := range r.fleet {
		all.Go(func() { errs[n] = i.end(signal) })
	}
	all.Wait()
	err := errors.Join(errs...)
	if r.balancer != nil {
		r.balancer.Close()
	}
	for _, i := range r.fleet {
		err = errors.Join(err, i.faultsInLog())
		i.release()
		for _, l := range i.links() {
			if l != nil {
				l.Close()
			}
		}
	}
	for _, l := range []*badlink.Link{r.app, r.clients, r.wal} {
		if l != nil {
			l.Close()
		}
	}
	return errors.Join(err, r.leaveSource())
}

// cpu is what the gateways used.
func (r *run) cpu() (all time.Duration) {
	for _, i := range r.fleet {
		i.mu.Lock()
		all += i.cpu
		i.mu.Unlock()
	}
	return all
}

// story tells what happened, and how the gateways' logs end, and leaves the first in the run's directory.
func (r *run) story() string {
	r.mu.Lock()
	events := strings.Join(r.events, "\n") + "\n"
	r.mu.Unlock()
	if err := os.WriteFile(filepath.Join(r.dir, "events.log"), []byte(events), 0o600); err != nil {
		events += err.Error() + "\n"
	}
	const mostEvents, mostLog = 12000, 2500
	text := events[max(0, len(events)-mostEvents):]
	for _, i := range r.fleet {
		text += fmt.Sprintf("--- %s ends with:\n%s\n", i.log, telling(i.log, mostLog))
	}
	return text
}

// telling is the end of a gateway's log without what is said of single requests.
func telling(path string, most int) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	var lines []byte
	for line := range bytes.Lines(text) {
		if !bytes.Contains(line, []byte(`msg="request failed"`)) && !bytes.Contains(line, []byte(`msg="a row is visible to nobody`)) {
			lines = append(lines, line...)
		}
	}
	return string(lines[max(0, len(lines)-most):])
}

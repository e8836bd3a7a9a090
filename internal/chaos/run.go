package chaos

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/walgate/walgate/internal/pgserver"
	"github.com/walgate/walgate/policies"
)

// Options say what to run, and on what.
type Options struct {
	Binary     string // walgate; its serve is what is run
	Failpoints bool   // Binary was built with the tag failpoints: it can die at a step
	Install    pgserver.Install
	Redis      bool   // there is a redis-server
	FakeTime   string // path of libfaketime; empty: the databases' clocks stay right

	Schema      string // SQL that makes the application's tables in an empty database
	Collections map[string]policies.Spec

	Seed     uint64        // the first run's; the others follow
	Runs     int           // how many runs; 0: one, or as many as begin within Duration
	Duration time.Duration // no run begins later than this; 0: no bound
	Parallel int           // runs at the same time; 0: one
	Rounds   int           // of each run; 0: two
	Round    time.Duration // how long the faults of a round last at least; 0: two seconds
	Clients  int           // 0: six
	Writers  int           // 0: four

	Keep   string       // directory for what a failed run leaves; empty: the temporary directory
	Replay string       // how to run one seed again; %d is the seed
	Report func(Report) // called after each run, by one goroutine at a time; may be nil
	Event  func(string) // called with all that happens, as it happens; may be nil
}

// Report says what a run did.
type Report struct {
	Seed    uint64         `json:"seed"`
	OK      bool           `json:"ok"`
	Error   string         `json:"error,omitempty"`
	Kept    string         `json:"kept,omitempty"` // directory with the gateways' logs and the order of events
	Seconds float64        `json:"seconds"`
	CPU     float64        `json:"cpu_seconds"` // of the gateways
	Setup   string         `json:"setup"`
	Faults  map[string]int `json:"faults"` // those that happened, by name
	Counts  map[string]int `json:"counts"` // what application and clients did

	Story string `json:"-"` // of a failed run: what happened when, and how the gateways' logs end
}

// String is the report as a line of JSON.
func (r Report) String() string {
	text, err := json.Marshal(r)
	if err != nil {
		return err.Error()
	}
	return string(text)
}

func (o Options) withDefaults() Options {
	set := func(v *int, to int) {
		if *v == 0 {
			*v = to
		}
	}
	set(&o.Parallel, 1)
	set(&o.Rounds, 2)
	set(&o.Clients, 6)
	set(&o.Writers, 4)
	if o.Runs == 0 && o.Duration == 0 {
		o.Runs = 1
	}
	if o.Round == 0 {
		o.Round = 2 * time.Second
	}
	if o.Keep == "" {
		o.Keep = os.TempDir()
	}
	if o.Replay == "" {
		o.Replay = "go test ./internal/chaos -run Chaos -seed %d"
	}
	return o
}

// Run does the runs of one seed after the other, several at a time, until all are done, their time is over, or ctx ends. It
// returns how many failed, and an error where the harness itself did.
func Run(ctx context.Context, o Options) (failed int, err error) {
	o = o.withDefaults()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var all sync.WaitGroup
	var mu sync.Mutex // of what follows
	next, end := o.Seed, time.Now().Add(o.Duration)
	take := func() (seed uint64, ok bool) {
		mu.Lock()
		defer mu.Unlock()
		if ctx.Err() != nil || o.Runs > 0 && next-o.Seed >= uint64(o.Runs) || o.Duration > 0 && time.Now().After(end) {
			return 0, false
		}
		next++
		return next - 1, true
	}
	told := func(r Report) {
		mu.Lock()
		defer mu.Unlock()
		if !r.OK {
			failed++
		}
		if o.Report != nil {
			o.Report(r)
		}
	}
	for range o.Parallel {
		all.Go(func() {
			if e := work(ctx, o, take, told); e != nil {
				mu.Lock()
				defer mu.Unlock()
				err = errors.Join(err, e)
				stop()
			}
		})
	}
	all.Wait()
	return failed, err
}

// work does runs on a stack of its own. After a failed one it takes a new stack.
func work(ctx context.Context, o Options, take func() (uint64, bool), told func(Report)) (err error) {
	var s *Stack
	defer func() {
		if s != nil {
			err = errors.Join(err, s.close())
		}
	}()
	for {
		seed, ok := take()
		if !ok {
			return nil
		}
		if s == nil {
			if s, err = newStack(ctx, o); err != nil {
				return err
			}
		}
		report := s.run(ctx, seed)
		if ctx.Err() != nil {
			return nil // cut short: it proves nothing
		}
		told(report)
		if !report.OK {
			if err := s.close(); err != nil {
				return err
			}
			s = nil
		}
	}
}

// run does one seed's run.
func (s *Stack) run(ctx context.Context, seed uint64) (report Report) {
	began := time.Now()
	r := newRun(s, seed)
	report = Report{Seed: seed, Setup: r.setup.String(), Faults: r.faults}
	err := r.begin(ctx)
	for n := 0; err == nil && n < s.o.Rounds; n++ {
		err = r.round(ctx, n)
	}
	if r.world != nil {
		report.Counts = r.world.Counts()
	}
	err = errors.Join(err, r.end(err == nil), r.violations())
	report.CPU = r.cpu().Seconds()
	report.Seconds = time.Since(began).Seconds()
	if report.OK = err == nil; report.OK {
		report.Error, err = "", os.RemoveAll(r.dir)
	}
	if err != nil {
		report.OK, report.Error, report.Kept = false, err.Error(), r.dir
		report.Story = r.story() + fmt.Sprintf("replay with: "+s.o.Replay+"\n", seed)
	}
	return report
}

// round lets faults happen while the world is at work, makes all well again, and has the world judge.
func (r *run) round(ctx context.Context, n int) error {
	began := time.Now()
	steps := r.plan[n]
	long := r.stack.o.Round
	for _, s := range steps {
		long = max(long, s.at+max(s.fault.lasts, s.fault.takes))
	}
	working, stop := context.WithTimeout(ctx, long)
	defer stop()
	r.note("round %d", n)
	var all sync.WaitGroup
	all.Go(func() { r.world.Run(working) })
	for _, s := range steps {
		all.Go(func() { r.step(working, s) })
	}
	all.Wait()
	if err := errors.Join(ctx.Err(), r.violations()); err != nil {
		return err
	}
	if err := r.heal(ctx); err != nil {
		return err
	}
	healed := time.Now()
	settling, cancel := context.WithTimeout(ctx, settleLimit)
	defer cancel()
	slow := time.AfterFunc(settleSlow, r.noteSessions)
	err := r.world.Settle(settling)
	if !slow.Stop() {
		r.note("it took long to settle")
	}
	if err != nil {
		return fmt.Errorf("round %d: %w", n, err)
	}
	r.note("round %d was over after %s, all well after %s, settled after %s", n, long, healed.Sub(began).Round(time.Millisecond), time.Since(began).Round(time.Millisecond))
	return nil
}

// step does one fault of the plan at its time.
func (r *run) step(ctx context.Context, s step) {
	if !sleep(ctx, s.at) {
		return
	}
	what, err := s.fault.do(r, ctx, s.rng())
	end, bounded := ctx.Deadline() // connections notice it before the context does
	switch {
	case err != nil && ctx.Err() == nil && !(bounded && time.Now().After(end)):
		r.broken("the fault %q could not be done: %v", s.fault.name, err)
	case err != nil:
		r.note("%s: given up at the round's end: %v", s.fault.name, err)
	case what == "":
		r.note("%s: nothing to do", s.fault.name)
	default:
		r.count(s.fault.name)
		r.note("%s: %s: over", s.fault.name, what)
	}
}

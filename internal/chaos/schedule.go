package chaos

import (
	"context"
	"math/rand/v2"
	"slices"
	"strings"
	"time"
)

// setup is what a seed chooses to run on.
type setup struct {
	logApart     bool // the change log is in a database of its own
	logElsewhere bool // it is on a server of its own
	redis        bool
	standby      bool // there is a physical standby
	synced       bool // which keeps the gateways' slot (PostgreSQL 17 and newer)
	backup       bool // a copy of the source's files was taken, and so was one of the log's where that is elsewhere
	clock        bool // the databases' clocks can be set
}

// String names what is out of the ordinary.
func (w setup) String() string {
	parts := []string{"log beside the tables"}
	switch {
	case w.logElsewhere:
		parts[0] = "log on a server of its own"
	case w.logApart:
		parts[0] = "log in a database of its own"
	}
	for _, p := range []struct {
		has  bool
		what string
	}{{w.redis, "Redis"}, {!w.redis, "no Redis"}, {w.standby && !w.synced, "standby"}, {w.synced, "standby with a synchronised slot"}, {w.backup, "backup"}, {w.clock, "clocks that jump"}} {
		if p.has {
			parts = append(parts, p.what)
		}
	}
	return strings.Join(parts, ", ")
}

// The streams of random numbers of a seed; the world has its own.
const (
	setupStream = 1 << 32
	planStream  = setupStream + 1
	stepStream  = setupStream + 1<<16
)

// choose says what a seed runs on.
func choose(o Options, seed uint64) (w setup) {
	rng := rand.New(rand.NewPCG(seed, setupStream))
	storage, redis, standby, synced, backup, clock := rng.IntN(3), rng.IntN(10), rng.IntN(4), rng.IntN(2), rng.IntN(8), rng.IntN(5)
	w.logApart, w.logElsewhere = storage == 1, storage == 2
	w.redis = o.Redis && redis > 0
	w.standby = standby == 0
	w.synced = w.standby && synced == 0 && o.Install.Major >= 17
	w.backup = !w.standby && backup == 0
	w.clock = o.FakeTime != "" && !w.standby && clock == 0
	return w
}

// fault is something that goes wrong.
type fault struct {
	name    string
	times   int                           // how often it is in a seed's deck
	needs   func(o Options, w setup) bool // nil: nothing
	special func(w setup) bool            // whether a setup is made for it; nil: none is
	lasts   time.Duration                 // where that is longer than a round: only seeds that have the time get it
	takes   time.Duration                 // how long the round goes on after its begin
	// do lets it happen and makes it good again. It returns what happened, to whom; nothing where it couldn't.
	do func(r *run, ctx context.Context, rng *rand.Rand) (what string, err error)
}

// step is a fault of the plan.
type step struct {
	at    time.Duration // after the round's begin
	fault *fault
	seed  uint64
	n     uint64
}

// rng is the step's own, so that what it does doesn't hang on what others did before.
func (s step) rng() *rand.Rand { return rand.New(rand.NewPCG(s.seed, stepStream+s.n)) }

const (
	stepsLeast = 3 // of a round
	stepsMost  = 7
	slowOdds   = 12 // one seed in so many has the time for faults that last longer than a round
)

// schedule deals the faults of a seed: from a deck of all that its setup allows, a few for each round.
func schedule(o Options, seed uint64, w setup) [][]step {
	rng := rand.New(rand.NewPCG(seed, planStream))
	slow := rng.IntN(slowOdds) == 0
	var deck []*fault
	for i := range faults {
		f := &faults[i]
		if f.needs != nil && !f.needs(o, w) || f.lasts > 0 && !slow {
			continue
		}
		for range f.times {
			deck = append(deck, f)
		}
	}
	rng.Shuffle(len(deck), func(i, j int) { deck[i], deck[j] = deck[j], deck[i] })
	special(rng, deck, w, slow)
	rounds := make([][]step, o.Rounds)
	var n uint64
	for i := range rounds {
		for range stepsLeast + rng.IntN(stepsMost-stepsLeast+1) {
			if len(deck) == 0 {
				break
			}
			n++
			rounds[i] = append(rounds[i], step{at: time.Duration(50+rng.IntN(int(o.Round.Milliseconds()*4/5))) * time.Millisecond, fault: deck[0], seed: seed, n: n})
			deck = deck[1:]
		}
		slices.SortStableFunc(rounds[i], func(a, b step) int { return int(a.at - b.at) })
	}
	return rounds
}

// special brings a fault that the setup was made for to where it is dealt.
func special(rng *rand.Rand, deck []*fault, w setup, slow bool) {
	for i, f := range deck {
		if f.special != nil && f.special(w) || slow && f.lasts > 0 {
			to := rng.IntN(stepsLeast)
			deck[i], deck[to] = deck[to], deck[i]
			return
		}
	}
}

package gateway

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/walgate/walgate/changelog"
)

// faultyBus is a bus that loses, doubles, delays and reorders messages, as its contract allows.
type faultyBus struct {
	changelog.Bus
	mu    sync.Mutex
	mode  string
	rng   *rand.Rand
	late  []*changelog.Batch
	count map[string]int
}

func (f *faultyBus) Publish(b *changelog.Batch) {
	f.mu.Lock()
	defer f.mu.Unlock()
	mode := f.mode
	if mode == "any" {
		mode = []string{"lost", "doubled", "late", "stripped", ""}[f.rng.IntN(5)]
	}
	f.count[mode]++
	switch mode {
	case "lost":
		return
	case "doubled":
		f.Bus.Publish(b)
	case "late": // comes after the next ones, in any order
		if f.late = append(f.late, b); len(f.late) < 3 {
			return
		}
		f.rng.Shuffle(len(f.late), func(i, j int) { f.late[i], f.late[j] = f.late[j], f.late[i] })
		for _, b := range f.late {
			f.Bus.Publish(b)
		}
		f.late = f.late[:0]
		return
	case "stripped":
		c := *b
		c.Entries, c.Omitted = nil, len(b.Entries) > 0
		b = &c
	}
	f.Bus.Publish(b)
}

// TestFaultyBus: whatever happens to the bus's messages, every subscriber gets every change once and in order.
func TestFaultyBus(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"lost", "doubled", "late", "stripped", "any"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			seed := uint64(time.Now().UnixNano())
			var bus *faultyBus
			e := newEnv(t, setup{gateway: func(g *Gateway) { g.hub.every = 20 * time.Millisecond },
				bus: func(b changelog.Bus) changelog.Bus {
					bus = &faultyBus{Bus: b, mode: mode, rng: rand.New(rand.NewPCG(seed, 0)), count: map[string]int{}}
					return bus
				}})
			a, b := tokenFor(t, "a", nil), tokenFor(t, "b", nil)
			s, other, waiter := e.live(t, a, ""), e.live(t, b, `,"collections":["todos"]`), tokenFor(t, "w", nil)
			since := e.here(t, waiter)
			const n = 90
			go func() {
				for i := range n + 1 {
					owner := []string{"b", "a", "a"}[i%3]
					if i == n {
						owner = "w"
					}
					if err := e.insertAlone(i, owner); err != nil {
						t.Errorf("insert: %v", err)
						return
					}
				}
			}()
			for i := range n {
				to := s
				if i%3 == 0 {
					to = other
				}
				if f := nextChange(t, to); f.DocID != fmt.Sprint(i) {
					t.Fatalf("seed %d: want %d, got %s", seed, i, f.raw)
				}
			}
			if p := e.pull(t, waiter, since, "wait", "25"); briefs(p.Changes) != fmt.Sprint("upsert todos/", n) {
				t.Errorf("seed %d: the waiting pull got %s", seed, briefs(p.Changes))
			}
			// Raises travel by the bus as well.
			e.exec(t, `TRUNCATE todos`)
			if f := next(t, s, "full_resync_required"); len(f.Collections) != 1 || f.Collections[0] != "todos" {
				t.Errorf("seed %d: got %s", seed, f.raw)
			}
			bus.mu.Lock()
			defer bus.mu.Unlock()
			harm := 0
			for m, n := range bus.count {
				if m != "" {
					harm += n
				}
			}
			if harm < n/3 {
				t.Errorf("the bus did harm to %v messages only", bus.count)
			}
		})
	}
}

// insertAlone inserts a row and waits until the log has it, so that it is announced by a message of its own.
func (e *env) insertAlone(id int, owner string) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	before, err := e.log.Head(ctx)
	if err != nil {
		return err
	}
	if _, err := e.db.Exec(ctx, `INSERT INTO todos VALUES ($1, $2)`, id, owner); err != nil {
		return err
	}
	for now := before; now.Version == before.Version; {
		if now, err = e.log.Head(ctx); err != nil {
			return err
		}
	}
	return nil
}

// next reads up to the first frame of this type; only checkpoints and heartbeats may come before.
func next(t testing.TB, s *stream, kind string) wireFrame {
	t.Helper()
	for {
		f := s.next(t)
		if f.Type == kind {
			return f
		}
		if f.Type != "checkpoint" && f.Type != "heartbeat" {
			t.Fatalf("want %q, got %s", kind, f.raw)
		}
	}
}

func nextChange(t testing.TB, s *stream) wireFrame {
	t.Helper()
	return next(t, s, "")
}

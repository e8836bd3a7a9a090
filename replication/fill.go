package replication

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/walgate/walgate/changelog"
)

const (
	fillRows  = 2000
	fillBytes = 4 << 20
	// fillFence is how long a snapshot waits for the log: past it, it is given back until the log has caught up.
	fillFence = 10 * time.Second
	// sweepBlocks is how many heap pages of the log's references one step of a sweep looks through.
	sweepBlocks = 16
)

// filler looks through the rows that existed before a collection's references were followed, and removes what earlier fills
// have written. There is one a tenure. A fill's progress is stored with its steps, so that the next leader goes on there.
type filler struct {
	tenure   *tenure
	rows     int // of one step
	logged   func() changelog.LSN
	version  atomic.Int64  // up to which the log is durable
	appended chan struct{} // capacity 1: the log has moved
	wake     chan struct{} // capacity 1: there is another task

	mu    sync.Mutex
	tasks map[int32]*fillTask // by collection
}

// fillTask is what is left to do for one collection.
type fillTask struct {
	collection int32
	fill       int32
	name       string            // of the collection; for the log
	version    changelog.Version // where it began
	after      changelog.Version // the log's transactions up to here must show in the snapshot that the next rows are read in
	position   []string          // key of the last row; nil: none yet
	rows       int64
	estimate   int64 // 0: not known
	done       bool
	swept      bool
	gone       bool // it has no attachments any more: nothing is left of it after the sweep

	stale  []int32 // what the sweep removes; nil: it hasn't begun
	block  int64   // the next heap block of the sweep
	blocks int64   // how many there were when it began

	pause  time.Duration // after a failure
	next   time.Time
	warned time.Time
}

func newFiller(t *tenure, logged func() changelog.LSN) *filler {
	return &filler{tenure: t, rows: cmp.Or(t.leader.o.fillRows, fillRows), logged: logged, appended: make(chan struct{}, 1), wake: make(chan struct{}, 1), tasks: map[int32]*fillTask{}}
}

// began notes a new fill, in place of the one before. Safe for concurrent use, as all but run's steps.
func (f *filler) began(collection int32, newest fill) {
	f.mu.Lock()
	defer f.mu.Unlock()
	name := bytesFillName
	if collection != bytesFill {
		name = f.tenure.nameOf(collection)
	}
	f.set(&fillTask{collection: collection, fill: newest.id, name: name, version: newest.version, after: newest.version})
	wake(f.wake)
}

func (f *filler) set(t *fillTask) {
	f.tasks[t.collection] = t
	f.tenure.leader.o.Stats.setFill(t.name, FillProgress{Rows: t.rows, Estimate: t.estimate, Done: t.done, Swept: t.swept}, t.gone && t.swept)
}

// moved notes how far the log is durable.
func (f *filler) moved(v changelog.Version) {
	f.version.Store(int64(v))
	wake(f.appended)
}

func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// run works until ctx ends. Whatever fails is tried again: the stream goes on meanwhile.
func (f *filler) run(ctx context.Context) error {
	for {
		t, wait := f.pick(time.Now())
		if t == nil {
			retry := time.NewTimer(wait)
			select {
			case <-ctx.Done():
			case <-f.wake:
			case <-retry.C:
			}
			retry.Stop()
			if ctx.Err() != nil {
				return nil
			}
			continue
		}
		err := f.step(ctx, t)
		if ctx.Err() != nil {
			return nil
		}
		f.settle(t, err)
	}
}

// pick returns a copy of the next task, or how long there is none: rows first, then the bytes, so that what an upload may
// not reach is known by then, and sweeps last.
func (f *filler) pick(now time.Time) (*fillTask, time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var best *fillTask
	wait := time.Hour
	for _, t := range f.tasks {
		if t.swept {
			continue
		}
		if d := t.next.Sub(now); d > 0 {
			wait = min(wait, d)
			continue
		}
		if best == nil || t.order() < best.order() {
			best = t
		}
	}
	if best == nil {
		return nil, wait
	}
	t := *best
	return &t, 0
}

// rowsLeft says whether rows of a collection are yet to be looked through.
func (f *filler) rowsLeft() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, t := range f.tasks {
		if t.collection != bytesFill && !t.done {
			return true
		}
	}
	return false
}

func (t *fillTask) order() int64 {
	n := int64(t.collection)
	if t.collection == bytesFill {
		n = 1 << 32
	}
	if t.done {
		n += 1 << 33
	}
	return n
}

// settle stores what became of a step, unless another fill of the collection began.
func (f *filler) settle(t *fillTask, err error) {
	log := f.tenure.leader.o.Logger
	if err == nil {
		t.pause, t.next = 0, time.Time{}
	} else {
		t.pause = min(max(t.pause*2, firstBackoff), lastBackoff)
		t.next = time.Now().Add(t.pause)
		if !errors.Is(err, errNotNow) && time.Since(t.warned) > waitAgain {
			t.warned = time.Now()
			log.Warn("existing rows can't be looked through for attachments; trying again", "collection", t.name, "rows", t.rows, "error", err)
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	was := f.tasks[t.collection]
	if was == nil || was.fill != t.fill {
		return
	}
	f.set(t)
	switch {
	case t.done && !was.done:
		log.Info("existing rows were looked through for attachments", "collection", t.name, "rows", t.rows)
	case t.swept && len(t.stale) > 0:
		log.Info("removed references to attachments that no longer hold", "collection", t.name)
	}
}

// errNotNow: what must be true first isn't yet, and nothing is wrong.
var errNotNow = errors.New("not yet")

// step does the next part of a task and notes it there.
func (f *filler) step(ctx context.Context, t *fillTask) error {
	switch {
	case t.done:
		return f.sweep(ctx, t)
	case t.collection == bytesFill:
		return f.files(ctx, t)
	}
	return f.chunk(ctx, t)
}

// put places a step in the order and waits until it is durable.
func (f *filler) put(ctx context.Context, t *fillTask, step changelog.FillStep, files []changelog.FileEvent) error {
	step.Fill, step.Collection = t.fill, t.collection
	placed := make(chan placing, 1)
	s := f.tenure.stream
	s.post(0, func() { placed <- s.seq.place(step, files) })
	select {
	case <-ctx.Done():
		return ctx.Err()
	case p := <-placed:
		if p.overtaken {
			return errNotNow
		}
		if t.after = p.version; p.dropped {
			return errNotNow
		}
		return f.await(ctx, func() bool { return changelog.Version(f.version.Load()) >= p.version })
	}
}

// await waits until the log has come far enough.
func (f *filler) await(ctx context.Context, far func() bool) error {
	for !far() {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-f.appended:
		}
	}
	return nil
}

// passFence waits until all that was visible before is durable and logged.
func (f *filler) passFence(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, fillFence)
	defer cancel()
	lsn, err := Fence(ctx, f.tenure.leader.o.Source)
	if err != nil {
		return err
	}
	if err := f.await(ctx, func() bool { return f.logged() > lsn }); err != nil {
		return fmt.Errorf("the change log is behind the source: %w", errNotNow)
	}
	return nil
}

// finish ends a fill. That it is done stands in a step of its own, placed once its rows are durable: until then changes
// replace all that the log holds of their documents, so that none rests on a row that the log has passed over.
func (f *filler) finish(ctx context.Context, t *fillTask) error {
	if err := f.put(ctx, t, changelog.FillStep{Done: true}, nil); err != nil {
		return err
	}
	t.done = true
	return nil
}

// sweep removes some of what earlier fills of the collection have written.
func (f *filler) sweep(ctx context.Context, t *fillTask) error {
	log := f.tenure.leader.o.Log
	if t.stale == nil {
		fills, err := log.Fills(ctx)
		if err != nil {
			return err
		}
		stale := []int32{}
		for _, other := range fills {
			if other.Collection == t.collection && (other.Fill < t.fill || t.gone) {
				stale = append(stale, other.Fill)
			}
		}
		blocks := int64(0)
		if len(stale) > 0 {
			if blocks, err = log.SweepBlocks(ctx, t.collection); err != nil {
				return err
			}
		}
		t.stale, t.block, t.blocks = stale, 0, blocks
	}
	step := changelog.FillStep{Stale: t.stale}
	if t.block >= t.blocks {
		step.Swept = true
	} else {
		step.SweepFrom, step.SweepTo = t.block, min(t.block+sweepBlocks, t.blocks)
	}
	if err := f.put(ctx, t, step, nil); err != nil {
		return err
	}
	t.block, t.swept = step.SweepTo, step.Swept
	return nil
}

// prepareFills decides, at the start of a tenure, which fills go on and which are needed, and puts those at the head of
// what the stream hands over.
func (t *tenure) prepareFills(fills []changelog.Fill, head *changelog.Head) {
	newest := map[int32]*changelog.Fill{}
	seq := t.stream.seq
	seq.fills, seq.onFill = map[int32]*fill{}, t.filler.began
	for i := range fills {
		seq.lastFill = max(seq.lastFill, fills[i].Fill)
		if was := newest[fills[i].Collection]; was == nil || was.Fill < fills[i].Fill {
			newest[fills[i].Collection] = &fills[i]
		}
	}
	need := map[int32]changelog.Version{} // of each collection with attachments: what its fill must not have begun before
	for _, c := range t.leader.o.Watcher.whole.Collections {
		if stored, ok := t.ids[c.Name]; ok && c.HasAttachments() {
			need[stored.ID] = stored.Refill
		}
	}
	if t.leader.o.Watcher.whole.HasAttachments() {
		need[bytesFill] = head.Floor // what was uploaded while there was no log is known to the source only
	}
	for collection, least := range need {
		f := newest[collection]
		seq.fills[collection] = &fill{}
		if f == nil || f.Version < least {
			continue
		}
		*seq.fills[collection] = fill{id: f.Fill, version: f.Version, done: f.Done}
		t.filler.resume(f, seq.clock.Last(), false)
	}
	for collection, f := range newest {
		if _, wanted := need[collection]; !wanted && collection != bytesFill {
			t.filler.resume(f, 0, true)
		}
	}
	for _, collection := range slices.Sorted(maps.Keys(need)) {
		if seq.fills[collection].id == 0 {
			seq.startFill(collection)
		}
	}
	if len(seq.piece.Fills) > 0 {
		t.stream.post(0, func() {}) // hands them over before anything else
	}
}

// resume goes on with a fill that an earlier tenure began.
func (f *filler) resume(was *changelog.Fill, after changelog.Version, gone bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	t := &fillTask{collection: was.Collection, fill: was.Fill, name: bytesFillName, version: was.Version, after: max(was.Version, after), rows: was.Rows, estimate: was.Estimate,
		done: was.Done || gone, swept: was.Swept && !gone, gone: gone}
	if was.Collection != bytesFill {
		t.name = cmp.Or(f.tenure.nameOf(was.Collection), fmt.Sprintf("%d, which is configured no longer", was.Collection))
	}
	if len(was.Position) > 0 {
		t.position = was.Position
	}
	f.set(t)
}

// nameOf returns the name of the collection with this id.
func (t *tenure) nameOf(id int32) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	for name, c := range t.ids {
		if c.ID == id {
			return name
		}
	}
	return ""
}

package gateway

import (
	"sync"

	"github.com/walgate/walgate/changelog"
)

// frame is one thing to send.
type frame struct {
	data []byte
	kind frameKind
	room *shared // what it takes of the budget; nil: nothing
}

type frameKind uint8

const (
	frameChange frameKind = iota
	frameAttachment
	frameCheckpoint
)

// subscriber is the queue between the hub and one session. The hub puts, the session takes. It is bounded: when it is
// full, the subscriber leaves the live path with everything before the transaction that didn't fit queued, and reads the
// log from there.
type subscriber struct {
	feed   *feed
	client client        // whose marks it is shown; the empty one is nobody's
	limit  int           // bytes that may wait; 0: the first change ends the live path (a long poll)
	bell   chan struct{} // capacity 1: look at the queue

	// Of the hub, under its lock.
	slots     []int             // position in the hub's list of each scope
	last      changelog.Version // newest row change handed over
	fileSlots []int             // as slots, of the scopes of files
	file      struct {          // newest operation looked at
		version    changelog.Version
		attachment [16]byte
	}

	mu      sync.Mutex
	live    bool
	queue   []frame
	size    int
	pending []frame // of the transaction being delivered
	held    int
	tx      changelog.Version // of pending
	newest  changelog.Version // of pending
	pos     changelog.Version // everything up to here is queued or was sent
	whole   changelog.Version // of the newest checkpoint queued
	closing *resync
	problem *Problem
}

func newSubscriber(f *feed, limit int) *subscriber {
	return &subscriber{feed: f, limit: limit, bell: make(chan struct{}, 1)}
}

// checkpointed returns the version of the newest checkpoint that was queued.
func (s *subscriber) checkpointed() changelog.Version {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.whole
}

func (s *subscriber) goLive(v changelog.Version) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.live, s.pos = true, v
}

// reached returns what the session has or will have, given that the hub has handed out everything up to hub.
func (s *subscriber) reached(hub changelog.Version) changelog.Version {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.live {
		return max(s.pos, hub)
	}
	return s.pos
}

// wants says whether a change at v is to be handed over.
func (s *subscriber) wants(v changelog.Version) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.live && v > s.pos
}

// pend adds the change at v of transaction tx; true if it is the first of it in this round. A frame without room ends the
// live path, and so does one that doesn't fit, but for one alone: reading it from the log would copy it for each stream.
func (s *subscriber) pend(f frame, v, tx changelog.Version) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	first := len(s.pending) == 0
	s.tx = tx
	waiting := s.size + s.held
	s.held += len(f.data)
	if f.room == nil || waiting+len(f.data) > s.limit && (waiting > 0 || s.limit == 0) {
		s.overflowLocked()
		return false
	}
	f.room.refs.Add(1)
	s.pending = append(s.pending, f)
	s.newest = v
	return first
}

// leaveLive leaves the live path before transaction tx, for what is to be sent can only be told by reading the log.
func (s *subscriber) leaveLive(tx changelog.Version) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tx = tx
	s.overflowLocked()
}

// overflowLocked leaves the live path before the present transaction.
func (s *subscriber) overflowLocked() {
	s.live = false
	s.pos = max(s.pos, s.tx-1)
	s.dropPendingLocked()
	ring(s.bell)
}

func (s *subscriber) dropPendingLocked() {
	releaseAll(s.pending)
	s.pending, s.held = nil, 0
}

// drop gives up what is queued, once the hub knows the subscriber no longer.
func (s *subscriber) drop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.live = false
	s.dropPendingLocked()
	releaseAll(s.queue)
	s.queue, s.size = nil, 0
}

// releaseAll gives back the room of frames that were sent or given up, and forgets them.
func releaseAll(frames []frame) {
	for i := range frames {
		frames[i].room.release()
	}
	clear(frames)
}

// flushPending queues what the transaction brought, with its checkpoint at v (0: it goes on).
func (s *subscriber) flushPending(v changelog.Version, checkpoint []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.live || len(s.pending) == 0 && s.pos >= v {
		s.dropPendingLocked()
		return
	}
	s.queue = append(s.queue, s.pending...)
	s.size += s.held
	clear(s.pending)
	s.pending, s.held = s.pending[:0], 0
	s.pos = max(s.newest, v)
	if v != 0 {
		s.whole = v
		s.queue = append(s.queue, frame{data: checkpoint, kind: frameCheckpoint})
	}
	ring(s.bell)
}

// keptFrames is for how many frames an idle stream keeps room.
const keptFrames = 32

// take moves what waits into dst. Whoever takes frames releases them.
func (s *subscriber) take(dst []frame) (frames []frame, live bool, r *resync, p *Problem) {
	s.mu.Lock()
	defer s.mu.Unlock()
	dst = append(dst, s.queue...)
	clear(s.queue)
	s.queue, s.size = s.queue[:0], 0
	if cap(s.queue) > keptFrames {
		s.queue = nil
	}
	return dst, s.live, s.closing, s.problem
}

// end makes the session tell its client to resynchronise, after what is queued.
func (s *subscriber) end(r *resync) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing == nil {
		s.closing = r
	}
	s.live = false
	ring(s.bell)
}

// fail makes the session end with a problem.
func (s *subscriber) fail(p *Problem) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.problem == nil {
		s.problem = p
	}
	s.live = false
	ring(s.bell)
}

func ring(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func checkpointFrame(f *feed, v changelog.Version, history string) []byte {
	return []byte(`{"type":"checkpoint","last_seq":"` + f.cursor(v, history) + `"}`)
}

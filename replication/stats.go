package replication

import (
	"log/slog"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"github.com/walgate/walgate/changelog"
)

// Stats is what the leader shows of itself. Safe for concurrent use.
type Stats struct {
	Received     atomic.Uint64 // LSN read from the stream
	Logged       atomic.Uint64 // LSN durable in the log
	Acknowledged atomic.Uint64 // LSN that the source may forget
	Transactions atomic.Uint64 // logged
	Rows         atomic.Uint64 // logged
	Reconnects   atomic.Uint64
	Histories    atomic.Uint64 // new ones that this instance began, but for the first
	PolicyErrors atomic.Uint64 // rows that nobody sees because their policy failed
	CommitNanos  atomic.Int64  // commit time of the newest logged transaction, Unix ns
	WireNanos    atomic.Int64  // when anything was last received, Unix ns
	QueueBytes   atomic.Int64
	LogRows      atomic.Int64 // about how many rows the log holds

	mu      sync.Mutex
	leading bool
	standby bool // err is that another instance leads, which is as it should be
	err     string
	waiting string // why an append takes long
	slot    SlotHealth
	warned  map[string]time.Time
	fills   map[string]FillProgress
}

// FillProgress is how far existing rows of a collection were looked through for attachments.
type FillProgress struct {
	Rows, Estimate int64 // looked at, and about how many there are; 0: not known
	Done           bool
	Swept          bool // what no longer holds is removed
}

// Fills returns the progress of each collection with attachments, while this instance leads.
func (s *Stats) Fills() map[string]FillProgress {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.fills)
}

func (s *Stats) setFill(collection string, p FillProgress, over bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fills == nil {
		s.fills = map[string]FillProgress{}
	}
	if s.fills[collection] = p; over {
		delete(s.fills, collection)
	}
}

// SlotHealth is how much WAL the slot holds back.
type SlotHealth struct {
	LagBytes  int64
	SafeBytes int64 // until the server invalidates the slot; 0: no bound is set
	Status    string
}

// State returns whether this instance leads, and what stopped it last; empty while all is well.
func (s *Stats) State() (leading bool, err string, slot SlotHealth) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.leading, s.err, s.slot
}

// Waiting returns why the change log holds replication up; empty while it doesn't.
func (s *Stats) Waiting() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.waiting
}

func (s *Stats) setWaiting(why string) (was string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	was, s.waiting = s.waiting, why
	return was
}

func (s *Stats) setState(leading bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.leading, s.standby = leading, false
	if !leading {
		s.fills = nil
	}
	s.err = ""
	if err != nil {
		s.err = err.Error()
	}
}

// setStandby notes that another instance holds the slot, and which.
func (s *Stats) setStandby(why error) {
	s.setState(false, why)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.standby = true
}

// Standby says whether all that State tells is that another instance leads.
func (s *Stats) Standby() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.standby
}

func (s *Stats) setSlot(h SlotHealth) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.slot = h
}

// policyError counts a row that failed closed and names its collection at most once a minute. The error names the
// expression, never the row's values.
func (s *Stats) policyError(collection string, err error, log *slog.Logger) {
	s.PolicyErrors.Add(1)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.warned == nil {
		s.warned = map[string]time.Time{}
	}
	if now := time.Now(); now.Sub(s.warned[collection]) > time.Minute {
		s.warned[collection] = now
		log.Warn("a row is visible to nobody because its policy failed; mend the policy's where", "collection", collection, "error", err)
	}
}

func (s *Stats) appended(a changelog.Appended) {
	s.Logged.Store(uint64(a.LSN))
	s.Transactions.Add(uint64(a.Transactions))
	s.Rows.Add(uint64(a.Rows))
	if a.Transactions > 0 {
		s.CommitNanos.Store(a.Version.Time().UnixNano())
	}
}

package gateway

import (
	"container/list"
	"sync"
	"time"
)

// maxRateSubjects bounds the memory of a rateLimiter. Past it the subject that has been quiet longest is forgotten,
// which refills its bucket.
const maxRateSubjects = 1 << 16

// rateLimiter is a token bucket for each subject: burst requests at once, perSecond in the long run. Safe for
// concurrent use.
type rateLimiter struct {
	interval time.Duration // between two tokens
	depth    time.Duration // time in which an empty bucket fills
	most     int
	now      func() time.Time

	mu      sync.Mutex
	buckets map[string]*list.Element
	recent  list.List // of *rateBucket, the one used last in front
}

// rateBucket stores when the bucket will be full again instead of a count, so that nothing has to refill it.
type rateBucket struct {
	subject string
	fullAt  time.Time
}

func newRateLimiter(perSecond, burst, mostSubjects int, now func() time.Time) *rateLimiter {
	interval := time.Second / time.Duration(perSecond)
	return &rateLimiter{
		interval: interval,
		depth:    interval * time.Duration(burst),
		most:     mostSubjects,
		now:      now,
		buckets:  map[string]*list.Element{},
	}
}

// allow takes a token of the subject's bucket. Where there is none it returns after which time there is one.
func (l *rateLimiter) allow(subject string) (retryAfter time.Duration, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	b := l.bucketLocked(subject)
	fullAt := b.fullAt
	if fullAt.Before(now) {
		fullAt = now
	}
	fullAt = fullAt.Add(l.interval)
	if wait := fullAt.Sub(now) - l.depth; wait > 0 {
		return wait, false
	}
	b.fullAt = fullAt
	return 0, true
}

// check is allow as a problem, nil where the request may go on.
func (l *rateLimiter) check(subject string) error {
	retryAfter, ok := l.allow(subject)
	if ok {
		return nil
	}
	return &Problem{Code: RateLimited, RetryAfter: retryAfter}
}

func (l *rateLimiter) bucketLocked(subject string) *rateBucket {
	if e, ok := l.buckets[subject]; ok {
		l.recent.MoveToFront(e)
		return e.Value.(*rateBucket)
	}
	if len(l.buckets) >= l.most {
		oldest := l.recent.Back()
		delete(l.buckets, l.recent.Remove(oldest).(*rateBucket).subject)
	}
	b := &rateBucket{subject: subject}
	l.buckets[subject] = l.recent.PushFront(b)
	return b
}

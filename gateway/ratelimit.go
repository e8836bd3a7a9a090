package gateway

import (
	"container/list"
	"context"
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

// giveBack puts a token back that was of no use.
func (l *rateLimiter) giveBack(subject string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	b := l.bucketLocked(subject)
	b.fullAt = b.fullAt.Add(-l.interval)
}

// admit says whether a subject may make one more request, as a problem where it may not. This instance's own bucket comes first:
// whatever becomes of Redis, no instance lets through more than the limit.
func (g *Gateway) admit(ctx context.Context, subject string) error {
	retryAfter, ok := g.limiter.allow(subject)
	by := "instance"
	if ok && g.fleet != nil {
		if retryAfter, ok = g.fleet.allow(ctx, subject); !ok {
			g.limiter.giveBack(subject)
			by = "fleet"
		}
	}
	if ok {
		return nil
	}
	g.metrics.limited.WithLabelValues(by).Inc()
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

package gateway

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/walgate/walgate/changelog"
)

const (
	// fleetRateMost is how long a request waits for Redis to count it.
	fleetRateMost = 100 * time.Millisecond
	// fleetRatePause is how long Redis isn't asked after it has failed.
	fleetRatePause = time.Second
)

// fleetRate is a token bucket for each subject that all instances draw from. It is in Redis, which may lose it at any time: that
// fills the buckets. Where Redis doesn't answer, requests go on: each instance's own buckets are in front of these. Safe for
// concurrent use.
type fleetRate struct {
	redis           *changelog.Redis
	interval, depth float64       // see rateLimiter; in microseconds
	most            time.Duration // fleetRateMost, but for tests
	logger          *slog.Logger

	started time.Time
	askAt   atomic.Int64  // since started; 0: Redis answers
	alone   atomic.Uint64 // requests that weren't counted
}

func newFleetRate(r *changelog.Redis, perSecond, burst int, logger *slog.Logger) *fleetRate {
	interval := 1e6 / float64(perSecond)
	return &fleetRate{redis: r, interval: interval, depth: interval * float64(burst), most: fleetRateMost, logger: logger, started: time.Now()}
}

// takeToken is rateLimiter.allow by the clock of Redis, whatever those of the instances say. A clock that was set back shuts nobody
// out for longer than a bucket takes to fill. It returns after how many microseconds there is a token; 0: it was taken.
var takeToken = redis.NewScript(`
local t = redis.call('TIME')
local now, interval, depth = t[1] * 1000000 + t[2], tonumber(ARGV[1]), tonumber(ARGV[2])
local full = tonumber(redis.call('GET', KEYS[1]) or 0)
full = math.max(math.min(full, now + depth), now) + interval
local wait = full - now - depth
if wait > 0 then
	return math.ceil(wait)
end
redis.call('SET', KEYS[1], string.format('%.17g', full), 'PX', math.ceil((full - now) / 1000))
return 0`)

// allow takes a token of the subject's bucket. Where there is none it returns after which time there is one.
func (f *fleetRate) allow(ctx context.Context, subject string) (retryAfter time.Duration, ok bool) {
	if !f.answers() {
		f.alone.Add(1)
		return 0, true
	}
	wait, err := f.take(ctx, subject)
	switch {
	case err == nil:
		return wait, wait == 0
	case ctx.Err() == nil: // else it is the request that ended
		f.failed(err)
	}
	f.alone.Add(1)
	return 0, true
}

// take asks Redis once.
func (f *fleetRate) take(ctx context.Context, subject string) (wait time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, f.most)
	defer cancel()
	sum := sha256.Sum256([]byte(subject))
	key := f.redis.Key("rate:" + base64.RawURLEncoding.EncodeToString(sum[:16]))
	micros, err := takeToken.Run(ctx, f.redis.Client(), []string{key}, f.interval, f.depth).Int64()
	return time.Duration(micros) * time.Microsecond, err
}

// answers says whether Redis is to be asked. One that failed is tried now and then, while nobody waits for it.
func (f *fleetRate) answers() bool {
	at := f.askAt.Load()
	if at == 0 {
		return true
	}
	if now := int64(time.Since(f.started)); now >= at && f.askAt.CompareAndSwap(at, now+int64(fleetRatePause)) {
		go func() {
			if _, err := f.take(context.Background(), ""); err == nil && f.askAt.Swap(0) != 0 { // no subject is empty
				f.logger.Info("limits.requests_per_second holds for all instances together again")
			}
		}()
	}
	return false
}

func (f *fleetRate) failed(err error) {
	if f.askAt.Swap(int64(time.Since(f.started)+fleetRatePause)) == 0 {
		f.logger.Warn("Redis doesn't count requests: until it does, limits.requests_per_second holds for each instance alone. See that Redis runs, and that its user may EVALSHA, EVAL, TIME, GET and SET keys walgate:*", "error", err)
	}
}

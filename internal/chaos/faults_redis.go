package chaos

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"
)

// redisCommand sends one to Redis.
func (r *run) redisCommand(ctx context.Context, args ...string) (string, error) {
	return exclusively(ctx, []token{r.redisHold}, func() (string, error) {
		if _, err := r.stack.redis.Do(ctx, args...); err != nil {
			return "", err
		}
		return args[0], nil
	})
}

func (r *run) flushRedis(ctx context.Context, _ *rand.Rand) (string, error) {
	return r.redisCommand(ctx, "FLUSHALL")
}

func (r *run) endSubscribers(ctx context.Context, _ *rand.Rand) (string, error) {
	return r.redisCommand(ctx, "CLIENT", "KILL", "TYPE", "pubsub")
}

func (r *run) restartRedis(ctx context.Context, _ *rand.Rand) (string, error) {
	return exclusively(ctx, []token{r.redisHold}, func() (string, error) {
		return "Redis", r.stack.redis.Restart(context.WithoutCancel(ctx))
	})
}

func (r *run) redisAway(ctx context.Context, rng *rand.Rand) (string, error) {
	away := between(rng, 200*time.Millisecond, 1500*time.Millisecond)
	return exclusively(ctx, []token{r.redisHold}, func() (string, error) {
		if err := r.stack.redis.Kill(); err != nil {
			return "", err
		}
		r.note("Redis is away for %s", away)
		sleep(ctx, away)
		return "Redis", r.stack.redis.Restart(context.WithoutCancel(ctx))
	})
}

func (r *run) redisSilent(ctx context.Context, rng *rand.Rand) (string, error) {
	return r.silenceRedis(ctx, between(rng, 200*time.Millisecond, 1800*time.Millisecond))
}

func (r *run) redisSilentLong(ctx context.Context, _ *rand.Rand) (string, error) {
	return r.silenceRedis(context.WithoutCancel(ctx), silentLong)
}

func (r *run) silenceRedis(ctx context.Context, silent time.Duration) (string, error) {
	return exclusively(ctx, []token{r.redisHold}, func() (string, error) {
		err := r.stack.redis.Pause()
		r.note("Redis is silent for %s", silent)
		sleep(ctx, silent)
		return "Redis", errors.Join(err, r.stack.redis.Resume())
	})
}

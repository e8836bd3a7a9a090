package changelog

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"
)

// redisPatience bounds one call of Redis, where the URL names no time-outs.
const redisPatience = 2 * time.Second

// RedisOptions is what Redis needs.
type RedisOptions struct {
	URL       string // see RedisURLs
	Namespace string // of the installation: what all of its keys and channels begin with
	Logger    *slog.Logger
}

// RedisURLs says which addresses OpenRedis takes.
const RedisURLs = `redis://[USER:PASSWORD@]HOST:PORT[/DB], or rediss:// for TLS; a cluster with ?addr=HOST:PORT for each further node, or with ?cluster=true; sentinels with ?master_name=NAME`

// Redis is a connection pool to the Redis that an installation's instances share. What is in it may be lost at any time. Safe
// for concurrent use.
type Redis struct {
	client    redis.UniversalClient
	sharded   bool // a cluster: messages go to the node of their channel only
	addrs     []string
	namespace string
	logger    *slog.Logger

	mu     sync.Mutex
	faults map[string]string // by what is being done
	since  time.Time         // of the first of them
}

// OpenRedis checks the URL and makes a pool; it connects with the first use.
func OpenRedis(o RedisOptions) (*Redis, error) {
	r := &Redis{namespace: o.Namespace, logger: o.Logger, faults: map[string]string{}}
	quiet.Do(func() { redis.SetLogger(silent{}) })
	u, err := url.Parse(o.URL)
	if err != nil || u.User == nil && strings.Contains(o.URL, "@") { // the parser's words would show the password
		return nil, errors.New("not a URL: write %2F, %3F, %23 and %40 for /, ?, # and @ in user and password")
	}
	q := u.Query()
	clustered := q.Get("cluster") == "true"
	q.Del("cluster")
	u.RawQuery = q.Encode()
	never := &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
	switch {
	case q.Has("master_name"):
		f, err := redis.ParseFailoverURL(u.String())
		if err != nil {
			return nil, err
		}
		redisDefaults(&f.Protocol, &f.DialTimeout, &f.ReadTimeout, &f.WriteTimeout)
		f.ContextTimeoutEnabled, f.DisableIdentity, f.DialerRetries = true, true, 1
		r.client, r.addrs = redis.NewFailoverClient(f), f.SentinelAddrs
	case q.Has("addr") || clustered:
		c, err := redis.ParseClusterURL(u.String())
		if err != nil {
			return nil, err
		}
		redisDefaults(&c.Protocol, &c.DialTimeout, &c.ReadTimeout, &c.WriteTimeout)
		c.MaintNotificationsConfig, c.ContextTimeoutEnabled, c.DisableIdentity, c.DialerRetries = never, true, true, 1
		r.client, r.addrs, r.sharded = redis.NewClusterClient(c), c.Addrs, true
	default:
		s, err := redis.ParseURL(u.String())
		if err != nil {
			return nil, err
		}
		redisDefaults(&s.Protocol, &s.DialTimeout, &s.ReadTimeout, &s.WriteTimeout)
		s.MaintNotificationsConfig, s.ContextTimeoutEnabled, s.DisableIdentity, s.DialerRetries = never, true, true, 1
		r.client, r.addrs = redis.NewClient(s), []string{s.Addr}
	}
	return r, nil
}

// CheckRedisURL says why a URL can't be that of a Redis. The error doesn't tell its password.
func CheckRedisURL(url string) error {
	r, err := OpenRedis(RedisOptions{URL: url})
	if err != nil {
		return err
	}
	return r.Close()
}

// redisDefaults fills in what the URL doesn't say.
func redisDefaults(protocol *int, timeouts ...*time.Duration) {
	if *protocol == 0 {
		*protocol = 2
	}
	for _, t := range timeouts {
		if *t == 0 {
			*t = redisPatience
		}
	}
}

// quiet ends the library's own log, which knows neither levels nor our format: what matters comes back as errors.
var quiet sync.Once

type silent struct{}

func (silent) Printf(context.Context, string, ...any) {}

// Client returns the pool.
func (r *Redis) Client() redis.UniversalClient { return r.client }

// Key returns a key or channel of this installation.
func (r *Redis) Key(name string) string { return "walgate:" + r.namespace + ":" + name }

// Addr names the servers, for people.
func (r *Redis) Addr() string { return strings.Join(r.addrs, ", ") }

// Down says why Redis can't be used and since when; "" while it can, as far as is known.
func (r *Redis) Down() (why string, since time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.downLocked(), r.since
}

func (r *Redis) downLocked() string {
	for _, what := range slices.Sorted(maps.Keys(r.faults)) {
		return what + ": " + r.faults[what]
	}
	return ""
}

// Check tries all that instances do with Redis and the rights that they need for it.
func (r *Redis) Check(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*redisPatience)
	defer cancel()
	subscribe, publish, channel := r.client.Subscribe, r.client.Publish, r.Key("check")
	if r.sharded {
		subscribe, publish = r.client.SSubscribe, r.client.SPublish
	}
	s := subscribe(ctx, channel)
	defer s.Close()
	_, err := s.ReceiveTimeout(ctx, redisPatience)
	if err == nil {
		err = publish(ctx, channel, "").Err()
	}
	if err == nil {
		err = r.client.Eval(ctx, `return redis.call('GET', KEYS[1])`, []string{r.Key("check")}).Err()
	}
	if err != nil && !errors.Is(err, redis.Nil) {
		return errors.New(ExplainRedis(err))
	}
	return nil
}

// Close closes all connections.
func (r *Redis) Close() error { return r.client.Close() }

// judge notes whether one of the things that Redis is used for goes well, and says so in the log when that changes all in all.
func (r *Redis) judge(what string, err error) {
	r.mu.Lock()
	was, since := r.downLocked(), r.since
	if delete(r.faults, what); err != nil {
		r.faults[what] = ExplainRedis(err)
	}
	is := r.downLocked()
	if was == "" && is != "" {
		r.since = time.Now()
	}
	r.mu.Unlock()
	switch {
	case was == "" && is != "":
		r.logger.Warn("Redis can't be used: instances learn of changes from the change log, a moment later; nothing is lost. See that Redis runs and that redis.url is right", "redis", r.Addr(), "error", is)
	case was != "" && is == "":
		r.logger.Info("Redis can be used again", "redis", r.Addr(), "away_for", time.Since(since).Round(time.Millisecond).String())
	}
}

// ExplainRedis says what an error of Redis means, where that is known.
func ExplainRedis(err error) string {
	text := err.Error()
	switch {
	case strings.Contains(text, "NOPERM"):
		return "its ACL doesn't allow what walgate needs: the user of redis.url wants ~walgate:* &walgate:* +publish +subscribe +unsubscribe +spublish +ssubscribe +sunsubscribe +ping +evalsha +eval +time +get +set, and with a database in the URL +select (" + text + ")"
	case strings.Contains(text, "NOAUTH"), strings.Contains(text, "WRONGPASS"):
		return "it refuses the user or password of redis.url (" + text + ")"
	}
	return text
}

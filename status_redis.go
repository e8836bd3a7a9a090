package main

import (
	"context"
	"errors"
	"io"

	"github.com/walgate/walgate/changelog"
)

// statusRedis is what instances tell each other through.
type statusRedis struct {
	Address string `json:"address"`
	Answers bool   `json:"answers"`
	Error   string `json:"error"`
}

func (s *status) readRedis(ctx context.Context, cfg *Config) {
	const name = "redis"
	r, err := changelog.OpenRedis(changelog.RedisOptions{URL: string(cfg.Redis.URL), Namespace: "status", Logger: newLogger(cfg, io.Discard)})
	s.Redis = &statusRedis{}
	if err == nil {
		s.Redis.Address = r.Addr()
		err = errors.Join(r.Check(ctx), r.Close())
	}
	if err != nil {
		s.Redis.Error = err.Error()
		s.add(statusWrong, name, s.Redis.Address+" can't be used: "+err.Error(), "nothing is lost: instances look at the change log four times a second instead, so live changes come a moment later, and each counts its rate limits for itself",
			"see that Redis runs, and that host, port, user and password in redis.url are right; instances use it again by themselves")
		return
	}
	s.Redis.Answers = true
	s.ok(name, "%s answers", s.Redis.Address)
}

package chaos

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/internal/pgserver"
	"github.com/walgate/walgate/internal/redisserver"
)

const (
	database    = "chaos"     // of the application
	logDatabase = "chaos_log" // of the change log, where it isn't beside the tables
	serverLimit = 90 * time.Second
)

// Stack is what outlives a run: servers of PostgreSQL and Redis that no other run uses at the same time. Between two runs
// its databases go; what a fault ruined is replaced.
type Stack struct {
	o      Options
	dir    string
	source *pgserver.Server // the application's; the present primary
	log    *pgserver.Server // of a change log elsewhere; nil until a run needs it
	redis  *redisserver.Server
	faked  bool // source and log run with a clock that can be set
}

// settings are those of every PostgreSQL here. It writes little WAL, so that a copy is small.
func settings() map[string]string {
	return map[string]string{"deadlock_timeout": "50ms", "min_wal_size": "32MB", "max_wal_size": "256MB", "autovacuum_naptime": "10s"}
}

// newStack starts the servers that every run needs.
func newStack(ctx context.Context, o Options) (*Stack, error) {
	s := &Stack{o: o}
	err := s.begin(ctx)
	if err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

func (s *Stack) begin(ctx context.Context) (err error) {
	if s.dir, err = os.MkdirTemp("", "walgate-chaos-"); err != nil {
		return err
	}
	if err := os.Chmod(s.dir, 0o711); err != nil { // PostgreSQL may run as another user
		return err
	}
	if s.source, err = s.postgres(ctx); err != nil {
		return err
	}
	if s.o.Redis {
		s.redis, err = redisserver.Start(ctx, redisserver.Options{})
	}
	return err
}

func (s *Stack) postgres(ctx context.Context) (*pgserver.Server, error) {
	return pgserver.Start(ctx, pgserver.Options{Install: s.o.Install, Fast: true, Settings: settings()})
}

// close ends the servers and removes their files.
func (s *Stack) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), serverLimit)
	defer cancel()
	var err error
	for _, server := range []*pgserver.Server{s.source, s.log} {
		if server != nil {
			err = errors.Join(err, server.Crash(), server.Close(ctx))
		}
	}
	if s.redis != nil {
		err = errors.Join(err, s.redis.Close())
	}
	if s.dir != "" {
		err = errors.Join(err, os.RemoveAll(s.dir))
	}
	return err
}

// prepare makes the servers fit for a run: as its setup wants them, empty, and with the right time.
func (s *Stack) prepare(ctx context.Context, w setup) error {
	if w.logElsewhere && s.log == nil {
		log, err := s.postgres(ctx)
		if err != nil {
			return err
		}
		s.log = log
		if s.faked {
			s.log.SetEnv(s.fakeClock("log"))
		}
	}
	if w.clock != s.faked {
		if err := s.fake(ctx, w.clock); err != nil {
			return err
		}
	}
	if s.redis != nil {
		if _, err := s.redis.Do(ctx, "FLUSHALL"); err != nil {
			return err
		}
	}
	if err := s.clear(ctx, s.source); err != nil {
		return err
	}
	if s.log != nil {
		if err := s.clear(ctx, s.log); err != nil {
			return err
		}
	}
	if err := s.source.CreateDatabase(ctx, database); err != nil {
		return err
	}
	if w.logElsewhere {
		return s.log.CreateDatabase(ctx, logDatabase)
	} else if w.logApart {
		return s.source.CreateDatabase(ctx, logDatabase)
	}
	return nil
}

// clear removes what the last run left.
func (s *Stack) clear(ctx context.Context, server *pgserver.Server) error {
	conn, err := pgx.Connect(ctx, server.DSN("postgres"))
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	rows, err := conn.Query(ctx, `SELECT datname::text FROM pg_database WHERE datname LIKE 'chaos%'`)
	if err != nil {
		return err
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := server.DropDatabase(ctx, name); err != nil {
			return err
		}
	}
	_, err = conn.Exec(ctx, `SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE NOT active`)
	return err
}

// fake restarts the databases' servers with a clock that can be set, or with the machine's.
func (s *Stack) fake(ctx context.Context, on bool) error {
	for name, server := range map[string]*pgserver.Server{"source": s.source, "log": s.log} {
		if server == nil {
			continue
		}
		var env []string
		if on {
			if err := s.setClock(name, 0); err != nil {
				return err
			}
			env = s.fakeClock(name)
		}
		server.SetEnv(env)
		if err := server.Restart(ctx); err != nil {
			return err
		}
	}
	s.faked = on
	return nil
}

// fakeClock is the environment in which a server reads its clock's deviation from a file.
func (s *Stack) fakeClock(name string) []string {
	return []string{"LD_PRELOAD=" + s.o.FakeTime, "FAKETIME_TIMESTAMP_FILE=" + s.clockFile(name), "FAKETIME_NO_CACHE=1",
		"FAKETIME_DONT_FAKE_MONOTONIC=1", "FAKETIME_DONT_RESET=1", "FAKETIME_DISABLE_SHM=1"}
}

func (s *Stack) clockFile(name string) string { return filepath.Join(s.dir, "clock-"+name) }

// setClock writes by how much a server's clock differs from the machine's.
func (s *Stack) setClock(name string, by time.Duration) error {
	path := s.clockFile(name)
	if err := os.WriteFile(path+".new", fmt.Appendf(nil, "%+d\n", int(by.Seconds())), 0o644); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// FindFakeTime returns the path of libfaketime, with which PostgreSQL's clock can be set, or nothing.
func FindFakeTime() string {
	found, _ := filepath.Glob("/usr/lib/*/faketime/libfaketime.so.1") // the pattern is well formed
	if len(found) == 0 {
		return ""
	}
	return found[0]
}

package pgserver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/internal/ports"
)

const (
	startLimit     = 60 * time.Second // Crash recovery included.
	fastLimit      = 15 * time.Second // A walsender whose client doesn't answer holds a fast shutdown for ever.
	immediateLimit = 8 * time.Second  // The postmaster itself kills what is left after 5 s.
	portTries      = 5
)

// Options say what server to start. The zero value is a durable server of the newest version in a temporary directory.
type Options struct {
	// Install is the set of binaries to use; the zero value means the newest found with the Major version.
	Install Install
	// Major is the wanted major version; 0 means that of Dir's data, else the newest found.
	Major int
	// Dir holds the server's files and is kept by Close; data in it from an earlier run is used again. Empty means a
	// temporary directory, removed by Close.
	Dir string
	// Port is the TCP port on 127.0.0.1; 0 means a free one, kept over restarts.
	Port int
	// Settings are further server settings, over the ones that every server here has.
	Settings map[string]string
	// Password is the superuser's. Empty trusts every local connection: for tests only.
	Password string
	// Fast turns fsync off and copies the data directory from a cached one: for tests and throw-away data.
	Fast bool
	// Fresh runs initdb even where Fast would copy. Copies share one system identifier, which tests of a replaced
	// server must not.
	Fresh bool
	// Env is further environment of the server's processes, as NAME=VALUE.
	Env []string
	// fill makes the data directory in place of initdb.
	fill func(data string) error
}

// Server is a running, stopped or crashed private PostgreSQL server.
type Server struct {
	install Install
	options Options
	root    string
	port    int
	lock    *os.File // Held on a temporary root; nil for one that is kept.

	releasePort func() // nil: the port was named, or there is none yet

	mu      sync.Mutex // Guards process, and is held while the server starts and stops.
	process *process
}

// Start makes a data directory where none exists, starts a server on it and waits until it accepts connections.
// The caller must call Close.
func Start(ctx context.Context, o Options) (*Server, error) {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	install, err := chooseInstall(ctx, o)
	if err != nil {
		return nil, err
	}
	s := &Server{install: install, options: o}
	if err := s.prepare(ctx); err != nil {
		return nil, errors.Join(err, s.removeTemporary())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.startOnPort(ctx); err != nil {
		return nil, errors.Join(err, s.removeTemporary())
	}
	return s, nil
}

func chooseInstall(ctx context.Context, o Options) (Install, error) {
	if o.Dir != "" {
		major, err := clusterMajor(filepath.Join(o.Dir, "data"))
		if err != nil {
			return Install{}, err
		}
		if major != 0 {
			o.Major = major // Another version could not read the data.
		}
	}
	if o.Install.Bin != "" && (o.Major == 0 || o.Major == o.Install.Major) {
		return o.Install, nil
	}
	installs, err := Find(ctx)
	if err != nil {
		return Install{}, err
	}
	return pick(installs, o.Major)
}

// prepare makes the server's directory and, where there is none yet, its data.
func (s *Server) prepare(ctx context.Context) error {
	if err := s.makeRoot(); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(s.root), 0o755); err != nil {
		return err
	}
	if err := checkReachable(runAs(), filepath.Dir(s.root)); err != nil {
		return err
	}
	for _, dir := range []string{s.root, s.socketDir()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
		if user := runAs(); user != nil {
			if err := os.Chown(dir, int(user.uid), int(user.gid)); err != nil {
				return err
			}
		}
	}
	major, err := clusterMajor(s.dataDir())
	if err != nil || major != 0 {
		return err
	}
	if s.options.fill != nil {
		return s.options.fill(s.dataDir())
	}
	return initCluster(ctx, s.install, s.root, s.dataDir(), s.options)
}

func (s *Server) makeRoot() (err error) {
	if s.options.Dir == "" {
		sweep(os.TempDir(), time.Now())
		if s.root, err = os.MkdirTemp("", temporaryPrefix); err != nil {
			return err
		}
		s.lock, err = lockRoot(s.root)
		return err
	}
	s.root, err = filepath.Abs(s.options.Dir)
	return err
}

// startOnPort starts the server; where the port is ours to choose, it chooses again if somebody else took it first.
func (s *Server) startOnPort(ctx context.Context) error {
	if s.options.Port != 0 {
		s.port = s.options.Port
		return s.launch(ctx)
	}
	var err error
	for range portTries {
		if s.port, s.releasePort, err = ports.Reserve(); err != nil {
			return err
		}
		if err = s.launch(ctx); err == nil {
			return nil
		}
		s.releasePort()
		if !s.portTaken() {
			return err
		}
	}
	return err
}

// portTaken says whether something listens on or holds the server's port.
func (s *Server) portTaken() bool {
	listener, err := net.Listen("tcp", s.address())
	if err != nil {
		return true
	}
	return listener.Close() != nil
}

// launch runs postgres on the data directory and waits until it accepts connections. The caller holds mu.
func (s *Server) launch(ctx context.Context) error {
	settings := []map[string]string{defaultSettings()}
	if s.options.Fast {
		settings = append(settings, fastSettings())
	}
	settings = append(settings, s.options.Settings, map[string]string{
		"port": strconv.Itoa(s.port), "unix_socket_directories": s.socketSetting(),
	})
	if err := writeSettings(s.dataDir(), settings...); err != nil {
		return err
	}
	log, err := os.OpenFile(s.LogPath(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(filepath.Join(s.install.Bin, "postgres"), "-D", s.dataDir()) // Outlives ctx: Stop ends it.
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = s.root, append(serverEnv(), s.options.Env...), log, log
	cmd.SysProcAttr = processAttributes(runAs())
	if s.process, err = startProcess(cmd); err != nil {
		return fmt.Errorf("start %s: %w", cmd.Path, err)
	}
	if err := s.awaitReady(ctx); err != nil {
		return errors.Join(err, s.shutdown(context.WithoutCancel(ctx), immediateShutdown, immediateLimit))
	}
	return nil
}

// awaitReady waits until the server accepts connections.
func (s *Server) awaitReady(ctx context.Context) error {
	retry := time.NewTicker(10 * time.Millisecond)
	defer retry.Stop()
	for {
		conn, err := pgx.Connect(ctx, s.DSN(superuser))
		if err == nil {
			return conn.Close(ctx)
		}
		select {
		case <-s.process.exited:
			return fmt.Errorf("PostgreSQL %s ended while starting: %w; its log %s ends with:\n%s",
				s.install.Version, s.process.err, s.LogPath(), s.logTail())
		case <-ctx.Done():
			return fmt.Errorf("PostgreSQL %s accepts no connections: %w; see its log %s", s.install.Version, err, s.LogPath())
		case <-retry.C:
		}
	}
}

// Stop shuts the server down, data written and walsenders served, and waits for its process. What doesn't stop in
// time is stopped at once, and at last killed. The data stays for Restart. Stopping a stopped server does nothing.
func (s *Server) Stop(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.shutdown(ctx, fastShutdown, fastLimit)
}

// Crash ends the server at once, without a checkpoint and without a word to its clients' transactions, as a power cut
// would; Restart recovers from the WAL.
func (s *Server) Crash() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.shutdown(context.Background(), immediateShutdown, immediateLimit)
}

// shutdown sends the signal and escalates when it has no effect within limit. The caller holds mu.
func (s *Server) shutdown(ctx context.Context, signal os.Signal, limit time.Duration) error {
	if s.process == nil || !s.process.running() {
		return nil
	}
	first, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if s.process.end(first, signal) {
		return nil
	}
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), immediateLimit)
	defer cancel()
	if s.process.end(last, immediateShutdown) {
		return nil
	}
	if err := killGroup(s.process.cmd.Process.Pid); err != nil {
		return fmt.Errorf("kill PostgreSQL, process %d: %w", s.process.cmd.Process.Pid, err)
	}
	<-s.process.exited
	return nil
}

// Restart stops the server if it runs and starts it again, on the same port and data.
func (s *Server) Restart(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.shutdown(ctx, fastShutdown, fastLimit); err != nil {
		return err
	}
	return s.launch(ctx)
}

// SetEnv replaces Options.Env for the starts to come.
func (s *Server) SetEnv(env []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.options.Env = env
}

// Close stops the server and removes its directory if that was a temporary one.
func (s *Server) Close(ctx context.Context) error {
	err := s.Stop(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.releasePort != nil {
		s.releasePort()
	}
	return errors.Join(err, s.removeTemporary())
}

func (s *Server) removeTemporary() error {
	if s.options.Dir != "" || s.root == "" {
		return nil
	}
	err := os.RemoveAll(s.root)
	if s.lock != nil {
		err = errors.Join(err, s.lock.Close())
		s.lock = nil
	}
	return err
}

// DSN returns a connection string for the superuser to a database.
func (s *Server) DSN(database string) string {
	user := url.User(superuser)
	if s.options.Password != "" {
		user = url.UserPassword(superuser, s.options.Password)
	}
	dsn := url.URL{Scheme: "postgres", User: user, Host: s.address(), Path: "/" + database, RawQuery: "sslmode=disable"}
	return dsn.String()
}

// Port returns the TCP port on 127.0.0.1.
func (s *Server) Port() int { return s.port }

// Version returns the major version.
func (s *Server) Version() int { return s.install.Major }

// LogPath returns the file that the server logs to.
func (s *Server) LogPath() string { return filepath.Join(s.root, "postgres.log") }

func (s *Server) address() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(s.port)) }

func (s *Server) dataDir() string { return filepath.Join(s.root, "data") }

func (s *Server) socketDir() string { return filepath.Join(s.root, "socket") }

// socketSetting turns the Unix socket off where its path would be longer than the system allows.
func (s *Server) socketSetting() string {
	const longest = 80 // Of 104 on some systems, less the file's own name.
	if len(s.socketDir()) > longest {
		return ""
	}
	return s.socketDir()
}

// logTail returns the last lines of the log for an error message.
func (s *Server) logTail() string {
	text, err := os.ReadFile(s.LogPath())
	if err != nil {
		return err.Error()
	}
	const most = 2000
	if len(text) > most {
		text = text[len(text)-most:]
	}
	return string(text)
}

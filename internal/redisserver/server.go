// Package redisserver runs a private redis-server for tests, the benchmark and the fault harness.
//
// It owns the life of the process, which listens on loopback only, keeps nothing on disk and dies with its parent. It never
// touches a Redis that it did not start. A Server is safe for concurrent use.
package redisserver

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/walgate/walgate/internal/ports"
)

const (
	startLimit = 15 * time.Second
	callLimit  = 5 * time.Second
	portTries  = 5
)

// ErrNotFound says that the machine has no redis-server.
var ErrNotFound = errors.New("redis-server was not found on this machine: install it (Debian: apt-get install redis-server)")

// Options say what server to start.
type Options struct {
	// Port is the TCP port on 127.0.0.1; 0 means a free one, kept over restarts.
	Port int
	// Settings are lines of redis.conf, such as "requirepass secret", over the ones that every server here has;
	// $PORT stands for the port.
	Settings []string
	// Sentinel runs it as a sentinel, whose settings name its masters.
	Sentinel bool
}

// Server is a running, paused or killed private redis-server.
type Server struct {
	options Options
	binary  string
	dir     string
	port    int

	releasePort func() // nil: the port was named

	mu     sync.Mutex
	cmd    *exec.Cmd
	exited chan struct{} // closed when the process has been waited for
}

// Find returns the path of the redis-server of this machine, or ErrNotFound.
func Find() (string, error) {
	path, err := exec.LookPath("redis-server")
	if err != nil {
		return "", ErrNotFound
	}
	return path, nil
}

// Start starts a server and waits until it answers. The caller must call Close.
func Start(ctx context.Context, o Options) (*Server, error) {
	binary, err := Find()
	if err != nil {
		return nil, err
	}
	s := &Server{options: o, binary: binary}
	if s.dir, err = os.MkdirTemp("", "walgate-redis-"); err != nil {
		return nil, err
	}
	for range portTries {
		if s.port = o.Port; s.port == 0 {
			if s.port, s.releasePort, err = ports.Reserve(); err != nil {
				break
			}
		}
		if err = s.launch(ctx); err == nil {
			return s, nil
		}
		if o.Port != 0 {
			break
		}
		s.releasePort()
	}
	return nil, errors.Join(err, os.RemoveAll(s.dir))
}

func (s *Server) launch(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	config, err := s.configure()
	if err != nil {
		return err
	}
	args := []string{config}
	if s.options.Sentinel {
		args = append(args, "--sentinel")
	}
	cmd := exec.Command(s.binary, args...)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = attributes()
	exited := make(chan struct{})
	started := make(chan error, 1)
	go func() { // stays with its thread, whose end would end the child
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // its end is what counts
			close(exited)
		}
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("start redis-server: %w", err)
	}
	s.mu.Lock()
	s.cmd, s.exited = cmd, exited
	s.mu.Unlock()
	retry := time.NewTicker(5 * time.Millisecond)
	defer retry.Stop()
	for {
		conn, err := net.DialTimeout("tcp", s.Addr(), callLimit)
		if err == nil {
			return conn.Close()
		}
		select {
		case <-exited:
			return fmt.Errorf("redis-server ended while starting: %s", out.String())
		case <-ctx.Done():
			_ = s.Kill() // nobody waits for it any more
			return fmt.Errorf("redis-server doesn't answer: %w", err)
		case <-retry.C:
		}
	}
}

// configure writes the configuration anew: sentinels change theirs.
func (s *Server) configure() (path string, err error) {
	lines := []string{"port " + strconv.Itoa(s.port), "bind 127.0.0.1", "dir " + s.dir, "daemonize no"}
	if !s.options.Sentinel {
		lines = append(lines, `save ""`, "appendonly no")
	}
	path = filepath.Join(s.dir, "redis.conf")
	text := strings.Join(append(lines, s.options.Settings...), "\n") + "\n"
	return path, os.WriteFile(path, []byte(strings.ReplaceAll(text, "$PORT", strconv.Itoa(s.port))), 0o600)
}

// Addr is host:port.
func (s *Server) Addr() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(s.port)) }

// URL is the address as redis.url takes it, without a password.
func (s *Server) URL() string { return "redis://" + s.Addr() + "/0" }

// Kill ends the process with SIGKILL and waits for it. A server that has ended already is no error.
func (s *Server) Kill() error { return s.end(syscall.SIGKILL) }

// Stop ends the process with SIGTERM and waits for it.
func (s *Server) Stop() error { return s.end(syscall.SIGTERM) }

func (s *Server) end(signal syscall.Signal) error {
	s.mu.Lock()
	cmd, exited := s.cmd, s.exited
	s.mu.Unlock()
	if err := cmd.Process.Signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-exited:
	case <-time.After(callLimit):
		_ = cmd.Process.Kill()
		<-exited
	}
	return nil
}

// Restart starts the server again on its port, empty, ending it first where it runs.
func (s *Server) Restart(ctx context.Context) error {
	if err := s.Kill(); err != nil {
		return err
	}
	return s.launch(ctx)
}

// Pause stops the process: connections stay, and nothing is answered.
func (s *Server) Pause() error { return s.signal(syscall.SIGSTOP) }

// Resume ends Pause.
func (s *Server) Resume() error { return s.signal(syscall.SIGCONT) }

func (s *Server) signal(signal syscall.Signal) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cmd.Process.Signal(signal)
}

// Close ends the server and removes its directory.
func (s *Server) Close() error {
	err := errors.Join(s.Kill(), os.RemoveAll(s.dir))
	if s.releasePort != nil {
		s.releasePort()
	}
	return err
}

// Do sends one command over a connection of its own and returns the answer: a text, a number as text, or the elements of a
// list, a line each. An error answer is an error.
func (s *Server) Do(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", s.Addr())
	if err != nil {
		return "", err
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		return "", err
	}
	var b strings.Builder
	fmt.Fprintf(&b, "*%d\r\n", len(args))
	for _, a := range args {
		fmt.Fprintf(&b, "$%d\r\n%s\r\n", len(a), a)
	}
	if _, err := io.WriteString(conn, b.String()); err != nil {
		return "", err
	}
	return answer(bufio.NewReader(conn))
}

// answer reads one value of the RESP2 protocol.
func answer(r *bufio.Reader) (string, error) {
	line, err := r.ReadString('\n')
	if err != nil {
		return "", err
	}
	kind, rest := line[0], strings.TrimRight(line[1:], "\r\n")
	n, _ := strconv.Atoi(rest)
	switch kind {
	case '-':
		return "", errors.New(rest)
	case '$':
		if n < 0 {
			return "", nil
		}
		b := make([]byte, n+2)
		_, err := io.ReadFull(r, b)
		return string(b[:n]), err
	case '*':
		var all []string
		for range n {
			one, err := answer(r)
			if err != nil {
				return "", err
			}
			all = append(all, one)
		}
		return strings.Join(all, "\n"), nil
	}
	return rest, nil
}

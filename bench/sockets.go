package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/fasthttp/websocket"
	"golang.org/x/sync/errgroup"
)

// sockets are WebSocket clients that do as little as possible: they share the machine with what is measured. Once open,
// a socket is a file descriptor in a poller, without goroutine or buffer of its own.
type sockets struct {
	onChange func(payload []byte, at time.Time) // payload is valid during the call
	changes  atomic.Int64
	ready    atomic.Int64
	refused  atomic.Int64  // sockets that the server closed, where that is let through
	small    bool          // sockets take little before they are read
	bell     chan struct{} // capacity 1: a count has reached what is waited for
	want     atomic.Int64
	failed   chan error
	poller   *poller
	// reopen, if set, opens another socket for one that the server closed, which gets everything again.
	reopen    func(i int) (*socket, error)
	reopening sync.WaitGroup

	mu   sync.Mutex
	open []*socket
}

// socket is one of them; only the poller's goroutine touches it once it is open.
type socket struct {
	fd   int
	i    int    // its number
	got  int64  // changes
	rest []byte // of a frame that hasn't come whole
}

func newSockets(onChange func([]byte, time.Time)) (*sockets, error) {
	s := &sockets{onChange: onChange, bell: make(chan struct{}, 1), failed: make(chan error, 1)}
	var err error
	s.poller, err = newPoller(func(one *socket, data []byte, err error) bool {
		if err == nil {
			err = s.take(one, data)
		}
		if err == nil {
			return true
		}
		if s.reopen != nil {
			s.refused.Add(1)
			s.changes.Add(-one.got)
			s.reopening.Go(func() { s.replace(one.i) })
			return false
		}
		s.fail(err)
		return false
	})
	return s, err
}

func (s *sockets) fail(err error) {
	select {
	case s.failed <- err:
	default:
	}
}

// replace opens another socket in the place of a closed one.
func (s *sockets) replace(i int) {
	one, err := s.reopen(i)
	if err == nil {
		one.i = i
		err = s.poller.add(one)
	}
	if err != nil {
		s.fail(err)
	}
}

func (s *sockets) len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.open)
}

// connect opens one more socket and sends its first frame, if it has one. It isn't read yet.
func (s *sockets) connect(ctx context.Context, base, path, token, first string) (*socket, error) {
	header := http.Header{}
	if token != "" {
		header.Set("Authorization", "Bearer "+token)
	}
	dialer := websocket.Dialer{HandshakeTimeout: 10 * time.Second, ReadBufferSize: 1024, WriteBufferSize: 1024}
	if s.small {
		tcp := &net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
			return c.Control(func(fd uintptr) { syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 4096) })
		}}
		dialer.NetDialContext = tcp.DialContext
	}
	conn, _, err := dialer.DialContext(ctx, "ws"+strings.TrimPrefix(base, "http")+path, header)
	if err != nil {
		return nil, fmt.Errorf("open a socket: %w", err)
	}
	defer conn.Close() // its file descriptor is doubled
	if first != "" {
		if err := conn.WriteMessage(websocket.TextMessage, []byte(first)); err != nil {
			return nil, err
		}
	}
	raw, err := conn.UnderlyingConn().(*net.TCPConn).SyscallConn()
	if err != nil {
		return nil, err
	}
	one := &socket{}
	var failed error
	if err := raw.Control(func(fd uintptr) { one.fd, failed = syscall.Dup(int(fd)) }); err != nil {
		return nil, err
	}
	if failed != nil {
		return nil, failed
	}
	syscall.CloseOnExec(one.fd)
	s.mu.Lock()
	s.open = append(s.open, one)
	s.mu.Unlock()
	return one, nil
}

// connectAll opens sockets until there are n, several at a time, and reads them.
func (s *sockets) connectAll(ctx context.Context, n int, connect func(ctx context.Context, i int) (*socket, error)) error {
	return s.openAll(ctx, n, connect, s.poller.add)
}

func (s *sockets) openAll(ctx context.Context, n int, connect func(ctx context.Context, i int) (*socket, error), then func(*socket) error) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for i := s.len(); i < n; i++ {
		g.Go(func() error {
			one, err := connect(ctx, i)
			if err != nil {
				return err
			}
			one.i = i
			return then(one)
		})
	}
	return g.Wait()
}

// take takes the server's frames apart: whole and unmasked, as all servers here send them.
func (s *sockets) take(one *socket, data []byte) error {
	now := time.Now()
	if len(one.rest) > 0 {
		one.rest = append(one.rest, data...)
		data = one.rest
	}
	for {
		kind, payload, size := parseFrame(data)
		if size == 0 {
			break
		}
		if kind == websocket.PingMessage {
			pong(one.fd, payload)
		} else if err := s.frame(one, kind, payload, now); err != nil {
			return err
		}
		data = data[size:]
	}
	if one.rest = append(one.rest[:0], data...); len(data) == 0 {
		one.rest = nil
	}
	return nil
}

// pong answers a ping: the server gives up who doesn't. It is let go where the socket can't take it just now.
func pong(fd int, payload []byte) {
	frame := append([]byte{0x80 | websocket.PongMessage, 0x80 | byte(len(payload)), 0, 0, 0, 0}, payload...) // masked with zeros
	syscall.Write(fd, frame)
}

// parseFrame returns the first frame and its size; 0: it isn't whole.
func parseFrame(b []byte) (kind int, payload []byte, size int) {
	if len(b) < 2 {
		return 0, nil, 0
	}
	from, length := 2, int(b[1])
	switch length {
	case 126:
		if len(b) < 4 {
			return 0, nil, 0
		}
		from, length = 4, int(binary.BigEndian.Uint16(b[2:]))
	case 127:
		if len(b) < 10 {
			return 0, nil, 0
		}
		from, length = 10, int(binary.BigEndian.Uint64(b[2:]))
	}
	if len(b) < from+length {
		return 0, nil, 0
	}
	return int(b[0] & 0x0f), b[from : from+length], from + length
}

func (s *sockets) frame(one *socket, kind int, payload []byte, at time.Time) error {
	switch {
	case kind == websocket.CloseMessage:
		return fmt.Errorf("closed by the server: %q", payload)
	case bytes.HasPrefix(payload, []byte(`{"version"`)):
		if s.onChange != nil {
			s.onChange(payload, at)
		}
		one.got++
		s.count(&s.changes)
	case bytes.HasPrefix(payload, []byte(`{"type":"ready"`)):
		s.count(&s.ready)
	case bytes.HasPrefix(payload, []byte(`{"type":"error"`)), bytes.HasPrefix(payload, []byte(`{"type":"full_resync_required"`)):
		return fmt.Errorf("refused: %s", payload)
	}
	return nil
}

func (s *sockets) count(n *atomic.Int64) {
	if n.Add(1) == s.want.Load() {
		s.ring()
	}
}

func (s *sockets) ring() {
	select {
	case s.bell <- struct{}{}:
	default:
	}
}

// waitMost is how long frames that are on their way may take.
const waitMost = 5 * time.Minute

// wait waits until a count has reached want.
func (s *sockets) wait(ctx context.Context, n *atomic.Int64, want int64) error {
	s.want.Store(want)
	timeout := time.NewTimer(waitMost)
	defer timeout.Stop()
	for n.Load() < want {
		select {
		case <-s.bell:
		case err := <-s.failed:
			return err
		case <-timeout.C:
			return fmt.Errorf("only %d of %d frames came within %s", n.Load(), want, waitMost)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// subscribe opens a socket for a subject on walgate's stream, from a position on.
func (s *sockets) subscribe(ctx context.Context, g *gateway, subject, since string) (*socket, error) {
	first := fmt.Sprintf(`{"type":"subscribe","since":%q,"collections":["items"]}`, since)
	return s.connect(ctx, g.base, "/sync/stream", token(subject), first)
}

// follow opens sockets for subjects until there are n, and waits until all have caught up.
func (s *sockets) follow(ctx context.Context, g *gateway, n int, since string, subject func(i int) string) error {
	return s.followAll(ctx, []*gateway{g}, n, since, subject)
}

// followAll spreads the sockets evenly over several instances.
func (s *sockets) followAll(ctx context.Context, all []*gateway, n int, since string, subject func(i int) string) error {
	err := s.connectAll(ctx, n, func(ctx context.Context, i int) (*socket, error) {
		return s.subscribe(ctx, all[i%len(all)], subject(i), since)
	})
	if err != nil {
		return err
	}
	return s.wait(ctx, &s.ready, int64(n))
}

func (s *sockets) close() error {
	err := s.poller.close()
	s.reopening.Wait()
	for _, one := range s.open {
		syscall.Close(one.fd)
	}
	return err
}

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fasthttp/websocket"
)

// sockets are WebSocket clients that do as little as possible: they share the machine with what is measured.
type sockets struct {
	conns    []*websocket.Conn
	onChange func(payload []byte, at time.Time) // called by many goroutines; payload is valid during the call
	changes  atomic.Int64
	ready    atomic.Int64
	bell     chan struct{} // capacity 1: a count has reached what is waited for
	want     atomic.Int64
	readers  sync.WaitGroup
	failed   chan error
}

func newSockets(onChange func([]byte, time.Time)) *sockets {
	return &sockets{onChange: onChange, bell: make(chan struct{}, 1), failed: make(chan error, 1)}
}

// connect opens one more socket and sends its first frame, if it has one.
func (s *sockets) connect(ctx context.Context, base, path, token, first string) error {
	header := http.Header{}
	if token != "" {
		header.Set("Authorization", "Bearer "+token)
	}
	dialer := websocket.Dialer{HandshakeTimeout: 10 * time.Second, ReadBufferSize: 1024, WriteBufferSize: 1024}
	conn, _, err := dialer.DialContext(ctx, "ws"+strings.TrimPrefix(base, "http")+path, header)
	if err != nil {
		return fmt.Errorf("open socket %d: %w", len(s.conns)+1, err)
	}
	s.conns = append(s.conns, conn)
	if first != "" {
		if err := conn.WriteMessage(websocket.TextMessage, []byte(first)); err != nil {
			return err
		}
	}
	s.readers.Go(func() {
		err := s.read(conn.UnderlyingConn())
		select {
		case s.failed <- err:
		default:
		}
	})
	return nil
}

// read takes the server's frames apart: whole, unmasked and small, as all servers here send them.
func (s *sockets) read(conn io.Reader) error {
	r := bufio.NewReaderSize(conn, 4096)
	for {
		head, err := r.Peek(2)
		if err != nil {
			return err
		}
		kind, size := head[0]&0x0f, int(head[1])
		r.Discard(2) // peeked
		if size == 126 {
			long, err := r.Peek(2)
			if err != nil {
				return err
			}
			size = int(binary.BigEndian.Uint16(long))
			r.Discard(2)
		}
		payload, err := r.Peek(size)
		if err != nil {
			return fmt.Errorf("a frame of %d bytes: %w", size, err)
		}
		switch {
		case kind == websocket.CloseMessage:
			return fmt.Errorf("closed by the server: %q", payload)
		case bytes.HasPrefix(payload, []byte(`{"version"`)):
			if s.onChange != nil {
				s.onChange(payload, time.Now())
			}
			s.count(&s.changes)
		case bytes.HasPrefix(payload, []byte(`{"type":"ready"`)):
			s.count(&s.ready)
		case bytes.HasPrefix(payload, []byte(`{"type":"error"`)), bytes.HasPrefix(payload, []byte(`{"type":"full_resync_required"`)):
			return fmt.Errorf("refused: %s", payload)
		}
		r.Discard(size)
	}
}

func (s *sockets) count(n *atomic.Int64) {
	if n.Add(1) == s.want.Load() {
		select {
		case s.bell <- struct{}{}:
		default:
		}
	}
}

// wait waits until a count has reached want.
func (s *sockets) wait(ctx context.Context, n *atomic.Int64, want int64) error {
	s.want.Store(want)
	timeout := time.NewTimer(time.Minute)
	defer timeout.Stop()
	for n.Load() < want {
		select {
		case <-s.bell:
		case err := <-s.failed:
			return err
		case <-timeout.C:
			return fmt.Errorf("only %d of %d frames came within a minute", n.Load(), want)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// subscribe opens a socket for a subject on walgate's stream, from a position on.
func (s *sockets) subscribe(ctx context.Context, g *gateway, subject, since string) error {
	first := fmt.Sprintf(`{"type":"subscribe","since":%q,"collections":["items"]}`, since)
	return s.connect(ctx, g.base, "/sync/stream", token(subject), first)
}

func (s *sockets) close() error {
	var err error
	for _, c := range s.conns {
		err = errors.Join(err, c.Close())
	}
	s.readers.Wait()
	return err
}

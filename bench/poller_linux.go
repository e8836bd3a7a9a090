package main

import (
	"errors"
	"io"
	"sync"
	"syscall"
	"time"
)

// poller reads many sockets on one goroutine: with a goroutine each, their scheduling would cost as much as what is
// measured.
type poller struct {
	epoll  int
	handle func(one *socket, data []byte, err error) (more bool)
	mu     sync.Mutex
	known  map[int32]*socket
	closed bool
	done   chan struct{}
}

// newPoller returns a poller that hands what comes to handle, and forgets the socket where handle says so.
func newPoller(handle func(*socket, []byte, error) bool) (*poller, error) {
	fd, err := syscall.EpollCreate1(syscall.EPOLL_CLOEXEC)
	if err != nil {
		return nil, err
	}
	p := &poller{epoll: fd, handle: handle, known: map[int32]*socket{}, done: make(chan struct{})}
	go p.run()
	return p, nil
}

func (p *poller) add(one *socket) error {
	p.mu.Lock()
	p.known[int32(one.fd)] = one
	p.mu.Unlock()
	return syscall.EpollCtl(p.epoll, syscall.EPOLL_CTL_ADD, one.fd, &syscall.EpollEvent{Events: syscall.EPOLLIN, Fd: int32(one.fd)})
}

// pause lets a socket stand unread until it is added again.
func (p *poller) pause(one *socket) error {
	return syscall.EpollCtl(p.epoll, syscall.EPOLL_CTL_DEL, one.fd, nil)
}

func (p *poller) run() {
	defer close(p.done)
	events := make([]syscall.EpollEvent, 512)
	due := make([]*socket, 0, len(events))
	buf := make([]byte, 256<<10)
	for {
		n, err := syscall.EpollWait(p.epoll, events, int((100 * time.Millisecond).Milliseconds()))
		if err != nil && !errors.Is(err, syscall.EINTR) {
			return
		}
		due = due[:0]
		p.mu.Lock()
		closed := p.closed
		for i := range max(n, 0) {
			due = append(due, p.known[events[i].Fd])
		}
		p.mu.Unlock()
		if closed {
			return
		}
		for _, one := range due {
			p.read(one, buf)
		}
	}
}

func (p *poller) read(one *socket, buf []byte) {
	n, err := syscall.Read(one.fd, buf)
	switch {
	case errors.Is(err, syscall.EAGAIN), errors.Is(err, syscall.EINTR):
		return
	case err == nil && n == 0:
		err = io.ErrUnexpectedEOF
	}
	if !p.handle(one, buf[:max(n, 0)], err) {
		syscall.EpollCtl(p.epoll, syscall.EPOLL_CTL_DEL, one.fd, nil)
	}
}

// close ends the reading; the sockets stay open.
func (p *poller) close() error {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	<-p.done
	return syscall.Close(p.epoll)
}

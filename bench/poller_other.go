//go:build unix && !linux

package main

import (
	"errors"
	"io"
	"os"
	"sync"
)

// poller reads each socket on a goroutine of its own: slower than what it is on Linux.
type poller struct {
	handle func(one *socket, data []byte, err error) (more bool)
	mu     sync.Mutex // handle is called by one goroutine at a time
	files  []*os.File
}

func newPoller(handle func(*socket, []byte, error) bool) (*poller, error) {
	return &poller{handle: handle}, nil
}

func (p *poller) add(one *socket) error {
	file := os.NewFile(uintptr(one.fd), "socket")
	p.mu.Lock()
	p.files = append(p.files, file)
	p.mu.Unlock()
	go func() {
		buf := make([]byte, 4<<10)
		for more := true; more; {
			n, err := file.Read(buf)
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			p.mu.Lock()
			more = p.handle(one, buf[:n], err)
			p.mu.Unlock()
		}
	}()
	return nil
}

// pause lets a socket stand unread.
func (p *poller) pause(*socket) error {
	return errors.New("sockets that stand still are measured on Linux only")
}

func (p *poller) close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, f := range p.files {
		f.Close()
	}
	return nil
}

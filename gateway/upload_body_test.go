package gateway

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/gofiber/fiber/v2"
)

// readUploads serves a route that reads its body as uploads are read, and passes on what came of it. interrupt gets each
// body before it is read.
func readUploads(t *testing.T, idle time.Duration, interrupt func(*uploadBody)) (address string, ends <-chan *uploadBody) {
	t.Helper()
	g := &Gateway{limits: defaultLimits()}
	g.limits.idle = idle
	app := fiber.New(fiber.Config{DisableStartupMessage: true, StreamRequestBody: true, BodyLimit: bodyLimit, ReadTimeout: 250 * time.Millisecond})
	read := make(chan *uploadBody, 1)
	app.Put("/", func(c *fiber.Ctx) error {
		b := g.uploadBody(c)
		interrupt(b)
		n, err := io.Copy(io.Discard, b)
		if n != b.n || (err == nil) != (b.err == nil) {
			t.Errorf("copied %d (%v), counted %d (%v)", n, err, b.n, b.err)
		}
		read <- b
		return endingWith(c, nil)
	})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ok(t, err)
	served := make(chan error, 1)
	go func() { served <- app.Listener(heardListener{l}) }()
	t.Cleanup(func() {
		ok(t, app.Shutdown())
		ok(t, <-served)
	})
	return l.Addr().String(), read
}

// TestUploadBody ends bodies in every way that they can end.
func TestUploadBody(t *testing.T) {
	t.Parallel()
	for _, x := range []struct {
		name, head, body string
		cut              bool // the connection ends with the body; else it stays open
		n                int64
		err              error
	}{
		{"whole", "Content-Length: 5", "hello", false, 5, nil},
		{"whole, then closed", "Content-Length: 5", "hello", true, 5, nil},
		{"empty", "Content-Length: 0", "", false, 0, nil},
		{"cut", "Content-Length: 6", "hello", true, 0, nil}, // refused before it is a request
		{"chunked", "Transfer-Encoding: chunked", "5\r\nhello\r\n0\r\n\r\n", false, 5, nil},
		{"chunked, cut within a chunk", "Transfer-Encoding: chunked", "6\r\nhello", true, 5, io.ErrUnexpectedEOF},
		{"chunked, cut between chunks", "Transfer-Encoding: chunked", "5\r\nhello\r\n", true, 5, io.ErrUnexpectedEOF},
		{"chunked, nothing came", "Transfer-Encoding: chunked", "", true, 0, io.ErrUnexpectedEOF},
		{"chunked, standing still", "Transfer-Encoding: chunked", "5\r\nhello\r\n", false, 5, os.ErrDeadlineExceeded},
	} {
		t.Run(x.name, func(t *testing.T) {
			t.Parallel()
			idle := patience
			if x.err == os.ErrDeadlineExceeded {
				idle = 50 * time.Millisecond
			}
			address, ends := readUploads(t, idle, func(*uploadBody) {})
			conn, err := net.Dial("tcp", address)
			ok(t, err)
			defer conn.Close()
			fmt.Fprintf(conn, "PUT / HTTP/1.1\r\nHost: x\r\n%s\r\n\r\n%s", x.head, x.body)
			if x.cut {
				if err := conn.(*net.TCPConn).CloseWrite(); !errors.Is(err, syscall.ENOTCONN) { // the server may have ended it first
					ok(t, err)
				}
			}
			if x.name == "cut" {
				answer, _ := io.ReadAll(conn)
				if len(ends) != 0 {
					t.Errorf("it was read, and answered %q", answer)
				}
				return
			}
			b := <-ends
			if b.n != x.n || !errors.Is(b.err, x.err) {
				t.Errorf("%d bytes and %v, want %d and %v", b.n, b.err, x.n, x.err)
			}
			want := InvalidRequest
			if x.err == os.ErrDeadlineExceeded {
				want = RequestTimeout
			}
			if p := b.problem(); x.err != nil && p.Code != want {
				t.Errorf("told as %v", p)
			}
		})
	}
}

// TestUploadBodyTakesItsTime sends a byte at a time for longer than the framework's limit of the whole request.
func TestUploadBodyTakesItsTime(t *testing.T) {
	t.Parallel()
	address, ends := readUploads(t, patience, func(*uploadBody) {})
	conn, err := net.Dial("tcp", address)
	ok(t, err)
	defer conn.Close()
	fmt.Fprintf(conn, "PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
	began := time.Now()
	sent := int64(0)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for ; time.Since(began) < 400*time.Millisecond; sent++ {
		<-tick.C
		fmt.Fprint(conn, "1\r\nx\r\n")
	}
	fmt.Fprint(conn, "0\r\n\r\n")
	if b := <-ends; b.err != nil || b.n != sent {
		t.Errorf("%d of %d bytes: %v", b.n, sent, b.err)
	}
}

// TestUploadBodyInterrupted ends a body that stands still, before its first byte and after some.
func TestUploadBodyInterrupted(t *testing.T) {
	t.Parallel()
	for _, early := range []bool{true, false} {
		bodies := make(chan *uploadBody, 1)
		address, ends := readUploads(t, patience, func(b *uploadBody) {
			if early {
				b.interrupt()
			}
			bodies <- b
		})
		conn, err := net.Dial("tcp", address)
		ok(t, err)
		fmt.Fprintf(conn, "PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
		if b := <-bodies; !early {
			b.interrupt()
		}
		if b := <-ends; !errors.Is(b.err, errInterrupted) {
			t.Errorf("early %v: %v", early, b.err)
		}
		conn.Close()
	}
}

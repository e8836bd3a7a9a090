package badlink

import (
	"bufio"
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 10 * time.Second

// echo starts a server that sends back every line, and reports each line and each end of a connection that reach it.
func echo(t *testing.T) (address string, seen <-chan string) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	lines := make(chan string, 1<<16)
	t.Cleanup(func() { _ = listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = conn.Close() }()
				in := bufio.NewReader(conn)
				for {
					line, err := in.ReadString('\n')
					if err != nil {
						lines <- name(err)
						return
					}
					lines <- line
					if _, err := io.WriteString(conn, line); err != nil {
						return
					}
				}
			}()
		}
	}()
	return listener.Addr().String(), lines
}

// name says how a connection ended.
func name(err error) string {
	if errors.Is(err, io.EOF) {
		return "FIN"
	}
	if errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
		return "RST"
	}
	return err.Error()
}

type client struct {
	*net.TCPConn
	in *bufio.Reader
}

func dial(t *testing.T, l *Link) client {
	t.Helper()
	conn, err := net.Dial("tcp", l.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return client{conn.(*net.TCPConn), bufio.NewReader(conn)}
}

func (c client) send(t *testing.T, text string) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
}

// answer reads a line, or says how the connection ended.
func (c client) answer(t *testing.T, limit time.Duration) string {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(limit)); err != nil {
		t.Fatal(err)
	}
	line, err := c.in.ReadString('\n')
	if err != nil {
		var timeout net.Error
		if errors.As(err, &timeout) && timeout.Timeout() {
			return "nothing"
		}
		return name(err)
	}
	return line
}

func want(t *testing.T, got, want string) {
	t.Helper()
	if got != want {
		t.Fatalf("got %q, want %q", got, want)
	}
}

func arrives(t *testing.T, seen <-chan string, text string) {
	t.Helper()
	select {
	case got := <-seen:
		want(t, got, text)
	case <-time.After(patience):
		t.Fatalf("%q doesn't arrive", text)
	}
}

func TestCut(t *testing.T) {
	address, seen := echo(t)
	l := New(t, address)
	c := dial(t, l)
	c.send(t, "a\n")
	want(t, c.answer(t, patience), "a\n")
	arrives(t, seen, "a\n")
	if n := l.Cut(); n != 1 {
		t.Errorf("%d connections were cut, want 1", n)
	}
	want(t, c.answer(t, patience), "RST")
	arrives(t, seen, "RST")
	c = dial(t, l)
	c.send(t, "b\n")
	want(t, c.answer(t, patience), "b\n")
}

func TestDown(t *testing.T) {
	address, _ := echo(t)
	l := New(t, address)
	c := dial(t, l)
	c.send(t, "a\n")
	want(t, c.answer(t, patience), "a\n")
	l.Down()
	want(t, c.answer(t, patience), "RST")
	conn, err := net.Dial("tcp", l.Addr())
	if err == nil { // The reset may arrive within the handshake.
		_, err = conn.Read(make([]byte, 1))
		_ = conn.Close()
	}
	want(t, name(err), "RST")
	l.Up()
	c = dial(t, l)
	c.send(t, "b\n")
	want(t, c.answer(t, patience), "b\n")
}

func TestStall(t *testing.T) {
	for _, tt := range []struct {
		name    string
		stall   func(*Link)
		arrives bool
	}{
		{"both ways", (*Link).Stall, false},
		{"requests", (*Link).StallRequests, false},
		{"answers", (*Link).StallAnswers, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			address, seen := echo(t)
			l := New(t, address)
			c := dial(t, l)
			c.send(t, "a\n")
			want(t, c.answer(t, patience), "a\n")
			arrives(t, seen, "a\n")
			tt.stall(l)
			late := dial(t, l)
			c.send(t, "b\n")
			late.send(t, "b\n")
			want(t, c.answer(t, 50*time.Millisecond), "nothing")
			want(t, late.answer(t, 50*time.Millisecond), "nothing")
			if tt.arrives {
				arrives(t, seen, "b\n")
				arrives(t, seen, "b\n")
			} else if len(seen) > 0 {
				t.Errorf("%q passed the stall", <-seen)
			}
			l.Resume()
			want(t, c.answer(t, patience), "b\n")
			want(t, late.answer(t, patience), "b\n")
		})
	}
}

// The end of a connection, orderly or not, is as stalled as its bytes.
func TestStallHidesEnds(t *testing.T) {
	for _, tt := range []struct {
		end    string
		linger int
	}{{"FIN", -1}, {"RST", 0}} {
		t.Run(tt.end, func(t *testing.T) {
			address, seen := echo(t)
			l := New(t, address)
			c := dial(t, l)
			c.send(t, "a\n")
			want(t, c.answer(t, patience), "a\n")
			arrives(t, seen, "a\n")
			l.Stall()
			if err := errors.Join(c.SetLinger(tt.linger), c.Close()); err != nil {
				t.Fatal(err)
			}
			select {
			case got := <-seen:
				t.Errorf("%q passed the stall", got)
			case <-time.After(50 * time.Millisecond):
			}
			l.Resume()
			arrives(t, seen, tt.end)
		})
	}
}

func TestStrand(t *testing.T) {
	address, _ := echo(t)
	l := New(t, address)
	old := dial(t, l)
	old.send(t, "a\n")
	want(t, old.answer(t, patience), "a\n")
	l.Strand()
	l.Resume()
	old.send(t, "b\n")
	fresh := dial(t, l)
	fresh.send(t, "c\n")
	want(t, fresh.answer(t, patience), "c\n")
	want(t, old.answer(t, 50*time.Millisecond), "nothing")
}

// A stall that begins in the middle of a write that its reader doesn't take.
func TestStallOfAFullPipe(t *testing.T) {
	address, _ := echo(t)
	l := New(t, address)
	c := dial(t, l)
	line := make([]byte, 1<<20)
	line[len(line)-1] = '\n'
	sent := make(chan error, 1)
	const lines = 32 // More than all the buffers on the way hold.
	go func() {
		for range lines {
			if _, err := c.Write(line); err != nil {
				sent <- err
				return
			}
		}
		sent <- c.CloseWrite()
	}()
	want(t, c.answer(t, patience)[:1], "\x00")
	l.Stall()
	l.Resume()
	if err := c.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	n, err := io.Copy(io.Discard, c.in)
	if err != nil || n != (lines-1)<<20 {
		t.Errorf("%d bytes of %d arrived: %v", n, (lines-1)<<20, err)
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
}

func TestSlow(t *testing.T) {
	address, _ := echo(t)
	l := New(t, address)
	c := dial(t, l)
	l.Slow(100 << 10)
	line := make([]byte, 50<<10)
	line[len(line)-1] = '\n'
	start := time.Now()
	go func() { _, _ = c.Write(line) }()
	if got := c.answer(t, patience); len(got) != len(line) {
		t.Fatalf("%d bytes came back: %.20q", len(got), got)
	}
	slow := time.Since(start)
	if slow < 400*time.Millisecond {
		t.Errorf("50 kB at 100 kB/s took %v", slow)
	}
	l.Slow(0)
	start = time.Now()
	go func() { _, _ = c.Write(line) }()
	if got := c.answer(t, patience); len(got) != len(line) {
		t.Fatalf("%d bytes came back: %.20q", len(got), got)
	}
	if took := time.Since(start); took > slow {
		t.Errorf("50 kB at full speed took %v, at 100 kB/s %v", took, slow)
	}
}

func TestDSN(t *testing.T) {
	address, _ := echo(t)
	dsn := "postgres://u:p%40@" + address + "/db?sslmode=disable"
	l := To(t, dsn)
	want(t, l.target, address)
	want(t, l.DSN(t, dsn), "postgres://u:p%40@"+l.Addr()+"/db?sslmode=disable")
}

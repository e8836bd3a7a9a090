// Package badlink is a TCP relay whose weather its owner controls: it cuts, refuses, stalls and slows the connections
// that pass through it.
//
// It owns both halves of each relayed connection and its goroutines; all are gone after Close. It never
// reads what it relays. The kernel on each side keeps confirming bytes to a sender through a stall, so neither TCP
// keepalives nor TCP_USER_TIMEOUT can notice one: whatever is relayed must have deadlines of its own, as it needs them
// against a peer whose process is stopped. A Link is safe for concurrent use.
package badlink

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"sync"
	"time"
)

// A direction of the bytes, as the dialling side sees it.
const (
	requests = iota // To the target.
	answers         // From the target.
	directions
)

// Link relays connections to its target.
type Link struct {
	listener net.Listener
	ctx      context.Context // Ends with Close.
	stop     context.CancelFunc
	running  sync.WaitGroup

	mu      sync.Mutex
	target  string
	changed chan struct{} // Closed and renewed whenever the weather changes.
	down    bool
	stalled [directions]bool
	rate    int                   // Bytes a second in each direction; 0 is no limit.
	due     [directions]time.Time // When the next byte may pass at that rate.
	open    map[*relay]struct{}
}

// relay is one connection. Its fields are under Link.mu, but for ends, which rest once the pumps run.
type relay struct {
	ends     [directions]*net.TCPConn // What the bytes of a direction are read from; the target's comes second.
	stranded bool                     // By Strand.
	over     bool                     // By reset.
}

// Start starts a relay to target, host:port. The weather is fine at first. The caller must call Close.
func Start(target string) (*Link, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	l := &Link{target: target, listener: listener, ctx: ctx, stop: stop,
		changed: make(chan struct{}), open: map[*relay]struct{}{}}
	l.running.Go(l.accept)
	return l, nil
}

// Addr is where the relay listens.
func (l *Link) Addr() string { return l.listener.Addr().String() }

// Through is the URL of a server, such as a connection string as pgserver writes them, with the relay in its place.
func (l *Link) Through(server string) (string, error) {
	u, err := parse(server)
	if err != nil {
		return "", err
	}
	u.Host = l.Addr()
	return u.String(), nil
}

// TurnTo relays new connections to another target, host:port, as the address of a service that fails over does; open ones
// stay.
func (l *Link) TurnTo(target string) { l.change(func() { l.target = target }) }

func parse(server string) (*url.URL, error) {
	u, err := url.Parse(server)
	if err == nil && u.Host == "" {
		err = fmt.Errorf("%q names no host", server)
	}
	return u, err
}

// Cut resets the open connections, and says how many there were; new ones are accepted.
func (l *Link) Cut() (n int) {
	l.change(func() { n = l.resetAllLocked() })
	return n
}

// Down resets the open connections, and every new one as soon as it is accepted.
func (l *Link) Down() {
	l.change(func() {
		l.down = true
		l.resetAllLocked()
	})
}

// Up ends Down.
func (l *Link) Up() { l.change(func() { l.down = false }) }

// Stall lets no byte and no end of a connection pass in either direction, also for connections accepted meanwhile.
// Nothing that is sent after Stall has returned arrives before Resume.
func (l *Link) Stall() { l.change(func() { l.stalled = [directions]bool{true, true} }) }

// StallRequests stalls the way to the target only.
func (l *Link) StallRequests() { l.change(func() { l.stalled[requests] = true }) }

// StallAnswers stalls the way from the target only.
func (l *Link) StallAnswers() { l.change(func() { l.stalled[answers] = true }) }

// Resume ends every stall. What was sent meanwhile arrives now, ends of connections included.
func (l *Link) Resume() { l.change(func() { l.stalled = [directions]bool{} }) }

// Strand stalls the open connections for good, as a firewall that forgot them does; new ones are well.
func (l *Link) Strand() {
	l.change(func() {
		for r := range l.open {
			r.stranded = true
		}
	})
}

// Slow lets bytesPerSecond pass in each direction, over all connections together; 0 is full speed.
func (l *Link) Slow(bytesPerSecond int) {
	l.change(func() { l.rate, l.due = bytesPerSecond, [directions]time.Time{} })
}

// Open says how many connections the link relays.
func (l *Link) Open() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.open)
}

// change alters the weather. Whoever waits, or is held up in a write, looks at the sky again.
func (l *Link) change(alter func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	alter()
	close(l.changed)
	l.changed = make(chan struct{})
	for r := range l.open {
		for _, end := range r.ends {
			if end != nil {
				_ = end.SetWriteDeadline(time.Unix(1, 0))
			}
		}
	}
}

func (l *Link) resetAllLocked() int {
	for r := range l.open {
		r.resetLocked()
	}
	return len(l.open)
}

// resetLocked ends a connection with RST on both sides.
func (r *relay) resetLocked() {
	r.over = true
	for _, end := range r.ends {
		if end != nil {
			_ = end.SetLinger(0)
			_ = end.Close()
		}
	}
}

// Close ends the relay and resets what passes through it.
func (l *Link) Close() {
	l.stop()
	_ = l.listener.Close()
	l.Down()
	l.running.Wait()
}

func (l *Link) accept() {
	for {
		conn, err := l.listener.Accept()
		if err != nil {
			return
		}
		l.running.Go(func() { l.relay(conn.(*net.TCPConn)) })
	}
}

// relay serves one connection until both its ways have ended.
func (l *Link) relay(conn *net.TCPConn) {
	r := &relay{ends: [directions]*net.TCPConn{requests: conn}}
	if !l.admit(r) {
		return
	}
	defer l.forget(r)
	if !l.await(r, requests, 0) { // Not even the handshake passes a stall.
		return
	}
	l.mu.Lock()
	to := l.target
	l.mu.Unlock()
	var dialer net.Dialer
	target, err := dialer.DialContext(l.ctx, "tcp", to)
	if !l.join(r, target, err) {
		return
	}
	var ways sync.WaitGroup
	for way := range directions {
		ways.Go(func() { l.pump(r, way) })
	}
	ways.Wait()
}

// admit counts a connection among the open ones, or resets it where the link is down.
func (l *Link) admit(r *relay) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.down {
		r.resetLocked()
		return false
	}
	l.open[r] = struct{}{}
	return true
}

// join adds the target's end. False: there is none, or the connection was cut meanwhile.
func (l *Link) join(r *relay, target net.Conn, err error) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err == nil {
		r.ends[answers] = target.(*net.TCPConn)
	}
	if err != nil || r.over {
		r.resetLocked()
		return false
	}
	return true
}

// forget closes what is left of a connection whose ways have ended.
func (l *Link) forget(r *relay) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.open, r)
	for _, end := range r.ends {
		if end != nil {
			_ = end.Close()
		}
	}
}

// pump carries one way's bytes and then its end: an orderly one as FIN, any other as a reset of both sides.
func (l *Link) pump(r *relay, way int) {
	from, to := r.ends[way], r.ends[1-way]
	buf := make([]byte, 16<<10)
	for {
		n, err := from.Read(buf[:l.piece(len(buf))])
		if !l.carry(r, way, to, buf[:n]) {
			break
		}
		if errors.Is(err, io.EOF) && l.await(r, way, 0) {
			_ = to.CloseWrite()
			return
		}
		if err != nil {
			l.await(r, way, 0)
			break
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	r.resetLocked()
}

// carry writes data once the weather allows it. False: the connection is over.
func (l *Link) carry(r *relay, way int, to *net.TCPConn, data []byte) bool {
	cost := len(data)
	for len(data) > 0 {
		if !l.await(r, way, cost) {
			return false
		}
		cost = 0 // What is left of an interrupted write was counted.
		n, err := to.Write(data)
		data = data[n:]
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return false
		}
	}
	return true
}

// piece is how much to read at once: a twentieth of a second's worth on a slow link.
func (l *Link) piece(most int) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.rate == 0 {
		return most
	}
	return min(most, max(1, l.rate/20))
}

// await returns when n bytes may pass, and lifts the write deadline by which change interrupts. False: the connection
// is over.
func (l *Link) await(r *relay, way, n int) bool {
	for {
		changed, pause, over := l.look(r, way, n)
		if over {
			return false
		}
		if changed == nil {
			return true
		}
		var clear <-chan time.Time
		if pause > 0 {
			clear = time.After(pause)
		}
		select {
		case <-changed:
		case <-clear:
		}
	}
}

// look says whether n bytes may pass now: then changed is nil. Else it says what to wait for.
func (l *Link) look(r *relay, way, n int) (changed <-chan struct{}, pause time.Duration, over bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if r.over {
		return nil, 0, true
	}
	if l.stalled[way] || r.stranded {
		return l.changed, 0, false
	}
	if l.rate > 0 && n > 0 {
		now := time.Now()
		if l.due[way].After(now) {
			return l.changed, l.due[way].Sub(now), false
		}
		l.due[way] = now.Add(time.Duration(n) * time.Second / time.Duration(l.rate))
	}
	if to := r.ends[1-way]; to != nil {
		_ = to.SetWriteDeadline(time.Time{})
	}
	return nil, 0, false
}

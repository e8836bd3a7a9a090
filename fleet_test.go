package main

import (
	"cmp"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/fasthttp/websocket"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/internal/badlink"
	"github.com/walgate/walgate/internal/pgserver"
)

// fleet is a followed source with three gateways, behind a door that leads clients to one of them.
type fleet struct {
	*followedSource
	storage string // where the log is
	log     *changelog.Log
	all     []*gatewayProcess
	links   []*badlink.Link // of each gateway to the source
	door    *badlink.Link
	written int // rows from firstWritten on
}

const firstWritten = 1000

// newFleet starts three gateways on the server; change may alter the configuration. An empty storage is the source.
func newFleet(t *testing.T, server *pgserver.Server, storage string, change func(config string) string) *fleet {
	t.Helper()
	f := &fleet{followedSource: followSource(t, server, storage), storage: cmp.Or(storage, server.DSN("postgres"))}
	f.all, f.links = []*gatewayProcess{f.gateway}, []*badlink.Link{f.link}
	for range 2 {
		link := badlink.To(t, server.DSN("postgres"))
		config := strings.NewReplacer("URL", link.DSN(t, server.DSN("postgres")), "STORAGE", storage).Replace(sourceConfig)
		if change != nil {
			config = change(config)
		}
		p, _ := newGatewayProcess(t, config)
		must(t, p.start(t.Context()))
		f.all, f.links = append(f.all, p), append(f.links, link)
	}
	f.door = badlink.To(t, f.gateway.base)
	for _, c := range []*syncClient{f.present, f.absent} {
		c.base = "http://" + f.door.Addr()
	}
	var err error
	f.log, err = changelog.Open(t.Context(), f.storage, 2)
	must(t, err)
	t.Cleanup(f.log.Close)
	return f
}

// leader waits until one of the gateways says that it leads, and returns it.
func (f *fleet) leader() (leader *gatewayProcess) {
	f.t.Helper()
	client := &http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	resyncEventually(f.t, "a gateway leads", func() bool {
		for _, p := range f.all {
			select {
			case <-p.exited:
				continue
			default:
			}
			res, err := client.Get(p.base + "/readyz")
			if err != nil {
				continue
			}
			var state struct{ Leading bool }
			err = json.NewDecoder(res.Body).Decode(&state)
			res.Body.Close()
			if err == nil && state.Leading {
				leader = p
				return true
			}
		}
		return false
	})
	return leader
}

// others are the gateways but one.
func (f *fleet) others(but *gatewayProcess) []*gatewayProcess {
	return slices.DeleteFunc(slices.Clone(f.all), func(p *gatewayProcess) bool { return p == but })
}

// epoch is that of the last takeover.
func (f *fleet) epoch() int64 {
	f.t.Helper()
	conn := connect(f.t, f.storage)
	defer conn.Close(context.Background())
	var epoch int64
	resyncScan(f.t, conn, []any{&epoch}, `SELECT epoch FROM walgate.checkpoint`)
	return epoch
}

// write lets the application insert one row after the other, each in a transaction of its own, until the returned function
// is called.
func (f *fleet) write() (stop func()) {
	f.t.Helper()
	ctx, cancel := context.WithCancel(f.t.Context())
	conn := connect(f.t, f.server.DSN("postgres"))
	var writing sync.WaitGroup
	writing.Go(func() {
		for ctx.Err() == nil {
			if _, err := conn.Exec(context.WithoutCancel(ctx), `INSERT INTO docs VALUES ($1, 'u0', 'written')`, firstWritten+f.written); err != nil {
				f.t.Errorf("the application can't write: %v", err)
				return
			}
			f.written++
			pause(ctx, 15*time.Millisecond)
		}
	})
	stop = sync.OnceFunc(func() { cancel(); writing.Wait() })
	f.t.Cleanup(stop)
	return stop
}

// arrives commits a row and waits until the log has it, and says how long that took since then.
func (f *fleet) arrives(since time.Time) time.Duration {
	f.t.Helper()
	f.exec(`INSERT INTO docs VALUES ($1, 'u0', 'written')`, firstWritten+f.written)
	f.written++
	want := sourceQuery[int64](f.followedSource, `SELECT (pg_current_wal_flush_lsn() - '0/0')::int8`)
	resyncEventually(f.t, "the row is logged", func() bool {
		h, err := f.log.Head(f.t.Context())
		return err == nil && int64(h.LSN) >= want-64 // the commit's own record ends at or before it
	})
	return time.Since(since)
}

// audit fails unless the log holds each written row exactly once, in the order of the commits, at rising versions.
func (f *fleet) audit() {
	f.t.Helper()
	next, last := firstWritten, changelog.Version(0)
	for since, more := changelog.Version(0), true; more; {
		p, err := f.log.ReadAll(f.t.Context(), since, 1<<62, 20000, 64<<20)
		must(f.t, err)
		for _, e := range p.Entries {
			if e.Version <= last {
				f.t.Errorf("version %d comes after %d", e.Version, last)
			}
			last = e.Version
			id, err := strconv.Atoi(string(e.DocID))
			must(f.t, err)
			if id < firstWritten {
				continue
			}
			if id != next {
				f.t.Fatalf("row %d is logged where %d is due", id, next)
			}
			next++
		}
		since, more = p.Last, p.More
	}
	if next != firstWritten+f.written {
		f.t.Errorf("the log holds %d of %d rows", next-firstWritten, f.written)
	}
}

// unbroken fails if a client had to start anew, or the history isn't the one before.
func (f *fleet) unbroken(history string) {
	f.t.Helper()
	for _, c := range []*syncClient{f.present, f.absent} {
		if n := resynchronised(c); n != 0 || historyOf(c) != history {
			f.t.Errorf("client %s had to start anew %d times (history %s, then %s): nothing was lost", c.name, n, history, historyOf(c))
		}
	}
}

// subscribe opens a stream at a gateway, from a client's cursor, and returns once it is live.
func (f *fleet) subscribe(p *gatewayProcess, since string) *websocket.Conn {
	f.t.Helper()
	stream, _, err := websocket.DefaultDialer.DialContext(f.t.Context(), "ws"+strings.TrimPrefix(p.base, "http")+"/sync/stream",
		http.Header{"Authorization": {"Bearer " + f.absent.token}})
	must(f.t, err)
	f.t.Cleanup(func() { _ = stream.Close() })
	must(f.t, stream.WriteJSON(map[string]any{"type": "subscribe", "since": since}))
	f.frame(stream, "ready")
	return stream
}

// streamFrame is what is looked at of a frame.
type streamFrame struct {
	Type      string
	DocID     string `json:"doc_id"`
	Reconnect int    `json:"reconnect_after_ms"`
	LastSeq   string `json:"last_seq"`
}

// frame reads a stream up to a frame of a type, or, for "", a change.
func (f *fleet) frame(stream *websocket.Conn, kind string) (frame streamFrame) {
	f.t.Helper()
	_ = stream.SetReadDeadline(time.Now().Add(resyncWait))
	for {
		frame = streamFrame{}
		if err := stream.ReadJSON(&frame); err != nil {
			f.t.Fatalf("waiting for %q: %v", kind, err)
		}
		if frame.Type == kind {
			return frame
		}
	}
}

// slowDownload begins to read all documents from a gateway, and stops.
func (f *fleet) slowDownload(p *gatewayProcess) io.Closer {
	f.t.Helper()
	r, err := http.NewRequestWithContext(f.t.Context(), http.MethodGet, p.base+"/sync/full?limit=all", nil)
	must(f.t, err)
	r.Header.Set("Authorization", "Bearer "+f.absent.token)
	r.Header.Set("Accept-Encoding", "identity")
	res, err := f.absent.http.Do(r)
	must(f.t, err)
	f.t.Cleanup(func() { res.Body.Close() })
	if _, err := io.ReadFull(res.Body, make([]byte, 1000)); err != nil || res.StatusCode != http.StatusOK {
		f.t.Fatalf("a download: %d, %v", res.StatusCode, err)
	}
	return res.Body
}

// TestTakeover: the leader is killed, or stopped while a client is slow to go. Another one takes over, and nothing is lost,
// doubled or out of order; who waits is quiet. The long form measures how long it takes.
func TestTakeover(t *testing.T) {
	t.Parallel()
	f := newFleet(t, pgserver.StartForTest(t, pgserver.Options{}), "", nil)
	history, rounds := historyOf(f.absent), 1
	if os.Getenv(longEnv) != "" {
		rounds = 20
	}
	took := map[string][]time.Duration{}
	for range rounds {
		for _, kill := range []bool{true, false} {
			leader, epoch := f.leader(), f.epoch()
			f.door.Turn(t, f.others(leader)[0].base)
			stop, end := f.write(), f.during()
			if kill {
				began := time.Now()
				must(t, leader.end(syscall.SIGKILL))
				stop()
				took["after SIGKILL"] = append(took["after SIGKILL"], f.arrives(began))
			} else {
				stream := f.subscribe(leader, f.absent.replica.cursor)
				began := time.Now()
				must(t, leader.end(syscall.SIGTERM))
				ended := time.Now()
				stop()
				took["after the process ended in order"] = append(took["after the process ended in order"], f.arrives(ended))
				took["after SIGTERM"] = append(took["after SIGTERM"], time.Since(began))
				if g := f.frame(stream, "goodbye"); g.Reconnect < 500 || g.Reconnect >= 3500 {
					t.Errorf("goodbye asks to reconnect after %d ms", g.Reconnect)
				}
			}
			f.leader()
			if now := f.epoch(); now != epoch+1 {
				t.Errorf("epoch %d after %d: more than one has taken over", now, epoch)
			}
			end()
			f.settle(f.present, f.absent)
			must(t, leader.start(t.Context()))
		}
	}
	f.audit()
	f.unbroken(history)
	for what, all := range took {
		slices.Sort(all)
		t.Logf("taken over %s: median %s, worst %s of %d", what, all[len(all)/2].Round(time.Millisecond), all[len(all)-1].Round(time.Millisecond), len(all))
	}
	for _, p := range f.all {
		if waits, leads := p.says("another process holds the slot"), p.says("leading: streaming"); waits > 2*2*rounds+2 {
			t.Errorf("a gateway said %d times that it waits; it led %d times", waits, leads)
		}
	}
}

// TestDrainingLeaderLeads: a leader that was told to stop goes on leading while a client is slow to end its request, and lets
// the slot go once it has.
func TestDrainingLeaderLeads(t *testing.T) {
	t.Parallel()
	f := newFleet(t, pgserver.StartForTest(t, pgserver.Options{}), "", nil)
	f.exec(`INSERT INTO docs SELECT n, 'u0', repeat(md5(n::text), 30000) FROM generate_series(100, 119) n`)
	f.settle(f.absent)
	leader, epoch, history := f.leader(), f.epoch(), historyOf(f.absent)
	f.door.Turn(t, f.others(leader)[0].base)
	stream := f.subscribe(leader, f.absent.replica.cursor)
	body := f.slowDownload(leader)
	must(t, leader.cmd.Process.Signal(syscall.SIGTERM))
	f.frame(stream, "goodbye")
	f.arrives(time.Now())
	f.settle(f.absent) // at another gateway
	if now := f.epoch(); now != epoch {
		t.Errorf("epoch %d after %d: it let go of the slot while a client was still there", now, epoch)
	}
	select {
	case <-leader.exited:
		t.Error("it ended while a client was still there")
	default:
	}
	body.Close()
	<-leader.exited
	if leader.err != nil {
		t.Errorf("it ended with %v", leader.err)
	}
	f.arrives(time.Now())
	if now := f.epoch(); now != epoch+1 {
		t.Errorf("epoch %d after %d", now, epoch)
	}
	f.settle(f.absent)
	f.audit()
	f.unbroken(history)
}

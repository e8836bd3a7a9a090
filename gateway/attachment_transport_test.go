package gateway

import (
	"bufio"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"
)

// dialRaw opens a connection and begins a request on it; head has more headers, each with its line's end.
func (e *env) dialRaw(t testing.TB, method, target, token, head string) (net.Conn, *bufio.Reader) {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(e.base, "http://"))
	ok(t, err)
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(patience))
	beginRequest(conn, method, target, token, head)
	return conn, bufio.NewReader(conn)
}

func beginRequest(conn net.Conn, method, target, token, head string) {
	fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n%s\r\n", method, target, token, head)
}

// nextAnswer reads an answer.
func nextAnswer(t testing.TB, r *bufio.Reader) (status int, body string, closing bool) {
	t.Helper()
	res, err := http.ReadResponse(r, nil)
	ok(t, err)
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	ok(t, err)
	return res.StatusCode, string(text), res.Close
}

// TestAttachmentExpect: who asks before it sends is told what it would be told, and sends nothing for a refusal.
func TestAttachmentExpect(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{options: func(o *Options) { o.AttachmentLimit, o.Quota = 1000, 600 }})
	ana := editor(t, "ana")
	e.put(t, "taken", editor(t, "ben"), "x").created(t)
	for _, x := range []struct {
		target, token, head string
		status              int
	}{
		{"/attachments/a", ana, "Content-Length: 1001\r\n", 413}, {"/attachments/a", ana, "Content-Length: 601\r\n", 507}, {"/attachments/taken", ana, "Content-Length: 5\r\n", 409},
		{"/attachments/a", "x", "Content-Length: 5\r\n", 401}, {"/attachments/a", reader(t, "ana"), "Content-Length: 5\r\n", 403}, {"/attachments/a..b", ana, "Content-Length: 5\r\n", 400},
		{"/attachments/a", ana, "Transfer-Encoding: chunked\r\nContent-Encoding: br\r\n", 415},
	} {
		_, r := e.dialRaw(t, "PUT", x.target, x.token, "Expect: 100-continue\r\n"+x.head)
		if status, body, closing := nextAnswer(t, r); status != x.status || !closing {
			t.Errorf("%s %s: %d %s (closing %v), want %d", x.target, x.head, status, body, closing, x.status)
		}
		if rest, _ := io.ReadAll(r); len(rest) > 0 {
			t.Errorf("%s: and then %q", x.target, rest)
		}
	}
	conn, r := e.dialRaw(t, "PUT", "/attachments/a", ana, "Expect: 100-continue\r\nContent-Length: 5\r\n")
	if status, _, _ := nextAnswer(t, r); status != 100 {
		t.Fatalf("told %d", status)
	}
	fmt.Fprint(conn, "hello")
	if status, body, closing := nextAnswer(t, r); status != 201 || closing {
		t.Fatalf("%d %s", status, body)
	}
	beginRequest(conn, "GET", "/attachments/a", ana, "") // on the same connection
	if status, body, _ := nextAnswer(t, r); status != 200 || body != "hello" {
		t.Errorf("%d %s", status, body)
	}
}

// TestAttachmentRefusedOnKeptConnections: what is left of a body that nobody wanted is no request.
func TestAttachmentRefusedOnKeptConnections(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{options: func(o *Options) { o.AttachmentLimit = 10 << 20 }})
	ana := editor(t, "ana")
	e.put(t, "mine", ana, "hello").created(t)
	hidden := "GET /attachments/mine HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + ana + "\r\n\r\n"
	for _, x := range []struct {
		name, method, target, token string
		size                        int
		chunked                     bool
		status                      int
	}{
		{"small", "PUT", "/attachments/a..b", ana, 2_000, false, 400}, {"medium", "PUT", "/attachments/a..b", ana, 200_000, false, 400}, {"large", "PUT", "/attachments/a..b", ana, 2_000_000, false, 400},
		{"too large", "PUT", "/attachments/a", ana, 11 << 20, false, 413}, {"no token", "PUT", "/attachments/a", "x", 20_000, false, 401}, {"chunked", "PUT", "/attachments/a..b", ana, 2_000, true, 400},
		{"a push", "POST", "/sync/push", "x", 200_000, false, 401}, {"a chunked push", "POST", "/sync/push", "x", 2_000, true, 401}, {"nothing there", "PUT", "/nowhere", ana, 200_000, false, 404},
		{"read nothing", "GET", "/healthz", "", 20_000, false, 200}, {"read nothing large", "GET", "/healthz", "", 2_000_000, false, 200}, {"read nothing chunked", "GET", "/healthz", "", 2_000, true, 200},
		{"list", "GET", "/attachments", ana, 20_000, false, 200}, {"download", "GET", "/attachments/mine", ana, 20_000, false, 200}, {"chunked download", "GET", "/attachments/mine", ana, 2_000, true, 200},
		{"delete", "DELETE", "/attachments/a", ana, 20_000, false, 204}, {"options", "OPTIONS", "/uploads", ana, 20_000, false, 204},
	} {
		t.Run(x.name, func(t *testing.T) {
			t.Parallel()
			head := fmt.Sprintf("Content-Type: application/json\r\nContent-Length: %d\r\n", x.size)
			if x.chunked {
				head = "Transfer-Encoding: chunked\r\n"
			}
			conn, r := e.dialRaw(t, x.method, x.target, x.token, head)
			body := strings.Repeat(hidden, x.size/len(hidden)+1)[:x.size]
			sent := make(chan struct{})
			go func() {
				defer close(sent)
				if x.chunked {
					fmt.Fprintf(conn, "%x\r\n%s\r\n0\r\n\r\n", len(body), body)
				} else {
					io.WriteString(conn, body)
				}
			}()
			status, text, closing := nextAnswer(t, r)
			if status != x.status {
				t.Errorf("%d %s", status, text)
			}
			if closing {
				if rest, _ := io.ReadAll(r); len(rest) > 0 {
					t.Errorf("and then %.200q", rest)
				}
				conn.Close()
				<-sent
				return
			}
			<-sent
			beginRequest(conn, "GET", "/attachments/unknown", ana, "")
			if status, text, _ := nextAnswer(t, r); status != 404 {
				t.Errorf("the next answer is %d %.200s", status, text)
			}
		})
	}
}

// TestAttachmentCut: a client that goes away in the middle leaves nothing, whatever form its body has.
func TestAttachmentCut(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "file://"+t.TempDir(), setup{})
	ana := editor(t, "ana")
	for name, x := range map[string]struct{ head, body string }{
		"with a length": {"Content-Length: 1000000\r\n", strings.Repeat("x", 300_000)},
		"chunked":       {"Transfer-Encoding: chunked\r\n", "5\r\nhello\r\n"},
		"in a chunk":    {"Transfer-Encoding: chunked\r\n", "50\r\nhello"},
		"a form":        {"Content-Type: " + multipartType + "\r\nContent-Length: 1000000\r\n", multipartBody("file", "", "hello")[:80]},
		"a whole form":  {"Content-Type: " + multipartType + "\r\nContent-Length: 1000000\r\n", multipartBody("file", "", "hello")},
		"before a byte": {"Content-Length: 1000000\r\n", ""},
	} {
		conn, _ := e.dialRaw(t, "PUT", "/attachments/cut", ana, x.head)
		io.WriteString(conn, x.body)
		eventually(t, "the upload began: "+name, func() bool { return e.g.uploads.count("") == 1 })
		conn.Close()
		eventually(t, "the upload ended: "+name, func() bool { return e.g.uploads.count("") == 0 })
		e.get(t, "/attachments/cut", ana).problem(t, NotFound)
		e.tidy(t, 0)
	}
	e.put(t, "cut", ana, "hello").created(t)
}

// TestAttachmentIdle: an upload and a download may be slow, and may not stand still.
func TestAttachmentIdle(t *testing.T) {
	t.Parallel()
	const idle = 300 * time.Millisecond
	e := newBytesEnv(t, "", setup{gateway: func(g *Gateway) { g.limits.idle = idle }})
	ana := editor(t, "ana")
	conn, r := e.dialRaw(t, "PUT", "/attachments/still", ana, "Content-Length: 100\r\n")
	io.WriteString(conn, "hello")
	began := time.Now()
	if status, text, closing := nextAnswer(t, r); status != 408 || !closing || time.Since(began) < idle/2 {
		t.Errorf("%d %s after %s", status, text, time.Since(began))
	}
	conn, r = e.dialRaw(t, "PUT", "/attachments/slow", ana, "Content-Length: 12\r\n")
	tick := time.NewTicker(idle / 6)
	defer tick.Stop()
	for range 12 { // twice as long as it may stand still
		<-tick.C
		io.WriteString(conn, "x")
	}
	if status, text, _ := nextAnswer(t, r); status != 201 {
		t.Errorf("%d %s", status, text)
	}
	e.tidy(t, 1)

	large := pattern(32 << 20)
	e.put(t, "large", ana, string(large)).created(t)
	conn, r = e.dialRaw(t, "GET", "/attachments/large", ana, "")
	_, err := r.ReadByte()
	ok(t, err)
	eventually(t, "a client that doesn't read is cut", func() bool {
		return strings.Contains(string(e.get(t, "/metrics", "").body), `walgate_attachment_requests_total{operation="get",outcome="cut"} 1`)
	})
	conn.Close()
	conn, r = e.dialRaw(t, "GET", "/attachments/large", ana, "")
	conn.(*net.TCPConn).SetReadBuffer(64 << 10)
	res, err := http.ReadResponse(r, nil)
	ok(t, err)
	h, n := sha256.New(), int64(0)
	for n < int64(len(large)) { // in pieces, longer than it may stand still
		if n < 10*(1<<20) {
			<-tick.C
		}
		got, err := io.CopyN(h, res.Body, min(1<<20, int64(len(large))-n))
		ok(t, err)
		n += got
	}
	if string(h.Sum(nil)) != string(sha(string(large))) {
		t.Error("other bytes")
	}
}

// TestAttachmentDrain: transfers under way end well while the instance stops, up to the drain time, and new ones are refused.
func TestAttachmentDrain(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{options: func(o *Options) { o.Drain = patience }})
	ana := editor(t, "ana")
	large := pattern(32 << 20)
	e.put(t, "large", ana, string(large)).created(t)
	up, upR := e.dialRaw(t, "PUT", "/attachments/a", ana, "Content-Length: 10\r\n")
	io.WriteString(up, "hello")
	_, downR := e.dialRaw(t, "GET", "/attachments/large", ana, "")
	res, err := http.ReadResponse(downR, nil)
	ok(t, err)
	idle, idleR := e.dialRaw(t, "GET", "/healthz", "", "")
	nextAnswer(t, idleR)
	eventually(t, "the upload began", func() bool { return e.g.uploads.count("") == 1 })
	e.stop()
	eventually(t, "draining", e.g.draining.Load)
	beginRequest(idle, "PUT", "/attachments/b", ana, "Content-Length: 5\r\nExpect: 100-continue\r\n")
	if status, text, _ := nextAnswer(t, idleR); status != 503 {
		t.Errorf("while it stops: %d %s", status, text)
	}
	body, err := io.ReadAll(res.Body)
	if err != nil || string(body) != string(large) {
		t.Errorf("%d bytes: %v", len(body), err)
	}
	io.WriteString(up, "world")
	if status, text, _ := nextAnswer(t, upR); status != 201 {
		t.Errorf("%d %s", status, text)
	}
	<-e.ended
}

// TestAttachmentDrainOver: what is still under way when the drain time is over is cut off, and leaves nothing.
func TestAttachmentDrainOver(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{options: func(o *Options) { o.Drain = 50 * time.Millisecond }})
	up, _ := e.dialRaw(t, "PUT", "/attachments/a", editor(t, "ana"), "Content-Length: 10\r\n")
	io.WriteString(up, "hello")
	eventually(t, "the upload began", func() bool { return e.g.uploads.count("") == 1 })
	e.stop()
	<-e.ended
	e.tidy(t, 0)
}

// endless is a body of a size that takes no memory.
type endless struct{ left int64 }

func (b *endless) Read(p []byte) (int, error) {
	if b.left == 0 {
		return 0, io.EOF
	}
	n := min(int64(len(p)), b.left)
	for i := range p[:n] {
		p[i] = byte(b.left) + byte(i)
	}
	b.left -= n
	return int(n), nil
}

// TestAttachmentMemory sends and reads what is much larger than the memory that it may take.
func TestAttachmentMemory(t *testing.T) { // not parallel: it looks at the process's memory
	size := int64(200 << 20)
	if os.Getenv("WALGATE_TEST_LONG") != "" {
		size = 1 << 30
	}
	e := newBytesEnv(t, "file://"+t.TempDir(), setup{options: func(o *Options) { o.AttachmentLimit = 2 << 30 }})
	ana := editor(t, "ana")
	highest := make(chan uint64, 1)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	runtime.GC()
	var before runtime.MemStats
	runtime.ReadMemStats(&before)
	go func() {
		var high uint64
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				highest <- high
				return
			case <-tick.C:
				var m runtime.MemStats
				runtime.ReadMemStats(&m)
				high = max(high, m.HeapAlloc)
			}
		}
	}()
	a := e.send(t, http.MethodPut, "/attachments/big", ana, &endless{size}, "Content-Length", fmt.Sprint(size))
	u := a.created(t)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, e.base+"/attachments/big", nil)
	ok(t, err)
	req.Header.Set("Authorization", "Bearer "+ana)
	res, err := e.client.Do(req)
	ok(t, err)
	defer res.Body.Close()
	h := sha256.New()
	n, err := io.Copy(h, res.Body)
	if err != nil || n != size || hexText(h.Sum(nil)) != u.SHA256 {
		t.Errorf("read %d bytes: %v", n, err)
	}
	stop()
	if high := <-highest; high > before.HeapAlloc+64<<20 {
		t.Errorf("the heap grew from %d to %d", before.HeapAlloc, high)
	}
}

// count is how many a subject has.
func (c *subjectCounts) count(subject string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n[subject]
}

package gateway

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/walgate/walgate/blobstore"
)

// sendPart opens a connection and sends the head of a PATCH and some of its bytes.
func (e *env) sendPart(t testing.TB, at, token, head, bytes string) *net.TCPConn {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(e.base, "http://"))
	ok(t, err)
	t.Cleanup(func() { conn.Close() })
	_, err = fmt.Fprintf(conn, "PATCH %s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nTus-Resumable: 1.0.0\r\nContent-Type: %s\r\n%s\r\n\r\n%s", at, token, tusBody, head, bytes)
	ok(t, err)
	return conn.(*net.TCPConn)
}

// status reads the answer on a connection.
func status(t testing.TB, conn net.Conn) int {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(patience))
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	ok(t, err)
	res.Body.Close()
	return res.StatusCode
}

// arrived waits until the gateway has so many bytes of a part under way.
func (e *env) arrived(t testing.TB, at string, n int64) {
	t.Helper()
	eventually(t, "the bytes arrive", func() bool {
		e.g.turns.mu.Lock()
		defer e.g.turns.mu.Unlock()
		for key, turn := range e.g.turns.held {
			if key.id == strings.TrimPrefix(at, "/uploads/") {
				return turn.body.came.Load() >= n
			}
		}
		return false
	})
}

// TestTusCut cuts, stalls and abandons requests in their middle. What came is kept, and the rest makes it whole.
func TestTusCut(t *testing.T) {
	t.Parallel()
	content := strings.Repeat("0123456789abcdef", 20<<10) // 320 KiB
	const half = 150_000
	for _, x := range []struct {
		name   string
		length string
		cut    func(t *testing.T, e *env, at string, conn *net.TCPConn)
	}{
		{"closed", fmt.Sprintf("Content-Length: %d", len(content)), func(t *testing.T, e *env, at string, conn *net.TCPConn) { ok(t, conn.Close()) }},
		{"reset", fmt.Sprintf("Content-Length: %d", len(content)), func(t *testing.T, e *env, at string, conn *net.TCPConn) {
			ok(t, conn.SetLinger(0))
			ok(t, conn.Close())
		}},
		{"chunked, closed", "Transfer-Encoding: chunked", func(t *testing.T, e *env, at string, conn *net.TCPConn) { ok(t, conn.Close()) }},
		{"asked for while it stands still", fmt.Sprintf("Content-Length: %d", len(content)), func(t *testing.T, e *env, at string, conn *net.TCPConn) {}},
	} {
		t.Run(x.name, func(t *testing.T) {
			t.Parallel()
			e := newBytesEnv(t, "", setup{gateway: func(g *Gateway) { g.limits.idle = patience }})
			ana := editor(t, "ana")
			at := e.begin(t, ana, "a", len(content))
			sent := content[:half]
			if strings.Contains(x.length, "chunked") {
				sent = fmt.Sprintf("%x\r\n%s\r\n", half, sent)
			}
			conn := e.sendPart(t, at, ana, x.length+"\r\nUpload-Offset: 0", sent)
			e.arrived(t, at, half)
			x.cut(t, e, at, conn)
			e.tus(t, "HEAD", at, ana, "").at(t, 200, half)
			e.patch(t, at, ana, content[half:], half).at(t, 204, len(content))
			e.get(t, "/attachments/a", ana).bytesAre(t, 200, content)
			e.tidy(t, 2)
		})
	}
}

// TestTusTakenOver sends the same bytes on two connections at once: the second takes over, and the first is told.
func TestTusTakenOver(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{gateway: func(g *Gateway) { g.limits.idle = patience }})
	ana := editor(t, "ana")
	at := e.begin(t, ana, "a", 10)
	conn := e.sendPart(t, at, ana, "Content-Length: 10\r\nUpload-Offset: 0", "hello")
	e.arrived(t, at, 5)
	e.patch(t, at, ana, "helloworld", 0).problem(t, UploadOffset) // the first had come further
	if got := status(t, conn); got != UploadLocked.Wire().Status {
		t.Errorf("the first was told %d", got)
	}
	e.patch(t, at, ana, "world", 5).at(t, 204, 10)
	e.get(t, "/attachments/a", ana).bytesAre(t, 200, "helloworld")
	e.tidy(t, 2)
}

// TestTusOfAnother: who knows the address of somebody else's upload doesn't disturb it.
func TestTusOfAnother(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{gateway: func(g *Gateway) { g.limits.idle = patience }})
	ana, ben := editor(t, "ana"), editor(t, "ben")
	at := e.begin(t, ana, "a", 10)
	conn := e.sendPart(t, at, ana, "Content-Length: 10\r\nUpload-Offset: 0", "hello")
	e.arrived(t, at, 5)
	for _, method := range []string{"PATCH", "DELETE"} {
		e.tus(t, method, at, ben, "", "Upload-Offset", "0", "Content-Type", tusBody).problem(t, UploadGone)
	}
	_, err := fmt.Fprint(conn, "world")
	ok(t, err)
	if got := status(t, conn); got != 204 {
		t.Errorf("the upload that somebody else asked for ended with %d", got)
	}
	e.get(t, "/attachments/a", ana).bytesAre(t, 200, "helloworld")
	e.tidy(t, 1)
}

// TestTusStandsStill: a body that stops is given up, and what came of it kept; with a checksum nothing is.
func TestTusStandsStill(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{gateway: func(g *Gateway) { g.limits.idle = 100 * time.Millisecond }})
	ana := editor(t, "ana")
	at := e.begin(t, ana, "a", 10)
	if got := status(t, e.sendPart(t, at, ana, "Content-Length: 10\r\nUpload-Offset: 0", "hello")); got != 408 {
		t.Errorf("told %d", got)
	}
	e.tus(t, "HEAD", at, ana, "").at(t, 200, 5)
	if got := status(t, e.sendPart(t, at, ana, "Content-Length: 5\r\nUpload-Offset: 5\r\nUpload-Checksum: sha1 fCEUM/Ag+4ZYlXUCr1ou9JZVL3I=", "wor")); got != 408 {
		t.Errorf("told %d", got)
	}
	e.tus(t, "HEAD", at, ana, "").at(t, 200, 5)
	if keys := e.objects(t); len(keys) != 1 {
		t.Errorf("kept are %v", keys)
	}
	if a := e.tus(t, "DELETE", at, ana, ""); a.status != 204 {
		t.Errorf("%d %s", a.status, a.body)
	}
	e.tidy(t, 0)
}

// TestTusDrains stops the gateway while bytes are coming: those that came are kept.
func TestTusDrains(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{gateway: func(g *Gateway) { g.limits.idle = patience }})
	ana := editor(t, "ana")
	at := e.begin(t, ana, "a", 10)
	conn := e.sendPart(t, at, ana, "Content-Length: 10\r\nUpload-Offset: 0", "hello")
	e.arrived(t, at, 5)
	e.stop()
	if got := status(t, conn); got != 503 {
		t.Errorf("told %d", got)
	}
	<-e.ended
	if got := e.one(t, `SELECT received::text FROM walgate.uploads`); got != "5" {
		t.Errorf("%s bytes were kept", got)
	}
}

// TestTusLeavesNothing has a gateway die between writing a part and noting it, and after all parts: the one goes with the
// upload, the other is published by whoever asks next.
func TestTusLeavesNothing(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{})
	ana := editor(t, "ana")
	died := func(at string, content string) *tusUpload {
		u, err := e.g.o.Files.Upload(t.Context(), strings.TrimPrefix(at, "/uploads/"), "ana")
		ok(t, err)
		_, key, err := e.g.o.Files.BeginPart(t.Context(), u)
		ok(t, err)
		_, err = e.g.o.Blobs.Write(t.Context(), key, strings.NewReader(content), blobstore.WriteOptions{})
		ok(t, err)
		return &tusUpload{g: e.g, upload: u}
	}
	at := e.begin(t, ana, "a", 5)
	died(at, "hel")
	e.tus(t, "HEAD", at, ana, "").at(t, 200, 0)
	e.exec(t, `UPDATE walgate.uploads SET expires_at = now() - interval '1s'`)
	_, _, _, err := e.g.o.Files.Expire(t.Context(), e.g.o.Blobs)
	ok(t, err)
	e.tidy(t, 0)

	at = e.begin(t, ana, "a", 5)
	state, err := restoredHash(nil)
	ok(t, err)
	state.Write([]byte("hello"))
	bytes, err := state.(interface{ MarshalBinary() ([]byte, error) }).MarshalBinary()
	ok(t, err)
	ok(t, died(at, "hello").add(tusWritten{number: 0, size: 5, state: bytes}))
	e.get(t, "/attachments/a", ana).problem(t, NotFound)
	e.patch(t, at, ana, "", 5).at(t, 204, 5)
	e.get(t, "/attachments/a", ana).bytesAre(t, 200, "hello")
	e.tidy(t, 1)
}

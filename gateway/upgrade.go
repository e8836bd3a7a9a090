package gateway

import (
	"bufio"
	"context"
	"encoding/base64"
	"io"
	"net"
	"net/http"
	"runtime/debug"
	"strings"
	"time"

	"github.com/fasthttp/websocket"
	"github.com/gofiber/fiber/v2"
	"github.com/gofiber/fiber/v2/utils"
	"github.com/valyala/fasthttp"
	"github.com/valyala/fasthttp/fasthttpadaptor"
)

// readBuffer of an open stream: clients send little.
const readBuffer = 256

// upgrader makes the handshake's answer; upgrade has checked the request.
var upgrader = websocket.Upgrader{ReadBufferSize: readBuffer, WriteBufferPool: unusedBuffers{}, CheckOrigin: func(*http.Request) bool { return true }}

// unusedBuffers keeps the library from allocating a buffer for writing: outlets write.
type unusedBuffers struct{}

func (unusedBuffers) Get() any { return nil }
func (unusedBuffers) Put(any)  {}

// upgrade answers GET /sync/stream: it checks the handshake and turns the connection into a stream.
func (g *Gateway) upgrade(c *fiber.Ctx) error {
	switch {
	case !websocket.FastHTTPIsWebSocketUpgrade(c.Context()) || !c.Context().IsGet():
		return &Problem{Code: UpgradeRequired, Detail: "connect with a WebSocket client"}
	case c.Get("Sec-WebSocket-Version") != "13" || !handshakeKey(c.Get("Sec-WebSocket-Key")):
		return &Problem{Code: UpgradeRequired, Detail: "the handshake must have Sec-WebSocket-Version 13 and a Sec-WebSocket-Key"}
	case g.draining.Load():
		return &Problem{Code: ShuttingDown, RetryAfter: 2 * time.Second}
	case !g.originAllowed(c.Get(fiber.HeaderOrigin)):
		return &Problem{Code: Forbidden, Detail: "the page's origin is not in http.allowed_origins"}
	case g.o.StreamConnections > 0 && g.open.Load() >= int64(g.o.StreamConnections):
		return &Problem{Code: TooManyConnections, Detail: "this instance has as many streams as it may", RetryAfter: 5 * time.Second}
	}
	t := token(c)
	if t == "" {
		t = utils.CopyString(c.Query("token"))
	}
	id := utils.CopyString(requestID(c))
	request := c.Context()
	request.HijackSetNoResponse(true)
	request.Hijack(func(conn net.Conn) { g.accept(request, conn, id, t) })
	return nil
}

func handshakeKey(text string) bool {
	key, err := base64.StdEncoding.DecodeString(text)
	return err == nil && len(key) == 16
}

// originAllowed: clients that aren't browsers send no origin.
func (g *Gateway) originAllowed(origin string) bool {
	if origin == "" || strings.EqualFold(origin, strings.TrimSuffix(g.o.PublicURL, "/")) {
		return true
	}
	for _, o := range g.o.AllowedOrigins {
		if o == "*" || strings.EqualFold(o, origin) {
			return true
		}
	}
	return false
}

// accept takes the connection from the HTTP server and lets go of everything that served the handshake: its buffers and its
// goroutine would otherwise stay for as long as the stream is open.
func (g *Gateway) accept(request *fasthttp.RequestCtx, hijacked net.Conn, id, token string) {
	conn := hijacked
	if h, ok := hijacked.(interface{ UnsafeConn() net.Conn }); ok {
		conn = h.UnsafeConn()
		conn.SetReadDeadline(time.Unix(1, 0))
		if n, _ := hijacked.Read(make([]byte, 1)); n > 0 { // what the server has read beyond the handshake is lost with its buffer
			g.o.Logger.Warn("a client sent frames before the handshake's answer; its connection is closed", "request_id", id)
			conn.Close()
			return
		}
	}
	out := &outlet{Conn: conn, limit: g.limits.write}
	var r http.Request
	err := fasthttpadaptor.ConvertRequest(request, &r, true)
	var ws *websocket.Conn
	if err == nil {
		ws, err = upgrader.Upgrade(&hijacker{conn: out}, &r, nil)
	}
	if err != nil { // the client has gone
		conn.Close()
		return
	}
	g.streams.Add(1)
	g.open.Add(1)
	go g.stream(ws, out, id, token)
}

// stream runs a stream to its end, on a goroutine of its own.
func (g *Gateway) stream(ws *websocket.Conn, out *outlet, id, token string) {
	defer g.streams.Done()
	defer g.open.Add(-1)
	defer out.Close()
	defer context.AfterFunc(g.working, func() { out.Close() })() // also where a write stands still
	defer func() {
		if r := recover(); r != nil {
			g.o.Logger.Error("a stream ended by a panic; please report it", "panic", r, "stack", string(debug.Stack()))
			ws.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(websocket.CloseInternalServerErr, ""), time.Time{})
		}
	}()
	g.serveStream(g.serving, ws, out, id, token)
}

// hijacker lets the library answer the handshake on a connection that already left the HTTP server.
type hijacker struct{ conn net.Conn }

func (h *hijacker) Header() http.Header       { return http.Header{} }
func (h *hijacker) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }
func (h *hijacker) WriteHeader(int)           {}
func (h *hijacker) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return h.conn, bufio.NewReadWriter(bufio.NewReaderSize(h.conn, 16), bufio.NewWriterSize(h.conn, 256)), nil
}

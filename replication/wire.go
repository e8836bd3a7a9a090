package replication

import (
	"context"
	"crypto/tls"
	"net"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// wire is a connection that remembers when a byte last came: on a slow network one message takes longer than the silence
// that no live server keeps.
type wire struct {
	net.Conn
	read atomic.Int64 // Unix ns
}

func (w *wire) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	if n > 0 {
		w.read.Store(time.Now().UnixNano())
	}
	return n, err
}

// onWire lets the connection that cfg makes be a wire, below TLS.
func onWire(cfg *pgconn.Config) {
	dial := cfg.DialFunc
	cfg.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		return &wire{Conn: conn}, nil
	}
}

// lastByte returns when the last byte came on conn; the zero time where it isn't a wire.
func lastByte(conn net.Conn) time.Time {
	if t, ok := conn.(*tls.Conn); ok {
		conn = t.NetConn()
	}
	if w, ok := conn.(*wire); ok {
		return time.Unix(0, w.read.Load())
	}
	return time.Time{}
}

package changelog

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// connectTimeout bounds making a connection, where the URL has no connect_timeout: a pool counts one that hangs as open.
const connectTimeout = 10 * time.Second

// boundConnections makes a pool of connections that notice, on both sides, that the other one is gone. Calls have
// deadlines of their own, for what TCP can't notice; package schema does the same for the source.
func boundConnections(cfg *pgxpool.Config) {
	c := cfg.ConnConfig
	if c.ConnectTimeout == 0 {
		c.ConnectTimeout = connectTimeout
	}
	c.DialFunc = (&net.Dialer{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3}}).DialContext
	c.RuntimeParams["tcp_keepalives_idle"] = "15"
	c.RuntimeParams["tcp_keepalives_interval"] = "5"
	c.RuntimeParams["tcp_keepalives_count"] = "3"
	c.RuntimeParams["idle_in_transaction_session_timeout"] = "60s" // no transaction of ours pauses that long
	cfg.PingTimeout = 2 * time.Second
	cfg.AfterConnect = durable
}

// durable makes a session's commits wait for the disk at least; stronger settings stay.
func durable(ctx context.Context, c *pgx.Conn) error {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	_, err := c.Exec(ctx, `SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') IN ('off', 'local')`)
	return err
}

// Explain says what an error of the log's database means and what to do, where that is known.
func Explain(err error) error {
	var pg *pgconn.PgError
	var connect *pgconn.ConnectError
	var network net.Error
	switch {
	case errors.As(err, &connect), errors.As(err, &network), errors.Is(err, io.ErrUnexpectedEOF), errors.As(err, &pg) && strings.HasPrefix(pg.Code, "57P"): // it is going down
		return fmt.Errorf("the change log's database can't be reached, so nothing new reaches clients and the source keeps its WAL; see that it runs and that the network to it is up: %w", err)
	case !errors.As(err, &pg):
		return err
	case pg.Code == "53100": // disk_full
		return fmt.Errorf("the disk of the change log's database is full, so nothing new reaches clients and the source keeps its WAL; make room there, replication then goes on by itself: %w", err)
	case pg.Code == "25006": // read_only_sql_transaction
		return fmt.Errorf("the change log's database is read-only (a standby?): point storage.url at the primary: %w", err)
	}
	return err
}

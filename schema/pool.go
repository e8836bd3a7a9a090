package schema

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// connectTimeout bounds making a connection, where the URL has no connect_timeout: a pool counts one that hangs as open.
const connectTimeout = 10 * time.Second

// BoundConnection makes connections notice, on both sides, that the other one is gone. Calls have deadlines of their own,
// for what TCP can't notice; package changelog does the same for the log's database.
func BoundConnection(c *pgconn.Config) {
	if c.ConnectTimeout == 0 {
		c.ConnectTimeout = connectTimeout
	}
	c.DialFunc = (&net.Dialer{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3}}).DialContext
	c.RuntimeParams["tcp_keepalives_idle"] = "15"
	c.RuntimeParams["tcp_keepalives_interval"] = "5"
	c.RuntimeParams["tcp_keepalives_count"] = "3"
	c.RuntimeParams["idle_in_transaction_session_timeout"] = "60s" // else the locks of a lost gateway stay; none of ours pauses that long
}

// ErrSettings says that a session runs with other settings than it asked for: a pooler is between it and PostgreSQL, and
// values would be written in another form than the feed's. Who opens the source checks for it.
var ErrSettings = errors.New("the session has other settings than it asked for, as behind a pooler")

// prepared checks that a session has the settings that the codec needs, and makes it durable. The search path is set here
// and not with the connection's parameters, so that it shows what the application's sessions have: see ApplicationPath.
func prepared(ctx context.Context, c *pgx.Conn) error {
	if err := durable(ctx, c); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	var path string
	if err := c.QueryRow(ctx, `SELECT current_setting('search_path')`).Scan(&path); err != nil {
		return err
	}
	c.PgConn().CustomData()[applicationPath] = path
	if _, err := c.Exec(ctx, `SET search_path TO pg_catalog`); err != nil {
		return err
	}
	var names, values []string
	for _, s := range append(append([]Setting{}, SessionSettings...), SnapshotSettings...) {
		if s.Name != "client_encoding" { // of a database in SQL_ASCII it is another
			names, values = append(names, s.Name), append(values, s.Value)
		}
	}
	var other string
	err := c.QueryRow(ctx, `SELECT coalesce(string_agg(name, ', '), '') FROM unnest($1::text[], $2::text[]) AS s(name, value) WHERE current_setting(name) <> value`, names, values).Scan(&other)
	if err == nil && other != "" {
		err = fmt.Errorf("%w: %s", ErrSettings, other)
	}
	return err
}

const applicationPath = "search_path"

// ApplicationPath returns the search path that a connection of OpenPool would have without us: the application's triggers
// may need it.
func ApplicationPath(c *pgx.Conn) string {
	path, _ := c.PgConn().CustomData()[applicationPath].(string)
	return path
}

// Altered names a setting that the application's triggers or functions have changed for the whole session of a connection of
// OpenPool, as far as the server reports it; empty: none. Such a connection would write values in another form.
func Altered(c *pgx.Conn) string {
	for _, s := range SessionSettings {
		if now := c.PgConn().ParameterStatus(s.Name); now != "" && now != s.Value && s.Name != "client_encoding" {
			return s.Name
		}
	}
	return ""
}

// durable makes a session's commits wait for the disk at least; stronger settings stay.
func durable(ctx context.Context, c *pgx.Conn) error {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	_, err := c.Exec(ctx, `SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') IN ('off', 'local')`)
	return err
}

// OpenPool makes a pool of ordinary connections to the source with the settings that the codec needs. Its sessions read
// past no row-level security without an error, and commit durably whatever the database's default is. It connects once.
func OpenPool(ctx context.Context, url string, maxConns int) (*pgxpool.Pool, error) {
	cfg, err := pgxpool.ParseConfig(url)
	if err != nil {
		return nil, fmt.Errorf("database url: %w", err)
	}
	BoundConnection(&cfg.ConnConfig.Config)
	cfg.PingTimeout = 2 * time.Second
	conn, err := pgx.ConnectConfig(ctx, cfg.ConnConfig)
	if err != nil {
		return nil, fmt.Errorf("connect to the source: %w", err)
	}
	encoding := conn.PgConn().ParameterStatus("server_encoding")
	conn.Close(ctx)
	cfg.MaxConns = int32(maxConns)
	params := cfg.ConnConfig.RuntimeParams
	path, chosen := params["search_path"]
	params["application_name"] = "walgate"
	for _, s := range append(append([]Setting{}, SessionSettings...), SnapshotSettings...) {
		params[s.Name] = s.Value
	}
	if delete(params, "search_path"); chosen { // see prepared
		params["search_path"] = path
	}
	params["jit"] = "off" // would compile each chunk of a large table anew
	params["client_encoding"] = ClientEncoding(encoding)
	for _, name := range []string{"statement_timeout", "lock_timeout"} {
		params[name] = "0" // what a role sets for the application; here a context bounds each call
	}
	cfg.AfterConnect = prepared
	pool, err := pgxpool.NewWithConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("source: %w", err)
	}
	return pool, nil
}

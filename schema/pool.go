package schema

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// durable makes a session's commits wait for the disk at least; stronger settings stay.
func durable(ctx context.Context, c *pgx.Conn) error {
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
	conn, err := pgx.ConnectConfig(ctx, cfg.ConnConfig)
	if err != nil {
		return nil, fmt.Errorf("connect to the source: %w", err)
	}
	encoding := conn.PgConn().ParameterStatus("server_encoding")
	conn.Close(ctx)
	cfg.MaxConns = int32(maxConns)
	params := cfg.ConnConfig.RuntimeParams
	params["application_name"] = "walgate"
	for _, s := range append(append([]Setting{}, SessionSettings...), SnapshotSettings...) {
		params[s.Name] = s.Value
	}
	params["jit"] = "off" // would compile each chunk of a large table anew
	params["client_encoding"] = ClientEncoding(encoding)
	for _, name := range []string{"statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"} {
		params[name] = "0" // what a role sets for the application; here a context bounds each call
	}
	cfg.AfterConnect = durable
	pool, err := pgxpool.NewWithConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("source: %w", err)
	}
	return pool, nil
}

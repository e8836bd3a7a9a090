package schema

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

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
	params["client_encoding"] = ClientEncoding(encoding)
	pool, err := pgxpool.NewWithConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("source: %w", err)
	}
	return pool, nil
}

package pgserver

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5"
)

// CreateDatabase creates an empty database.
func (s *Server) CreateDatabase(ctx context.Context, name string) error {
	return s.maintain(ctx, func(ctx context.Context, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, "CREATE DATABASE "+pgx.Identifier{name}.Sanitize())
		return err
	})
}

// DropDatabase drops a database with its replication slots and whatever is still connected to it.
func (s *Server) DropDatabase(ctx context.Context, name string) error {
	return s.maintain(ctx, func(ctx context.Context, conn *pgx.Conn) error { return dropDatabase(ctx, conn, name) })
}

// maintain runs work on a connection to the maintenance database.
func (s *Server) maintain(ctx context.Context, work func(context.Context, *pgx.Conn) error) error {
	ctx, cancel := context.WithTimeout(ctx, cleanupLimit)
	defer cancel()
	conn, err := pgx.Connect(ctx, s.DSN(superuser))
	if err != nil {
		return err
	}
	return errors.Join(work(ctx, conn), conn.Close(context.WithoutCancel(ctx)))
}

// dropDatabase drops a database. Its logical slots would forbid that, so they go first, with their walsenders.
func dropDatabase(ctx context.Context, conn *pgx.Conn, name string) error {
	rows, err := conn.Query(ctx, "SELECT slot_name FROM pg_replication_slots WHERE database = $1", name)
	if err != nil {
		return err
	}
	slots, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	for _, slot := range slots {
		// Ten seconds of patience for the walsender to go; 14 and newer.
		_, err := conn.Exec(ctx, `SELECT pg_terminate_backend(active_pid, 10000) FROM pg_replication_slots
			WHERE slot_name = $1 AND active_pid IS NOT NULL`, slot)
		if err != nil {
			return err
		}
		if _, err := conn.Exec(ctx, `SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots
			WHERE slot_name = $1`, slot); err != nil {
			return err
		}
	}
	_, err = conn.Exec(ctx, "DROP DATABASE "+pgx.Identifier{name}.Sanitize()+" WITH (FORCE)")
	return err
}

// Package migrate applies numbered SQL files to schema walgate, each once, in one transaction each.
//
// It owns the table walgate.migrations and nothing else. Up may run from several instances at once.
package migrate

import (
	"context"
	"fmt"
	"io/fs"
	"sort"

	"github.com/jackc/pgx/v5"
)

// lockKey serialises instances that start together; an arbitrary constant ("walgate" in ASCII).
const lockKey = 0x77616c67617465

// Up applies the files of fsys (001_name.sql, 002_…) that this part ("log", "source") has not seen yet. Schema walgate
// is made when missing. An error names the file; what was applied before it stays.
func Up(ctx context.Context, conn *pgx.Conn, part string, fsys fs.FS) error {
	names, err := fs.Glob(fsys, "*.sql")
	if err != nil {
		return err
	}
	sort.Strings(names)
	for _, name := range names {
		if err := apply(ctx, conn, part, fsys, name); err != nil {
			return fmt.Errorf("migrate %s: %s: %w", part, name, err)
		}
	}
	return nil
}

func apply(ctx context.Context, conn *pgx.Conn, part string, fsys fs.FS, name string) error {
	text, err := fs.ReadFile(fsys, name)
	if err != nil {
		return err
	}
	return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock($1)`, int64(lockKey)); err != nil {
			return err
		}
		var done bool
		err := tx.QueryRow(ctx, `SELECT to_regclass('walgate.migrations') IS NOT NULL`).Scan(&done)
		if err != nil {
			return err
		}
		if !done {
			// Who waited for the lock may still look at the catalog of before; what makes tables looks anew.
			_, err = tx.Exec(ctx, `CREATE SCHEMA IF NOT EXISTS walgate;
				CREATE TABLE IF NOT EXISTS walgate.migrations (part text, name text, applied_at timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (part, name))`)
			if err != nil {
				return err
			}
		}
		tag, err := tx.Exec(ctx, `INSERT INTO walgate.migrations (part, name) VALUES ($1, $2) ON CONFLICT DO NOTHING`, part, name)
		if err != nil || tag.RowsAffected() == 0 {
			return err
		}
		_, err = tx.Exec(ctx, string(text), pgx.QueryExecModeSimpleProtocol)
		return err
	})
}

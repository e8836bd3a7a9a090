package schema

import (
	"context"
	"embed"
	"fmt"
	"io/fs"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/internal/migrate"
)

//go:embed migrations/*.sql
var migrationFiles embed.FS

// OwnTables are the tables in the source's schema walgate that the gateway reads and writes.
var OwnTables = []string{"attachments", "care", "files", "local_ids", "manifests", "outcomes", "pushes", "quotas", "secrets", "sessions", "source", "tables", "uploads"}

func migrations() fs.FS {
	sub, err := fs.Sub(migrationFiles, "migrations")
	if err != nil {
		panic(err) // embedded: it is there
	}
	return sub
}

// Migrate creates or updates walgate's own tables in the source.
func Migrate(ctx context.Context, conn *pgx.Conn) error {
	return migrate.Up(ctx, conn, "source", migrations())
}

// PendingMigrations names what Migrate has yet to do, in its order; none: nothing.
func PendingMigrations(ctx context.Context, q Querier) ([]string, error) {
	var there bool
	err := each(ctx, q, `SELECT to_regclass('walgate.migrations') IS NOT NULL`, nil, func(r pgx.Rows) error { return r.Scan(&there) })
	done := map[string]bool{}
	if err == nil && there {
		err = each(ctx, q, `SELECT name FROM walgate.migrations WHERE part = 'source'`, nil, func(r pgx.Rows) error {
			var name string
			err := r.Scan(&name)
			done[name] = true
			return err
		})
	}
	if err != nil {
		return nil, fmt.Errorf("read which of walgate's tables are there: %w", err)
	}
	names, err := fs.Glob(migrations(), "*.sql") // sorted
	if err != nil {
		return nil, err
	}
	var pending []string
	for _, n := range names {
		if !done[n] {
			pending = append(pending, n)
		}
	}
	return pending, nil
}

// MigrationSQL returns what Migrate does for the pending migrations as SQL for a DBA.
func MigrationSQL(pending []string) string {
	var b strings.Builder
	b.WriteString("CREATE SCHEMA IF NOT EXISTS walgate;\n" +
		"CREATE TABLE IF NOT EXISTS walgate.migrations (part text, name text, applied_at timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (part, name));\n")
	for _, name := range pending {
		text, err := fs.ReadFile(migrations(), name)
		if err != nil {
			panic(err) // embedded: it is there
		}
		fmt.Fprintf(&b, "INSERT INTO walgate.migrations (part, name) VALUES ('source', %s);\n%s", literal(name), text)
	}
	return b.String()
}

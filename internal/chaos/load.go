package chaos

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/walgate/walgate/internal/pgserver"
)

// SchemaError says that the application's SQL can't be loaded into an empty database.
type SchemaError struct{ cause error }

// Error names the place and PostgreSQL's reason.
func (e *SchemaError) Error() string { return "the SQL can't be loaded: " + e.cause.Error() }

// Unwrap returns PostgreSQL's reason.
func (e *SchemaError) Unwrap() error { return e.cause }

// TryOut starts a server of its own, loads the application's tables into an empty database, and hands its connection string
// to look.
func TryOut(ctx context.Context, o Options, look func(ctx context.Context, dsn string) error) (err error) {
	server, err := pgserver.Start(ctx, pgserver.Options{Install: o.Install, Fast: true, Settings: settings()})
	if err != nil {
		return err
	}
	defer func() {
		closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), serverLimit)
		defer cancel()
		err = errors.Join(err, server.Close(closing))
	}()
	if err := server.CreateDatabase(ctx, database); err != nil {
		return err
	}
	if err := loadSchema(ctx, server.DSN(database), o.Schema); err != nil {
		return err
	}
	return look(ctx, server.DSN(database))
}

var missingRole = regexp.MustCompile(`^role "(.*)" does not exist$`)

// loadSchema makes the application's tables. Roles that the SQL names and a dump of one database doesn't make are made.
func loadSchema(ctx context.Context, dsn, sql string) error {
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var plain strings.Builder
	for line := range strings.Lines(sql) {
		if !strings.HasPrefix(line, `\`) { // psql's own, such as \restrict
			plain.WriteString(line)
		}
	}
	for range 100 {
		_, err = conn.PgConn().Exec(ctx, plain.String()).ReadAll()
		var pg *pgconn.PgError
		if !errors.As(err, &pg) {
			break
		}
		named := missingRole.FindStringSubmatch(pg.Message)
		if named == nil {
			return &SchemaError{fmt.Errorf("%s: %w%s", place(plain.String(), int(pg.Position)), err, schemaHint(pg.Code))}
		}
		if _, err := conn.Exec(ctx, "CREATE ROLE "+pgx.Identifier{named[1]}.Sanitize()); err != nil {
			return fmt.Errorf("load the schema: %w", err)
		}
	}
	return err
}

// schemaHint says what to do about the commonest trouble.
func schemaHint(code string) string {
	switch code {
	case "0A000", "58P01", "42704": // an extension or a type that isn't there
		return " (an extension that this machine's PostgreSQL lacks? install it here too, or leave it out of the SQL)"
	case "42P06", "42P07", "42710":
		return " (it must make the tables in an empty database)"
	}
	return ""
}

// place says where in the text PostgreSQL found a fault.
func place(text string, position int) string {
	before := []rune(text)
	if position < 1 || position > len(before) {
		return "at a statement as a whole"
	}
	return fmt.Sprintf("line %d", 1+strings.Count(string(before[:position-1]), "\n"))
}

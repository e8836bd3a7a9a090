package schema

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Publications names the two publications that walgate makes.
type Publications struct {
	Rows   string // the synced tables
	Events string // walgate's own tables whose inserts mark events in the stream: eventTables
}

// eventTables are walgate's own tables whose inserts are published: marks of pushes, events of attachments.
var eventTables = []string{"walgate.pushes", "walgate.attachments"}

// PublicationsFor derives both names from the configured one.
func PublicationsFor(name string) Publications {
	return Publications{Rows: name, Events: name + "_events"}
}

// Synced is one table that should be in the publication.
type Synced struct {
	Table       *Table
	KeyIdentity bool // replica identity stays as it is (the primary key) instead of FULL
}

// Step is a set of statements that run in one transaction.
type Step struct {
	What       string
	Statements []string
	Locks      bool // waits for locks of the application's transactions: retried with a lock timeout
}

// Plan returns the steps that bring publication and replica identities to what is wanted; none when all is well.
func Plan(p Publications, cat *Catalog, has *Published, wanted []Synced) []Step {
	var steps []Step
	with, now := `publish = 'insert, update, delete, truncate'`, cat.Publication
	if cat.ServerVersion >= 180000 { // else replica identity FULL would break the application's UPDATE of such tables
		with += `, publish_generated_columns = stored`
	}
	if has.Rows && (len(now.Lacks) > 0 || now.ViaRoot || now.HidesGenerated) {
		steps = append(steps, Step{What: "give publication " + p.Rows + " its options back", Statements: []string{
			fmt.Sprintf("ALTER PUBLICATION %s SET (%s, publish_via_partition_root = false)", ident(p.Rows), with)}})
	}
	if !has.Rows {
		steps = append(steps, Step{What: "create publication " + p.Rows, Statements: []string{
			fmt.Sprintf("CREATE PUBLICATION %s WITH (%s)", ident(p.Rows), with)}})
	}
	switch {
	case !has.Events:
		steps = append(steps, Step{What: "create publication " + p.Events, Statements: []string{
			fmt.Sprintf("CREATE PUBLICATION %s FOR TABLE ONLY %s WITH (publish = 'insert')", ident(p.Events), strings.Join(eventTables, ", ONLY "))}})
	case len(has.LacksEvents) > 0: // made by an older walgate
		steps = append(steps, Step{What: "let " + strings.Join(has.LacksEvents, " and ") + " join publication " + p.Events, Statements: []string{
			fmt.Sprintf("ALTER PUBLICATION %s ADD TABLE ONLY %s", ident(p.Events), strings.Join(has.LacksEvents, ", ONLY "))}})
	}
	in := map[uint32]bool{}
	for _, t := range has.Tables {
		in[t.OID] = true
	}
	keep := map[uint32]bool{}
	for _, s := range wanted {
		keep[s.Table.OID] = true
		if st := joinStep(p.Rows, s, in[s.Table.OID]); len(st.Statements) > 0 {
			steps = append(steps, st)
		}
	}
	for _, t := range has.Tables {
		if !keep[t.OID] {
			steps = append(steps, Step{What: "take " + t.String() + " out of the publication", Locks: true,
				Statements: []string{fmt.Sprintf("ALTER PUBLICATION %s DROP TABLE ONLY %s", ident(p.Rows), t.sql())}})
		}
	}
	return steps
}

// joinStep lets a table join so that no row in flight escapes: the lock waits for the writers, and everything they wrote
// is decoded by the old rules; everything after is decoded by the new ones.
func joinStep(publication string, s Synced, published bool) Step {
	t := s.Table
	type relation struct {
		oid      uint32
		sql      string
		identity byte
	}
	alter := []relation{{t.OID, t.sql(), t.Identity}}
	if t.Kind == 'p' { // rows live in the leaves; a leaf made later inherits nothing of this
		alter = alter[:0]
		for _, l := range t.Leaves {
			alter = append(alter, relation{l.OID, pgx.Identifier{l.Schema, l.Name}.Sanitize(), l.Identity})
		}
	}
	st := Step{What: "let " + t.String() + " join", Locks: true}
	only := "ONLY "
	if t.Kind == 'p' {
		only = ""
	}
	lock := fmt.Sprintf("LOCK TABLE %s%s IN SHARE ROW EXCLUSIVE MODE", only, t.sql())
	for _, r := range alter {
		if s.KeyIdentity || r.identity == 'f' {
			continue
		}
		st.Statements = append(st.Statements,
			fmt.Sprintf(`INSERT INTO walgate.tables (relation, former_identity, former_index) SELECT c.oid, c.relreplident, (SELECT indexrelid FROM pg_index WHERE indrelid = c.oid AND indisreplident) FROM pg_class c WHERE c.oid = %s::regclass ON CONFLICT (relation) DO NOTHING`, literal(r.sql)),
			fmt.Sprintf("ALTER TABLE ONLY %s REPLICA IDENTITY FULL", r.sql))
	}
	if published && (t.Filtered || t.Listed) {
		st.Statements = append(st.Statements, fmt.Sprintf("ALTER PUBLICATION %s DROP TABLE ONLY %s", ident(publication), t.sql()))
	}
	if !published || t.Filtered || t.Listed {
		target := "ONLY " + t.sql()
		if t.Kind == 'p' {
			target = t.sql()
		}
		st.Statements = append(st.Statements, fmt.Sprintf("ALTER PUBLICATION %s ADD TABLE %s", ident(publication), target))
	}
	if len(st.Statements) > 0 {
		st.Statements = append([]string{lock}, st.Statements...)
	}
	return st
}

// Published is what the publications hold.
type Published struct {
	Rows, Events bool     // whether the publications exist
	Tables       []*Table // that the one of rows names
	LacksEvents  []string // walgate's own tables that the one of events, if it exists, should have and hasn't
}

// ReadPublished reads what the publications hold.
func ReadPublished(ctx context.Context, q Querier, p Publications) (*Published, error) {
	has := &Published{}
	err := each(ctx, q, `SELECT pubname = $1, ARRAY(SELECT name FROM unnest($3::text[]) WITH ORDINALITY AS t(name, n) WHERE NOT EXISTS (
			SELECT FROM pg_publication_rel WHERE prpubid = p.oid AND prrelid = to_regclass(name)) ORDER BY n)
		FROM pg_publication p WHERE pubname IN ($1, $2)`, []any{p.Rows, p.Events, eventTables}, func(r pgx.Rows) error {
		var rows bool
		var lacks []string
		err := r.Scan(&rows, &lacks)
		if rows {
			has.Rows = true
		} else {
			has.Events, has.LacksEvents = true, lacks
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("read publications: %w", err)
	}
	err = each(ctx, q, `SELECT c.oid, n.nspname::text, c.relname::text FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
		JOIN pg_class c ON c.oid = r.prrelid JOIN pg_namespace n ON n.oid = c.relnamespace WHERE p.pubname = $1 ORDER BY 2, 3`, []any{p.Rows}, func(r pgx.Rows) error {
		t := &Table{}
		has.Tables = append(has.Tables, t)
		return r.Scan(&t.OID, &t.Schema, &t.Name)
	})
	if err != nil {
		return nil, fmt.Errorf("read the publication's tables: %w", err)
	}
	return has, nil
}

// joinAttempts bounds how often a step that waits for locks is tried, two seconds each.
const joinAttempts = 15

// Execute runs one step in one transaction. A step that waits for locks gives way to the application after two seconds
// and tries again.
func Execute(ctx context.Context, conn *pgx.Conn, s Step) error {
	var err error
	for attempt := range joinAttempts {
		err = ExecuteOnce(ctx, conn, s)
		var pg *pgconn.PgError
		if !errors.As(err, &pg) || pg.Code != "55P03" && pg.Code != "40P01" {
			break
		}
		select { // let the application's queue of lock waiters drain before asking again
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Duration(attempt+1) * 200 * time.Millisecond):
		}
	}
	return err
}

// ExecuteOnce is Execute without trying again.
func ExecuteOnce(ctx context.Context, conn *pgx.Conn, s Step) error {
	err := pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		if s.Locks {
			if _, err := tx.Exec(ctx, `SET LOCAL lock_timeout = '2s'`); err != nil {
				return err
			}
		}
		for _, sql := range s.Statements {
			if _, err := tx.Exec(ctx, sql); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("%s: %w", s.What, err)
	}
	return nil
}

// String returns the step as SQL for a DBA.
func (s Step) String() string {
	b := "-- " + s.What + "\nBEGIN;\n"
	if s.Locks {
		b += "SET LOCAL lock_timeout = '2s'; -- repeat the block if it times out\n"
	}
	return b + strings.Join(s.Statements, ";\n") + ";\nCOMMIT;\n"
}

// Uninstall drops the publications and schema walgate and gives every altered table its former replica identity, as far
// as nobody changed it since. The slot must be gone before (replication.DropSlot), or its next reader fails.
func Uninstall(ctx context.Context, conn *pgx.Conn, p Publications) error {
	for _, name := range []string{p.Rows, p.Events} {
		if _, err := conn.Exec(ctx, "DROP PUBLICATION IF EXISTS "+ident(name)); err != nil {
			return fmt.Errorf("drop publication %s: %w", name, err)
		}
	}
	var there bool
	if err := conn.QueryRow(ctx, `SELECT to_regclass('walgate.tables') IS NOT NULL`).Scan(&there); err != nil {
		return err
	}
	if there {
		if err := restoreIdentities(ctx, conn); err != nil {
			return err
		}
	}
	if _, err := conn.Exec(ctx, "DROP SCHEMA IF EXISTS walgate CASCADE"); err != nil {
		return fmt.Errorf("drop schema walgate: %w", err)
	}
	return nil
}

func restoreIdentities(ctx context.Context, conn *pgx.Conn) error {
	var restore []Step
	err := each(ctx, conn, `SELECT t.relation::oid::int8, n.nspname::text, c.relname::text, t.former_identity::text, coalesce(i.relname::text, '')
		FROM walgate.tables t JOIN pg_class c ON c.oid = t.relation JOIN pg_namespace n ON n.oid = c.relnamespace
		LEFT JOIN pg_class i ON i.oid = t.former_index WHERE c.relreplident = 'f' ORDER BY 2, 3`, nil, func(r pgx.Rows) error {
		var oid int64
		var schema, name, identity, index string
		if err := r.Scan(&oid, &schema, &name, &identity, &index); err != nil {
			return err
		}
		to := "DEFAULT"
		switch {
		case identity == "n":
			to = "NOTHING"
		case identity == "i" && index != "":
			to = "USING INDEX " + ident(index)
		}
		sql := pgx.Identifier{schema, name}.Sanitize()
		restore = append(restore, Step{What: "give " + schema + "." + name + " its replica identity back", Locks: true, Statements: []string{
			"ALTER TABLE ONLY " + sql + " REPLICA IDENTITY " + to, fmt.Sprintf("DELETE FROM walgate.tables WHERE relation = %d", oid)}})
		return nil
	})
	if err != nil {
		return fmt.Errorf("read the former replica identities: %w", err)
	}
	for _, s := range restore {
		if err := Execute(ctx, conn, s); err != nil {
			return err
		}
	}
	return nil
}

func (t *Table) sql() string { return pgx.Identifier{t.Schema, t.Name}.Sanitize() }

// SQL returns the table's name quoted for SQL.
func (t *Table) SQL() string { return t.sql() }

// GrantRead is what lets a role read a table.
func GrantRead(t *Table, role string) string {
	return fmt.Sprintf("GRANT USAGE ON SCHEMA %s TO %s; GRANT SELECT ON %s TO %[2]s;", ident(t.Schema), ident(role), t.sql())
}

func ident(s string) string { return pgx.Identifier{s}.Sanitize() }

func literal(s string) string { return "'" + strings.ReplaceAll(s, "'", "''") + "'" }

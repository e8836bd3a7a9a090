package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/policies"
)

// pushRole is the role that writes what clients push.
type pushRole struct {
	name, quoted string
	own          bool   // it is that of database.url
	bypasses     string // why row-level security doesn't hold for it; empty: it may
}

// checkPush finds what would keep the role that writes from writing, and what would let it write past the application's
// row-level security.
func checkPush(ctx context.Context, conn *pgx.Conn, cfg *Config, set *policies.Set) ([]policies.Fault, error) {
	w, faults, err := findWriter(ctx, conn, cfg.Push.Role)
	if err != nil || w == nil {
		return faults, err
	}
	for _, c := range set.Collections {
		more, err := w.checkTable(ctx, conn, c)
		if err != nil {
			return nil, err
		}
		faults = append(faults, more...)
		if c.Spec.Conflict == policies.Function {
			if more, err = w.checkResolver(ctx, conn, c); err != nil {
				return nil, err
			}
			faults = append(faults, more...)
		}
	}
	return faults, nil
}

// findWriter looks the role up; nil where there is none.
func findWriter(ctx context.Context, conn *pgx.Conn, role string) (*pushRole, []policies.Fault, error) {
	var faults []policies.Fault
	fault := func(got, want, hint string) {
		faults = append(faults, policies.Fault{Path: "push.role", Got: got, Want: want, Hint: hint})
	}
	w := &pushRole{own: role == ""}
	var user string
	var super, bypass, settable bool
	var version int
	// Before 16, every membership allows SET ROLE.
	err := conn.QueryRow(ctx, `SELECT rolname::text, current_user::text, rolsuper, rolbypassrls, v, pg_has_role(current_user, oid, CASE WHEN v >= 160000 THEN 'SET' ELSE 'MEMBER' END)
		FROM pg_roles, (SELECT current_setting('server_version_num')::int) AS s(v) WHERE rolname = coalesce(nullif($1, ''), current_user)`, role).
		Scan(&w.name, &user, &super, &bypass, &version, &settable)
	if errors.Is(err, pgx.ErrNoRows) {
		hint, err := nearestRole(ctx, conn, role)
		fault("role "+role+", which doesn't exist", "a role that writes what clients push", hint)
		return nil, faults, err
	}
	if err != nil {
		return nil, nil, err
	}
	w.quoted = pgx.Identifier{w.name}.Sanitize()
	switch {
	case super:
		w.bypasses = "is a superuser"
	case bypass:
		w.bypasses = "has BYPASSRLS"
	}
	if w.own {
		return w, nil, nil
	}
	if w.bypasses != "" {
		fault("role "+w.name+", which "+w.bypasses, "a role for which row-level security holds",
			"the application's policies would not hold for clients: ALTER ROLE "+w.quoted+" NOSUPERUSER NOBYPASSRLS; or name another role")
	}
	if !settable {
		with := ""
		if version >= 160000 {
			with = " WITH SET TRUE"
		}
		fault("role "+w.name+", which role "+user+" of database.url may not become", "a role that it may SET ROLE to",
			"GRANT "+w.quoted+" TO "+pgx.Identifier{user}.Sanitize()+with+";")
	}
	return w, faults, nil
}

func nearestRole(ctx context.Context, conn *pgx.Conn, role string) (string, error) {
	rows, err := conn.Query(ctx, `SELECT rolname::text FROM pg_roles WHERE rolname !~ '^pg_'`)
	if err != nil {
		return "", err
	}
	roles, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if near := policies.Nearest(role, roles); near != "" {
		return "did you mean " + near + "?", err
	}
	return "CREATE ROLE " + pgx.Identifier{role}.Sanitize() + " NOLOGIN; and grant it what it may do", err
}

// checkTable holds the role's rights against what the collection lets clients do, and row-level security against the role.
func (w *pushRole) checkTable(ctx context.Context, conn *pgx.Conn, c *policies.Collection) (faults []policies.Fault, err error) {
	if c.Spec.Write == nil && w.own {
		return nil, nil
	}
	secured, owns, grants, err := w.rights(ctx, conn, c)
	if err != nil {
		return nil, err
	}
	table := pgx.Identifier{c.Table.Schema, c.Table.Name}.Sanitize()
	fault := func(path, got, want, hint string) {
		faults = append(faults, policies.Fault{Path: path, Got: got, Want: want, Hint: hint})
	}
	const holds = "row-level security that holds for clients"
	force := "ALTER TABLE " + table + " FORCE ROW LEVEL SECURITY;"
	switch bypasses := w.bypasses; {
	case !secured || bypasses == "" && !owns:
	case w.own:
		if bypasses == "" {
			bypasses = "owns it"
		}
		fault("collections."+c.Name+".write", c.Table.String()+", whose row-level security role "+w.name+" of database.url is above, as it "+bypasses, holds,
			"set push.role to a role for which it holds, such as the one that the application's users have")
	case owns && bypasses == "": // else it is reported already
		fault("push.role", "role "+w.name+", which owns "+c.Table.String()+" and is above its row-level security", holds, force+" or name another role")
	}
	if len(grants) > 0 {
		fault("collections."+c.Name+".write", c.Table.String()+", where role "+w.name+" lacks rights to write", "a table that it may write as the collection says", strings.Join(grants, " "))
	}
	return faults, nil
}

// rights says whether the table has row-level security and the role stands above it as its owner, and which statements give the
// role what the collection's operations take; none: it has it.
func (w *pushRole) rights(ctx context.Context, conn *pgx.Conn, c *policies.Collection) (secured, owns bool, grants []string, err error) {
	need, columns := needs(c)
	var usage bool
	var lacks []string
	// An owner, and who has its rights, is above row-level security without FORCE. A right may be granted by column.
	err = conn.QueryRow(ctx, `SELECT relrowsecurity, pg_has_role($1::name, relowner, 'USAGE') AND NOT relforcerowsecurity, has_schema_privilege($1::name, relnamespace, 'USAGE'),
		ARRAY(SELECT p FROM unnest($3::text[]) AS p WHERE NOT has_table_privilege($1::name, c.oid, p) AND NOT coalesce(p <> 'DELETE' AND
			(SELECT bool_and(has_column_privilege($1::name, c.oid, a, p)) FROM unnest(CASE p WHEN 'SELECT' THEN $4::text[] WHEN 'INSERT' THEN $5 ELSE $6 END) AS a), false))
		FROM pg_class c WHERE oid = $2`, w.name, c.Table.OID, need, columns["SELECT"], columns["INSERT"], columns["UPDATE"]).Scan(&secured, &owns, &usage, &lacks)
	if errors.Is(err, pgx.ErrNoRows) { // dropped meanwhile, which the watch of the catalog finds
		return false, false, nil, nil
	}
	if err != nil || c.Spec.Write == nil {
		return secured, owns, nil, err
	}
	if !usage {
		grants = append(grants, "GRANT USAGE ON SCHEMA "+pgx.Identifier{c.Table.Schema}.Sanitize()+" TO "+w.quoted+";")
	}
	if len(lacks) > 0 {
		grants = append(grants, fmt.Sprintf("GRANT %s ON %s TO %s;", strings.Join(lacks, ", "), pgx.Identifier{c.Table.Schema, c.Table.Name}.Sanitize(), w.quoted))
	}
	return secured, owns, grants, nil
}

// needs lists the privileges that the collection's operations take, and for those that may be granted by column, the columns.
func needs(c *policies.Collection) (privileges []string, columns map[string][]string) {
	columns = map[string][]string{}
	if c.Spec.Write == nil {
		return nil, columns
	}
	soft, _ := c.SoftDelete()
	inserts, updates, deletes := c.Takes(policies.PushInsert), c.Takes(policies.PushUpdate), c.Takes(policies.PushDelete)
	for i, col := range c.Table.Columns {
		columns["SELECT"] = append(columns["SELECT"], col.Name) // the row as written is read back
		_, set := c.Spec.Write.Set[col.Name]
		if c.Writable(col.Name) || set || slices.Contains(c.Table.Key, i) {
			columns["INSERT"] = append(columns["INSERT"], col.Name)
		}
		if updates && c.Writable(col.Name) || col.Name == soft {
			columns["UPDATE"] = append(columns["UPDATE"], col.Name)
		}
	}
	privileges = []string{"SELECT"}
	if inserts {
		privileges = append(privileges, "INSERT")
	}
	if updates || deletes && soft != "" {
		privileges = append(privileges, "UPDATE")
	}
	if deletes && soft == "" {
		privileges = append(privileges, "DELETE")
	}
	return privileges, columns
}

const resolverSignature = "(current jsonb, incoming jsonb, base jsonb) RETURNS jsonb"

// checkResolver looks for the collection's resolver and the role's right to call it.
func (w *pushRole) checkResolver(ctx context.Context, conn *pgx.Conn, c *policies.Collection) ([]policies.Fault, error) {
	namespace, name, _ := strings.Cut(c.Spec.ConflictFunction, ".")
	f := policies.Fault{Path: "collections." + c.Name + ".conflict.function", Want: "a function " + resolverSignature}
	quoted := pgx.Identifier{namespace, name}.Sanitize()
	rows, err := conn.Query(ctx, `SELECT pg_get_function_identity_arguments(p.oid), coalesce(pg_get_function_result(p.oid), 'nothing'),
		prokind = 'f' AND NOT proretset AND proargtypes = '3802 3802 3802' AND prorettype = 'jsonb'::regtype AND proargmodes IS NULL,
		has_schema_privilege($3::name, n.oid, 'USAGE'), has_function_privilege($3::name, p.oid, 'EXECUTE')
		FROM pg_proc p JOIN pg_namespace n ON n.oid = pronamespace WHERE nspname = $1 AND proname = $2`, namespace, name, w.name)
	if err != nil {
		return nil, err
	}
	var found []string
	var args, result string
	var fits, usage, execute, fitting bool
	var grants []string
	_, err = pgx.ForEachRow(rows, []any{&args, &result, &fits, &usage, &execute}, func() error {
		found = append(found, "("+args+") RETURNS "+result)
		if !fits {
			return nil
		}
		fitting = true
		if !usage {
			grants = append(grants, "GRANT USAGE ON SCHEMA "+pgx.Identifier{namespace}.Sanitize()+" TO "+w.quoted+";")
		}
		if !execute {
			grants = append(grants, "GRANT EXECUTE ON FUNCTION "+quoted+"(jsonb, jsonb, jsonb) TO "+w.quoted+";")
		}
		return nil
	})
	switch {
	case err != nil:
		return nil, err
	case fitting && len(grants) == 0:
		return nil, nil
	case fitting:
		f.Got, f.Want, f.Hint = c.Spec.ConflictFunction+", which role "+w.name+" may not call", "a function that it may call", strings.Join(grants, " ")
	case len(found) > 0:
		f.Got, f.Hint = c.Spec.ConflictFunction+strings.Join(found, " and "), "CREATE FUNCTION "+quoted+resolverSignature+" …"
	default:
		f.Got = c.Spec.ConflictFunction + ", which doesn't exist"
		if f.Hint, err = nearestResolver(ctx, conn, c.Spec.ConflictFunction); f.Hint == "" {
			f.Hint = "CREATE FUNCTION " + quoted + resolverSignature + " …"
		}
	}
	return []policies.Fault{f}, err
}

func nearestResolver(ctx context.Context, conn *pgx.Conn, name string) (string, error) {
	rows, err := conn.Query(ctx, `SELECT nspname || '.' || proname FROM pg_proc JOIN pg_namespace n ON n.oid = pronamespace
		WHERE proargtypes = '3802 3802 3802' AND prorettype = 'jsonb'::regtype AND nspname NOT IN ('pg_catalog', 'information_schema')`)
	if err != nil {
		return "", err
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if near := policies.Nearest(name, names); near != "" {
		return "did you mean " + near + "?", err
	}
	return "", err
}

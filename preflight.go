package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/schema"
)

// purpose is what the source is opened for: each needs other rights in it.
type purpose int

const (
	toServe purpose = iota
	toPrepare
	toPrint // somebody else will prepare
)

const (
	oldestServer     = 140000
	preflightTimeout = 20 * time.Second
	direct           = "a direct connection to PostgreSQL"
	directHint       = "put the host and port of the server itself there, not the pooler's"
)

// checkServer finds what in the source's server, or on the way to it, would keep walgate from working. It leaves what
// can't be connected to at all to those who connect next.
func checkServer(ctx context.Context, cfg *Config, why purpose, logger *slog.Logger) []policies.Fault {
	ctx, cancel := context.WithTimeout(ctx, preflightTimeout)
	defer cancel()
	conn, err := pgx.Connect(ctx, string(cfg.Database.URL))
	if err != nil {
		return nil
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var faults []policies.Fault
	fault := func(got, want, hint string) {
		faults = append(faults, policies.Fault{Path: "database.url", Got: got, Want: want, Hint: hint})
	}
	var version, pid int
	var text, level, standbys, started, database string
	var recovering bool
	err = conn.QueryRow(ctx, `SELECT current_setting('server_version_num')::int, current_setting('server_version'), pg_is_in_recovery(), current_setting('wal_level'),
		pg_backend_pid(), current_setting('synchronous_standby_names'), pg_postmaster_start_time()::text, current_database()`, pgx.QueryExecModeSimpleProtocol).
		Scan(&version, &text, &recovering, &level, &pid, &standbys, &started, &database)
	if err != nil {
		return nil
	}
	if version < oldestServer {
		fault("PostgreSQL "+text, "PostgreSQL 14 or newer", "upgrade the server; older ones lack what walgate reads")
		return faults
	}
	if recovering {
		fault("a standby, which only replays another server", "the primary", "walgate keeps its tables, publication and slot where the application writes: name the primary, or several hosts and target_session_attrs=read-write")
	}
	if level != "logical" {
		fault("a server with wal_level = "+level, "wal_level = logical", "ALTER SYSTEM SET wal_level = logical; then restart the server")
	}
	if countsWalgate(standbys) {
		fault("synchronous_standby_names = '"+standbys+"', which includes walgate", "the names of the standbys only",
			"every commit of the application would wait for walgate: name the standbys instead of '*'")
	}
	if int(conn.PgConn().PID()) != pid {
		logger.Warn("database.url seems to lead through a pooler: walgate needs " + direct + ", or its sessions get mixed up; " + directHint)
	}
	if recovering || level != "logical" {
		return faults
	}
	return append(faults, checkReplication(ctx, cfg, why, started, database)...)
}

var standbyName = regexp.MustCompile(`(?i)\*|\bwalgate\b`)

// countsWalgate says whether a synchronous_standby_names counts walgate's connection, by its application_name.
func countsWalgate(names string) bool { return standbyName.MatchString(names) }

// checkReplication tries the replication connection.
func checkReplication(ctx context.Context, cfg *Config, why purpose, started, database string) []policies.Fault {
	f := policies.Fault{Path: "database.url", Want: "a connection that may replicate"}
	if cfg.Database.ReplicationURL != "" {
		f.Path = "database.replication_url"
	}
	c, err := pgconn.ParseConfig(cfg.replicationURL())
	if err != nil {
		f.Got, f.Want = "what can't be read as a connection string", "a PostgreSQL connection string"
		return []policies.Fault{f}
	}
	c.RuntimeParams["replication"], c.RuntimeParams["application_name"] = "database", "walgate"
	conn, err := pgconn.ConnectConfig(ctx, c)
	var pg *pgconn.PgError
	switch {
	case err == nil:
	case throughPooler(err):
		f.Got, f.Want, f.Hint = "a connection through a pooler, which refuses replication", direct, directHint
		if f.Path == "database.url" {
			f.Hint = "set database.replication_url and database.url to the host and port of the server itself"
		}
		return []policies.Fault{f}
	case errors.As(err, &pg) && pg.Code == "53300" && why != toPrepare: // it is tried again and again
		return nil
	case errors.As(err, &pg) && pg.Code == "42501" && why == toPrint: // printed
		return nil
	case errors.As(err, &pg) && pg.Code == "53300":
		f.Got, f.Hint = pg.Message, "raise max_wal_senders (or max_connections) and restart the server, or end a replication connection: SELECT pid, application_name, client_addr FROM pg_stat_replication"
		return []policies.Fault{f}
	case errors.As(err, &pg) && pg.Code == "42501":
		f.Got, f.Hint = fmt.Sprintf("role %s without the REPLICATION attribute", c.User), grantReplication(c.User)
		return []policies.Fault{f}
	default:
		f.Got, f.Hint = "no replication connection: "+err.Error(), "pg_hba.conf must let the role connect to this database, and nothing but PostgreSQL may answer there"
		return []policies.Fault{f}
	}
	defer conn.Close(context.WithoutCancel(ctx))
	res, err := conn.Exec(ctx, `SELECT pg_postmaster_start_time()::text, current_database()`).ReadAll()
	if err == nil && len(res) == 1 && len(res[0].Rows) == 1 {
		if row := res[0].Rows[0]; string(row[0]) != started || string(row[1]) != database {
			f.Got, f.Want, f.Hint = "database "+string(row[1])+" of another server or another database than database.url leads to", "the same database of the same server", "both must lead to the source: "+database
			return []policies.Fault{f}
		}
	}
	return nil
}

// throughPooler says whether an error of connecting is a pooler's, which doesn't know what PostgreSQL knows.
func throughPooler(err error) bool {
	var pg *pgconn.PgError
	if errors.Is(err, schema.ErrSettings) {
		return true
	}
	// protocol_violation; and the prepared statements of a session that isn't always the same one
	return errors.As(err, &pg) && (pg.Code == "08P01" || pg.Code == "42P05" || pg.Code == "26000" || strings.Contains(pg.Message, "startup parameter"))
}

// notConnected makes a fault of an error of connecting to a database that a key names.
func notConnected(path string, err error) []policies.Fault {
	if path == "database.url" && throughPooler(err) {
		return pooled(err)
	}
	var connecting *pgconn.ConnectError
	if !errors.As(err, &connecting) || errors.Is(err, context.Canceled) {
		return nil
	}
	f := policies.Fault{Path: path, Got: "a server that can't be connected to: " + err.Error(), Want: "a database that answers", Hint: "see that PostgreSQL runs there, and that host and port are right"}
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		f.Got, f.Hint = "a server that refuses: "+pg.Message, ""
		switch pg.Code {
		case "28P01":
			f.Hint = "put the role's password into the URL, with %40 for @ and the like"
		case "28000":
			f.Hint = "pg_hba.conf on the server must let the role connect from here"
		case "3D000":
			f.Hint = "put the name of the application's database behind the last slash"
		case "53300":
			f.Hint = "raise max_connections, or lower database.pool_size"
		}
	}
	return []policies.Fault{f}
}

// pooled makes a fault of an error of the source's pool, if a pooler is its cause.
func pooled(err error) []policies.Fault {
	if !throughPooler(err) {
		return nil
	}
	return []policies.Fault{{Path: "database.url", Got: "a connection through a pooler, which doesn't keep the settings that walgate's sessions need", Want: direct, Hint: directHint + " (" + err.Error() + ")"}}
}

func grantReplication(role string) string {
	return fmt.Sprintf("ALTER ROLE %s REPLICATION; (on Amazon RDS: GRANT rds_replication TO %[1]s;)", pgx.Identifier{role}.Sanitize())
}

// mayReplicate is a column of pg_roles.
const mayReplicate = `rolsuper OR rolreplication OR EXISTS (SELECT FROM pg_roles r WHERE r.rolname = 'rds_replication' AND pg_has_role(current_user, r.oid, 'MEMBER'))`

// checkRights finds the rights that the role of database.url lacks, with the statement that gives each.
func checkRights(ctx context.Context, conn *pgx.Conn, cfg *Config, p *parts, why purpose) ([]policies.Fault, error) {
	var faults []policies.Fault
	fault := func(path, got, want, hint string) {
		faults = append(faults, policies.Fault{Path: path, Got: got, Want: want, Hint: hint})
	}
	var role, database string
	var replicates, creates, prepared bool
	var slots, mostSlots int
	err := conn.QueryRow(ctx, `SELECT current_user, current_database(), `+mayReplicate+`,
		has_database_privilege(current_database(), 'CREATE'), to_regnamespace('walgate') IS NOT NULL AND (SELECT count(*) = 2 FROM pg_publication WHERE pubname IN ($1, $2)),
		(SELECT count(*) FROM pg_replication_slots WHERE slot_name <> $3), current_setting('max_replication_slots')::int
		FROM pg_roles WHERE rolname = current_user`, p.publications.Rows, p.publications.Events, cfg.Replication.Slot).Scan(&role, &database, &replicates, &creates, &prepared, &slots, &mostSlots)
	if err != nil {
		return nil, fmt.Errorf("read the rights of database.url's role: %w", err)
	}
	quoted := pgx.Identifier{role}.Sanitize()
	if !replicates {
		fault("database.url", "role "+role+" without the REPLICATION attribute", "a role that may make and read its slot", grantReplication(role))
	}
	for _, c := range p.watcher.Current().Set.Collections {
		path, t := "collections."+c.Name+".table", c.Table
		if !t.Readable {
			fault(path, t.String()+", which role "+role+" may not read", "a table that full resyncs can read", schema.GrantRead(t, role))
		} else if t.RowsHidden {
			fault(path, t.String()+", whose row-level security would hide rows from role "+role+" that the feed doesn't hide", "a table that full resyncs can read whole",
				"ALTER ROLE "+quoted+" BYPASSRLS; and say in scope and where who sees what")
		}
	}
	more, err := checkPush(ctx, conn, cfg, p.watcher.Current().Set)
	if err != nil {
		return nil, fmt.Errorf("read the rights of the role that writes: %w", err)
	}
	faults = append(faults, more...)
	if why != toPrepare {
		more, err = checkOwnTables(ctx, conn, quoted)
		return append(faults, more...), err
	}
	if !prepared && !creates {
		fault("database.url", "role "+role+" without the right to create in database "+database, "a role that may make schema walgate and the publications",
			"GRANT CREATE ON DATABASE "+pgx.Identifier{database}.Sanitize()+" TO "+quoted+"; or let a superuser run what walgate init --print-sql prints")
	}
	if slots >= mostSlots {
		fault("replication.slot", fmt.Sprintf("%d other replication slots, as many as max_replication_slots allows", slots), "a free one",
			fmt.Sprintf("drop one that nobody needs (SELECT slot_name, active FROM pg_replication_slots), or set max_replication_slots = %d and restart the server", mostSlots+1))
	}
	if more, err = checkUpgrade(ctx, conn, p, quoted); err != nil {
		return nil, err
	}
	faults = append(faults, more...)
	rows, err := conn.Query(ctx, `SELECT name, oid::regclass::text, pg_get_userbyid(relowner)::text FROM unnest($1::text[], $2::oid[]) AS t(name, relation)
		JOIN pg_class ON oid = relation WHERE NOT pg_has_role(current_user, relowner, 'USAGE')`, unjoinedNames(p), unjoinedTables(p))
	if err != nil {
		return nil, err
	}
	var name, relation, owner string
	_, err = pgx.ForEachRow(rows, []any{&name, &relation, &owner}, func() error {
		fault("collections."+name+".table", relation+", which belongs to role "+owner, "a table of role "+role+", for its replica identity and the publication",
			"GRANT "+pgx.Identifier{owner}.Sanitize()+" TO "+quoted+"; or let "+owner+" run what walgate init --print-sql prints")
		return nil
	})
	return faults, err
}

// checkOwnTables finds walgate's own tables in the source that the role may not write. Those that aren't there are init's.
func checkOwnTables(ctx context.Context, conn *pgx.Conn, quoted string) (faults []policies.Fault, err error) {
	rows, err := conn.Query(ctx, `SELECT relname::text FROM pg_class WHERE relnamespace = to_regnamespace('walgate') AND relname = ANY ($1)
		AND NOT (has_table_privilege(oid, 'SELECT') AND has_table_privilege(oid, 'INSERT') AND has_table_privilege(oid, 'UPDATE') AND has_table_privilege(oid, 'DELETE')) ORDER BY 1`, schema.OwnTables)
	if err != nil {
		return nil, err
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if len(names) > 0 {
		faults = append(faults, policies.Fault{Path: "database.url", Got: "a role that may not read and write walgate." + strings.Join(names, ", walgate."), Want: "a role that may use walgate's own tables",
			Hint: "GRANT USAGE ON SCHEMA walgate TO " + quoted + "; GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA walgate TO " + quoted})
	}
	return faults, err
}

// checkUpgrade finds the rights that are missing to add to what an older walgate installed.
func checkUpgrade(ctx context.Context, conn *pgx.Conn, p *parts, quoted string) (faults []policies.Fault, err error) {
	pending, err := schema.PendingMigrations(ctx, conn)
	if err != nil {
		return nil, err
	}
	has, err := schema.ReadPublished(ctx, conn, p.publications)
	if err != nil {
		return nil, err
	}
	var installed, creates bool
	var owner string // of the publication, where the role isn't
	err = conn.QueryRow(ctx, `SELECT to_regnamespace('walgate') IS NOT NULL, coalesce(has_schema_privilege(to_regnamespace('walgate'), 'CREATE'), true),
		coalesce((SELECT pg_get_userbyid(pubowner)::text FROM pg_publication WHERE pubname = $1 AND NOT pg_has_role(current_user, pubowner, 'USAGE')), '')`, p.publications.Events).Scan(&installed, &creates, &owner)
	if err != nil {
		return nil, err
	}
	if installed && len(pending) > 0 && !creates {
		faults = append(faults, policies.Fault{Path: "database.url", Got: "a role that may not create in schema walgate, which lacks " + strings.Join(pending, ", "), Want: "a role that may add walgate's newer tables",
			Hint: "GRANT USAGE, CREATE ON SCHEMA walgate TO " + quoted + "; or let its owner run what walgate init --print-sql prints"})
	}
	if len(has.LacksEvents) > 0 && owner != "" {
		faults = append(faults, policies.Fault{Path: "replication.publication", Got: "publication " + p.publications.Events + " without " + strings.Join(has.LacksEvents, " and ") + ", which belongs to role " + owner, Want: "a publication of pushes and uploads",
			Hint: "let " + owner + " run what walgate init --print-sql prints"})
	}
	return faults, nil
}

// unjoined calls f with every relation that has yet to be prepared, and its collection's name.
func unjoined(p *parts, f func(name string, relation uint32)) {
	for _, c := range p.watcher.Current().Set.Collections {
		full := c.Spec.ReplicaIdentity == "default"
		if t := c.Table; !t.Published || t.Kind != 'p' && !full && t.Identity != 'f' {
			f(c.Name, t.OID)
		}
		for _, l := range c.Table.Leaves {
			if !full && l.Identity != 'f' {
				f(c.Name, l.OID)
			}
		}
	}
}

func unjoinedNames(p *parts) (names []string) {
	unjoined(p, func(name string, _ uint32) { names = append(names, name) })
	return names
}

func unjoinedTables(p *parts) (oids []uint32) {
	unjoined(p, func(_ string, oid uint32) { oids = append(oids, oid) })
	return oids
}

// printRights writes what the role of database.url, and the one that writes pushes, need besides and lack.
func printRights(ctx context.Context, conn *pgx.Conn, cfg *Config, p *parts) (string, error) {
	var role string
	var super, replicates bool
	if err := conn.QueryRow(ctx, `SELECT rolname::text, rolsuper, `+mayReplicate+` FROM pg_roles WHERE rolname = current_user`).Scan(&role, &super, &replicates); err != nil {
		return "", err
	}
	set := p.watcher.Current().Set
	var lines []string
	if !super {
		lines = roleRights(set, role, replicates)
	}
	w, _, err := findWriter(ctx, conn, cfg.Push.Role)
	if err != nil {
		return "", err
	}
	for _, c := range set.Collections {
		if w == nil || w.own && super {
			break
		}
		_, _, grants, err := w.rights(ctx, conn, c)
		if err != nil {
			return "", err
		}
		lines = append(lines, grants...)
	}
	if len(lines) == 0 {
		return "", nil
	}
	return "-- what walgate's roles may do\nBEGIN;\n" + strings.Join(lines, "\n") + "\nCOMMIT;\n\n", nil
}

// roleRights are the statements that let the role of database.url do what it has to.
func roleRights(set *policies.Set, role string, replicates bool) (lines []string) {
	name := pgx.Identifier{role}.Sanitize()
	if !replicates {
		lines = append(lines, "ALTER ROLE "+name+" REPLICATION; -- on Amazon RDS instead: GRANT rds_replication TO "+name+";")
	}
	lines = append(lines, "GRANT USAGE, CREATE ON SCHEMA walgate TO "+name+";", "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA walgate TO "+name+";")
	hidden := false
	for _, c := range set.Collections {
		lines = append(lines, schema.GrantRead(c.Table, role))
		hidden = hidden || c.Table.RowsHidden
	}
	if hidden {
		lines = append(lines, "ALTER ROLE "+name+" BYPASSRLS; -- row-level security would hide rows from full resyncs that the feed doesn't hide")
	}
	return lines
}

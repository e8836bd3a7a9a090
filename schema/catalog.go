package schema

import (
	"context"
	"fmt"
	"slices"

	"github.com/jackc/pgx/v5"
)

// Catalog is the tables asked for as they were in one snapshot of pg_catalog. Immutable.
type Catalog struct {
	Tables []*Table
	// Names lists every table of the application as schema.name, for suggestions.
	Names []string
	// ServerVersion is server_version_num, e.g. 150018.
	ServerVersion int
	// Publication is how the publication stands.
	Publication Publication
}

// Publication is the state of walgate's publication of tables.
type Publication struct {
	Name   string
	Exists bool
	// Lacks names what it doesn't publish of insert, update, delete and truncate.
	Lacks []string
	// ViaRoot says that rows of partitions arrive under their root's name, which their replica identities are not made for.
	ViaRoot bool
	// HidesGenerated says that stored generated columns are not published (PostgreSQL 18): with REPLICA IDENTITY FULL the
	// application can then neither update nor delete rows of tables that have some.
	HidesGenerated bool
}

// Table returns the table with this name, or nil.
func (c *Catalog) Table(schema, name string) *Table {
	for _, t := range c.Tables {
		if t.Name == name && t.Schema == schema {
			return t
		}
	}
	return nil
}

const relationsSQL = `SELECT c.oid, n.nspname::text, c.relname::text, c.relkind::text, c.relpersistence::text, c.relreplident::text,
	c.relispartition, c.relfilenode, c.relnatts,
	coalesce(row_security_active(c.oid), false), coalesce(has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT'), false),
	CASE WHEN r.oid IS NULL THEN '' ELSE concat_ws('.', p.oid, p.xmin, r.oid) END,
	to_jsonb(r) ->> 'prqual' IS NOT NULL, to_jsonb(r) ->> 'prattrs' IS NOT NULL
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_publication p ON p.pubname = $2 LEFT JOIN pg_publication_rel r ON r.prpubid = p.oid AND r.prrelid = c.oid
WHERE n.nspname || '.' || c.relname = ANY ($1) AND c.relkind IN ('r','p','v','m','f') ORDER BY 2, 3`

const publicationSQL = `SELECT array_remove(ARRAY[CASE WHEN NOT pubinsert THEN 'insert' END, CASE WHEN NOT pubupdate THEN 'update' END,
	CASE WHEN NOT pubdelete THEN 'delete' END, CASE WHEN NOT pubtruncate THEN 'truncate' END], NULL), pubviaroot, coalesce(to_jsonb(p) ->> 'pubgencols' = 'n', false)
FROM pg_publication p WHERE pubname = $1`

const columnsSQL = `SELECT a.attrelid, a.attnum, a.attname::text, a.atttypid, a.atttypmod, a.attnotnull, a.atthasdef OR a.atthasmissing OR a.attidentity <> '',
	a.attidentity = 'a', base.declared, a.attgenerated::text, a.attstorage::text, coalesce((SELECT collisdeterministic FROM pg_collation WHERE pg_collation.oid = a.attcollation), true), a.xmin::text
FROM pg_attribute a CROSS JOIN LATERAL (
	WITH RECURSIVE d(oid, typmod) AS (
		SELECT a.atttypid, a.atttypmod
		UNION ALL
		SELECT t.typbasetype, t.typtypmod FROM d JOIN pg_type t ON t.oid = d.oid WHERE t.typtype = 'd'
	)
	SELECT CASE WHEN d.typmod <> -1 AND t.typnamespace = 'pg_catalog'::regnamespace THEN format_type(d.oid, d.typmod) ELSE '' END
	FROM d JOIN pg_type t ON t.oid = d.oid WHERE t.typtype <> 'd'
) AS base(declared)
WHERE a.attrelid = ANY ($1) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attrelid, a.attnum`

const keysSQL = `SELECT indrelid, a.attname::text, NOT i.indimmediate FROM pg_index i
	CROSS JOIN LATERAL unnest(i.indkey[0:i.indnkeyatts - 1]) WITH ORDINALITY AS k(num, pos)
	JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.num
WHERE i.indisprimary AND i.indrelid = ANY ($1) ORDER BY indrelid, k.pos`

// leavesSQL knows a partition that was detached and attached again by the rows that say whose it is: what was written to it
// in between is not in the stream.
const leavesSQL = `WITH RECURSIVE tree(root, oid, link) AS (
	SELECT root, root, '' FROM unnest($1::oid[]) AS r(root)
	UNION ALL
	SELECT t.root, i.inhrelid, t.link || '.' || i.xmin::text FROM tree t JOIN pg_inherits i ON i.inhparent = t.oid
)
SELECT t.root, c.oid, n.nspname::text, c.relname::text, c.relkind::text, c.relpersistence::text, c.relreplident::text, t.link, c.relfilenode
FROM tree t JOIN pg_class c ON c.oid = t.oid JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind <> 'p' ORDER BY 1, 2`

const namesSQL = `SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r','p') AND NOT c.relispartition AND n.nspname NOT IN ('pg_catalog','information_schema','walgate') AND n.nspname !~ '^pg_' ORDER BY 1`

// LoadCatalog reads the tables with these names (schema.name) and their types; names that don't exist are left out. It
// runs in the caller's transaction, if q is one, and sees what that sees. publication decides Table.Published.
func LoadCatalog(ctx context.Context, q Querier, types *Types, publication string, names []string) (*Catalog, error) {
	c := &Catalog{}
	if err := c.load(ctx, q, types, publication, names); err != nil {
		return nil, fmt.Errorf("read the source's catalog: %w", err)
	}
	return c, nil
}

func (c *Catalog) load(ctx context.Context, q Querier, types *Types, publication string, names []string) error {
	byOID := map[uint32]*Table{}
	var oids, roots []uint32
	err := each(ctx, q, relationsSQL, []any{names, publication}, func(r pgx.Rows) error {
		t := &Table{}
		var kind, persistence, identity string
		if err := r.Scan(&t.OID, &t.Schema, &t.Name, &kind, &persistence, &identity, &t.Partition, &t.file, &t.width,
			&t.RowsHidden, &t.Readable, &t.joined, &t.Filtered, &t.Listed); err != nil {
			return err
		}
		t.Kind, t.Persistence, t.Identity, t.Published = kind[0], persistence[0], identity[0], t.joined != ""
		byOID[t.OID] = t
		oids = append(oids, t.OID)
		if t.Kind == 'p' {
			roots = append(roots, t.OID)
		}
		c.Tables = append(c.Tables, t)
		return nil
	})
	if err != nil {
		return err
	}
	if err := loadColumns(ctx, q, types, byOID, oids); err != nil {
		return err
	}
	err = each(ctx, q, keysSQL, []any{oids}, func(r pgx.Rows) error {
		var oid uint32
		var name string
		var deferrable bool
		if err := r.Scan(&oid, &name, &deferrable); err != nil {
			return err
		}
		t := byOID[oid]
		t.KeyDeferrable = deferrable
		t.Key = append(t.Key, t.Column(name))
		return nil
	})
	if err != nil {
		return err
	}
	err = each(ctx, q, leavesSQL, []any{roots}, func(r pgx.Rows) error {
		var root uint32
		var l Leaf
		var kind, persistence, identity string
		if err := r.Scan(&root, &l.OID, &l.Schema, &l.Name, &kind, &persistence, &identity, &l.link, &l.file); err != nil {
			return err
		}
		l.Kind, l.Persistence, l.Identity = kind[0], persistence[0], identity[0]
		byOID[root].Leaves = append(byOID[root].Leaves, l)
		return nil
	})
	if err != nil {
		return err
	}
	if err := loadConstraints(ctx, q, byOID, oids); err != nil {
		return err
	}
	c.Publication.Name = publication
	err = each(ctx, q, publicationSQL, []any{publication}, func(r pgx.Rows) error {
		c.Publication.Exists = true
		return r.Scan(&c.Publication.Lacks, &c.Publication.ViaRoot, &c.Publication.HidesGenerated)
	})
	if err != nil {
		return err
	}
	err = each(ctx, q, namesSQL, nil, func(r pgx.Rows) error {
		var n string
		err := r.Scan(&n)
		c.Names = append(c.Names, n)
		return err
	})
	if err != nil {
		return err
	}
	return each(ctx, q, `SELECT current_setting('server_version_num')::int`, nil, func(r pgx.Rows) error { return r.Scan(&c.ServerVersion) })
}

func loadColumns(ctx context.Context, q Querier, types *Types, tables map[uint32]*Table, oids []uint32) error {
	type loaded struct {
		table, typ uint32
		column     Column
	}
	var all []loaded
	var typeOIDs []uint32
	err := each(ctx, q, columnsSQL, []any{oids}, func(r pgx.Rows) error {
		var l loaded
		var generated, storage string
		col := &l.column
		if err := r.Scan(&l.table, &col.Num, &col.Name, &l.typ, &col.TypMod, &col.NotNull, &col.HasDefault,
			&col.AlwaysAssigned, &col.declared, &generated, &storage, &col.Deterministic, &col.stamp); err != nil {
			return err
		}
		col.Generated, col.Virtual = generated != "", generated == "v"
		col.Toastable = storage != "p"
		all = append(all, l)
		typeOIDs = append(typeOIDs, l.typ)
		return nil
	})
	if err != nil {
		return err
	}
	slices.Sort(typeOIDs)
	if err := types.Load(ctx, q, slices.Compact(typeOIDs)...); err != nil {
		return err
	}
	for _, l := range all {
		if l.column.Type = types.Lookup(l.typ); l.column.Type == nil {
			return fmt.Errorf("column %s.%s has a type (oid %d) that was dropped meanwhile; try again", tables[l.table], l.column.Name, l.typ)
		}
		tables[l.table].Columns = append(tables[l.table].Columns, l.column)
	}
	return nil
}

// each calls scan for every row.
func each(ctx context.Context, q Querier, sql string, args []any, scan func(pgx.Rows) error) error {
	rows, err := q.Query(ctx, sql, args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		if err := scan(rows); err != nil {
			return err
		}
	}
	return rows.Err()
}

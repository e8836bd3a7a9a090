package schema

import (
	"context"

	"github.com/jackc/pgx/v5"
)

// ForeignKey is a foreign key of a table; of a partitioned table, the root's.
type ForeignKey struct {
	Name          string
	Columns       []string
	Parent        uint32 // the OID of the referenced table
	ParentColumns []string
	Deferrable    bool
}

// keyName names a primary key as an error of PostgreSQL does.
type keyName struct{ schema, table, constraint string }

const foreignKeysSQL = `SELECT conrelid, conname::text, confrelid, condeferrable,
	(SELECT array_agg(a.attname::text ORDER BY k.pos) FROM unnest(conkey) WITH ORDINALITY AS k(num, pos) JOIN pg_attribute a ON a.attrelid = conrelid AND a.attnum = k.num),
	(SELECT array_agg(a.attname::text ORDER BY k.pos) FROM unnest(confkey) WITH ORDINALITY AS k(num, pos) JOIN pg_attribute a ON a.attrelid = confrelid AND a.attnum = k.num)
FROM pg_constraint WHERE contype = 'f' AND conparentid = 0 AND conrelid = ANY ($1) ORDER BY conrelid, conname`

const keyNamesSQL = `WITH RECURSIVE tree(root, oid) AS (
	SELECT root, root FROM unnest($1::oid[]) AS r(root)
	UNION ALL
	SELECT t.root, i.inhrelid FROM tree t JOIN pg_inherits i ON i.inhparent = t.oid JOIN pg_class c ON c.oid = i.inhrelid WHERE c.relispartition
)
SELECT t.root, n.nspname::text, c.relname::text, k.relname::text
FROM tree t JOIN pg_class c ON c.oid = t.oid JOIN pg_namespace n ON n.oid = c.relnamespace
	JOIN pg_index i ON i.indrelid = t.oid AND i.indisprimary JOIN pg_class k ON k.oid = i.indexrelid ORDER BY 1, 2, 3`

// keyEqualsSQL names the operators of the primary keys' indexes: those of an extension's type are found by no search path of ours.
const keyEqualsSQL = `SELECT i.indrelid, n.nspname::text, o.oprname::text
FROM pg_index i CROSS JOIN LATERAL unnest(i.indclass[0:i.indnkeyatts - 1]) WITH ORDINALITY AS k(class, pos)
	JOIN pg_opclass c ON c.oid = k.class
	JOIN pg_amop a ON a.amopfamily = c.opcfamily AND a.amoplefttype = c.opcintype AND a.amoprighttype = c.opcintype AND a.amopstrategy = 3
	JOIN pg_operator o ON o.oid = a.amopopr JOIN pg_namespace n ON n.oid = o.oprnamespace
WHERE i.indisprimary AND i.indrelid = ANY ($1) ORDER BY i.indrelid, k.pos`

// loadConstraints reads what only pushes need; none of it is part of a table's shape.
func loadConstraints(ctx context.Context, q Querier, tables map[uint32]*Table, oids []uint32) error {
	err := each(ctx, q, foreignKeysSQL, []any{oids}, func(r pgx.Rows) error {
		var child uint32
		var fk ForeignKey
		if err := r.Scan(&child, &fk.Name, &fk.Parent, &fk.Deferrable, &fk.Columns, &fk.ParentColumns); err != nil {
			return err
		}
		tables[child].ForeignKeys = append(tables[child].ForeignKeys, fk)
		return nil
	})
	if err != nil {
		return err
	}
	err = each(ctx, q, keyEqualsSQL, []any{oids}, func(r pgx.Rows) error {
		var oid uint32
		var schema, name string
		if err := r.Scan(&oid, &schema, &name); err != nil {
			return err
		}
		tables[oid].keyEquals = append(tables[oid].keyEquals, "OPERATOR("+ident(schema)+"."+name+")")
		return nil
	})
	if err != nil {
		return err
	}
	return each(ctx, q, keyNamesSQL, []any{oids}, func(r pgx.Rows) error {
		var root uint32
		var k keyName
		if err := r.Scan(&root, &k.schema, &k.table, &k.constraint); err != nil {
			return err
		}
		tables[root].keyNames = append(tables[root].keyNames, k)
		return nil
	})
}

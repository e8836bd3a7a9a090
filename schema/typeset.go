package schema

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/jackc/pgx/v5"
)

// Querier runs SQL on the source: a connection, a pool or a transaction of pgx.
type Querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

// Setting is one setting of a database session.
type Setting struct{ Name, Value string }

// SessionSettings are what decides how PostgreSQL writes a value as text. Every session whose text reaches AppendValue
// must run with them, the walsender's too, or the change stream and the snapshot disagree. The search path is among
// them because reg* types print a schema only for what the path doesn't show. In a database encoded as SQL_ASCII,
// client_encoding must be SQL_ASCII instead (ClientEncoding).
var SessionSettings = []Setting{
	{"DateStyle", "ISO, MDY"},
	{"IntervalStyle", "postgres"},
	{"TimeZone", "UTC"},
	{"extra_float_digits", "1"}, // 1 to 3 print the same: the shortest digits that give the same number back
	{"bytea_output", "hex"},
	{"lc_monetary", "C"},
	{"quote_all_identifiers", "off"},
	{"search_path", "pg_catalog"},
	{"client_encoding", "UTF8"},
}

// SnapshotSettings are what a session that reads tables needs besides SessionSettings: with row_security off,
// PostgreSQL refuses to read a table whose policies would hide rows, instead of hiding them without a word.
var SnapshotSettings = []Setting{{"row_security", "off"}}

// ClientEncoding returns the client_encoding for a database with this server_encoding. PostgreSQL can't convert from
// SQL_ASCII and would end the change stream at the first byte that isn't UTF-8; taken as it is, AppendString mends it.
func ClientEncoding(serverEncoding string) string {
	if serverEncoding == "SQL_ASCII" {
		return "SQL_ASCII"
	}
	return "UTF8"
}

// Types knows the types of one database by OID. The zero value knows the built-in ones; Load adds others. It is safe
// for concurrent use.
type Types struct {
	loading sync.Mutex // held by Load, so that of two loads the later one wins whole
	loaded  atomic.Pointer[map[uint32]*Type]
}

// Lookup returns the type with this OID, or nil if it is neither built in nor loaded.
func (s *Types) Lookup(oid uint32) *Type {
	if t := builtin[oid]; t != nil {
		return t
	}
	return s.current()[oid]
}

func (s *Types) current() map[uint32]*Type {
	if m := s.loaded.Load(); m != nil {
		return *m
	}
	return nil
}

// Load reads the definitions of the given types, of those that they are made of and of those known that are made of
// them, in one query. A type that was loaded before is replaced, so this is also how an altered enum or composite is
// taken over; *Type values handed out earlier stay as they were. An OID that the database doesn't have is forgotten.
func (s *Types) Load(ctx context.Context, q Querier, oids ...uint32) error {
	oids = slices.DeleteFunc(slices.Clone(oids), func(oid uint32) bool { return builtin[oid] != nil })
	if len(oids) == 0 {
		return nil
	}
	s.loading.Lock()
	defer s.loading.Unlock()
	known := s.current()
	for oid, t := range known {
		if !slices.Contains(oids, oid) && slices.ContainsFunc(oids, t.uses) {
			oids = append(oids, oid)
		}
	}
	defs, err := readTypes(ctx, q, oids)
	if err != nil {
		return fmt.Errorf("can't read type definitions from pg_type: %w", err)
	}
	next := make(map[uint32]*Type, len(known)+len(defs))
	maps.Copy(next, known)
	for _, oid := range oids {
		delete(next, oid)
	}
	if err := buildTypes(next, defs); err != nil {
		return err
	}
	s.loaded.Store(&next)
	return nil
}

// uses reports whether t is made of the type with this OID.
func (t *Type) uses(oid uint32) bool {
	if t == nil {
		return false
	}
	return t.OID == oid || t.Base.uses(oid) || t.Elem.uses(oid) ||
		slices.ContainsFunc(t.Fields, func(f Field) bool { return f.Type.uses(oid) })
}

// typeDef is one row of typesQuery.
type typeDef struct {
	OID        uint32
	Name       string
	Base       uint32 // of a domain, else 0
	Elem       uint32 // of an array, else 0
	Delim      string // of an array's elements
	Composite  bool
	Hstore     bool
	FieldNames []string
	FieldTypes []uint32
	Labels     []string // nil unless an enum
}

// typesQuery follows arrays to their elements, domains to their base and composites to their fields. Names outside
// pg_catalog carry their schema whatever the search path, so that casts built from them work in any session;
// format_type is given a modifier of -1 because it calls bpchar "character" otherwise, which casts to one character.
const typesQuery = `
WITH RECURSIVE reached(oid) AS (
	SELECT unnest($1::oid[])
	UNION
	SELECT part.oid
	FROM reached r
	JOIN pg_catalog.pg_type t ON t.oid = r.oid
	CROSS JOIN LATERAL (
		SELECT t.typbasetype WHERE t.typtype = 'd'
		UNION ALL
		SELECT t.typelem WHERE t.typsubscript = 'pg_catalog.array_subscript_handler'::regproc
		UNION ALL
		SELECT a.atttypid FROM pg_catalog.pg_attribute a
		WHERE t.typtype = 'c' AND a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped
	) part(oid)
)
SELECT t.oid,
	CASE WHEN n.nspname = 'pg_catalog' THEN pg_catalog.format_type(t.oid, -1)
		ELSE pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(t.typname) END,
	t.typbasetype,
	coalesce(e.oid, 0)::oid,
	coalesce(e.typdelim, '')::text,
	t.typtype = 'c',
	t.typname = 'hstore' AND EXISTS (
		SELECT FROM pg_catalog.pg_depend d
		JOIN pg_catalog.pg_extension x ON x.oid = d.refobjid AND x.extname = 'hstore'
		WHERE d.classid = 'pg_catalog.pg_type'::regclass AND d.objid = t.oid
			AND d.refclassid = 'pg_catalog.pg_extension'::regclass AND d.deptype = 'e'),
	f.names, f.types, l.labels
FROM reached r
JOIN pg_catalog.pg_type t ON t.oid = r.oid
JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace
LEFT JOIN pg_catalog.pg_type e
	ON e.oid = t.typelem AND t.typsubscript = 'pg_catalog.array_subscript_handler'::regproc
CROSS JOIN LATERAL (
	SELECT coalesce(pg_catalog.array_agg(a.attname::text ORDER BY a.attnum), '{}') AS names,
		coalesce(pg_catalog.array_agg(a.atttypid ORDER BY a.attnum), '{}') AS types
	FROM pg_catalog.pg_attribute a
	WHERE t.typtype = 'c' AND a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped
) f
CROSS JOIN LATERAL (
	SELECT pg_catalog.array_agg(v.enumlabel::text ORDER BY v.enumsortorder) AS labels
	FROM pg_catalog.pg_enum v
	WHERE v.enumtypid = t.oid
) l`

func readTypes(ctx context.Context, q Querier, oids []uint32) (map[uint32]*typeDef, error) {
	rows, err := q.Query(ctx, typesQuery, oids)
	if err != nil {
		return nil, err
	}
	list, err := pgx.CollectRows(rows, pgx.RowToAddrOfStructByPos[typeDef])
	if err != nil {
		return nil, err
	}
	defs := make(map[uint32]*typeDef, len(list))
	for _, d := range list {
		defs[d.OID] = d
	}
	return defs, nil
}

// buildTypes puts a Type for each definition into known, replacing those of an earlier load.
func buildTypes(known map[uint32]*Type, defs map[uint32]*typeDef) error {
	for oid := range defs {
		delete(known, oid)
	}
	for oid := range defs {
		if _, err := buildType(known, defs, oid); err != nil {
			return err
		}
	}
	return nil
}

func buildType(known map[uint32]*Type, defs map[uint32]*typeDef, oid uint32) (t *Type, err error) {
	if t := builtin[oid]; t != nil {
		return t, nil
	}
	if t := known[oid]; t != nil {
		return t, nil
	}
	d := defs[oid]
	if d == nil {
		return nil, fmt.Errorf("type %d is part of another but not in pg_type; it was altered meanwhile, load it again", oid)
	}
	t = &Type{OID: oid, Name: d.Name, Kind: KindText, Labels: d.Labels}
	switch {
	case d.Base != 0:
		if t.Base, err = buildType(known, defs, d.Base); err == nil {
			t.Kind = t.Base.Kind
		}
	case d.Elem != 0:
		t.Kind, t.Delim = KindArray, d.Delim[0]
		if t.Elem, err = buildType(known, defs, d.Elem); err == nil && !strings.HasSuffix(d.Name, "[]") {
			t.Name = t.Elem.Name + "[]"
		}
	case d.Composite:
		t.Kind, t.Fields = KindComposite, make([]Field, len(d.FieldNames))
		for i, name := range d.FieldNames {
			field, err := buildType(known, defs, d.FieldTypes[i])
			if err != nil {
				return nil, err
			}
			t.Fields[i] = Field{Name: name, Type: field}
		}
	case d.Hstore:
		t.Kind = KindHstore
	}
	if err != nil {
		return nil, err
	}
	known[oid] = t
	return t, nil
}

package chaos

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/schema"
)

// table is a collection's table as the world writes it.
type table struct {
	name    string // of the collection
	spec    policies.Spec
	policy  *policies.Collection
	sql     string // its quoted name
	columns []column
	key     []int
	parents []parent

	counted string // column whose pushed values the table edits notes; empty: none
	rewrite bool   // a trigger may change rows before they are written, so that a row needn't hold what was pushed
	owns    bool   // rows can be made that nobody else touches
}

// column is a column with what the policies say of it.
type column struct {
	schema.Column
	quoted string
	claims []string // that scopes hold it against
	files  []policies.AttachmentSpec
	parent int  // in table.parents; -1: no foreign key
	made   bool // values can be made for it
	shown  bool // documents have it
	key    bool
	pushed bool // pushes may name it
}

// parent is what a foreign key refers to.
type parent struct {
	sql     string
	columns map[string]string // of the table to those of the parent, quoted
	names   map[string]string // the same, unquoted
	table   *table            // where it is a collection of this world
}

// readTables loads the catalog and works out how rows of each collection are made.
func readTables(ctx context.Context, conn *pgx.Conn, specs map[string]policies.Spec) (*policies.Set, []*table, error) {
	var names []string
	for _, s := range specs {
		if !strings.Contains(s.Table, ".") {
			s.Table = "public." + s.Table
		}
		names = append(names, s.Table)
	}
	catalog, err := schema.LoadCatalog(ctx, conn, &schema.Types{}, "walgate", names)
	if err != nil {
		return nil, nil, err
	}
	set, faults := policies.Compile(specs, catalog.Table, catalog.Names)
	if len(faults) > 0 {
		return nil, nil, fmt.Errorf("the collections don't fit the tables: %+v: run walgate check", faults)
	}
	var counted bool
	if err := conn.QueryRow(ctx, `SELECT to_regclass('public.edits') IS NOT NULL AND to_regproc('public.log_edit') IS NOT NULL`).Scan(&counted); err != nil {
		return nil, nil, err
	}
	var tables []*table
	for _, c := range set.Collections {
		t := &table{name: c.Name, spec: c.Spec, policy: c, sql: c.Table.SQL(), key: c.Table.Key}
		if err := t.read(ctx, conn, catalog, counted); err != nil {
			return nil, nil, fmt.Errorf("collection %s: %w", c.Name, err)
		}
		tables = append(tables, t)
	}
	for _, t := range tables {
		for i := range t.parents {
			for _, other := range tables {
				if t.parents[i].sql == other.sql {
					t.parents[i].table = other
				}
			}
		}
	}
	return set, tables, nil
}

func (t *table) read(ctx context.Context, conn *pgx.Conn, catalog *schema.Catalog, counted bool) error {
	of := t.policy.Table
	foreign := map[string]int{}
	for _, fk := range of.ForeignKeys {
		p := parent{columns: map[string]string{}, names: map[string]string{}}
		if err := conn.QueryRow(ctx, `SELECT format('%I.%I', nspname, relname) FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace WHERE c.oid = $1`, fk.Parent).Scan(&p.sql); err != nil {
			return err
		}
		for _, other := range catalog.Tables {
			if other.OID == fk.Parent {
				p.sql = other.SQL()
			}
		}
		for i, name := range fk.Columns {
			p.columns[name], p.names[name] = quoteName(fk.ParentColumns[i]), fk.ParentColumns[i]
			foreign[name] = len(t.parents)
		}
		t.parents = append(t.parents, p)
	}
	if err := conn.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_trigger WHERE NOT tgisinternal AND tgtype & 1 = 1 AND tgtype & 2 = 2 AND tgrelid = ANY
		(SELECT $1::oid UNION SELECT relid FROM pg_partition_tree($1::oid)))`, of.OID).Scan(&t.rewrite); err != nil {
		return err
	}
	for i, sc := range of.Columns {
		c := column{Column: sc, quoted: quoteName(sc.Name), parent: -1, key: slices.Contains(of.Key, i)}
		if p, ok := foreign[sc.Name]; ok {
			c.parent = p
		}
		for _, alternative := range t.spec.Scope {
			if claim, ok := strings.CutPrefix(alternative[sc.Name], "claims."); ok && !slices.Contains(c.claims, claim) {
				c.claims = append(c.claims, claim)
			}
		}
		for _, a := range t.spec.Attachments {
			if a.Column == sc.Name {
				c.files = append(c.files, a)
			}
		}
		c.made = !sc.Generated && !sc.AlwaysAssigned && (c.parent >= 0 || len(c.claims) > 0 || madeUp(sc.Type))
		c.shown = !sc.Generated && !slices.Contains(t.spec.Columns.Exclude, sc.Name)
		c.pushed = c.made && !c.key && t.policy.Writable(sc.Name)
		if !c.made && sc.NotNull && !sc.HasDefault && !sc.Generated && !sc.AlwaysAssigned {
			return fmt.Errorf("the column %s is NOT NULL and has no default, and no values of type %s can be made up: leave the table out of the run, or give it a default", sc.Name, sc.Type.Name)
		}
		if counted && c.pushed && sc.Name == "token" {
			t.counted = sc.Name
		}
		t.columns = append(t.columns, c)
	}
	t.owns = t.ownable()
	return nil
}

// ownable says whether a key can be made that no writer ever draws, in a row that hangs on no other.
func (t *table) ownable() bool {
	wide := false
	for _, i := range t.key {
		c := &t.columns[i]
		if c.parent >= 0 {
			return false
		}
		wide = wide || len(c.claims) == 0 && len(c.Type.Underlying().Labels) == 0 && slices.Contains([]string{"text", "uuid", "integer", "bigint"}, c.Type.Underlying().Name)
	}
	for i := range t.columns {
		if c := &t.columns[i]; c.parent >= 0 && c.NotNull {
			return false
		}
	}
	return wide
}

func (t *table) column(name string) *column {
	for i := range t.columns {
		if t.columns[i].Name == name {
			return &t.columns[i]
		}
	}
	return nil
}

func quoteName(name string) string { return pgx.Identifier{name}.Sanitize() }

// pool is the values of a claim that rows and callers draw from.
type pool struct {
	values []string // as PostgreSQL writes them
	number bool     // in a token it is a number
}

var claimInExpression = regexp.MustCompile(`\bclaims((?:\.[A-Za-z_]\w*)+)`)

// claimPools gives each claim that the policies name some values that its columns can hold.
func claimPools(tables []*table) map[string]*pool {
	const values = 5
	types := map[string][]*schema.Type{}
	for _, t := range tables {
		for i := range t.columns {
			for _, claim := range t.columns[i].claims {
				types[claim] = append(types[claim], t.columns[i].Type.Underlying())
			}
		}
		if t.spec.Write != nil {
			for name, claim := range t.spec.Write.Set {
				if c := t.column(name); c != nil {
					claim = strings.TrimPrefix(claim, "claims.")
					types[claim] = append(types[claim], c.Type.Underlying())
				}
			}
		}
	}
	pools := map[string]*pool{}
	for claim, of := range types {
		p := &pool{}
		for n := range values {
			p.values = append(p.values, fmt.Sprint("u", n))
		}
		rank := func(t *schema.Type) int { // what fits the narrowest type fits the others, where anything does
			return slices.Index([]string{"character varying", "text", "bigint", "integer", "smallint", "date", "uuid", "boolean"}, t.Name)
		}
		narrow := slices.MaxFunc(of, func(a, b *schema.Type) int { return rank(a) - rank(b) })
		if i := slices.IndexFunc(of, func(t *schema.Type) bool { return len(t.Labels) > 0 }); i >= 0 {
			narrow = of[i]
		}
		for n := range p.values {
			switch {
			case len(narrow.Labels) > 0:
				p.values[n] = narrow.Labels[n%len(narrow.Labels)]
			case strings.HasSuffix(narrow.Name, "int") || narrow.Name == "integer":
				p.number, p.values[n] = true, fmt.Sprint(1+n)
			case narrow.Name == "uuid":
				p.values[n] = fmt.Sprintf("00000000-0000-4000-a000-%012d", n)
			case narrow.Name == "date":
				p.values[n] = fmt.Sprintf("2026-01-%02d", 1+n)
			case narrow.Name == "boolean":
				p.values[n] = []string{"true", "false"}[n%2]
			}
		}
		slices.Sort(p.values)
		p.values = slices.Compact(p.values)
		pools[claim] = p
	}
	for _, t := range tables {
		text := t.spec.Where
		if t.spec.Write != nil {
			text += " " + t.spec.Write.Check
		}
		for _, m := range claimInExpression.FindAllStringSubmatch(text, -1) {
			if claim := m[1][1:]; pools[claim] == nil {
				pools[claim] = &pool{number: true, values: []string{"0", "1", "2", "3", "4"}}
			}
		}
	}
	if pools["sub"] == nil {
		pools["sub"] = &pool{values: []string{"u0", "u1", "u2", "u3", "u4"}}
	}
	return pools
}

// roles lists all roles that the policies name.
func roles(tables []*table) []string {
	all := map[string]bool{}
	for _, t := range tables {
		for _, r := range t.spec.Read.Roles {
			all[r] = true
		}
		if t.spec.Write != nil {
			for _, r := range t.spec.Write.Roles {
				all[r] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(all))
}

func pick[T any](rng *rand.Rand, from []T) T { return from[rng.IntN(len(from))] }

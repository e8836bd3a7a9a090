package policies

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/walgate/walgate/schema"
)

const defaultRetention = 30 * 24 * time.Hour

var collectionName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]{0,62}$`)

// Compile turns the configured collections into policies over the given tables. tables returns the table of that schema
// and name, or nil; all lists every table as schema.name, for hints. It reports everything that is wrong at once; the
// Set is nil if anything is.
func Compile(specs map[string]Spec, tables func(schema_, name string) *schema.Table, all []string) (*Set, []Fault) {
	set := &Set{byTable: map[uint32]*Collection{}}
	var faults []Fault
	for _, name := range slices.Sorted(maps.Keys(specs)) {
		k := compiler{path: "collections." + name, c: newCollection(name, specs[name])}
		k.compile(tables, all)
		if t := k.c.Table; t != nil {
			if other := set.byTable[t.OID]; other != nil {
				k.fault("table", t.String(), "a table that no other collection names",
					"collection "+other.Name+" is over it already: a table belongs to one collection")
			} else {
				set.add(k.c)
			}
		}
		faults = append(faults, k.faults...)
	}
	if len(faults) > 0 {
		return nil, faults
	}
	set.collectNames()
	return set, nil
}

func newCollection(name string, spec Spec) *Collection {
	c := &Collection{Name: name, Spec: spec, Retention: spec.Retention, soft: -1, exclude: map[string]bool{}, writable: map[string]bool{}}
	if c.Retention == 0 {
		c.Retention = defaultRetention
	}
	c.everyone = everyoneKey(name)
	return c
}

func (s *Set) add(c *Collection) {
	c.pos = len(s.Collections)
	s.Collections = append(s.Collections, c)
	s.byTable[c.Table.OID] = c
	for _, leaf := range c.Table.Leaves {
		s.byTable[leaf.OID] = c
	}
}

// collectNames gathers the claims and roles that any policy names: they make up a caller's ScopeHash.
func (s *Set) collectNames() {
	for _, c := range s.Collections {
		for _, alt := range c.scopes {
			for _, col := range alt.columns {
				s.scoped = append(s.scoped, col.claim)
			}
		}
		if c.filter != nil {
			s.whole = append(s.whole, c.filter.claims...)
		}
		s.roles = append(s.roles, c.Spec.Read.Roles...)
	}
	slices.SortFunc(s.scoped, func(a, b claimPath) int { return slices.Compare(a, b) })
	s.scoped = slices.CompactFunc(s.scoped, func(a, b claimPath) bool { return slices.Equal(a, b) })
	slices.Sort(s.whole)
	s.whole = slices.Compact(s.whole)
	slices.Sort(s.roles)
	s.roles = slices.Compact(s.roles)
}

// NameAs makes callers' ScopeHash what it is with another Set of the same configuration, some of whose collections this one
// leaves out: else their stopping would make clients of all the others resynchronise, and their going on once more. Call it
// before anybody uses the Set.
func (s *Set) NameAs(whole *Set) { s.scoped, s.whole, s.roles = whole.scoped, whole.whole, whole.roles }

// compiler compiles one collection and gathers its faults.
type compiler struct {
	path   string
	c      *Collection
	names  []string // the table's columns, for hints
	faults []Fault
}

func (k *compiler) fault(key, got, want, hint string) {
	path := k.path
	if key != "" {
		path += "." + key
	}
	k.faults = append(k.faults, Fault{Path: path, Got: got, Want: want, Hint: hint})
}

func (k *compiler) compile(tables func(schema_, name string) *schema.Table, all []string) {
	spec := k.c.Spec
	if !collectionName.MatchString(k.c.Name) {
		k.fault("", k.c.Name, "a name of letters, digits and _ that begins with no digit, at most 63 long", "")
	}
	if spec.Retention < 0 {
		k.fault("retention", spec.Retention.String(), "a positive duration", "leave it out for 30 days")
	}
	for i, role := range spec.Read.Roles {
		if role == "" {
			k.fault("read.roles."+strconv.Itoa(i), "an empty role", "the name of a role", "")
		}
	}
	switch spec.ReplicaIdentity {
	case "", "full", "default":
	default:
		k.fault("replica_identity", spec.ReplicaIdentity, `"full" or "default"`, didYouMean(spec.ReplicaIdentity, []string{"full", "default"}))
	}
	k.checkConflict()
	if !k.findTable(tables, all) {
		return
	}
	k.checkTable()
	k.compileExclude()
	k.compileSoftDelete()
	k.compileScope()
	k.compileWhere()
	k.compileWrite()
	k.compileAttachments()
	k.checkIdentity()
	k.c.Fingerprint = fingerprint(k.c)
}

func (k *compiler) findTable(tables func(schema_, name string) *schema.Table, all []string) bool {
	got := k.c.Spec.Table
	namespace, name, qualified := strings.Cut(got, ".")
	if !qualified {
		namespace, name = "public", got
	}
	if got != "" {
		k.c.Table = tables(namespace, name)
	}
	t := k.c.Table
	if t == nil {
		hint := didYouMean(namespace+"."+name, all)
		k.fault("table", got, "a table of the database, as schema.name", hint)
		return false
	}
	k.names = make([]string, len(t.Columns))
	for i := range t.Columns {
		k.names[i] = t.Columns[i].Name
	}
	return true
}

// checkTable refuses relations whose changes logical replication doesn't carry, or whose rows can't be named.
func (k *compiler) checkTable() {
	t := k.c.Table
	const want = "a permanent table"
	switch t.Kind {
	case 'r', 'p':
	case 'v':
		k.fault("table", t.String()+", a view", want, "name the table below the view")
		return
	case 'm':
		k.fault("table", t.String()+", a materialised view", want, "name the table below the view")
		return
	case 'f':
		k.fault("table", t.String()+", a foreign table", want, "its changes are in another server's log")
		return
	default:
		k.fault("table", fmt.Sprintf("%s, a relation of kind %q", t, t.Kind), want, "")
		return
	}
	switch t.Persistence {
	case 'u':
		k.fault("table", t.String()+", an unlogged table", want, "ALTER TABLE … SET LOGGED, or leave it out: its changes are not in the log")
	case 't':
		k.fault("table", t.String()+", a temporary table", want, "its changes are not in the log")
	}
	if t.Schema == "information_schema" || t.Schema == "walgate" || strings.HasPrefix(t.Schema, "pg_") && t.Persistence != 't' {
		k.fault("table", t.String()+", a system table", "a table of the application", "PostgreSQL publishes no system tables, and walgate's own are not for clients")
	}
	for _, l := range t.Leaves {
		switch {
		case l.Kind == 'f':
			k.fault("table", t.String()+", whose partition "+l.Schema+"."+l.Name+" is a foreign table", want, "its changes are in another server's log")
		case l.Persistence == 'u':
			k.fault("table", t.String()+", whose partition "+l.Schema+"."+l.Name+" is unlogged", want, "ALTER TABLE … SET LOGGED: its changes are not in the log")
		}
	}
	if t.Partition {
		k.fault("table", t.String()+", a partition", want, "name the partitioned table at its root")
	}
	if len(t.Key) == 0 {
		k.fault("table", t.String()+", which has no primary key", "a table with a primary key", "documents are named by the key: add one")
	}
	for _, i := range t.Key {
		if t.Columns[i].Generated {
			k.fault("table", t.String()+", whose key column "+t.Columns[i].Name+" is generated",
				"a key of ordinary columns", "logical replication does not carry generated columns")
		}
	}
}

func (k *compiler) compileExclude() {
	for i, name := range k.c.Spec.Columns.Exclude {
		if k.c.Table.Column(name) < 0 {
			k.fault("columns.exclude."+strconv.Itoa(i), name, "a column of "+k.c.Table.String(), didYouMean(name, k.names))
			continue
		}
		k.c.exclude[name] = true
	}
}

func (k *compiler) compileSoftDelete() {
	name := k.c.Spec.SoftDelete
	if name == "" {
		return
	}
	i := k.c.Table.Column(name)
	if i < 0 {
		k.fault("soft_delete", name, "a column of "+k.c.Table.String(), didYouMean(name, k.names))
		return
	}
	col := k.c.Table.Columns[i]
	switch col.Type.Underlying().OID {
	case oidBool, oidDate, oidTimestamp, oidTimestampTZ:
	default:
		k.fault("soft_delete", name+", a "+col.Type.Name, "a bool, timestamp, timestamptz or date column", "")
		return
	}
	if col.Generated {
		k.fault("soft_delete", name+", a generated column", "an ordinary column", "logical replication does not carry generated columns")
		return
	}
	k.c.soft, k.c.softBool = i, col.Type.Underlying().OID == oidBool
}

// checkIdentity holds the replica identity against what the policy must know of a row's old state.
func (k *compiler) checkIdentity() {
	t, path := k.c.Table, "replica_identity"
	if k.c.Spec.ReplicaIdentity != "default" {
		for _, col := range t.Columns {
			if col.Virtual {
				k.fault(path, "full, with the virtual generated column "+col.Name, "a table without virtual columns",
					"PostgreSQL refuses updates of such a table under REPLICA IDENTITY FULL: make the column stored, or use default")
			}
		}
		return
	}
	if t.KeyDeferrable {
		k.fault(path, "default, with a deferrable primary key", "a key that is checked at once",
			"use full: PostgreSQL takes no deferrable key for an identity, and would refuse the application's updates")
	}
	inKey := make(map[int]bool, len(t.Key))
	for _, i := range t.Key {
		inKey[i] = true
	}
	check := func(i int, role string) {
		if !inKey[i] {
			k.fault(path, "default, with the "+role+" column "+t.Columns[i].Name+" outside the key",
				"scope, where, soft_delete and attachments within the key", "use full: without it the old value of the column is not in the log")
		}
	}
	for _, i := range k.c.scopeColumns() {
		check(i, "scope")
	}
	if k.c.filter != nil {
		for _, col := range k.c.filter.columns {
			check(col.table, "where")
		}
	}
	if k.c.soft >= 0 {
		check(k.c.soft, "soft_delete")
	}
	for _, a := range k.c.attachments {
		check(a.table, "attachments")
	}
	for i, col := range t.Columns {
		if col.Toastable && !inKey[i] {
			k.fault(path, "default, with the column "+col.Name+" that may be stored out of line",
				"no such column outside the key", "use full: without it an unchanged value of the column is not in the log")
		}
	}
}

// fingerprint covers all that decides what callers see of the collection, in an order that doesn't depend on how the
// configuration was written.
func fingerprint(c *Collection) string {
	var b []byte
	add := func(parts ...string) {
		b = strconv.AppendInt(b, int64(len(parts)), 10)
		for _, p := range parts {
			b = appendSized(b, []byte(p))
		}
	}
	add("walgate policy", strconv.Itoa(schema.CodecVersion), c.Table.String())
	for _, i := range c.Table.Key {
		add("key", c.Table.Columns[i].Name)
	}
	// The columns by what the configuration says of them: what the table has besides is its shape, which may gain a column
	// without anybody resynchronising.
	add(append([]string{"exclude"}, slices.Sorted(maps.Keys(c.exclude))...)...)
	for _, alt := range c.scopes {
		add("scope")
		for _, col := range alt.columns {
			add(col.name, c.Table.Columns[col.table].Type.Name, strings.Join(col.claim, "."))
			add(col.typ.Labels...) // a claim may equal a new label, whose rows its caller was not told of before
		}
	}
	roles := slices.Compact(slices.Sorted(slices.Values(c.Spec.Read.Roles)))
	add(append([]string{"read"}, roles...)...)
	add("where", c.Spec.Where, "soft_delete", c.Spec.SoftDelete, "lossless", strconv.FormatBool(c.Spec.Lossless))
	for _, a := range c.attachments {
		add("attachment", a.spec.Column, a.spec.Path, a.spec.Pattern)
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

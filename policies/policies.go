package policies

import (
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/walgate/walgate/schema"
)

// ErrTooManyScopes says that a caller's claims select more than MaxScopes scopes. Who authenticates checks for it and
// refuses the caller.
var ErrTooManyScopes = errors.New("the token's claims select more than 1000 scopes: issue a token with fewer values in its array claims")

// MaxScopes is how many scopes one caller's claims may select, over all collections.
const MaxScopes = 1000

// Spec is one collection as the configuration names it.
type Spec struct {
	Table           string              // schema.name, or name in public
	Columns         ColumnsSpec         // which columns documents carry
	Scope           []map[string]string // alternatives; each maps column -> "claims.NAME"; nil: everybody's
	Where           string              // CEL over row and claims
	Read            ReadSpec
	SoftDelete      string // column; empty: none
	Lossless        bool
	ReplicaIdentity string        // "full" (default) or "default"
	Retention       time.Duration // 0: 30 days

	Write            *WriteSpec // nil: nobody writes
	Conflict         string     // one of ConflictPolicies, or "function"; empty: last_write_wins
	ConflictFunction string     // schema.name, of "function"
	OnDeleted        string     // one of DeletePolicies; empty: resurrect_on_update

	Attachments []AttachmentSpec // where rows name attachments; nil: nowhere
}

// ColumnsSpec names the columns to leave out.
type ColumnsSpec struct{ Exclude []string }

// ReadSpec names the roles that may read; none: any authenticated caller.
type ReadSpec struct{ Roles []string }

// Fault is one thing wrong with the collections.
type Fault struct {
	Path string // where: "collections.tasks.scope.owner_id", "collections.tasks.scope.1.owner_id"
	Got  string
	Want string
	Hint string // the nearest right name or the remedy; may be empty
}

// ScopeKey names one scope of one collection: a cryptographic hash of collection, scope columns and their values, so
// that two scopes never share a key.
type ScopeKey [16]byte

// Op is what a change means in one scope or to one caller.
type Op byte

// The operations, as the change log stores them.
const (
	Upsert Op = 'u' // the row is there, in its new state
	Delete Op = 'd' // the row is gone
	Leave  Op = 'l' // the row exists but is no longer in this scope or passes its filter no more
)

// Effect is what a change of one row means in one scope.
type Effect struct {
	Scope ScopeKey
	Op    Op
	// Entered says of an Upsert that the row was not in this scope before. In a collection with guards such an entry
	// carries the guard of an insert (AppendGuard with old nil), or a caller who never saw the row would be told that
	// it left.
	Entered bool
}

// Set is all compiled collections.
type Set struct {
	Collections []*Collection // sorted by name

	byTable map[uint32]*Collection // root and leaf OIDs
	scoped  []claimPath            // claims that scopes name, sorted
	whole   []string               // claims that filters name, sorted
	roles   []string               // roles that read rules name, sorted
}

// ByName returns the collection of that name, or nil.
func (s *Set) ByName(name string) *Collection {
	i, found := slices.BinarySearchFunc(s.Collections, name, func(c *Collection, n string) int {
		return strings.Compare(c.Name, n)
	})
	if !found {
		return nil
	}
	return s.Collections[i]
}

// ByTable returns the collection over the table with that OID, or over the partitioned table of which it is a leaf, or
// nil.
func (s *Set) ByTable(oid uint32) *Collection { return s.byTable[oid] }

// Collection is one compiled policy.
type Collection struct {
	Name        string
	Table       *schema.Table
	Fingerprint string // hex; changes when what callers see may change
	Retention   time.Duration
	Spec        Spec

	pos      int           // position in the Set
	scopes   []alternative // nil: everybody's
	everyone ScopeKey      // the one scope of a collection without scopes
	filter   *filter       // nil: every row
	soft     int           // position in Table.Columns, or -1
	softBool bool          // true: deleted when true; false: deleted when not NULL
	exclude  map[string]bool
	writable map[string]bool
	set      []setColumn // sorted by name
	check    *filter     // of rows as written; nil: every row

	attachments []attachment // sorted
}

// ScopedByCaller says whether what a caller sees depends on its claims or roles.
func (c *Collection) ScopedByCaller() bool {
	return len(c.scopes) > 0 || c.HasGuard() || len(c.Spec.Read.Roles) > 0
}

// MayRead says whether the caller has one of the roles that may read; where none is named, every caller may.
func (c *Collection) MayRead(caller *Caller) bool {
	if caller == nil {
		return false
	}
	if len(c.Spec.Read.Roles) == 0 {
		return true
	}
	for _, role := range caller.Roles {
		if slices.Contains(c.Spec.Read.Roles, role) {
			return true
		}
	}
	return false
}

// HasGuard says whether the collection's filter names claims, so that its log entries carry a guard for Judge.
func (c *Collection) HasGuard() bool { return c.filter != nil && len(c.filter.claims) > 0 }

package policies

import (
	"time"

	"github.com/walgate/walgate/schema"
)

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
}

// Set is all compiled collections.
type Set struct {
	Collections []*Collection // sorted by name
}

// Collection is one compiled policy.
type Collection struct {
	Name        string
	Table       *schema.Table
	Fingerprint string // hex; changes when what callers see may change
	Retention   time.Duration
	Spec        Spec
}

// Binding ties a collection to the layout of the rows that one reader delivers. Not safe for concurrent use.
type Binding struct {
	Collection *Collection
}

// Caller is one authenticated subject with what its claims select. Immutable.
type Caller struct {
	Subject string
	Roles   []string
	// ScopeHash is 8 hex digits over the claim values and roles that the policies name (design 5).
	ScopeHash string
}

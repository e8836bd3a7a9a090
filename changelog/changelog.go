package changelog

import "errors"

// Entry is one change in one scope, as stored.
type Entry struct {
	Version    Version
	Tx         Version  // version of the first change of the same source transaction
	Scope      [16]byte // policies.ScopeKey
	Collection int32    // walgate.collections.id
	Op         byte     // policies.Op
	DocID      []byte
	Data       []byte // the document; nil unless Op is an upsert
	Guard      []byte // see policies.Binding.AppendGuard
	Changed    []byte // bit set by attnum - 1; nil: all columns
}

// Raise changes the state of one collection, in the order of the log.
type Raise struct {
	Collection int32
	Version    Version // the new floor; 0: the floor stays
	Reason     string
	Shape      string // new shape; empty: unchanged
	SetStopped bool   // whether Stopped is to be stored
	Stopped    string
}

// Piece is a part of what one source transaction appends. A transaction is one or more pieces, the last one Final.
// A final piece without entries only moves the checkpoint (a fence, an idle position, a raise), or marks a push that
// changed no row.
type Piece struct {
	Tx      Version // 0: no row changed, and it is nobody's push
	Xid     uint64
	LSN     LSN     // end of the commit record; of the last piece only
	Version Version // the newest version stamped so far
	Final   bool
	Entries []Entry
	Raises  []Raise
	Push    *Push // of a final piece with a Tx: the transaction is a push's
	// What it says of attachments, in this order within a piece.
	References []Reference
	Files      []FileEvent
	Fills      []FillStep
	Size       int // bytes held, about
}

// Batch is what one log transaction appended: what the bus announces.
type Batch struct {
	Claim   int64 // Head.Claim of the log that it is of
	History string
	Prev    Version // the version that this batch continues
	Last    Version // the checkpoint's version after it
	LSN     LSN     // the checkpoint's LSN after it
	Entries []Entry // in version order; nil with Omitted
	Omitted bool    // too large to announce: read the log from Prev to Last
	Raises  []Raise
	Pushes  []Pushed // those that it holds, in the order of versions; always told, also with Omitted
	// Operations are those that it wrote, one for each attachment and scope, in version order; nil with Omitted.
	Operations []Operation
}

// Errors that callers act on.
var (
	// ErrDeposed: another instance leads now. The leader must stop appending; serving goes on.
	ErrDeposed = errors.New("another instance has taken the change log over")
	// ErrNotInitialised: there is no log yet. Serving instances wait for the leader to make it.
	ErrNotInitialised = errors.New("the change log has not been started yet")
	// ErrConfigRevision: this instance's configuration is older than the one the log was written under.
	ErrConfigRevision = errors.New("config_revision is lower than the change log's")
)

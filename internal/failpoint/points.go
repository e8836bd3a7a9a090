// Package failpoint ends the process with SIGKILL at a named step of the path, for the tests of what a kill leaves behind.
// Only a binary built with the tag failpoints can die so; in every other one Here is empty and compiles to nothing.
package failpoint

// Env names the variable that a binary built with the tag reads: a point's name and, after a colon, the hit to die at.
const Env = "WALGATE_FAILPOINT"

// Point is a step of the path.
type Point int

// The steps, in the order in which a first start and then a change pass them, and those of a push, an upload and the care of files.
const (
	TableJoins     Point = iota // a table is about to join the publication
	SlotMissing                 // the slot is about to be made
	SlotMade                    // the slot exists, the log doesn't know
	SlotTaken                   // the walsender streams, the log is as the last leader left it
	LogClaiming                 // the claim is written, not committed
	LogClaimed                  // the claim is committed, nobody knows
	HistoryNoted                // the source remembers the history
	Received                    // a message of the WAL was read
	Decoded                     // it is decoded, not yet put in order
	HandedOver                  // a piece waits for the appender
	Appended                    // its rows were copied within the open log transaction
	Committing                  // checkpoint and COMMIT are about to be sent
	CommitSent                  // both are sent, the answer is not read
	Committed                   // the transaction is durable, nobody knows
	Announced                   // the bus has the batch
	Acknowledging               // the status is about to be sent
	Acknowledged                // the status was sent
	PushOpened                  // a push's transaction has begun, with its mark
	PushWritten                 // its rows are written, nothing is committed
	PushSent                    // what is to be remembered and COMMIT are sent, the answer is not read
	PushCommitted               // it is durable, its client knows nothing
	BytesWritten                // an upload's bytes are in the store, no record names them
	FileDeleting                // the deletion of files that no row names is written, not committed
	FileDeleted                 // it is committed; their bytes are there
	BytesDeleting               // some bytes of deleted files are gone
	BytesDeleted                // all of a batch are, which isn't noted
	MissingTold                 // it is committed that the store lost files
	OrphansDeleted              // objects that no record has are gone, which isn't noted
)

var names = [...]string{
	TableJoins: "table-joins", SlotMissing: "slot-missing", SlotMade: "slot-made", SlotTaken: "slot-taken",
	LogClaiming: "log-claiming", LogClaimed: "log-claimed", HistoryNoted: "history-noted",
	Received: "received", Decoded: "decoded", HandedOver: "handed-over", Appended: "appended",
	Committing: "committing", CommitSent: "commit-sent", Committed: "committed", Announced: "announced",
	Acknowledging: "acknowledging", Acknowledged: "acknowledged",
	PushOpened: "push-opened", PushWritten: "push-written", PushSent: "push-sent", PushCommitted: "push-committed",
	BytesWritten: "bytes-written", FileDeleting: "file-deleting", FileDeleted: "file-deleted", BytesDeleting: "bytes-deleting", BytesDeleted: "bytes-deleted",
	MissingTold: "missing-told", OrphansDeleted: "orphans-deleted",
}

// String returns the name that Env takes.
func (p Point) String() string { return names[p] }

// All returns every point.
func All() []Point {
	all := make([]Point, len(names))
	for i := range all {
		all[i] = Point(i)
	}
	return all
}

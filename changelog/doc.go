// Package changelog is the durable order of everything: the log that the leader appends to and all clients read from.
//
// It owns versions, cursors and histories, the tables of schema walgate that hold the log, floors, retention, and the
// bus that announces what was appended. It never sees the source's WAL (replication does) and never decides who may
// see a row (policies does). A Log is safe for concurrent use; an Appender belongs to one goroutine.
//
// A change goes: replication's sequencer → Queue → Appender (one log transaction) → Bus → the gateway's hub. The log
// is the truth and the bus a hint: a reader that misses, doubles or reorders announcements loses nothing, because each
// Batch names the version that it continues.
package changelog

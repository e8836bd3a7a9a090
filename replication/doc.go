// Package replication turns the source's WAL into ordered changes in the log.
//
// It owns the replication slot, the replication connection, the decoding of pgoutput, the stamping of versions, and the
// watch over the source's catalog. It never talks to clients. Exactly one goroutine (stream.run) touches the replication
// connection, for reading and for status alike.
//
// Three positions, each advanced in one place: received (stream.handle), logged (changelog.Appender.finish) and
// acknowledged (stream.sendStatus, never past logged).
package replication

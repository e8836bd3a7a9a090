// Package pgserver runs a private PostgreSQL server for the demo and for tests.
//
// It owns finding the binaries, making a data directory, and the life of the server process: the process dies with its
// parent, is dropped to another user where the parent is root, and leaves nothing behind after Close. It never touches
// a PostgreSQL that it did not start. A Server is safe for concurrent use.
package pgserver

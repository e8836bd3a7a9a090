// Package schema knows what the application's tables are and what their values look like on the wire.
//
// It owns the catalog read from pg_catalog (tables, keys, partitions, types), the publication and the replica identity
// of synced tables, and the one value codec that turns PostgreSQL text into JSON. It never decides who may see a row
// (policies does) and never reads the change log. A Catalog is immutable once loaded and safe for concurrent use; the
// functions that alter the source say so.
package schema

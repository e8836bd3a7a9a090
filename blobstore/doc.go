// Package blobstore keeps files: their bytes in a bucket (Store), and what is known of them in the source database (Records).
//
// Bytes are written under a random storage key of their own and never change. A file exists from the moment when the record
// that names its key is committed (Records.Publish), so that nothing has to be renamed, and a crash leaves bytes without a
// record at worst, which care deletes.
package blobstore

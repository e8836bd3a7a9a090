package blobstore

import (
	"os"
	"syscall"
)

// sendToDisk has the system begin to write a part of a file, so that less is left to wait for when it is flushed. What fails here
// fails there.
func sendToDisk(f *os.File, from, n int64) {
	const begin = 2 // SYNC_FILE_RANGE_WRITE
	_ = syscall.SyncFileRange(int(f.Fd()), from, n, begin)
}

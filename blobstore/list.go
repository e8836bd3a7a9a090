package blobstore

import (
	"context"
	"fmt"
	"io"
	"iter"
	"strings"
	"time"

	"gocloud.dev/blob"
	"gocloud.dev/gcerrors"
)

// Object is one of a listing.
type Object struct {
	Key     string
	Size    int64
	ModTime time.Time
}

// shards are the folders that keys are spread over.
const shards = 256

// listAgain bounds how often a folder that changes is read.
const listAgain = 100

// List yields the objects of files with keys above after, in the order of their keys. It reads one folder at a time, so that
// a listing resumed at a key repeats little. An error ends it.
func (s *Store) List(ctx context.Context, after string) iter.Seq2[Object, error] {
	return func(yield func(Object, error) bool) {
		for shard := firstShard(after); shard < shards; shard++ {
			prefix := fmt.Sprintf("%s%02x/", keyPrefix, shard)
			folder, again := s.bucket.List(&blob.ListOptions{Prefix: prefix}), 0
			for {
				o, err := folder.Next(ctx)
				if err == io.EOF {
					break
				}
				if s.files != nil && gcerrors.Code(err) == gcerrors.NotFound && again < listAgain { // a file went or got its name while the driver looked at it
					folder, again = s.bucket.List(&blob.ListOptions{Prefix: prefix}), again+1
					continue
				}
				if err != nil {
					yield(Object{}, fmt.Errorf("list the blob store: %w", err))
					return
				}
				if o.Key <= after || o.IsDir {
					continue
				}
				if after = o.Key; !yield(Object{Key: o.Key, Size: o.Size, ModTime: o.ModTime}, nil) {
					return
				}
			}
		}
	}
}

// firstShard returns the first folder that may hold keys above after.
func firstShard(after string) int {
	rest, ok := strings.CutPrefix(after, keyPrefix)
	if !ok {
		if after > keyPrefix {
			return shards
		}
		return 0
	}
	for shard := range shards {
		if fmt.Sprintf("%02x0", shard) > rest { // '0' follows '/', so that all of the folder's keys lie below
			return shard
		}
	}
	return shards
}

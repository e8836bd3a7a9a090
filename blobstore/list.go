package blobstore

import (
	"context"
	"fmt"
	"io"
	"iter"
	"strings"
	"time"

	"gocloud.dev/blob"
)

// Object is one of a listing.
type Object struct {
	Key     string
	Size    int64
	ModTime time.Time
}

// shards are the folders that keys are spread over.
const shards = 256

// List yields the objects of files with keys above after, in the order of their keys. It reads one folder at a time, so that
// a listing resumed at a key repeats little. An error ends it.
func (s *Store) List(ctx context.Context, after string) iter.Seq2[Object, error] {
	return func(yield func(Object, error) bool) {
		for shard := firstShard(after); shard < shards; shard++ {
			folder := s.bucket.List(&blob.ListOptions{Prefix: fmt.Sprintf("%s%02x/", keyPrefix, shard)})
			for {
				o, err := folder.Next(ctx)
				if err == io.EOF {
					break
				}
				if err != nil {
					yield(Object{}, fmt.Errorf("list the blob store: %w", err))
					return
				}
				if o.Key > after && !o.IsDir && !yield(Object{Key: o.Key, Size: o.Size, ModTime: o.ModTime}, nil) {
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

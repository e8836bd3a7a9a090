package blobstore

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestFilesAreOnTheDisk before they count as written: first the bytes, under no name that anybody reads, then the name, then,
// once, each new directory.
func TestFilesAreOnTheDisk(t *testing.T) {
	t.Parallel()
	s := open(t, "file")
	root := s.files.root
	var synced []string
	s.files.sync = func(f *os.File) error {
		path, err := filepath.Rel(filepath.Dir(root), f.Name())
		if err != nil {
			return err
		}
		key, temporary := strings.CutSuffix(path, ".tmp")
		if temporary {
			key = key[:strings.LastIndex(key, ".")]
		}
		there := "gone"
		if _, err := os.Stat(filepath.Join(filepath.Dir(root), key)); err == nil {
			there = "there"
		}
		synced = append(synced, key+" "+there)
		return f.Sync()
	}
	for _, write := range []struct {
		key  string
		want []string
	}{
		{"walgate/aa/one", []string{"blobs/walgate/aa/one gone", "blobs/walgate/aa there", "blobs/walgate there", "blobs there", ". there"}},
		{"walgate/aa/two", []string{"blobs/walgate/aa/two gone", "blobs/walgate/aa there"}},
		{"walgate/bb/one", []string{"blobs/walgate/bb/one gone", "blobs/walgate/bb there", "blobs/walgate there"}},
	} {
		synced = nil
		if mustWrite(t, s, write.key, stream(10)); !slices.Equal(synced, write.want) {
			t.Errorf("%s: flushed %v\nwant %v", write.key, synced, write.want)
		}
	}
	for _, fails := range []string{".tmp", "/bb"} {
		broken := errors.New("the disk is broken")
		s.files.sync = func(f *os.File) error {
			if strings.HasSuffix(f.Name(), fails) {
				return broken
			}
			return f.Sync()
		}
		if _, err := s.Write(t.Context(), "walgate/bb/two", stream(10), WriteOptions{}); !errors.Is(err, broken) {
			t.Errorf("flushing %s failed: %v", fails, err)
		}
		if list := keys(t, s, "walgate/bb/one"); len(list) > 0 {
			t.Errorf("flushing %s failed, and there is %v", fails, list)
		}
	}
}

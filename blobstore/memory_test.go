package blobstore

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
)

// watched yields n bytes and notes how high the heap comes meanwhile.
type watched struct {
	left, since int64
	peak        uint64
}

func (w *watched) Read(p []byte) (int, error) {
	if w.left == 0 {
		return 0, io.EOF
	}
	n := int(min(int64(len(p)), w.left))
	w.left -= int64(n)
	if w.since += int64(n); w.since > 1<<20 {
		w.since = 0
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		w.peak = max(w.peak, m.HeapAlloc)
	}
	return n, nil
}

// TestMemoryStaysFlat: of a file of 300 MB only a part of a few MB is in memory at once. The services here throw away what they
// are sent. Not parallel: it measures the whole process.
func TestMemoryStaysFlat(t *testing.T) {
	amazon := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.Header().Set("ETag", `"x"`)
		switch q := r.URL.Query(); {
		case q.Has("uploads"):
			fmt.Fprint(w, `<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>`)
		case r.Method == http.MethodPost:
			fmt.Fprint(w, `<CompleteMultipartUploadResult><ETag>"x"</ETag></CompleteMultipartUploadResult>`)
		}
	}))
	defer amazon.Close()
	azure := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.WriteHeader(http.StatusCreated)
	}))
	defer azure.Close()
	for kind, url := range map[string]string{
		"file":   bucketURL(t, "file"),
		"s3":     "s3://files?region=us-east-1&use_path_style=true&endpoint=" + amazon.URL,
		"azblob": "azblob://files?protocol=http&domain=" + strings.TrimPrefix(azure.URL, "http://"),
	} {
		s := openURL(t, url)
		runtime.GC()
		var before runtime.MemStats
		runtime.ReadMemStats(&before)
		w := &watched{left: 300_000_000}
		if _, err := s.Write(t.Context(), NewKey(), w, WriteOptions{Limit: 2_000_000_000}); err != nil {
			t.Fatal(err)
		}
		took := (int64(w.peak) - int64(before.HeapAlloc)) >> 20
		t.Logf("%s: %d MiB", kind, took)
		if most := map[string]int64{"file": 10, "s3": 70, "azblob": 70}[kind]; took > most {
			t.Errorf("%s: 300 MB took %d MiB of heap, want at most %d", kind, took, most)
		}
	}
}

package pgserver

import (
	"archive/zip"
	_ "embed"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
)

// A package with scripts in place of programs: postgres tells its version, initdb fails as it does for root.
//
//go:embed testdata/postgres-that-only-tells-its-version.txz
var fakeBinaries []byte

// mavenRepository serves archive as the binaries of every system.
func mavenRepository(t *testing.T, archive []byte) (url string, requests *atomic.Int32) {
	t.Helper()
	requests = new(atomic.Int32)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		if !strings.HasSuffix(r.URL.Path, ".jar") || archive == nil {
			http.NotFound(w, r)
			return
		}
		jar := zip.NewWriter(w)
		file, err := jar.Create("postgres.txz")
		if err == nil {
			_, err = file.Write(archive)
		}
		if err == nil {
			err = jar.Close()
		}
		if err != nil {
			t.Errorf("write the archive: %v", err)
		}
	}))
	// The library asks with the default client, whose idle connections would count as goroutines left behind.
	t.Cleanup(http.DefaultClient.CloseIdleConnections)
	t.Cleanup(server.Close)
	return server.URL, requests
}

func TestDownloadedBinariesAreUsedAndKept(t *testing.T) {
	t.Parallel()
	source, requests := mavenRepository(t, fakeBinaries)
	cache := t.TempDir()
	install, err := download(t.Context(), cache, source)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(install.Bin, cache) { // Root's cache is closed to the server's user, who got a copy.
		t.Cleanup(func() { os.RemoveAll(filepath.Dir(filepath.Dir(install.Bin))) })
	}
	if install.Major != 18 || install.Version != "18.3" {
		t.Errorf("downloaded %+v, want version 18.3", install)
	}
	before := requests.Load()
	if again, err := download(t.Context(), cache, source); err != nil || again != install {
		t.Errorf("second call: %+v, %v; want %+v", again, err, install)
	}
	if requests.Load() != before {
		t.Error("what is in the cache was fetched again")
	}
}

func TestFailedDownloadLeavesNothing(t *testing.T) {
	t.Parallel()
	for name, archive := range map[string][]byte{"absent": nil, "cut off": fakeBinaries[:len(fakeBinaries)/2]} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			source, _ := mavenRepository(t, archive)
			cache := t.TempDir()
			if install, err := download(t.Context(), cache, source); err == nil {
				t.Errorf("downloaded %+v", install)
			}
			left, err := os.ReadDir(cache)
			if err != nil || len(left) > 0 {
				t.Errorf("left in the cache: %v (%v)", left, err)
			}
		})
	}
}

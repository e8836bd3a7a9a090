package blobstore

import (
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	"github.com/fsouza/fake-gcs-server/fakestorage"
	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"
	"go.uber.org/goleak"

	"github.com/walgate/walgate/internal/pgserver"
	"github.com/walgate/walgate/internal/ports"
)

// buckets are URLs of a bucket of each kind that all tests share; each test has a prefix of its own in it.
var buckets = map[string]string{}

// TestMain starts the stand-ins of the services behind a network. Their SDKs find credentials, and Google's also its server,
// in the environment only.
func TestMain(m *testing.M) { os.Exit(withFakes(m)) }

func withFakes(m *testing.M) int {
	log.SetOutput(io.Discard) // the SDK of Amazon logs what tests provoke
	memory := s3mem.New()
	if err := memory.CreateBucket("files"); err != nil {
		panic(err)
	}
	amazon := httptest.NewServer(gofakes3.New(memory).Server())
	buckets["s3"] = "s3://files?region=us-east-1&use_path_style=true&endpoint=" + amazon.URL
	port, _, err := ports.Reserve()
	if err != nil {
		panic(err)
	}
	host := fmt.Sprintf("127.0.0.1:%d", port) // objects are read at the public host, other calls go to any
	google, err := fakestorage.NewServerWithOptions(fakestorage.Options{Scheme: "http", Host: "127.0.0.1", Port: uint16(port), PublicHost: host, Writer: io.Discard})
	if err != nil {
		panic(err)
	}
	google.CreateBucketWithOpts(fakestorage.CreateBucketOpts{Name: "files"})
	buckets["gs"] = "gs://files?anonymous=true"
	azure := httptest.NewServer(newFakeAzure())
	buckets["azblob"] = "azblob://files?protocol=http&domain=" + strings.TrimPrefix(azure.URL, "http://")
	for name, value := range map[string]string{
		"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true",
		"AWS_CONFIG_FILE": os.DevNull, "AWS_SHARED_CREDENTIALS_FILE": os.DevNull,
		"STORAGE_EMULATOR_HOST": host,
		"AZURE_STORAGE_ACCOUNT": "someone", "AZURE_STORAGE_KEY": "c2VjcmV0",
	} {
		if err := os.Setenv(name, value); err != nil {
			panic(err)
		}
	}
	stop := func() { amazon.Close(); google.Stop(); azure.Close() }
	return pgserver.MainThen(m, stop, goleak.IgnoreTopFunction("go.opencensus.io/stats/view.(*worker).start"))
}

// open opens an empty store of a kind.
func open(t testing.TB, kind string) *Store {
	t.Helper()
	return openURL(t, bucketURL(t, kind))
}

func bucketURL(t testing.TB, kind string) string {
	t.Helper()
	switch kind {
	case "file":
		return "file://" + t.TempDir() + "/blobs"
	case "mem":
		return "mem://"
	}
	return fmt.Sprintf("%s&prefix=%s/", buckets[kind], strings.ReplaceAll(NewKey(), "/", "-"))
}

func openURL(t testing.TB, url string) *Store {
	t.Helper()
	s, err := Open(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// everyKind runs a test on each kind of store.
func everyKind(t *testing.T, test func(t *testing.T, s *Store)) {
	t.Parallel()
	for _, kind := range Schemes {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			test(t, open(t, kind))
		})
	}
}

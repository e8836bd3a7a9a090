package gateway

import (
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"

	"github.com/walgate/walgate/blobstore"
)

// newFileFleet is three instances with a blob store of the kind that they share, each with its own connection to it.
func newFileFleet(t *testing.T, kind string, options func(*Options)) fleet {
	t.Helper()
	at := "file://" + t.TempDir()
	if kind == "s3" {
		for name, value := range map[string]string{"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true",
			"AWS_CONFIG_FILE": os.DevNull, "AWS_SHARED_CREDENTIALS_FILE": os.DevNull} {
			t.Setenv(name, value)
		}
		memory := s3mem.New()
		ok(t, memory.CreateBucket("files"))
		bucket := httptest.NewServer(gofakes3.New(memory, gofakes3.WithLogger(gofakes3.StdLog(log.New(io.Discard, "", 0)))).Server())
		t.Cleanup(bucket.Close)
		t.Cleanup(http.DefaultClient.CloseIdleConnections)
		at = "s3://files?region=us-east-1&use_path_style=true&endpoint=" + bucket.URL
	}
	patient := func(g *Gateway) { g.limits.idle = patience }
	e := newBytesEnv(t, at, setup{options: options, gateway: patient})
	f := fleet{e}
	for range 2 {
		f = append(f, e.another(t, setup{gateway: patient, options: func(o *Options) {
			store, err := blobstore.Open(t.Context(), at)
			ok(t, err)
			t.Cleanup(func() { ok(t, store.Close()) })
			o.Blobs = store
		}}))
	}
	return f
}

func testFleetFiles(t *testing.T, kind string) {
	f := newFileFleet(t, kind, nil)
	ana := editor(t, "ana")
	content := strings.Repeat("0123456789abcdef", 10<<10) // 160 KiB
	const half = 70_000

	// Cut at one, gone on with at another, read at the third.
	at := f[0].begin(t, ana, "cut", len(content))
	conn := f[0].sendPart(t, at, ana, fmt.Sprintf("Content-Length: %d\r\nUpload-Offset: 0", len(content)), content[:half])
	f[0].arrived(t, at, half)
	f[1].tus(t, "HEAD", at, ana, "").at(t, 200, 0) // nothing is committed while the connection lives
	ok(t, conn.Close())
	eventually(t, "the other hears how much came", func() bool {
		return f[1].tus(t, "HEAD", at, ana, "").header.Get("Upload-Offset") == fmt.Sprint(half)
	})
	f[1].patch(t, at, ana, content[half:], half).at(t, 204, len(content))
	f[2].tus(t, "HEAD", at, ana, "").at(t, 200, len(content))
	f[2].get(t, "/attachments/cut", ana).bytesAre(t, 200, content)

	// One stands still at the first; its client goes on at the second. What the first commits late counts for nothing.
	at = f[0].begin(t, ana, "still", len(content))
	conn = f[0].sendPart(t, at, ana, fmt.Sprintf("Content-Length: %d\r\nUpload-Offset: 0", len(content)), strings.Repeat("x", half))
	f[0].arrived(t, at, half)
	f[1].patch(t, at, ana, content[:half], 0).at(t, 204, half)
	ok(t, conn.CloseWrite())
	if got := status(t, conn); got/100 != 4 {
		t.Errorf("the late one was told %d", got)
	}
	f[2].tus(t, "HEAD", at, ana, "").at(t, 200, half)
	f[2].patch(t, at, ana, content[half:], half).at(t, 204, len(content))
	f[0].get(t, "/attachments/still", ana).bytesAre(t, 200, content)

	// Two at once, round after round, with bytes of their own: the file is those of whoever was told that they came.
	const rounds, piece = 6, 20_000
	at = f[0].begin(t, ana, "both", rounds*piece)
	want := ""
	for r := range rounds {
		pieces := []string{strings.Repeat(string(rune('a'+r)), piece), strings.Repeat(string(rune('A'+r)), piece)}
		statuses := make([]int, 2)
		var wg sync.WaitGroup
		for i := range 2 {
			wg.Go(func() {
				a := f.at(r+i).patch(t, at, ana, pieces[i], r*piece)
				switch statuses[i] = a.status; {
				case a.status == 410 && r == rounds-1: // the other's piece was the last one, and the file is published
				case a.status != 204:
					a.problem(t, UploadOffset)
				}
			})
		}
		wg.Wait()
		if (statuses[0] == 204) == (statuses[1] == 204) {
			t.Fatalf("round %d: told %v", r, statuses)
		}
		if statuses[0] == 204 {
			want += pieces[0]
		} else {
			want += pieces[1]
		}
		f.at(r+2).tus(t, "HEAD", at, ana, "").at(t, 200, (r+1)*piece)
	}
	got := f[1].get(t, "/attachments/both", ana)
	got.bytesAre(t, 200, want)
	if got.header.Get("Etag") != etag(sha(want)) {
		t.Errorf("the digest is %s", got.header.Get("Etag"))
	}

	// A link that one has signed leads to the bytes at each.
	link := f[0].get(t, "/attachments/both/download-url", ana)
	var said struct{ URL string }
	ok(t, json.Unmarshal(link.body, &said))
	u, err := url.Parse(said.URL)
	ok(t, err)
	for i := range f {
		f.at(i).get(t, u.Path+"?"+u.RawQuery, "").bytesAre(t, 200, want)
	}
	f[0].tidy(t, 2+2+rounds)
}

// TestFleetFiles: resumable uploads go on at any instance, never both of two, and links are good at each; in a directory that the
// instances share.
func TestFleetFiles(t *testing.T) {
	t.Parallel()
	testFleetFiles(t, "file")
}

// TestFleetFilesS3 is the same in a bucket. It isn't parallel, for it sets the environment.
func TestFleetFilesS3(t *testing.T) { testFleetFiles(t, "s3") }

// TestFleetFinished publishes one upload from all instances at once: it becomes one file, and its bytes stay.
func TestFleetFinished(t *testing.T) {
	t.Parallel()
	f := newFileFleet(t, "file", nil)
	ana := editor(t, "ana")
	for i := range 5 {
		id := fmt.Sprint("a", i)
		at := f[0].begin(t, ana, id, 5)
		f[0].exec(t, `INSERT INTO photos (owner, file) VALUES ('ben', $1)`, id)
		f[0].sync(t)
		f[1].patch(t, at, ana, "hello", 0).problem(t, AttachmentExists) // whole, and not hers now
		f[0].exec(t, `DELETE FROM photos`)
		f[0].sync(t)
		var wg sync.WaitGroup
		for n := range 6 {
			wg.Go(func() { f.at(n).tus(t, "HEAD", at, ana, "").at(t, 200, 5) })
		}
		wg.Wait()
		f.at(i).get(t, "/attachments/"+id, ana).bytesAre(t, 200, "hello")
	}
	if n := f[0].one(t, `SELECT count(*)::text FROM walgate.attachments`); n != "5" {
		t.Errorf("5 uploads were announced %s times", n)
	}
	f[0].tidy(t, 5)
}

// TestFleetQuota: uploads to all instances at once never exceed a subject's quota, and it can be used up.
func TestFleetQuota(t *testing.T) {
	t.Parallel()
	f := newFileFleet(t, "file", func(o *Options) { o.Quota = 100 })
	ana := editor(t, "ana")
	var wg sync.WaitGroup
	var mu sync.Mutex
	count := map[int]int{}
	for i := range 15 {
		wg.Go(func() {
			a := f.at(i).put(t, fmt.Sprintf("q%d", i), ana, strings.Repeat("x", 20))
			mu.Lock()
			defer mu.Unlock()
			count[a.status]++
		})
	}
	wg.Wait()
	if count[201] != 5 || count[507] != 10 {
		t.Errorf("answered %v", count)
	}
	f[1].put(t, "one-more", ana, "x").problem(t, QuotaExceeded)
	f[0].tidy(t, 5)
}

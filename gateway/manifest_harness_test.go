package gateway

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/walgate/walgate/blobstore"
	"github.com/walgate/walgate/policies"
)

const fileTables = `
CREATE TABLE photos (id int PRIMARY KEY, owner text, team int, file text);
CREATE TABLE posters (id int PRIMARY KEY, file text);
`

// fileSpecs: photos by owner or team, posters for everybody.
func fileSpecs() map[string]policies.Spec {
	return map[string]policies.Spec{
		"photos": {Table: "public.photos", Scope: []map[string]string{{"owner": "claims.sub"}, {"team": "claims.teams"}},
			Attachments: []policies.AttachmentSpec{{Column: "file"}}},
		"posters": {Table: "public.posters", Attachments: []policies.AttachmentSpec{{Column: "file"}}},
	}
}

// newFileEnv is newEnv with the tables of the tests of attachments, whose rows were looked through.
func newFileEnv(t testing.TB, s setup) *env {
	t.Helper()
	s.before = fileTables + s.before
	specs := fileSpecs()
	for name, spec := range s.specs {
		specs[name] = spec
	}
	s.specs = specs
	options := s.options
	s.options = func(o *Options) {
		o.PublicURL, o.AttachmentSigningKey, o.AttachmentURLTTL = "https://sync.example", []byte("a key of the tests"), 15*time.Minute
		if options != nil {
			options(o)
		}
	}
	e := newEnv(t, s)
	e.looked(t)
	return e
}

// looked waits until existing rows were looked through.
func (e *env) looked(t testing.TB) {
	t.Helper()
	eventually(t, "all rows were looked through for attachments", func() bool {
		fills, err := e.log.Fills(t.Context())
		ok(t, err)
		done := 0
		for _, f := range fills {
			if f.Done {
				done++
			}
		}
		return done >= 3 && done == len(fills)
	})
	e.sync(t)
}

func contentType(id string) string {
	if strings.HasSuffix(id, ".png") {
		return "image/png"
	}
	return "image/jpeg"
}

// upload records an upload as a request would, without bytes. client "" is no private one. It takes the place of what is
// there.
func (e *env) upload(t testing.TB, id, content string, size int64, subject, client string) {
	t.Helper()
	ctx := t.Context()
	records := blobstore.NewRecords(e.db, blobstore.RecordsOptions{UploadTTL: time.Hour})
	v := blobstore.Reservation{Kind: blobstore.Put, AttachmentID: id, Subject: subject, Length: size, ContentType: contentType(id)}
	if client != "" {
		v.ClientID = &client
	}
	u, err := records.Reserve(ctx, v)
	ok(t, err)
	p := blobstore.Publishing{Upload: u, Size: size, SHA256: digestOf(content), Client: client}
	if old, err := records.Find(ctx, id); err == nil && old.State != blobstore.Deleted {
		p.IfMatch = old.SHA256
	} else if err != nil && !errors.Is(err, blobstore.ErrNotFound) {
		t.Fatal(err)
	}
	_, err = records.Publish(ctx, p)
	ok(t, err)
}

func digestOf(content string) []byte {
	sum := sha256.Sum256([]byte(content))
	return sum[:]
}

// unload deletes an attachment as a request would, if it is there.
func (e *env) unload(t testing.TB, id, subject string) {
	t.Helper()
	records := blobstore.NewRecords(e.db, blobstore.RecordsOptions{})
	f, err := records.Find(t.Context(), id)
	if err == nil && f.State != blobstore.Deleted {
		_, err = records.Remove(t.Context(), blobstore.Removal{AttachmentID: id, EventID: f.EventID, Subject: subject})
	}
	if err != nil && !errors.Is(err, blobstore.ErrNotFound) {
		t.Fatal(err)
	}
}

// wireOperation is an operation as clients get it, in a manifest or as a frame.
type wireOperation struct {
	Operation   string      `json:"operation"`
	ID          string      `json:"attachment_id"`
	URL         string      `json:"download_url"`
	Size        int64       `json:"size"`
	ContentType string      `json:"content_type"`
	SHA256      string      `json:"sha256"`
	Version     json.Number `json:"version"`
	Seq         int64       `json:"seq"`
}

// wireManifest is the answer to a manifest's request.
type wireManifest struct {
	Current    int64           `json:"current_version"`
	Operations []wireOperation `json:"operations"`
	Size       int64           `json:"total_download_size"`
	Count      struct {
		Download int `json:"download"`
		Delete   int `json:"delete"`
	} `json:"operation_count"`
	More   bool   `json:"has_more"`
	Resync bool   `json:"full_resync_required"`
	Reason string `json:"reason"`
}

// brief is the manifest in one line, such as "download a.jpg, delete b.png", or "full_resync_required too_old".
func (m *wireManifest) brief() string {
	if m.Resync {
		return "full_resync_required " + m.Reason
	}
	var out []string
	for _, o := range m.Operations {
		out = append(out, o.Operation+" "+o.ID)
	}
	return strings.Join(out, ", ")
}

// manifest asks and holds the answer against what it says of itself. limit 0 is none.
func (e *env) manifest(t testing.TB, token, client string, since int64, limit int) *wireManifest {
	t.Helper()
	body := fmt.Sprintf(`{"client_id":%q,"since_version":%d`, client, since)
	if limit > 0 {
		body += fmt.Sprintf(`,"limit":%d`, limit)
	}
	a := e.post(t, "/attachments/manifest", token, body+"}")
	if a.status != http.StatusOK {
		t.Fatalf("manifest: %d %s", a.status, a.body)
	}
	if bytes.Contains(a.body, []byte("null")) {
		t.Errorf("a list is null: %s", a.body)
	}
	m := &wireManifest{}
	ok(t, json.Unmarshal(a.body, m))
	if !m.Resync {
		e.checkManifest(t, m, since)
	}
	return m
}

func (e *env) checkManifest(t testing.TB, m *wireManifest, since int64) {
	t.Helper()
	var size int64
	counts := map[string]int{}
	seen := map[string]bool{}
	at := since
	for _, o := range m.Operations {
		v, err := o.Version.Int64()
		ok(t, err)
		if v < at || v <= since || v > m.Current || seen[o.ID] || since == 0 && o.Operation == "delete" {
			t.Errorf("%+v after %d, above %d, up to %d, twice: %v", o, at, since, m.Current, seen[o.ID])
		}
		at, seen[o.ID] = v, true
		counts[o.Operation]++
		size += o.Size
		if o.Operation == "download" {
			u, err := url.Parse(o.URL)
			digest, err2 := hex.DecodeString(o.SHA256)
			if err != nil || err2 != nil || u.Host != "sync.example" || u.Path != "/attachments/"+o.ID {
				t.Fatalf("%+v", o)
			}
			ok(t, e.g.checkSignature(o.ID, digest, u.Query().Get("expires"), u.Query().Get("signature")))
		}
	}
	if m.Size != size || m.Count.Download != counts["download"] || m.Count.Delete != counts["delete"] || m.More && m.Current <= since {
		t.Errorf("total %d, counts %+v, more %v; want %d, %v", m.Size, m.Count, m.More, size, counts)
	}
}

// files is what a client holds: digests by id.
type files map[string]string

// take applies an operation.
func (f files) take(o wireOperation) {
	if delete(f, o.ID); o.Operation == "download" {
		f[o.ID] = o.SHA256
	}
}

// follow asks until there is no more, from since on, and returns the new position; from 0 again where it is told to.
func (e *env) follow(t testing.TB, f files, token, client string, since int64, limit int) int64 {
	t.Helper()
	for {
		m := e.manifest(t, token, client, since, limit)
		if m.Resync {
			clear(f)
			since = 0
			continue
		}
		for _, o := range m.Operations {
			f.take(o)
		}
		if since = m.Current; !m.More {
			return since
		}
	}
}

// visible is what a caller's rows name and exists, asked of the tables.
func (e *env) visible(t testing.TB, subject string, teams ...int) files {
	t.Helper()
	if teams == nil {
		teams = []int{}
	}
	rows, err := e.db.Query(t.Context(), `SELECT DISTINCT attachment_id, encode(sha256, 'hex') FROM walgate.files JOIN
		(SELECT file FROM photos WHERE owner = $1 OR team = ANY ($2) UNION SELECT file FROM posters) r ON file = attachment_id WHERE state = 'u'`, subject, teams)
	ok(t, err)
	f := files{}
	for rows.Next() {
		var id, digest string
		ok(t, rows.Scan(&id, &digest))
		f[id] = digest
	}
	ok(t, rows.Err())
	return f
}

package gateway

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/walgate/walgate/blobstore"
	"github.com/walgate/walgate/policies"
)

// beginPut begins an upload of ten bytes: the gateway has decided that it takes them, and been sent five.
func (e *env) beginPut(t testing.TB, id, token string) (net.Conn, *bufio.Reader) {
	t.Helper()
	conn, r := e.dialRaw(t, "PUT", "/attachments/"+id, token, "Expect: 100-continue\r\nContent-Length: 10\r\n")
	if status, text, _ := nextAnswer(t, r); status != 100 {
		t.Fatalf("the upload's begin: %d %s", status, text)
	}
	_, err := io.WriteString(conn, "hello")
	ok(t, err)
	return conn, r
}

// endPut sends the rest and expects an answer.
func endPut(t testing.TB, conn net.Conn, r *bufio.Reader, want int) {
	t.Helper()
	_, err := io.WriteString(conn, "world")
	ok(t, err)
	if status, text, _ := nextAnswer(t, r); status != want {
		t.Errorf("the upload's end: %d %s, want %d", status, text, want)
	}
}

// TestAttachmentUnderWay: a row is there before its file is, and while a file is on its way nobody sees any of it: no read, no list, no
// manifest. Then all of them show it.
func TestAttachmentUnderWay(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "file://"+t.TempDir(), setup{})
	ana := editor(t, "ana")
	start := e.here(t, ana)
	e.name(t, "ana", "a")
	if changes, _ := e.pullAll(t, ana, start); len(changes) != 1 || !strings.Contains(string(changes[0].Data), `"file":"a"`) {
		t.Errorf("the row before its file: %+v", changes)
	}
	conn, r := e.beginPut(t, "a", ana)
	unseen := func() {
		t.Helper()
		e.get(t, "/attachments/a", ana).problem(t, AttachmentMissing)
		e.get(t, "/attachments/a", ana, "Range", "bytes=0-1").problem(t, AttachmentMissing)
		e.get(t, "/attachments/a/download-url", ana).problem(t, AttachmentMissing)
		if a := e.do(t, http.MethodHead, "/attachments/a", ana); a.status != 404 {
			t.Errorf("HEAD: %d", a.status)
		}
		if a := e.get(t, "/attachments?count=only", ana); !strings.Contains(string(a.body), `"count":0`) {
			t.Errorf("listed: %s", a.body)
		}
		if m := e.manifest(t, ana, "c", 0, 0); m.brief() != "" {
			t.Errorf("told: %s", m.brief())
		}
	}
	unseen()
	endPut(t, conn, r, 201)
	e.get(t, "/attachments/a", ana).bytesAre(t, 200, "helloworld")
	if a := e.do(t, http.MethodHead, "/attachments/a", ana); a.status != 200 || a.header.Get("Content-Length") != "10" {
		t.Errorf("HEAD: %d %v", a.status, a.header)
	}
	if m := e.manifest(t, ana, "c", 0, 0); m.brief() != "download a" {
		t.Errorf("told: %s", m.brief())
	}
	e.tidy(t, 1)
}

// TestAttachmentDeletedUnderWay deletes what is being uploaded. Whichever is answered last holds, of new ids, of deleted ones, and of a
// repeat.
func TestAttachmentDeletedUnderWay(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{})
	ana := editor(t, "ana")
	e.name(t, "ana", "new")
	e.name(t, "ana", "dead")
	e.put(t, "dead", ana, "old bytes").created(t)
	e.remove(t, "dead", ana)
	since := e.manifest(t, ana, "c", 0, 0).Current
	for _, id := range []string{"new", "dead"} {
		conn, r := e.beginPut(t, id, ana)
		e.remove(t, id, ana)
		endPut(t, conn, r, 201)
		e.get(t, "/attachments/"+id, ana).bytesAre(t, 200, "helloworld")
	}
	m := e.manifest(t, ana, "c", since, 0)
	if m.brief() != "download new, download dead" {
		t.Errorf("told: %s", m.brief())
	}
	conn, r := e.beginPut(t, "new", ana) // the same bytes again
	e.remove(t, "new", ana)
	endPut(t, conn, r, 200) // it was there when it was asked
	e.get(t, "/attachments/new", ana).problem(t, AttachmentDeleted)
	if m := e.manifest(t, ana, "c", m.Current, 0); m.brief() != "delete new" {
		t.Errorf("told: %s", m.brief())
	}
	e.put(t, "new", ana, "anew").created(t)
	conn, r = e.beginPut(t, "other", ana)
	e.put(t, "other", ana, "overtaken").created(t)
	endPut(t, conn, r, 409)
	e.get(t, "/attachments/other", ana).bytesAre(t, 200, "overtaken")
}

// TestManifestLinks fetches by the links of a manifest, as a client does that sends no token there: they lead to the public address,
// whatever the request was sent to, and bring what the manifest says.
func TestManifestLinks(t *testing.T) {
	t.Parallel()
	const public = "https://photos.example/api"
	e := newBytesEnv(t, "file://"+t.TempDir(), setup{options: func(o *Options) { o.PublicURL = public }})
	ana := editor(t, "ana")
	const id, content = "abc123-def4-5678-9012-345678901234.jpg", "the bytes of a photo"
	e.name(t, "ben", id)
	e.put(t, id, tokenFor(t, "ben", map[string]any{"roles": []string{"editor"}}), content, "Content-Type", "image/jpeg").created(t)
	e.put(t, "anas", ana, "x").created(t)
	ask := func() wireOperation {
		t.Helper()
		const body = `{"client_id":"phone","since_version":0}`
		a := e.raw(t, http.MethodPost, "/attachments/manifest", reader(t, "ben"), fmt.Sprintf("X-Forwarded-Host: evil.example\r\nForwarded: host=evil.example\r\nContent-Length: %d\r\n\r\n%s", len(body), body)) // to the host x
		m := decoded[*wireManifest](t, a)
		if m.brief() != "download "+id || !strings.HasPrefix(m.Operations[0].URL, public+"/attachments/"+id+"?") {
			t.Fatalf("%d %s", a.status, a.body)
		}
		return m.Operations[0]
	}
	ask()
	o := ask() // the second one from memory
	link := strings.TrimPrefix(o.URL, public)
	got := e.send(t, http.MethodGet, link, "", nil)
	got.bytesAre(t, 200, content)
	if got.header.Get("Content-Type") != o.ContentType || int64(len(got.body)) != o.Size || hexText(sha(string(got.body))) != o.SHA256 || o.ContentType != "image/jpeg" {
		t.Errorf("%+v brought %v", o, got.header)
	}
	e.send(t, http.MethodGet, strings.Replace(link, id, "anas", 1), "", nil).problem(t, SignatureInvalid)
	e.remove(t, id, editor(t, "ben"))
	e.send(t, http.MethodGet, link, "", nil).problem(t, AttachmentDeleted)
}

// TestAttachmentBytesDamaged: bytes that were cut in the store are never sent as if they were whole. Once care has seen that bytes are
// lost nobody is sent for them, nor told to delete what may be the last copy; once they were sent again, they are fetched.
func TestAttachmentBytesDamaged(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	e := newBytesEnv(t, "file://"+dir, setup{})
	ana := editor(t, "ana")
	content := string(pattern(300_000))
	since := map[string]int64{}
	for _, id := range []string{"cut", "lost"} {
		e.name(t, "ana", id)
		e.put(t, id, ana, content).created(t)
		since[id] = e.manifest(t, ana, id, 0, 0).Current
	}
	path := func(id string) string {
		return filepath.Join(dir, e.one(t, `SELECT storage_key FROM walgate.files WHERE attachment_id = $1`, id))
	}
	ok(t, os.Truncate(path("cut"), 100_000))
	ok(t, os.Remove(path("lost")))
	e.get(t, "/attachments/lost", ana).problem(t, AttachmentMissing)
	_, r := e.dialRaw(t, "GET", "/attachments/cut", ana, "")
	res, err := http.ReadResponse(r, nil)
	ok(t, err)
	if body, err := io.ReadAll(res.Body); res.StatusCode == 200 && err == nil {
		t.Errorf("a cut file came as a whole one of %d bytes", len(body))
	}
	e.care(t)
	for _, id := range []string{"cut", "lost"} {
		e.get(t, "/attachments/"+id, ana).problem(t, AttachmentMissing)
		m := e.manifest(t, ana, id, since["lost"], 0)
		if strings.Contains(m.brief(), id) && m.brief() != "download cut" { // the other one, sent again
			t.Errorf("told of lost bytes: %s", m.brief())
		}
		if again := e.manifest(t, ana, id, 0, 0); strings.Contains(again.brief(), "download "+id) {
			t.Errorf("from 0: %s", again.brief())
		}
		e.put(t, id, ana, content).created(t) // by who still has it
		if m := e.manifest(t, ana, id, m.Current, 0); !strings.Contains(m.brief(), "download "+id) {
			t.Errorf("told of bytes that are back: %s", m.brief())
		}
		e.get(t, "/attachments/"+id, ana).bytesAre(t, 200, content)
	}
}

// care goes a round.
func (e *env) care(t testing.TB) {
	t.Helper()
	care := blobstore.NewCare(blobstore.CareOptions{Source: e.g.o.Source, Store: e.g.o.Blobs, Records: e.g.o.Files, References: logReferences{e, t}, Grace: time.Hour, UploadTTL: time.Hour, Guard: 100, Logger: slog.New(slog.DiscardHandler)})
	_, err := care.Round(t.Context(), blobstore.RoundOptions{Reconcile: true})
	ok(t, err)
	e.sync(t)
}

// TestRepeatedUploadIsYoung: who sends a file again, long after the first time, has the whole grace period again for the row that
// names it; and where the sweep is first, its bytes are taken anew.
func TestRepeatedUploadIsYoung(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{})
	ana := editor(t, "ana")
	e.put(t, "a", ana, "hello").created(t)
	e.care(t)
	e.exec(t, `UPDATE walgate.files SET unreferenced_since = unreferenced_since - interval '2 hours'`)
	e.put(t, "a", ana, "hello").uploaded(t, http.StatusOK)
	e.care(t)
	e.care(t)
	e.name(t, "ana", "a")
	e.get(t, "/attachments/a", ana).bytesAre(t, 200, "hello")

	e.put(t, "b", ana, "hello").created(t)
	sweep, err := e.db.Begin(t.Context())
	ok(t, err)
	defer sweep.Rollback(context.WithoutCancel(t.Context()))
	_, err = sweep.Exec(t.Context(), `SELECT pg_advisory_xact_lock($1)`, blobstore.LockKey("b"))
	ok(t, err)
	again := make(chan *answer, 1)
	go func() { again <- e.put(t, "b", ana, "hello") }()
	e.blocked(t)
	_, err = sweep.Exec(t.Context(), `UPDATE walgate.files SET state = 'd', deleted_at = now(), unreferenced_since = now() WHERE attachment_id = 'b'`)
	ok(t, err)
	ok(t, sweep.Commit(t.Context()))
	(<-again).created(t)
	e.get(t, "/attachments/b", ana).bytesAre(t, 200, "hello")
}

// logReferences is what care asks of the log.
type logReferences struct {
	e *env
	t testing.TB
}

func (r logReferences) Unfilled(context.Context) (string, error) { return "", nil }

func (r logReferences) Pass(context.Context) error {
	r.e.sync(r.t)
	return nil
}

func (r logReferences) Unwithheld(_ context.Context, ids []string) ([]int64, error) {
	return make([]int64, len(ids)), nil
}

func (r logReferences) Named(ctx context.Context, ids []string) ([]bool, error) {
	var keys [][16]byte
	for _, id := range ids {
		keys = append(keys, policies.AttachmentKey([]byte(id)))
	}
	held, err := r.e.log.Held(ctx, keys, [][16]byte{})
	out := make([]bool, len(ids))
	for i := range held {
		out[i] = held[i].Any
	}
	return out, err
}

// TestAttachmentListFollows: the list is in the order of uploads, without what was deleted, with what is uploaded anew as the newest, and
// of the caller's rows and uploads only.
func TestAttachmentListFollows(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{})
	ana := editor(t, "ana")
	e.exec(t, `INSERT INTO photos (team, file) VALUES (1, 'team1'), (2, 'team2'), (NULL, 'nobody')`)
	e.sync(t)
	one := tokenFor(t, "cat", map[string]any{"roles": []string{"editor"}, "teams": []int{1}})
	for _, id := range []string{"c", "a", "d", "b"} {
		e.put(t, id, ana, "x").created(t)
	}
	e.put(t, "team1", one, "x").created(t)
	e.put(t, "team2", tokenFor(t, "dan", map[string]any{"roles": []string{"editor"}, "teams": []int{2}}), "x").created(t)
	list := func(token, params string) string {
		t.Helper()
		var ids []string
		l := decoded[struct{ Attachments []listedAttachment }](t, e.get(t, "/attachments?"+params, token))
		for _, x := range l.Attachments {
			ids = append(ids, x.AttachmentID)
		}
		return strings.Join(ids, " ")
	}
	expect := func(what, got, want string) {
		t.Helper()
		if got != want {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
	expect("by date", list(ana, "order=date"), "c a d b")
	expect("by default", list(ana, ""), "c a d b")
	expect("newest first", list(ana, "order=-date"), "b d a c")
	e.remove(t, "c", ana)
	e.remove(t, "d", ana)
	e.put(t, "c", ana, "y").created(t)
	expect("c anew, d deleted", list(ana, "order=date"), "a b c")
	for range 2 {
		if a := e.get(t, "/attachments?count=only", ana); !strings.Contains(string(a.body), `"count":3`) {
			t.Errorf("count: %s", a.body)
		}
	}
	expect("of a team", list(one, ""), "team1")
	expect("of another", list(tokenFor(t, "eve", map[string]any{"roles": []string{"reader"}, "teams": []int{2}}), ""), "team2")
	expect("of nobody", list(reader(t, "eve"), ""), "")
}

// TestUploadsAtATime: a subject's uploads under way are bounded; one too many is told to come back, and others aren't held up.
func TestUploadsAtATime(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{})
	ana := editor(t, "ana")
	var first net.Conn
	var firstAnswer *bufio.Reader
	for i := range uploadsPerSubject {
		conn, r := e.beginPut(t, fmt.Sprint("slow", i), ana)
		if i == 0 {
			first, firstAnswer = conn, r
		}
	}
	e.put(t, "more", ana, "x").problem(t, RateLimited) // with Retry-After
	e.put(t, "bens", editor(t, "ben"), "x").created(t)
	endPut(t, first, firstAnswer, 201)
	eventually(t, "there is room", func() bool { return e.g.uploads.count("ana") < uploadsPerSubject })
	e.put(t, "more", ana, "x").created(t)
}

// TestAttachmentQueue does what a client's queue does over a bad link: raw bytes with their length and type, again where the
// answer was lost, by any queue of the same subject, and deletions again and again. Each repetition is a success.
func TestAttachmentQueue(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{})
	ana := editor(t, "ana")
	e.name(t, "ana", "photo.jpg")
	conn, _ := e.dialRaw(t, "PUT", "/attachments/photo.jpg", ana, "Content-Length: 5\r\nContent-Type: image/jpeg\r\n")
	_, err := io.WriteString(conn, "hello")
	ok(t, err)
	eventually(t, "the upload is published", func() bool {
		return e.one(t, `SELECT count(*)::text FROM walgate.files WHERE attachment_id = 'photo.jpg' AND state = 'u'`) == "1"
	})
	ok(t, conn.Close()) // the answer goes nowhere
	e.sync(t)
	if a := e.do(t, http.MethodHead, "/attachments/photo.jpg", ana); a.status != 200 || a.header.Get("Etag") != etag(sha("hello")) {
		t.Errorf("HEAD before PUT: %d %v", a.status, a.header)
	}
	for range 3 {
		u := e.put(t, "photo.jpg", ana, "hello", "Content-Type", "image/jpeg").uploaded(t, http.StatusOK)
		if u.Status != "success" || u.ContentType != "image/jpeg" || u.Size != 5 {
			t.Errorf("again: %+v", u)
		}
	}
	got := e.get(t, "/attachments/photo.jpg", ana)
	if got.bytesAre(t, 200, "hello"); got.header.Get("Content-Type") != "image/jpeg" || got.header.Get("Content-Length") != "5" {
		t.Errorf("%v", got.header)
	}
	for range 3 {
		e.remove(t, "photo.jpg", ana)
	}
	if a := e.get(t, "/attachments/photo.jpg", ana); a.status/100 == 2 {
		t.Errorf("deleted: %d", a.status)
	}
	e.tidy(t, 1) // care deletes the bytes
}

// decoded reads a 200 answer.
func decoded[T any](t testing.TB, a *answer) (v T) {
	t.Helper()
	if a.status != http.StatusOK {
		t.Fatalf("%d %s", a.status, a.body)
	}
	ok(t, json.Unmarshal(a.body, &v))
	return v
}

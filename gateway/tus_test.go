package gateway

import (
	"crypto/sha1"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/walgate/walgate/blobstore"
)

// tus sends a request about an upload, as a client of tus 1.0.0 unless the headers say otherwise.
func (e *env) tus(t testing.TB, method, path, token, body string, headers ...string) *answer {
	t.Helper()
	headers = append([]string{"Tus-Resumable", "1.0.0"}, headers...)
	var r io.Reader
	if body != "" {
		r = strings.NewReader(body)
		headers = append([]string{"Content-Type", tusBody}, headers...)
	}
	said, once := map[string]bool{}, []string(nil) // of each header, what was said last
	for i := len(headers) - 2; i >= 0; i -= 2 {
		if !said[headers[i]] {
			once = append(once, headers[i], headers[i+1])
		}
		said[headers[i]] = true
	}
	a := e.send(t, method, path, token, r, once...)
	if a.header.Get("Tus-Resumable") != "1.0.0" && a.status != 401 {
		t.Errorf("%s %s: Tus-Resumable is %q", method, path, a.header.Get("Tus-Resumable"))
	}
	return a
}

// metadata is an Upload-Metadata; pairs are keys and values.
func metadata(pairs ...string) string {
	var out []string
	for i := 0; i+1 < len(pairs); i += 2 {
		out = append(out, pairs[i]+" "+base64.StdEncoding.EncodeToString([]byte(pairs[i+1])))
	}
	return strings.Join(out, ",")
}

// begin creates an upload and returns its path.
func (e *env) begin(t testing.TB, token, id string, length int, headers ...string) string {
	t.Helper()
	a := e.tus(t, "POST", "/uploads", token, "", append([]string{"Upload-Length", fmt.Sprint(length), "Upload-Metadata", metadata("attachment_id", id)}, headers...)...)
	if a.status != 201 || !strings.HasPrefix(a.header.Get("Location"), "/uploads/") || a.header.Get("Upload-Expires") == "" {
		t.Fatalf("created %d %v %s", a.status, a.header, a.body)
	}
	return a.header.Get("Location")
}

// at expects an answer with this status and offset.
func (a *answer) at(t testing.TB, status, offset int) *answer {
	t.Helper()
	if a.status != status || a.header.Get("Upload-Offset") != fmt.Sprint(offset) {
		t.Fatalf("want %d and the offset %d, got %d %q %s", status, offset, a.status, a.header.Get("Upload-Offset"), a.body)
	}
	return a
}

func (e *env) patch(t testing.TB, path, token, body string, offset int, headers ...string) *answer {
	t.Helper()
	return e.tus(t, "PATCH", path, token, body, append([]string{"Content-Type", tusBody, "Upload-Offset", fmt.Sprint(offset)}, headers...)...)
}

// TestTus goes through the protocol, word for word.
func TestTus(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{options: func(o *Options) { o.AttachmentLimit, o.Quota = 1000, 1500 }})
	ana, ben := editor(t, "ana"), editor(t, "ben")
	for _, path := range []string{"/uploads", "/uploads/x"} {
		a := e.send(t, "OPTIONS", path, "", nil)
		if a.status != 204 || a.header.Get("Tus-Version") != "1.0.0" || a.header.Get("Tus-Extension") != tusExtensions || a.header.Get("Tus-Max-Size") != "1000" || a.header.Get("Tus-Checksum-Algorithm") != "sha1,sha256" {
			t.Errorf("OPTIONS: %d %v", a.status, a.header)
		}
	}
	at := e.begin(t, ana, "a", 11, "Upload-Metadata", metadata("attachment_id", "a", "filetype", "text/plain", "filename", "dir/hello.txt"))
	a := e.tus(t, "HEAD", at, ana, "").at(t, 200, 0)
	if a.header.Get("Upload-Length") != "11" || a.header.Get("Cache-Control") != "no-store" || a.header.Get("Upload-Metadata") != metadata("attachment_id", "a", "filetype", "text/plain", "filename", "hello.txt") {
		t.Errorf("HEAD: %v", a.header)
	}
	if expires, err := time.Parse(http.TimeFormat, a.header.Get("Upload-Expires")); err != nil || expires.Before(time.Now()) {
		t.Errorf("expires %v: %v", expires, err)
	}
	if a := e.tus(t, "HEAD", at, ben, ""); a.status != 410 || a.header.Get("Upload-Offset") != "" {
		t.Errorf("another's: %d %v", a.status, a.header)
	}
	e.patch(t, at, ben, "hello ", 0).problem(t, UploadGone)
	e.patch(t, at, ana, "hello ", 0).at(t, 204, 6)
	e.patch(t, at, ana, "hello ", 0).problem(t, UploadOffset)
	e.patch(t, at, ana, "world", 7).problem(t, UploadOffset)
	e.patch(t, at, ana, "world, and more", 6).problem(t, RequestTooLarge)
	e.tus(t, "PATCH", at, ana, "world").problem(t, InvalidRequest)
	e.patch(t, at, ana, "world", 6, "Content-Type", "text/plain").problem(t, UnsupportedMediaType)
	if a := e.patch(t, at, ana, "world", 6, "Tus-Resumable", "0.2.2"); a.header.Get("Tus-Version") != "1.0.0" {
		t.Errorf("another version: %v", a.header)
	} else {
		a.problem(t, TusVersion)
	}
	e.tus(t, "HEAD", at, ana, "").at(t, 200, 6)
	e.get(t, "/attachments/a", ana).problem(t, NotFound)
	e.tus(t, "POST", at, ana, "world", "Content-Type", tusBody, "Upload-Offset", "6", "X-HTTP-Method-Override", "PATCH").at(t, 204, 11)
	got := e.get(t, "/attachments/a", ana)
	got.bytesAre(t, 200, "hello world")
	if got.header.Get("Content-Type") != "text/plain" || got.header.Get("Etag") != etag(sha("hello world")) || !strings.Contains(got.header.Get("Content-Disposition"), "hello.txt") {
		t.Errorf("%v", got.header)
	}
	// Whoever didn't hear of the end asks again.
	e.tus(t, "HEAD", at, ana, "").at(t, 200, 11)
	if a := e.tus(t, "HEAD", at, ben, ""); a.status != 410 || a.header.Get("Upload-Metadata") != "" {
		t.Errorf("another's, finished: %d %v", a.status, a.header)
	}
	e.patch(t, at, ana, "", 11).at(t, 204, 11)
	e.patch(t, at, ana, "world", 6).problem(t, UploadOffset)
	e.tus(t, "DELETE", at, ana, "").problem(t, UploadGone)
	e.get(t, "/attachments/a", ana).bytesAre(t, 200, "hello world")
	e.tidy(t, 2)
}

// TestTusCreation begins uploads in every way.
func TestTusCreation(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{options: func(o *Options) {
		o.AttachmentLimit, o.Quota, o.AttachmentTypes = 1000, 1500, []string{"text/*", "application/octet-stream"}
	}})
	ana := editor(t, "ana")
	named := []string{"Upload-Metadata", metadata("attachment_id", "a")}
	for _, x := range []struct {
		what    string
		headers []string
		code    Code
	}{
		{"no length", nil, InvalidRequest},
		{"two lengths", []string{"Upload-Length", "1", "Upload-Defer-Length", "1"}, InvalidRequest},
		{"a negative length", []string{"Upload-Length", "-1"}, InvalidRequest},
		{"a fraction", []string{"Upload-Length", "1.5"}, InvalidRequest},
		{"a sign", []string{"Upload-Length", "+1"}, InvalidRequest},
		{"beyond 64 bits", []string{"Upload-Length", "9223372036854775808"}, InvalidRequest},
		{"a deferred length that isn't 1", []string{"Upload-Defer-Length", "2"}, InvalidRequest},
		{"too long", []string{"Upload-Length", "1001"}, RequestTooLarge},
		{"no id", []string{"Upload-Length", "1", "Upload-Metadata", ""}, InvalidAttachmentID},
		{"an id that is a path", []string{"Upload-Length", "1", "Upload-Metadata", metadata("attachment_id", "../a")}, InvalidAttachmentID},
		{"an id that is long", []string{"Upload-Length", "1", "Upload-Metadata", metadata("attachment_id", strings.Repeat("a", 256))}, InvalidAttachmentID},
		{"no base64", []string{"Upload-Length", "1", "Upload-Metadata", "attachment_id %%%"}, InvalidRequest},
		{"a key twice", []string{"Upload-Length", "1", "Upload-Metadata", metadata("attachment_id", "a", "attachment_id", "b")}, InvalidRequest},
		{"another type", []string{"Upload-Length", "1", "Upload-Metadata", metadata("attachment_id", "a", "filetype", "image/png")}, AttachmentTypeRefused},
		{"no type", []string{"Upload-Length", "1", "Upload-Metadata", metadata("attachment_id", "a", "filetype", "nonsense")}, AttachmentTypeRefused},
		{"a device with a NUL", []string{"Upload-Length", "1", "Upload-Metadata", metadata("attachment_id", "a", "client_id", "\x00")}, InvalidRequest},
	} {
		if a := e.tus(t, "POST", "/uploads", ana, "", append(slices.Clone(named), x.headers...)...); a.header.Get("Location") != "" {
			t.Errorf("%s: %v", x.what, a.header)
		} else {
			a.problem(t, x.code)
		}
	}
	e.tus(t, "POST", "/uploads", reader(t, "ana"), "", append(named, "Upload-Length", "1")...).problem(t, Forbidden)
	e.tus(t, "POST", "/uploads", "", "", append(named, "Upload-Length", "1")...).problem(t, InvalidToken)
	e.tidy(t, 0)

	first := e.begin(t, ana, "a", 900)
	e.tus(t, "POST", "/uploads", ana, "", append(named, "Upload-Length", "601")...).problem(t, QuotaExceeded)
	second := e.begin(t, ana, "a", 600)
	for _, at := range []string{first, second} {
		if a := e.tus(t, "DELETE", at, ana, ""); a.status != 204 {
			t.Errorf("terminated: %d %s", a.status, a.body)
		}
		e.patch(t, at, ana, "x", 0).problem(t, UploadGone)
		e.tus(t, "DELETE", at, ana, "").problem(t, UploadGone)
	}
	e.tidy(t, 0)

	// Its bytes, or some of them, with the creation.
	a := e.tus(t, "POST", "/uploads", ana, "hello", "Upload-Length", "5", "Upload-Metadata", metadata("attachment_id", "whole")).at(t, 201, 5)
	e.tus(t, "HEAD", a.header.Get("Location"), ana, "").at(t, 200, 5)
	e.get(t, "/attachments/whole", ana).bytesAre(t, 200, "hello")
	a = e.tus(t, "POST", "/uploads", ana, "hel", "Upload-Length", "5", "Upload-Metadata", metadata("attachment_id", "some")).at(t, 201, 3)
	e.patch(t, a.header.Get("Location"), ana, "lo", 3).at(t, 204, 5)
	e.get(t, "/attachments/some", ana).bytesAre(t, 200, "hello")
	e.tus(t, "POST", "/uploads", ana, "hello", "Upload-Length", "5", "Upload-Metadata", metadata("attachment_id", "b"), "Content-Type", "text/plain").problem(t, UnsupportedMediaType)
	e.tus(t, "POST", "/uploads", ana, "", "Upload-Length", "0", "Upload-Metadata", metadata("attachment_id", "empty"))
	e.get(t, "/attachments/empty", ana).bytesAre(t, 200, "")

	// A length that is said later, and never more than that.
	at := e.tus(t, "POST", "/uploads", ana, "", "Upload-Defer-Length", "1", "Upload-Metadata", metadata("attachment_id", "late")).header.Get("Location")
	e.patch(t, at, ana, "hel", 0).at(t, 204, 3)
	if a := e.tus(t, "HEAD", at, ana, "").at(t, 200, 3); a.header.Get("Upload-Defer-Length") != "1" || a.header.Get("Upload-Length") != "" {
		t.Errorf("%v", a.header)
	}
	e.patch(t, at, ana, strings.Repeat("x", 998), 3).problem(t, RequestTooLarge)
	e.patch(t, at, ana, "lo", 3, "Upload-Length", "2").problem(t, InvalidRequest)
	e.patch(t, at, ana, "lo", 3, "Upload-Length", "1001").problem(t, RequestTooLarge)
	e.patch(t, at, ana, "l", 3, "Upload-Length", "5").at(t, 204, 4)
	e.patch(t, at, ana, "o", 4, "Upload-Length", "6").problem(t, InvalidRequest)
	e.patch(t, at, ana, "o", 4).at(t, 204, 5)
	e.get(t, "/attachments/late", ana).bytesAre(t, 200, "hello")

	// What is there already: the same again is fine, another isn't.
	e.tus(t, "POST", "/uploads", ana, "hello", "Upload-Length", "5", "Upload-Metadata", metadata("attachment_id", "whole")).at(t, 201, 5)
	e.tus(t, "POST", "/uploads", ana, "jelly", "Upload-Length", "5", "Upload-Metadata", metadata("attachment_id", "whole")).problem(t, AttachmentExists)
	e.tus(t, "POST", "/uploads", ana, "", "Upload-Length", "6", "Upload-Metadata", metadata("attachment_id", "whole")).problem(t, AttachmentExists)
	if got := e.tus(t, "POST", "/uploads", editor(t, "ben"), "hello", "Upload-Length", "5", "Upload-Metadata", metadata("attachment_id", "whole")).problem(t, AttachmentExists); got.Detail != "" {
		t.Errorf("told %q", got.Detail)
	}
	e.tidy(t, 6)
}

// TestTusChecksum sends bytes with right, wrong and unknown checksums.
func TestTusChecksum(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{})
	ana := editor(t, "ana")
	one, two := sha1.Sum([]byte("hello ")), sha256.Sum256([]byte("world"))
	right1, right2 := "sha1 "+base64.StdEncoding.EncodeToString(one[:]), "sha256 "+base64.StdEncoding.EncodeToString(two[:])
	at := e.begin(t, ana, "a", 11)
	for _, bad := range []string{"md5 " + base64.StdEncoding.EncodeToString(one[:]), "sha1", "sha1 %%%", "sha1 aGVsbG8=", "sha256 " + right1[5:]} {
		e.patch(t, at, ana, "hello ", 0, "Upload-Checksum", bad).problem(t, InvalidRequest)
	}
	e.patch(t, at, ana, "jelly ", 0, "Upload-Checksum", right1).problem(t, ChecksumMismatch)
	e.tus(t, "HEAD", at, ana, "").at(t, 200, 0)
	e.patch(t, at, ana, "hello ", 0, "Upload-Checksum", right1).at(t, 204, 6)
	e.patch(t, at, ana, "wurld", 6, "Upload-Checksum", right2).problem(t, ChecksumMismatch)
	e.patch(t, at, ana, "world", 6, "Upload-Checksum", right2).at(t, 204, 11)
	e.get(t, "/attachments/a", ana).bytesAre(t, 200, "hello world")
	e.tus(t, "POST", "/uploads", ana, "jelly", "Upload-Length", "5", "Upload-Metadata", metadata("attachment_id", "b"), "Upload-Checksum", right2).problem(t, ChecksumMismatch)
	if keys := e.objects(t); len(keys) != 2 { // the parts of a
		t.Errorf("kept are %v", keys)
	}
	if n := e.one(t, `SELECT count(*)::text FROM walgate.uploads`); n != "0" {
		t.Errorf("%s uploads are left", n)
	}
}

// TestTusExpires lets an upload pass its time: it is gone, whether care has come by or not.
func TestTusExpires(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{})
	ana := editor(t, "ana")
	at := e.begin(t, ana, "a", 11)
	e.patch(t, at, ana, "hello ", 0).at(t, 204, 6)
	e.exec(t, `UPDATE walgate.uploads SET expires_at = now() - interval '1s'`)
	e.patch(t, at, ana, "world", 6).problem(t, UploadGone)
	if a := e.tus(t, "HEAD", at, ana, ""); a.status != 410 {
		t.Errorf("HEAD: %d", a.status)
	}
	n, _, _, err := e.g.o.Files.Expire(t.Context(), e.g.o.Blobs)
	if ok(t, err); n != 1 {
		t.Errorf("%d were given up", n)
	}
	e.tidy(t, 0)
	e.patch(t, at, ana, "world", 6).problem(t, UploadGone)
	e.patch(t, "/uploads/0", ana, "world", 6).problem(t, UploadGone)
}

// TestTusRightsEnd loses the right to upload before the end, and the id to somebody else.
func TestTusRightsEnd(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{})
	ana, ben := editor(t, "ana"), editor(t, "ben")
	taken, lost := e.begin(t, ana, "taken", 5), e.begin(t, ana, "lost", 5)
	e.put(t, "taken", ben, "other").created(t)
	if got := e.patch(t, taken, ana, "hello", 0).problem(t, AttachmentExists); got.Detail != "" {
		t.Errorf("told %q", got.Detail)
	}
	e.exec(t, `INSERT INTO photos (owner, file) VALUES ('ben', 'lost')`)
	e.sync(t)
	e.patch(t, lost, ana, "hello", 0).problem(t, AttachmentExists)
	e.patch(t, lost, reader(t, "ana"), "", 5).problem(t, Forbidden)
	e.exec(t, `DELETE FROM photos`)
	e.sync(t)
	e.tus(t, "HEAD", lost, ana, "").at(t, 200, 5) // publishes what was whole
	e.get(t, "/attachments/lost", ana).bytesAre(t, 200, "hello")
	e.tidy(t, 2)
}

// TestTusTwoInstances adds to one upload from two gateways at once: one of them is first, and the bytes are whole.
func TestTusTwoInstances(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{})
	ana := editor(t, "ana")
	at := e.begin(t, ana, "a", 5)
	id := strings.TrimPrefix(at, "/uploads/")
	files := e.g.o.Files
	other, err := files.Upload(t.Context(), id, "ana") // as another instance sees it, before
	ok(t, err)
	number, key, err := files.BeginPart(t.Context(), other)
	ok(t, err)
	e.patch(t, at, ana, "hel", 0).at(t, 204, 3)
	_, err = e.g.o.Blobs.Write(t.Context(), key, strings.NewReader("jelly"), blobstore.WriteOptions{}) // it comes late
	ok(t, err)
	slow := &tusUpload{g: e.g, upload: other}
	if err := slow.add(tusWritten{number: number, size: 5}); asProblem(err).Code != UploadOffset {
		t.Errorf("a late part: %v", err)
	}
	e.patch(t, at, ana, "lo", 3).at(t, 204, 5)
	e.get(t, "/attachments/a", ana).bytesAre(t, 200, "hello")
	e.tidy(t, 2)
}

// TestTusOrigins lets the configured origins send and read the headers of tus.
func TestTusOrigins(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{options: func(o *Options) { o.AllowedOrigins = []string{"https://app.example"} }})
	got := e.send(t, http.MethodOptions, "/uploads/x", "", nil, "Origin", "https://app.example", "Access-Control-Request-Method", "PATCH", "Access-Control-Request-Headers", "tus-resumable,upload-offset")
	allowed := strings.ToLower(got.header.Get("Access-Control-Allow-Headers"))
	if got.status != 204 || !strings.Contains(got.header.Get("Access-Control-Allow-Methods"), "PATCH") || !strings.Contains(allowed, "tus-resumable") || !strings.Contains(allowed, "upload-offset") {
		t.Errorf("preflight: %d %v", got.status, got.header)
	}
	a := e.tus(t, "POST", "/uploads", editor(t, "ana"), "", "Upload-Length", "1", "Upload-Metadata", metadata("attachment_id", "a"), "Origin", "https://app.example")
	if exposed := a.header.Get("Access-Control-Expose-Headers"); a.status != 201 || !strings.Contains(exposed, "Location") || !strings.Contains(exposed, "Upload-Offset") {
		t.Errorf("%d %v", a.status, a.header)
	}
}

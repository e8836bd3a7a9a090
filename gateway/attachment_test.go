package gateway

import (
	"net/http"
	"strings"
	"testing"
)

// TestAttachment goes through a file's life as the clients of two devices see it.
func TestAttachment(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "file://"+t.TempDir(), setup{})
	ana, ben := editor(t, "ana"), reader(t, "ben")
	id := "AbC-1_x.jpg"
	path := "/attachments/" + id
	u := e.put(t, id, ana, "hello", "Content-Type", "image/jpeg").created(t)
	if u.AttachmentID != id || u.Size != 5 || u.ContentType != "image/jpeg" || u.SHA256 != hexText(sha("hello")) || u.Version == nil {
		t.Fatalf("answered %+v", u)
	}
	e.get(t, path, ana).bytesAre(t, 200, "hello")
	e.get(t, path, ben).problem(t, NotFound)
	e.exec(t, `INSERT INTO photos (owner, file) VALUES ('ben', $1)`, id)
	e.sync(t)
	a := e.get(t, path, ben)
	a.bytesAre(t, 200, "hello")
	for name, want := range map[string]string{"Content-Type": "image/jpeg", "Content-Disposition": "inline; filename=AbC-1_x.jpg", "X-Content-Type-Options": "nosniff",
		"Content-Security-Policy": "sandbox; default-src 'none'", "Accept-Ranges": "bytes", "Etag": etag(sha("hello")), "Repr-Digest": sha256Field(sha("hello")), "Content-Length": "5"} {
		if got := a.header.Get(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	e.get(t, path, ana).problem(t, NotFound)    // ben's row names it now, and ana doesn't see that
	e.put(t, id, ana, "hello").uploaded(t, 200) // a repeat
	if got := e.put(t, id, ana, "other").problem(t, AttachmentExists); got.Detail != "" {
		t.Errorf("told %q", got.Detail)
	}
	if a := e.do(t, http.MethodDelete, path, ana); a.status != 204 {
		t.Errorf("delete: %d %s", a.status, a.body)
	}
	e.get(t, path, ben).bytesAre(t, 200, "hello") // ana may not
	e.do(t, http.MethodDelete, path, ben).problem(t, Forbidden)
	if a := e.do(t, http.MethodDelete, path, editor(t, "ben")); a.status != 204 || len(a.body) != 0 {
		t.Errorf("delete: %d %s", a.status, a.body)
	}
	e.get(t, path, ben).problem(t, AttachmentDeleted)
	e.get(t, path, ana).problem(t, NotFound)
	if a := e.do(t, http.MethodDelete, path, editor(t, "ben")); a.status != 204 {
		t.Errorf("a repeated delete: %d %s", a.status, a.body)
	}
	e.put(t, id, editor(t, "ben"), "anew").created(t)
	e.get(t, path, ben).bytesAre(t, 200, "anew")
	if a := e.do(t, http.MethodHead, path, ben); a.status != 200 || len(a.body) != 0 || a.header.Get("Content-Length") != "4" || a.header.Get("Etag") != etag(sha("anew")) {
		t.Errorf("HEAD: %d %v", a.status, a.header)
	}
	if a := e.do(t, http.MethodHead, path, ana); a.status != 404 || len(a.body) != 0 {
		t.Errorf("HEAD of what isn't to be seen: %d %q", a.status, a.body)
	}
	e.get(t, "/attachments/"+strings.ToLower(id), ben).problem(t, NotFound) // another one
}

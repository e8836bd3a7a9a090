package gateway

import (
	"crypto/sha512"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// TestAttachmentUploads sends bodies in every form, right and wrong. What is refused leaves nothing.
func TestAttachmentUploads(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{options: func(o *Options) {
		o.AttachmentLimit, o.AttachmentTypes = 100_000, []string{"image/*", "text/html", "application/octet-stream"}
	}})
	ana := editor(t, "ana")
	long := sha512.Sum512([]byte("hello"))
	sha512Field := "sha-512=:" + base64.StdEncoding.EncodeToString(long[:]) + ":"
	form := multipartBody("file", "Content-Type: image/png\r\n", "hello")
	n, good := 0, 0
	for _, x := range []struct {
		name, body string
		headers    []string
		code       Code // empty: created
		kind       string
	}{
		{"without a type", "hello", nil, "", "application/octet-stream"},
		{"with a type", "hello", []string{"Content-Type", "IMAGE/JPEG; q=1"}, "", "image/jpeg; q=1"},
		{"that isn't one", "hello", []string{"Content-Type", "jpeg"}, AttachmentTypeRefused, ""},
		{"of a type that isn't taken", "hello", []string{"Content-Type", "video/mp4"}, AttachmentTypeRefused, ""},
		{"of a type that begins like one", "hello", []string{"Content-Type", "image2/png"}, AttachmentTypeRefused, ""},
		{"chunked", "hello", []string{"Content-Length", "-1", "Content-Type", "image/png"}, "", "image/png"},
		{"empty", "", nil, "", "application/octet-stream"},
		{"encoded", "hello", []string{"Content-Encoding", "gzip"}, UnsupportedMediaType, ""},
		{"a piece", "hello", []string{"Content-Range", "bytes 0-4/10"}, InvalidRequest, ""},
		{"with its digest", "hello", []string{"Content-Digest", sha256Field(sha("hello"))}, "", "application/octet-stream"},
		{"with two digests", "hello", []string{"Content-Digest", sha512Field + ", " + sha256Field(sha("hello"))}, "", "application/octet-stream"},
		{"with another digest", "hello", []string{"Content-Digest", sha256Field(sha("hallo"))}, DigestMismatch, ""},
		{"with one of two right", "hello", []string{"Content-Digest", sha512Field + "," + sha256Field(sha("hallo"))}, DigestMismatch, ""},
		{"with digests on two lines", "hello", []string{"Content-Digest", "md5=:AAAA:", "Content-Digest", sha256Field(sha("hallo"))}, DigestMismatch, ""},
		{"with another long digest", "hallo", []string{"Content-Digest", sha512Field}, DigestMismatch, ""},
		{"with a digest of the representation", "hello", []string{"Repr-Digest", sha256Field(sha("hello"))}, "", "application/octet-stream"},
		{"with another of the representation", "hello", []string{"Repr-Digest", sha256Field(sha("hallo"))}, DigestMismatch, ""},
		{"with another long one of it", "hallo", []string{"Repr-Digest", sha512Field}, DigestMismatch, ""},
		{"with an unknown digest", "hello", []string{"Content-Digest", "md5=:AAAA:"}, "", "application/octet-stream"},
		{"with a malformed digest", "hello", []string{"Content-Digest", "sha-256=abc"}, InvalidRequest, ""},
		{"with a short digest", "hello", []string{"Content-Digest", "sha-256=:AAAA:"}, InvalidRequest, ""},
		{"a form", form, []string{"Content-Type", multipartType}, "", "image/png"},
		{"a form, chunked", form, []string{"Content-Type", multipartType, "Content-Length", "-1"}, "", "image/png"},
		{"a form with its digest", form, []string{"Content-Type", multipartType, "Content-Digest", sha256Field(sha(form)), "Repr-Digest", sha256Field(sha("hello"))}, "", "image/png"},
		{"a form with another digest", form, []string{"Content-Type", multipartType, "Content-Digest", sha256Field(sha("hello"))}, DigestMismatch, ""},
		{"a form of another name", multipartBody("other", "", "hello"), []string{"Content-Type", multipartType}, InvalidRequest, ""},
		{"a form of two parts", strings.TrimSuffix(form, "--\r\n") + "\r\nContent-Disposition: form-data; name=\"file\"\r\n\r\nmore\r\n--limit--\r\n", []string{"Content-Type", multipartType}, InvalidRequest, ""},
		{"a form without its end", strings.TrimSuffix(form, "--limit--\r\n"), []string{"Content-Type", multipartType}, InvalidRequest, ""},
		{"a form without parts", "--limit--\r\n", []string{"Content-Type", multipartType}, InvalidRequest, ""},
		{"no form", "hello", []string{"Content-Type", multipartType}, InvalidRequest, ""},
		{"a form without boundary", form, []string{"Content-Type", "multipart/form-data"}, InvalidRequest, ""},
		{"a form of a type that isn't taken", multipartBody("file", "Content-Type: video/mp4\r\n", "hello"), []string{"Content-Type", multipartType}, AttachmentTypeRefused, ""},
		{"another multipart", form, []string{"Content-Type", "multipart/mixed; boundary=limit"}, AttachmentTypeRefused, ""},
		{"at the limit", string(pattern(100_000)), nil, "", "application/octet-stream"},
		{"above the limit", string(pattern(100_001)), nil, RequestTooLarge, ""},
		{"above the limit, chunked", string(pattern(100_001)), []string{"Content-Length", "-1"}, RequestTooLarge, ""},
		{"a form with too much before its file", strings.Repeat("x\r\n", 60_000) + form, []string{"Content-Type", multipartType, "Content-Length", "-1"}, RequestTooLarge, ""},
		{"a form above the limit", multipartBody("file", "", string(pattern(100_001))), []string{"Content-Type", multipartType}, RequestTooLarge, ""},
		{"if free", "hello", []string{"If-None-Match", "*"}, "", "application/octet-stream"},
		{"if it is what isn't there", "hello", []string{"If-Match", "*"}, PreconditionFailed, ""},
	} {
		n++
		id := fmt.Sprintf("up-%d", n)
		a := e.send(t, http.MethodPut, "/attachments/"+id, ana, io.Reader(strings.NewReader(x.body)), x.headers...)
		if x.code != "" {
			if a.status != x.code.Wire().Status {
				t.Errorf("%s: %d %s, want %s", x.name, a.status, a.body, x.code)
				continue
			}
			a.problem(t, x.code)
			e.get(t, "/attachments/"+id, ana).problem(t, NotFound)
			continue
		}
		good++
		if a.status != 201 {
			t.Errorf("%s: %d %s", x.name, a.status, a.body)
			continue
		}
		want := x.body
		if strings.HasPrefix(x.name, "a form") {
			want = "hello"
		}
		u := a.created(t)
		if u.ContentType != x.kind || u.SHA256 != hexText(sha(want)) || u.Size != int64(len(want)) {
			t.Errorf("%s: %+v", x.name, u)
		}
		e.get(t, "/attachments/"+id, ana).bytesAre(t, 200, want)
		e.send(t, http.MethodPut, "/attachments/"+id, ana, strings.NewReader(x.body), x.headers...) // again, in the same form
	}
	e.tidy(t, good)
}

// TestAttachmentReplaced: bytes are never changed, unless the configuration says so and the client names what it replaces.
func TestAttachmentReplaced(t *testing.T) {
	t.Parallel()
	for _, replace := range []bool{false, true} {
		t.Run(fmt.Sprint(replace), func(t *testing.T) {
			t.Parallel()
			e := newBytesEnv(t, "", setup{options: func(o *Options) { o.AttachmentReplace = replace }})
			ana, ben := editor(t, "ana"), editor(t, "ben")
			e.name(t, "ana", "a")
			e.put(t, "a", ana, "old").created(t)
			if p := e.put(t, "a", ana, "new").problem(t, AttachmentExists); !strings.Contains(p.Detail, hexText(sha("old"))) {
				t.Errorf("who may read is told %q", p.Detail)
			}
			e.put(t, "a", ana, "new", "If-None-Match", "*").problem(t, PreconditionFailed)
			if p := e.put(t, "a", ben, "new", "If-Match", etag(sha("old"))).problem(t, AttachmentExists); p.Detail != "" {
				t.Errorf("ben is told %q", p.Detail)
			}
			if !replace {
				e.put(t, "a", ana, "new", "If-Match", etag(sha("old"))).problem(t, AttachmentExists)
				e.get(t, "/attachments/a", ana).bytesAre(t, 200, "old")
				e.tidy(t, 1)
				return
			}
			e.put(t, "a", ana, "new", "If-Match", etag(sha("other"))).problem(t, PreconditionFailed)
			link := e.link(t, "a", ana)
			e.send(t, http.MethodGet, link, "", nil).bytesAre(t, 200, "old")
			u := e.put(t, "a", ana, "newer", "If-Match", etag(sha("old"))).uploaded(t, 200)
			if u.SHA256 != hexText(sha("newer")) || u.Version == nil {
				t.Errorf("answered %+v", u)
			}
			e.get(t, "/attachments/a", ana).bytesAre(t, 200, "newer")
			e.send(t, http.MethodGet, link, "", nil).problem(t, SignatureInvalid)
			if _, _, _, err := e.g.o.Files.Expire(t.Context(), e.g.o.Blobs); err != nil { // what care does now and then
				t.Error(err)
			}
			e.tidy(t, 1)
		})
	}
}

// TestAttachmentQuota has uploads race for the last bytes: as many are taken as fit, exactly.
func TestAttachmentQuota(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{options: func(o *Options) { o.Quota = 100 }})
	ana := editor(t, "ana")
	var wg sync.WaitGroup
	var mu sync.Mutex
	count := map[int]int{}
	for i := range 12 {
		wg.Go(func() {
			headers := []string{}
			if i%2 == 1 {
				headers = append(headers, "Content-Length", "-1")
			}
			a := e.put(t, fmt.Sprintf("q%d", i), ana, strings.Repeat("x", 20), headers...)
			mu.Lock()
			defer mu.Unlock()
			count[a.status]++
		})
	}
	wg.Wait()
	if count[201] > 5 || count[201] == 0 || count[201]+count[507] != 12 {
		t.Fatalf("answered %v", count)
	}
	for i := 0; count[201] < 5; i++ { // one that came second to a reservation that was given up
		if a := e.put(t, fmt.Sprintf("r%d", i), ana, strings.Repeat("x", 20)); a.status == 201 {
			count[201]++
		} else {
			t.Fatalf("%d %s with %v", a.status, a.body, count)
		}
	}
	p := e.put(t, "one-more", ana, "x").problem(t, QuotaExceeded)
	if !strings.Contains(p.Detail, "have 100 bytes") {
		t.Errorf("told %q", p.Detail)
	}
	e.put(t, "one-more", ana, "x", "Content-Length", "-1").problem(t, QuotaExceeded)
	e.put(t, "one-more", ana, "").created(t)
	e.put(t, "of-ben", editor(t, "ben"), "x").created(t)
	e.tidy(t, 7)
}

// TestAttachmentRace: of several uploads to one id one is first, and its bytes are what everybody reads.
func TestAttachmentRace(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{})
	ana := editor(t, "ana")
	var wg sync.WaitGroup
	var mu sync.Mutex
	got := map[string]int{}
	for i := range 8 {
		wg.Go(func() {
			content := fmt.Sprint("content ", i%2)
			a := e.put(t, "a", ana, content)
			mu.Lock()
			defer mu.Unlock()
			if got[fmt.Sprint(a.status)]++; a.status == 201 {
				got["first"] = i%2 + 1
			}
		})
	}
	wg.Wait()
	if got["201"] != 1 || got["200"] != 3 || got["409"] != 4 {
		t.Fatalf("answered %v", got)
	}
	e.get(t, "/attachments/a", ana).bytesAre(t, 200, fmt.Sprint("content ", got["first"]-1))
	e.tidy(t, 1)
}

// TestStoreFull: a full disk is told as what it is, and nobody is sent back to it at once.
func TestStoreFull(t *testing.T) {
	t.Parallel()
	g := &Gateway{}
	full, away := asProblem(g.storeProblem(fmt.Errorf("write x: %w", &os.PathError{Op: "write", Path: "x", Err: syscall.ENOSPC}))), asProblem(g.storeProblem(errors.New("no answer")))
	if full.Code != StoreUnavailable || full.Detail != "the blob store is full" || full.RetryAfter <= away.RetryAfter {
		t.Errorf("full %+v, away %+v", full, away)
	}
}

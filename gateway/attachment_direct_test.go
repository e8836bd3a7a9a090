package gateway

import (
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"
)

// TestAttachmentDirect sends bytes to a stand-in of S3 by signed URLs. They are trusted only once they were looked at, under a
// key that no URL names.
func TestAttachmentDirect(t *testing.T) { // not parallel: the SDK finds credentials in the environment
	for name, value := range map[string]string{"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true",
		"AWS_CONFIG_FILE": os.DevNull, "AWS_SHARED_CREDENTIALS_FILE": os.DevNull} {
		t.Setenv(name, value)
	}
	log.SetOutput(io.Discard) // the SDK logs what this test provokes
	memory := s3mem.New()
	ok(t, memory.CreateBucket("files"))
	bucket := httptest.NewServer(gofakes3.New(memory).Server())
	t.Cleanup(bucket.Close)
	t.Cleanup(http.DefaultClient.CloseIdleConnections)
	e := newBytesEnv(t, "s3://files?region=us-east-1&use_path_style=true&endpoint="+bucket.URL, setup{options: func(o *Options) { o.AttachmentDirect, o.Quota, o.AttachmentLimit = true, 1000, 900 }})
	ana, ben := editor(t, "ana"), editor(t, "ben")
	type link struct {
		ID      string `json:"upload_id"`
		URL     string
		Headers map[string]string
	}
	ask := func(id, token, content string) (l link) {
		a := e.post(t, "/attachments/"+id+"/upload-url", token, fmt.Sprintf(`{"size":%d,"content_type":"image/png","sha256":%q}`, len(content), hexText(sha(content))))
		if a.status != 200 || json.Unmarshal(a.body, &l) != nil || !strings.HasPrefix(l.URL, bucket.URL) {
			t.Fatalf("%s: %d %s", id, a.status, a.body)
		}
		return l
	}
	write := func(l link, content string) int {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, l.URL, strings.NewReader(content))
		ok(t, err)
		for name, value := range l.Headers {
			req.Header.Set(name, value)
		}
		res, err := http.DefaultClient.Do(req)
		ok(t, err)
		defer res.Body.Close()
		_, err = io.Copy(io.Discard, res.Body)
		ok(t, err)
		return res.StatusCode
	}
	complete := func(id, token string, l link) *answer {
		return e.post(t, "/attachments/"+id+"/upload-complete", token, fmt.Sprintf(`{"upload_id":%q}`, l.ID))
	}
	l := ask("a", ana, "hello")
	complete("a", ana, l).problem(t, InvalidRequest) // nothing is there yet
	e.get(t, "/attachments/a", ana).problem(t, NotFound)
	if status := write(l, "hello"); status != 200 {
		t.Fatalf("the bucket says %d", status)
	}
	e.get(t, "/attachments/a", ana).problem(t, NotFound)
	complete("a", ben, l).problem(t, UploadGone)
	complete("b", ana, l).problem(t, UploadGone)
	if u := complete("a", ana, l).created(t); u.SHA256 != hexText(sha("hello")) || u.ContentType != "image/png" || u.Version == nil {
		t.Errorf("answered %+v", u)
	}
	complete("a", ana, l).problem(t, UploadGone)
	e.get(t, "/attachments/a", ana).bytesAre(t, 200, "hello")
	if key := e.one(t, `SELECT storage_key FROM walgate.files WHERE attachment_id = 'a'`); strings.Contains(l.URL, key) {
		t.Errorf("the file is at %s, which %s reaches", key, l.URL)
	}
	write(l, "hallo") // the URL is still good, for nobody
	e.get(t, "/attachments/a", ana).bytesAre(t, 200, "hello")
	e.exec(t, `UPDATE walgate.files SET unreferenced_since = now() - interval '1 day'`)
	if a := e.post(t, "/attachments/a/upload-url", ana, fmt.Sprintf(`{"size":5,"sha256":%q}`, hexText(sha("hello")))); a.status != 200 || !strings.Contains(string(a.body), `"status":"success"`) {
		t.Errorf("the same again: %d %s", a.status, a.body)
	}
	if old := e.one(t, `SELECT count(unreferenced_since)::text FROM walgate.files`); old != "0" {
		t.Error("what was to be sent again is swept by its old age")
	}
	for name, content := range map[string]string{"longer": "hello!", "shorter": "hell", "other": "hallo"} {
		l := ask(name, ana, "hello")
		write(l, content)
		complete(name, ana, l).problem(t, DigestMismatch)
		e.get(t, "/attachments/"+name, ana).problem(t, NotFound)
	}
	lost := ask("lost", ana, "hello") // its caller loses the right meanwhile
	write(lost, "hello")
	e.exec(t, `INSERT INTO photos (owner, file) VALUES ('ben', 'lost')`)
	e.sync(t)
	complete("lost", ana, lost).problem(t, AttachmentExists)
	var short link // without a digest
	ok(t, json.Unmarshal(e.post(t, "/attachments/short/upload-url", ana, `{"size":5}`).body, &short))
	write(short, "hell")
	complete("short", ana, short).problem(t, DigestMismatch)
	for body, code := range map[string]Code{`{}`: InvalidRequest, `{"size":-1}`: InvalidRequest, `{"size":1,"sha256":"x"}`: InvalidRequest, `{"size":901}`: RequestTooLarge, `nonsense`: InvalidRequest, `{"size":1,"content_type":"x"}`: AttachmentTypeRefused} {
		e.post(t, "/attachments/x/upload-url", ana, body).problem(t, code)
	}
	e.post(t, "/attachments/x/upload-url", reader(t, "ana"), `{"size":1}`).problem(t, Forbidden)
	e.post(t, "/attachments/a/upload-url", ben, `{"size":1}`).problem(t, AttachmentExists)
	e.post(t, "/attachments/a/upload-url", ben, fmt.Sprintf(`{"size":5,"sha256":%q}`, hexText(sha("hello")))).problem(t, AttachmentExists)
	ask("first", ana, strings.Repeat("x", 900))
	e.post(t, "/attachments/second/upload-url", ana, `{"size":100}`).problem(t, QuotaExceeded)
	a := e.get(t, "/attachments/a/download-url", ana)
	ok(t, json.Unmarshal(a.body, &l))
	res, err := http.DefaultClient.Get(l.URL)
	ok(t, err)
	defer res.Body.Close()
	if text, err := io.ReadAll(res.Body); err != nil || string(text) != "hello" || !strings.HasPrefix(l.URL, bucket.URL) {
		t.Errorf("%s: %q, %v", l.URL, text, err)
	}
}

// TestAttachmentDirectUnavailable: a store that can't sign keeps nothing of the attempt.
func TestAttachmentDirectUnavailable(t *testing.T) {
	t.Parallel()
	for _, direct := range []bool{false, true} {
		e := newBytesEnv(t, "", setup{options: func(o *Options) { o.AttachmentDirect = direct }})
		e.post(t, "/attachments/a/upload-url", editor(t, "ana"), `{"size":1}`).problem(t, DirectUnavailable)
		e.tidy(t, 0)
		e.put(t, "a", editor(t, "ana"), "x").created(t)
		e.link(t, "a", editor(t, "ana"))
	}
}

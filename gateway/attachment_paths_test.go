package gateway

import (
	"bufio"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"
)

// raw sends a request as it is written, and returns its answer.
func (e *env) raw(t testing.TB, method, target, token, rest string) *answer {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(e.base, "http://"))
	ok(t, err)
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n%s", method, target, token, rest)
	res, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: method})
	ok(t, err)
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	ok(t, err)
	return &answer{res.StatusCode, res.Header, body}
}

// TestAttachmentPaths: what isn't an id is refused at every door, however it is written.
func TestAttachmentPaths(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "file://"+t.TempDir(), setup{})
	ana := editor(t, "ana")
	for _, id := range []string{"..", ".", "...", "a..b", "a%2fb", "a%2Fb", "%2e%2e", "%2e%2e%2fetc", "..%2f..%2fetc%2fpasswd", "%252e%252e%252f", "a%5cb", `a\b`, `..\..\x`, "a%00b", "%00", "a%20b", "a+b",
		"a%c3%a9", "a\xc3\xa9", "a:b", "a;b", "a&b", "a=b", "~", "a%", "a%zz", "%41", strings.Repeat("a", 256), strings.Repeat("a", 4000), "C:%5Cx", "a%0d%0ab", "/", "//etc/passwd", "../x", "x/../y", "x/y"} {
		for _, door := range []struct{ method, tail, body string }{
			{"GET", "", ""}, {"HEAD", "", ""}, {"DELETE", "", ""}, {"PUT", "", "x"}, {"GET", "/download-url", ""}, {"POST", "/upload-url", `{"size":1}`},
			{"POST", "/upload-complete", `{"upload_id":"x"}`}, {"GET", "?expires=99999999999&signature=x", ""},
		} {
			a := e.raw(t, door.method, "/attachments/"+id+door.tail, ana, fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(door.body), door.body))
			if a.status != 400 && a.status != 404 && a.status != 405 {
				t.Errorf("%s %q%s: %d %s", door.method, id, door.tail, a.status, a.body)
			}
		}
	}
	for _, path := range []string{"/Attachments/a", "/ATTACHMENTS/a", "/METRICS"} { // other addresses: what stands before it may hide one by its name
		if a := e.raw(t, "GET", path, ana, "\r\n"); a.status != 404 || !strings.Contains(string(a.body), "There is nothing at this address") {
			t.Errorf("%s: %d %.200s", path, a.status, a.body)
		}
		e.raw(t, "PUT", path, ana, "Content-Length: 1\r\n\r\nx").problem(t, NotFound)
	}
	e.tidy(t, 0)
	for _, id := range []string{"a", strings.Repeat("a", 255), "-", "_", ".a", "a.", "a.b.c", "Manifest", "manifest", "download-url", "upload-url"} {
		e.put(t, id, ana, id).created(t)
		e.get(t, "/attachments/"+id, ana).bytesAre(t, 200, id)
	}
	e.tidy(t, 11)
}

// TestAttachmentTypes: what a browser might run is a download, and no type is guessed.
func TestAttachmentTypes(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{})
	ana := editor(t, "ana")
	const page = "<!doctype html><script>alert(1)</script>"
	for i, x := range []struct{ sent, kind, disposition string }{
		{"text/html", "text/html", "attachment"}, {"TEXT/HTML; charset=utf-8", "text/html; charset=utf-8", "attachment"},
		{"image/svg+xml", "image/svg+xml", "attachment"}, {"application/xhtml+xml", "application/xhtml+xml", "attachment"}, {"text/xml", "text/xml", "attachment"},
		{"application/pdf", "application/pdf", "attachment"}, {"text/javascript", "text/javascript", "attachment"}, {"", octetStream, "attachment"},
		{"image/png", "image/png", "inline"}, {"text/plain; charset=utf-8", "text/plain; charset=utf-8", "inline"}, {"application/x-unknown", "application/x-unknown", "attachment"},
	} {
		id := fmt.Sprint("t", i)
		headers := []string{}
		if x.sent != "" {
			headers = append(headers, "Content-Type", x.sent)
		}
		e.put(t, id, ana, page, headers...).created(t)
		for _, h := range [][]string{{}, {"Range", "bytes=0-3"}} {
			a := e.get(t, "/attachments/"+id, ana, h...)
			if a.header.Get("Content-Type") != x.kind || a.header.Get("Content-Disposition") != x.disposition+"; filename="+id || a.header.Get("X-Content-Type-Options") != "nosniff" ||
				!strings.Contains(a.header.Get("Content-Security-Policy"), "sandbox") {
				t.Errorf("%q: %v", x.sent, a.header)
			}
		}
	}
	for name, want := range map[string]string{"plain.png": "plain.png", `..\..\x.png`: "x.png", "/etc/passwd": "passwd", "a\r\nSet-Cookie: x=1": "aSet-Cookie: x=1", "..": "", "": "",
		"ünï.png": "ünï.png", "\u202egnp.exe": "gnp.exe", strings.Repeat("é", 200): strings.Repeat("é", 127)} {
		if got := cleanFilename(name); got != want {
			t.Errorf("%q became %q, want %q", name, got, want)
		}
	}
	e.send(t, http.MethodPut, "/attachments/named", ana, strings.NewReader(strings.Replace(multipartBody("file", "Content-Type: image/png\r\n", "x"), "a b.jpg", "ünï \\\"x\\\".png", 1)), "Content-Type", multipartType).created(t)
	if got := e.get(t, "/attachments/named", ana).header.Get("Content-Disposition"); !strings.HasPrefix(got, "inline; filename*=utf-8''%C3%BCn%C3%AF") || strings.Contains(got, "\n") {
		t.Errorf("disposition %q", got)
	}
}

// link asks for a signed URL and returns its path.
func (e *env) link(t testing.TB, id, token string) string {
	t.Helper()
	a := e.get(t, "/attachments/"+id+"/download-url", token)
	var link struct {
		URL     string    `json:"url"`
		Expires time.Time `json:"expires_at"`
	}
	if a.status != 200 || json.Unmarshal(a.body, &link) != nil || !strings.HasPrefix(link.URL, "https://sync.example/attachments/"+id+"?") || time.Until(link.Expires) < time.Minute {
		t.Fatalf("no link: %d %s", a.status, a.body)
	}
	return strings.TrimPrefix(link.URL, "https://sync.example")
}

// TestAttachmentLinks: a signed URL is good for one attachment's present bytes, for its time, and for reading.
func TestAttachmentLinks(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{})
	ana := editor(t, "ana")
	e.put(t, "a.jpg", ana, "hello").created(t)
	e.put(t, "b.jpg", ana, "other").created(t)
	link := e.link(t, "a.jpg", ana)
	e.send(t, http.MethodGet, link, "", nil).bytesAre(t, 200, "hello")
	e.send(t, http.MethodGet, link, "", nil, "Range", "bytes=1-2").bytesAre(t, 206, "el")
	e.send(t, http.MethodGet, link, "nonsense", nil).bytesAre(t, 200, "hello") // the signature counts
	e.send(t, http.MethodGet, link, "", nil, "Host", "evil.example").bytesAre(t, 200, "hello")
	if a := e.send(t, http.MethodHead, link, "", nil); a.status != 200 || a.header.Get("Content-Length") != "5" {
		t.Errorf("HEAD: %d", a.status)
	}
	for _, method := range []string{http.MethodPut, http.MethodDelete} {
		e.send(t, method, link, "", strings.NewReader("")).problem(t, InvalidToken)
	}
	u, err := url.Parse(link)
	ok(t, err)
	q := u.Query()
	expires, err := strconv.ParseInt(q.Get("expires"), 10, 64)
	ok(t, err)
	signature := q.Get("signature")
	for name, target := range map[string]string{
		"another id":   "/attachments/b.jpg?" + u.RawQuery,
		"an unknown":   "/attachments/c.jpg?" + u.RawQuery,
		"another time": fmt.Sprintf("/attachments/a.jpg?expires=%d&signature=%s", expires+1, signature),
		"tampered":     fmt.Sprintf("/attachments/a.jpg?expires=%d&signature=%s", expires, "A"+signature[1:]+"A"),
		"cut":          fmt.Sprintf("/attachments/a.jpg?expires=%d&signature=%s", expires, signature[:10]),
		"empty":        "/attachments/a.jpg?signature=",
		"no time":      "/attachments/a.jpg?signature=" + signature,
		"escaped":      "/attachments/a.jpg?expires=" + q.Get("expires") + "&signature=" + url.QueryEscape(signature+"="),
	} {
		a := e.send(t, http.MethodGet, target, "", nil)
		if a.status != 403 {
			t.Errorf("%s: %d %s", name, a.status, a.body)
			continue
		}
		a.problem(t, SignatureInvalid)
	}
	old := strings.TrimPrefix(e.g.downloadURL("a.jpg", sha("hello"), time.Now().Add(-time.Second)), "https://sync.example")
	e.send(t, http.MethodGet, old, "", nil).problem(t, SignatureExpired)
	e.send(t, http.MethodGet, link+"&x=1", "", nil).problem(t, InvalidRequest)
	e.get(t, "/attachments/a.jpg/download-url", editor(t, "ben")).problem(t, NotFound)
	e.remove(t, "a.jpg", ana)
	e.send(t, http.MethodGet, link, "", nil).problem(t, AttachmentDeleted)
	e.put(t, "a.jpg", ana, "anew").created(t)
	e.send(t, http.MethodGet, link, "", nil).problem(t, SignatureInvalid)
}

// TestAttachmentList: order, pages, filters and count.
func TestAttachmentList(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{})
	ana := editor(t, "ana")
	for id, content := range map[string]string{"a1": "xxx", "a2": "x", "b1": "xx"} {
		e.put(t, id, ana, content, "Content-Type", map[byte]string{'a': "image/png", 'b': "text/plain"}[id[0]]).created(t)
	}
	e.put(t, "c1", editor(t, "ben"), "x").created(t)
	e.put(t, "a0", ana, "x").created(t)
	e.remove(t, "a0", ana)
	ids := func(params string) string {
		var got []string
		for after := ""; ; {
			a := e.get(t, "/attachments?limit=2&"+params+"&after="+after, ana)
			var list struct {
				Attachments []listedAttachment
				Next        string
			}
			if a.status != 200 || json.Unmarshal(a.body, &list) != nil || list.Attachments == nil {
				t.Fatalf("%s: %d %s", params, a.status, a.body)
			}
			for _, x := range list.Attachments {
				got = append(got, x.AttachmentID)
			}
			if after = list.Next; after == "" {
				return strings.Join(got, " ")
			}
		}
	}
	for params, want := range map[string]string{"order=id": "a1 a2 b1", "order=-id": "b1 a2 a1", "order=size": "a2 b1 a1", "order=-size": "a1 b1 a2", "prefix=a&order=id": "a1 a2",
		"content_type=text/": "b1", "prefix=zzz": ""} {
		if got := ids(params); got != want {
			t.Errorf("%s: %q, want %q", params, got, want)
		}
	}
	if forward, back := strings.Fields(ids("order=date")), strings.Fields(ids("order=-date")); len(forward) != 3 || len(back) != 3 || forward[0] != back[2] {
		t.Errorf("by date %v and %v", forward, back)
	}
	if a := e.get(t, "/attachments?count=only", ana); !strings.Contains(string(a.body), `"count":3`) {
		t.Errorf("count: %s", a.body)
	}
	for params, code := range map[string]Code{"order=name": InvalidRequest, "limit=0": InvalidLimit, "limit=1001": InvalidLimit, "limit=x": InvalidLimit, "count=yes": InvalidRequest, "after=x": InvalidRequest, "sort=id": InvalidRequest,
		"prefix=%00": InvalidRequest, "prefix=%ff": InvalidRequest, "content_type=%00": InvalidRequest, "count=only&prefix=%00": InvalidRequest} {
		e.get(t, "/attachments?"+params, ana).problem(t, code)
	}
	for _, place := range []string{`{"o":"date","v":"yes","i":"a1"}`, `{"o":"date","v":"99999999-01-01","i":"a1"}`, `{"o":"size","v":"yes","i":"a1"}`, `{"o":"size","v":"9223372036854775808","i":"a1"}`,
		`{"o":"id","v":"\u0000","i":"a1"}`, `{"o":"id","v":"a1","i":"\u0000"}`} { // forged
		e.get(t, "/attachments?order="+strings.Split(place, `"`)[3]+"&after="+base64.RawURLEncoding.EncodeToString([]byte(place)), ana).problem(t, InvalidRequest)
	}
}

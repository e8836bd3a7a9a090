package gateway

import (
	"net/http"
	"testing"
	"time"
)

// TestAttachmentRanges asks for pieces of ten bytes, of one and of none.
func TestAttachmentRanges(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{})
	ana := editor(t, "ana")
	for id, content := range map[string]string{"ten": "0123456789", "one": "x", "none": ""} {
		e.put(t, id, ana, content).created(t)
	}
	tag, modified := etag(sha("0123456789")), e.get(t, "/attachments/ten", ana).header.Get("Last-Modified")
	later := time.Now().Add(time.Hour).UTC().Format(http.TimeFormat)
	for _, x := range []struct {
		id, set, ifRange string
		status           int
		body, content    string
	}{
		{"ten", "bytes=0-0", "", 206, "0", "bytes 0-0/10"},
		{"ten", "bytes=0-9", "", 206, "0123456789", "bytes 0-9/10"},
		{"ten", "bytes=2-4", "", 206, "234", "bytes 2-4/10"},
		{"ten", "bytes=9-9", "", 206, "9", "bytes 9-9/10"},
		{"ten", "bytes=8-", "", 206, "89", "bytes 8-9/10"},
		{"ten", "bytes=0-", "", 206, "0123456789", "bytes 0-9/10"},
		{"ten", "bytes=8-99999999999999999999999", "", 206, "89", "bytes 8-9/10"},
		{"ten", "bytes=-3", "", 206, "789", "bytes 7-9/10"},
		{"ten", "bytes=-10", "", 206, "0123456789", "bytes 0-9/10"},
		{"ten", "bytes=-11", "", 206, "0123456789", "bytes 0-9/10"},
		{"ten", "BYTES = 2-4", "", 206, "234", "bytes 2-4/10"},
		{"ten", "bytes=-0", "", 416, "", "bytes */10"},
		{"ten", "bytes=10-", "", 416, "", "bytes */10"},
		{"ten", "bytes=10-10", "", 416, "", "bytes */10"},
		{"ten", "bytes=99999999999999999999999-", "", 416, "", "bytes */10"},
		{"ten", "bytes=4-2", "", 416, "", "bytes */10"},
		{"ten", "bytes=0-1,3-4", "", 416, "", "bytes */10"},
		{"ten", "bytes=-", "", 416, "", "bytes */10"},
		{"ten", "bytes=", "", 416, "", "bytes */10"},
		{"ten", "bytes=x-y", "", 416, "", "bytes */10"},
		{"ten", "bytes=--1", "", 416, "", "bytes */10"},
		{"ten", "bytes=+1-2", "", 416, "", "bytes */10"},
		{"ten", "lines=1-2", "", 200, "0123456789", ""},
		{"ten", "bytes 0-1", "", 200, "0123456789", ""},
		{"ten", "bytes=2-4", tag, 206, "234", "bytes 2-4/10"},
		{"ten", "bytes=2-4", `"other"`, 200, "0123456789", ""},
		{"ten", "bytes=2-4", "W/" + tag, 200, "0123456789", ""},
		{"ten", "bytes=2-4", modified, 206, "234", "bytes 2-4/10"},
		{"ten", "bytes=2-4", later, 200, "0123456789", ""},
		{"ten", "bytes=20-", `"other"`, 200, "0123456789", ""},
		{"one", "bytes=0-0", "", 206, "x", "bytes 0-0/1"},
		{"one", "bytes=-1", "", 206, "x", "bytes 0-0/1"},
		{"one", "bytes=1-", "", 416, "", "bytes */1"},
		{"none", "", "", 200, "", ""},
		{"none", "bytes=0-", "", 416, "", "bytes */0"},
		{"none", "bytes=0-0", "", 416, "", "bytes */0"},
		{"none", "bytes=-1", "", 416, "", "bytes */0"},
	} {
		headers := []string{}
		if x.set != "" {
			headers = append(headers, "Range", x.set)
		}
		if x.ifRange != "" {
			headers = append(headers, "If-Range", x.ifRange)
		}
		a := e.get(t, "/attachments/"+x.id, ana, headers...)
		if a.status != x.status || a.header.Get("Content-Range") != x.content || x.status != 416 && string(a.body) != x.body {
			t.Errorf("%s %q if %q: %d %q %q, want %d %q %q", x.id, x.set, x.ifRange, a.status, a.body, a.header.Get("Content-Range"), x.status, x.body, x.content)
		}
		if x.status == 416 {
			a.problem(t, RangeNotSatisfiable)
		}
		if h := e.do(t, http.MethodHead, "/attachments/"+x.id, ana, headers...); h.status != 200 || len(h.body) != 0 || h.header.Get("Content-Length") == "" {
			t.Errorf("HEAD of %s with %q: %d %v", x.id, x.set, h.status, h.header)
		}
	}
}

// TestAttachmentConditions asks with conditions, alone and together.
func TestAttachmentConditions(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{})
	ana := editor(t, "ana")
	e.put(t, "a", ana, "hello").created(t)
	tag, modified := etag(sha("hello")), e.get(t, "/attachments/a", ana).header.Get("Last-Modified")
	before := time.Now().Add(-time.Hour).UTC().Format(http.TimeFormat)
	for _, x := range []struct {
		status  int
		headers []string
	}{
		{304, []string{"If-None-Match", tag}}, {304, []string{"If-None-Match", "W/" + tag}}, {304, []string{"If-None-Match", `"x", ` + tag}}, {304, []string{"If-None-Match", "*"}},
		{200, []string{"If-None-Match", `"x"`}}, {200, []string{"If-None-Match", tag[1 : len(tag)-1]}},
		{200, []string{"If-Match", tag}}, {200, []string{"If-Match", "*"}}, {412, []string{"If-Match", `"x"`}}, {412, []string{"If-Match", "W/" + tag}},
		{304, []string{"If-Modified-Since", modified}}, {200, []string{"If-Modified-Since", before}}, {200, []string{"If-Modified-Since", "yesterday"}},
		{200, []string{"If-Unmodified-Since", modified}}, {412, []string{"If-Unmodified-Since", before}},
		{200, []string{"If-None-Match", `"x"`, "If-Modified-Since", modified}}, {200, []string{"If-Match", tag, "If-Unmodified-Since", before}},
		{412, []string{"If-Match", `"x"`, "If-None-Match", tag}}, {304, []string{"If-Match", tag, "If-None-Match", tag}},
		{304, []string{"If-None-Match", tag, "Range", "bytes=0-0"}}, {412, []string{"If-Match", `"x"`, "Range", "bytes=90-"}},
	} {
		for _, method := range []string{http.MethodGet, http.MethodHead} {
			a := e.do(t, method, "/attachments/a", ana, x.headers...)
			if a.status != x.status || a.status == 304 && len(a.body) != 0 || a.header.Get("ETag") != tag {
				t.Errorf("%s with %q: %d %q %v, want %d", method, x.headers, a.status, a.body, a.header, x.status)
			}
		}
	}
	if a := e.get(t, "/attachments/b", ana, "If-None-Match", "*", "Range", "bytes=0-0"); a.status != 404 {
		t.Errorf("conditions told of what isn't there: %d", a.status)
	}
}

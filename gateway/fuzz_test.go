package gateway

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/gofiber/fiber/v2"
	"github.com/valyala/fasthttp"

	"github.com/walgate/walgate/changelog"
)

// FuzzFrame: any bytes as a client's frame give a frame or a problem that doesn't repeat them.
func FuzzFrame(f *testing.F) {
	for _, seed := range []string{`{"type":"subscribe","since":0}`, `{"type":"subscribe","since":"20260502T150000.000Z-0005-a1b2-00ff00ff","collections":["todos"],"batch":true}`,
		`{"type":"auth","token":"x.y.z"}`, `{"type":"subscribe","since":1e9}`, `{"type":"subscribe","since":{}}`, `{}`, `[]`, `null`, ``, "\xff", `{"type":"subscribe","since":"\u0030"}`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		frame, err := decodeFrame(data)
		if err != nil {
			onlyProblem(t, err, InvalidFrame)
			return
		}
		if frame.Type != "subscribe" && frame.Type != "auth" {
			t.Errorf("type %q", frame.Type)
		}
		since, err := parseSince(frame.Since)
		if err != nil {
			onlyProblem(t, err, InvalidSince)
			return
		}
		if since.Version < 0 {
			t.Errorf("since %d", since.Version)
		}
	})
}

// onlyProblem expects an error that clients may see, as valid JSON.
func onlyProblem(t *testing.T, err error, codes ...Code) {
	t.Helper()
	var p *Problem
	if !errors.As(err, &p) || !slices.Contains(codes, p.Code) {
		t.Fatalf("%v", err)
	}
	if frame := p.frame("id"); !json.Valid(frame) || !utf8.Valid(frame) {
		t.Errorf("the problem is no JSON: %q", frame)
	}
}

// FuzzPull: any query string gives a request within its bounds or a problem.
func FuzzPull(f *testing.F) {
	for _, seed := range []string{"since=0", "since=20260502T150000.000Z-0005-a1b2&limit=1000&wait=25&collections=todos,notes", "since=0&until=1", "since=0&limit=1e3",
		"since=0&wait=1h", "since=0&wait=-0", "since=0&wait=NaN", "&&&", "%", "since=%00", "since=0&since=1", "since=0&wait=25.0000001s", "since=0&wait=9999999999999999h", "since=0;limit=3"} {
		f.Add(seed)
	}
	app := fiber.New()
	f.Fuzz(func(t *testing.T, raw string) {
		c := app.AcquireCtx(&fasthttp.RequestCtx{})
		defer app.ReleaseCtx(c)
		c.Context().QueryArgs().Parse(raw)
		r, err := parsePull(c)
		if err != nil {
			onlyProblem(t, err, InvalidSince, InvalidLimit, InvalidRequest)
			return
		}
		if r.limit < 1 || r.limit > pullMost || r.wait < 0 || r.wait > 25*time.Second || r.since.Version < 0 {
			t.Errorf("%+v", r)
		}
		if r.until != 0 && r.until < r.since.Version {
			t.Errorf("until %d is before since %d", r.until, r.since.Version)
		}
		for _, name := range r.collections {
			if name == "" || strings.Contains(name, ",") {
				t.Errorf("collection %q", name)
			}
		}
	})
}

// FuzzFullCursor: any text is a cursor within its bounds, or a problem; a cursor survives its text form.
func FuzzFullCursor(f *testing.F) {
	f.Add((&fullCursor{Last: 7, History: "a1b2", Floors: nil, Collections: nil}).String())
	f.Add((&fullCursor{Last: 7, History: "a1b2", Collections: []string{"a", "b"}, Floors: make([]changelog.Version, 2), Index: 1, Key: []string{"1", "x"}, Merge: true, Tombstones: 3}).String())
	f.Add("e30")
	f.Add("")
	f.Add("bnVsbA")
	f.Fuzz(func(t *testing.T, text string) {
		c, err := parseFullCursor(text)
		if err != nil {
			onlyProblem(t, err, InvalidCursor)
			return
		}
		if len(c.Collections) == 0 || len(c.Collections) != len(c.Floors) || c.Index < 0 || c.Index > len(c.Collections) {
			t.Fatalf("%+v", c)
		}
		again, err := parseFullCursor(c.String())
		if err != nil || again.String() != c.String() {
			t.Errorf("%s comes back as %s, %v", c, again, err)
		}
	})
}

// FuzzUploadMetadata: any Upload-Metadata gives what it says, which reads back as the same, or a problem.
func FuzzUploadMetadata(f *testing.F) {
	for _, seed := range []string{"", "attachment_id YQ==", "attachment_id YQ==,filename Yi5qcGc=,is_private", "filetype aW1hZ2UvcG5n , client_id /w==", "a,a", ",", " ", "a  b", "filename ====", "filename YQ"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		m, err := parseUploadMetadata(text)
		if err != nil {
			onlyProblem(t, err, InvalidRequest)
			return
		}
		if again, err := parseUploadMetadata(m.String()); err != nil || again != m {
			t.Errorf("%q: %+v, then %+v (%v)", text, m, again, err)
		}
	})
}

// FuzzUploadChecksum: any Upload-Checksum gives a checksum of its algorithm's size, or a problem.
func FuzzUploadChecksum(f *testing.F) {
	for _, seed := range []string{"", "sha1 Kq5sNclPz7QV2+lfQIuc6R7oRu0=", "sha256 uU0nuZNNPgilLlLX2n2r+sSE7+N6U4DukIj3rOLvzek=", "md5 x", "sha1", "sha1  ", "SHA1 Kq5s"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		s, err := parseUploadChecksum(text)
		switch {
		case err != nil:
			onlyProblem(t, err, InvalidRequest)
		case s == nil && text != "", s != nil && len(s.want) != s.hash.Size():
			t.Errorf("%q: %+v", text, s)
		}
	})
}

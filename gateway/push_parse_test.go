package gateway

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
)

// TestPushBadRequests sends what is no push: each is a precise problem, and nothing is written.
func TestPushBadRequests(t *testing.T) {
	t.Parallel()
	e := newPushEnv(t, setup{options: func(o *Options) { o.PushBody = 64 << 10 }})
	ana := tokenFor(t, "ana", nil)
	change := `{"collection":"boards","operation":"upsert","doc_id":"1","data":{"n":1}}`
	long := strings.Repeat("x", 256)
	for _, c := range []struct {
		name, body string
		code       Code
		field      string
	}{
		{"nothing", ``, InvalidRequest, ""},
		{"no JSON", `{"client_id":`, InvalidRequest, ""},
		{"more behind it", `{"client_id":"a","changes":[` + change + `]} x`, InvalidRequest, ""},
		{"no UTF-8", "{\"client_id\":\"\xff\",\"changes\":[" + change + `]}`, InvalidRequest, ""},
		{"a list", `[]`, InvalidRequest, ""},
		{"unknown member", `{"client_id":"a","changes":[` + change + `],"force":true}`, InvalidRequest, "force"},
		{"member twice", `{"client_id":"a","client_id":"b","changes":[` + change + `]}`, InvalidRequest, "client_id"},
		{"no client", `{"changes":[` + change + `]}`, InvalidRequest, "client_id"},
		{"empty client", `{"client_id":"","changes":[` + change + `]}`, InvalidRequest, "client_id"},
		{"long client", `{"client_id":"` + long + `","changes":[` + change + `]}`, InvalidRequest, "client_id"},
		{"client with NUL", `{"client_id":"a\u0000","changes":[` + change + `]}`, InvalidRequest, "client_id"},
		{"client is a number", `{"client_id":7,"changes":[` + change + `]}`, InvalidRequest, "client_id"},
		{"no changes", `{"client_id":"a"}`, InvalidRequest, "changes"},
		{"empty changes", `{"client_id":"a","changes":[]}`, InvalidRequest, "changes"},
		{"changes null", `{"client_id":"a","changes":null}`, InvalidRequest, "changes"},
		{"atomic is a text", `{"client_id":"a","changes":[` + change + `],"atomic":"no"}`, InvalidRequest, "atomic"},
		{"too many", `{"client_id":"a","changes":[` + strings.Repeat("{},", 1000) + `{}]}`, TooManyChanges, "changes"},
		{"too large", `{"client_id":"a","changes":[` + strings.Repeat(" ", 64<<10) + change + `]}`, RequestTooLarge, ""},
	} {
		for _, chunked := range []bool{false, true} {
			var body io.Reader = strings.NewReader(c.body)
			if chunked {
				body = io.MultiReader(body)
			}
			p := e.send(t, http.MethodPost, "/sync/push", ana, body, "Content-Type", "application/json").problem(t, c.code)
			if c.code != RequestTooLarge && (len(p.Errors) != 1 || p.Errors[0].Field != c.field) {
				t.Errorf("%s: errors are %v", c.name, p.Errors)
			}
		}
	}
	good := `{"client_id":"a","changes":[` + change + `]}`
	e.post(t, "/sync/push", ana, good, "Content-Type", "text/plain").problem(t, UnsupportedMediaType)
	e.post(t, "/sync/push", ana, good, "Content-Type", "application/json; charset=latin1").problem(t, UnsupportedMediaType)
	e.post(t, "/sync/push", ana, good, "Content-Encoding", "gzip").problem(t, UnsupportedMediaType)
	e.post(t, "/sync/push?dry_run=1", ana, good).problem(t, InvalidRequest)
	e.post(t, "/sync/push", "", good).problem(t, InvalidToken)
	if got := e.one(t, `SELECT count(*)::text FROM boards`); got != "0" {
		t.Errorf("%s rows were written", got)
	}
	if a := e.post(t, "/sync/push", ana, good, "Content-Type", "application/json; charset=utf-8"); a.status != http.StatusOK {
		t.Errorf("%d %s", a.status, a.body)
	}
	if n := e.g.bodies.held.Load(); n != 0 {
		t.Errorf("%d bytes of bodies are held", n)
	}
}

// FuzzPushParse holds the scanner against encoding/json: it takes nothing that isn't JSON, and never panics; and what it
// takes is read alike.
func FuzzPushParse(f *testing.F) {
	for _, c := range outcomeCases {
		f.Add([]byte(`{"client_id":"a","changes":[` + c.change + `]}`))
	}
	f.Add([]byte(`{"client_id":"\ud83d\ude00","atomic":false,"changes":[{"data":{"a":[1,-0.5e+3,{"b":[[],{}]}],"c":"\ud800"},"base":{}}]}`))
	f.Add([]byte(`{"client_id":"a","changes":[` + strings.Repeat("[", 200) + strings.Repeat("]", 200) + `]}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		r, err := parsePush(body)
		var p *Problem
		switch {
		case err == nil && !json.Valid(body):
			t.Fatalf("taken, and no JSON: %q", body)
		case err == nil && (r.client == "" || len(r.changes) == 0 || len(r.changes) > mostChanges):
			t.Fatalf("taken: %+v", r)
		case err != nil && (!errors.As(err, &p) || len(p.Errors) == 0):
			t.Fatalf("refused without saying what is wrong: %v", err)
		case err != nil:
			return
		}
		var same struct {
			Changes []json.RawMessage `json:"changes"`
		}
		if err := json.Unmarshal(body, &same); err != nil {
			t.Fatal(err)
		}
		for i := range r.changes {
			c := &r.changes[i]
			if c.fault != nil {
				continue
			}
			var other struct {
				Data map[string]json.RawMessage `json:"data"`
			}
			if err := json.Unmarshal(same.Changes[i], &other); err != nil {
				t.Fatal(err)
			}
			for _, col := range c.data {
				if !bytes.Equal(other.Data[col.name], col.value) {
					t.Fatalf("column %q is %s here and %s there", col.name, col.value, other.Data[col.name])
				}
			}
			if len(c.hash()) != 32 {
				t.Fatal("no hash")
			}
		}
	})
}

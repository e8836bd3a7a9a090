package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// pushChange is a change as a client sends it.
type pushChange struct {
	Collection    string         `json:"collection"`
	Operation     string         `json:"operation"`
	DocID         string         `json:"doc_id,omitempty"`
	LocalID       string         `json:"local_id,omitempty"`
	Data          map[string]any `json:"data"`
	Base          map[string]any `json:"base,omitempty"`
	ParentVersion string         `json:"parent_version,omitempty"`
	ChangeID      string         `json:"change_id,omitempty"`
}

// pushResult is what became of one change.
type pushResult struct {
	DocID      string          `json:"doc_id"`
	LocalID    string          `json:"local_id"`
	ChangeID   string          `json:"change_id"`
	Status     string          `json:"status"`
	NewVersion *string         `json:"new_version"`
	Version    *string         `json:"version"`
	Document   json.RawMessage `json:"document"`
	Policy     string          `json:"policy"`
	Columns    []string        `json:"columns"`
	Code       string          `json:"code"`
	Error      string          `json:"error"`
	Retryable  bool            `json:"retryable"`

	raw json.RawMessage // as it came
}

// shown is the row in the result, nil if there is none.
func (r pushResult) shown(t *testing.T) modelRow {
	t.Helper()
	if len(r.Document) == 0 || string(r.Document) == "null" {
		return nil
	}
	var row modelRow
	must(t, json.Unmarshal(r.Document, &row))
	return row
}

func (r pushResult) String() string {
	if r.Code != "" {
		return r.Status + " " + r.Code
	}
	return r.Status
}

// pushAnswer is the answer to a push, or the problem.
type pushAnswer struct {
	status    int
	body      []byte
	Results   []pushResult `json:"results"`
	TxID      *int64       `json:"txid"`
	VisibleAt *string      `json:"visible_at"`
	Code      string       `json:"code"`
	Detail    string       `json:"detail"`
	Retryable bool         `json:"retryable"`
	Errors    []struct {
		Field  string `json:"field"`
		Detail string `json:"detail"`
	} `json:"errors"`
}

func parsePush(status int, body []byte) (pushAnswer, error) {
	a := pushAnswer{status: status, body: body}
	if err := json.Unmarshal(body, &a); err != nil {
		return a, err
	}
	var each struct {
		Results []json.RawMessage `json:"results"`
	}
	if err := json.Unmarshal(body, &each); err != nil {
		return a, err
	}
	for i := range a.Results {
		a.Results[i].raw = each.Results[i]
	}
	return a, nil
}

const pushPath = "/sync/push"

// pushGateway is a gateway in this process, and one of its callers.
type pushGateway struct {
	resyncGateway
	config *Config
	device string
}

// startPushGateway prepares the database, serves it, and returns a caller named ana, an editor. settings are top-level
// keys of the configuration; collections lie under collections.
func startPushGateway(t *testing.T, dsn, schemaSQL, settings, collections string) *pushGateway {
	t.Helper()
	resyncExec(t, connect(t, dsn), schemaSQL)
	path := writePushConfig(t, dsn, settings, collections)
	config, err := Load(path, func(string) (string, bool) { return "", false })
	if err != nil {
		t.Fatal(err)
	}
	g := &pushGateway{config: config, device: "device-1",
		resyncGateway: resyncGateway{dsn: dsn, client: &http.Client{Transport: &http.Transport{DisableCompression: true}}}}
	g.token = g.sign(t, "ana", []string{"editor"}, nil)
	g.serve(t, config)
	resyncEventually(t, "the gateway answers", func() bool { return g.get(t, "/sync/full?limit=1").status == http.StatusOK })
	return g
}

func writePushConfig(t *testing.T, dsn, settings, collections string) (path string) {
	t.Helper()
	text := fmt.Sprintf(`auto_init: true
database: {url: %q}
replication: {slot: %s}
catalog: {poll_interval: 100ms}
http: {listen: "127.0.0.1:0"}
auth: {jwt: {secret: %s}}
limits: {requests_per_second: 1000000, burst: 1000000, drain: 1s, push_body: 4MB}
log: {level: error, format: text}
%s
collections:
%s`, dsn, "walgate_"+strings.ToLower(rand.Text()[:12]), convergenceSecret, settings, collections)
	path = filepath.Join(t.TempDir(), "config.yaml")
	must(t, os.WriteFile(path, []byte(text), 0o600))
	return path
}

func (g *pushGateway) sign(t *testing.T, sub string, roles []string, claims map[string]any) string {
	t.Helper()
	token, err := signToken(g.config, sub, roles, claims, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// as is the same gateway for another caller.
func (g *pushGateway) as(t *testing.T, sub string, roles []string, claims map[string]any) *pushGateway {
	t.Helper()
	other := *g
	other.token = g.sign(t, sub, roles, claims)
	return &other
}

// post sends a body as it is.
func (g *pushGateway) post(t *testing.T, body []byte, headers ...string) pushAnswer {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, g.url+pushPath, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+g.token)
	r.Header.Set("Content-Type", "application/json")
	for i := 0; i+1 < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	answer, err := g.client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	a, err := parsePush(answer.StatusCode, text)
	if err != nil {
		t.Fatalf("the answer %d %.300s: %v", answer.StatusCode, text, err)
	}
	return a
}

// push sends changes and wants 200 with a result for each, in their order.
func (g *pushGateway) push(t *testing.T, atomic bool, changes ...pushChange) pushAnswer {
	t.Helper()
	body, err := json.Marshal(map[string]any{"client_id": g.device, "atomic": atomic, "changes": changes})
	if err != nil {
		t.Fatal(err)
	}
	var a pushAnswer
	resyncEventually(t, "an answer other than 503", func() bool { // log_behind under load: clients try again.
		a = g.post(t, body)
		return a.status != http.StatusServiceUnavailable
	})
	if a.status != http.StatusOK || len(a.Results) != len(changes) {
		t.Fatalf("the push of %d changes: %d %.2000s", len(changes), a.status, a.body)
	}
	for i, r := range a.Results {
		if changes[i].DocID != "" && r.DocID != changes[i].DocID || changes[i].ChangeID != r.ChangeID {
			t.Fatalf("result %d is of %q (change %q), the change of %q (%q)", i, r.DocID, r.ChangeID, changes[i].DocID, changes[i].ChangeID)
		}
	}
	return a
}

// one sends a single change.
func (g *pushGateway) one(t *testing.T, c pushChange) pushResult {
	t.Helper()
	return g.push(t, true, c).Results[0]
}

// pushEntry is a document's last entry in the feed.
type pushEntry struct {
	Version   string
	ClientID  string `json:"client_id"`
	Operation string
	Data      json.RawMessage
}

// feed pulls from since to the end and returns each document's last entry by collection/doc_id, and the cursor.
func (g *pushGateway) feed(t *testing.T, since string) (entries map[string]pushEntry, cursor string) {
	t.Helper()
	entries = map[string]pushEntry{}
	for {
		a := g.get(t, "/sync/pull?limit=1000&client_id="+g.device+"&since="+url.QueryEscape(since))
		var page struct {
			Changes []struct {
				Collection string
				DocID      string `json:"doc_id"`
				pushEntry
			}
			LastSeq string `json:"last_seq"`
			HasMore bool   `json:"has_more"`
			Resync  bool   `json:"full_resync_required"`
		}
		if err := json.Unmarshal(a.body, &page); err != nil || a.status != http.StatusOK || page.Resync {
			t.Fatalf("pull: %d %.300s (%v)", a.status, a.body, err)
		}
		for _, c := range page.Changes {
			entries[c.Collection+"/"+c.DocID] = c.pushEntry
		}
		if since = page.LastSeq; !page.HasMore {
			return entries, since
		}
	}
}

// settled pulls what is committed now.
func (g *pushGateway) settled(t *testing.T, since string) (entries map[string]pushEntry, cursor string) {
	t.Helper()
	resyncLogged(t, connect(t, g.dsn))
	return g.feed(t, since)
}

// here is the position at present, as a cursor and as a version.
func (g *pushGateway) here(t *testing.T) (cursor, version string) {
	t.Helper()
	resyncLogged(t, connect(t, g.dsn))
	cursor = g.get(t, "/sync/full?limit=1").last()
	return cursor, versionText(cursor)
}

// versionText is the version in a cursor, with its history.
func versionText(cursor string) string {
	parts := strings.Split(cursor, "-")
	return strings.Join(parts[:min(3, len(parts))], "-")
}

// tableRows reads what a query of key and row as JSON returns, as the database's owner sees it.
func tableRows(ctx context.Context, t *testing.T, dsn, query string) map[string]modelRow {
	t.Helper()
	rows, err := connect(t, dsn).Query(ctx, query)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	out := map[string]modelRow{}
	for rows.Next() {
		var id, doc string
		must(t, rows.Scan(&id, &doc))
		var row modelRow
		must(t, json.Unmarshal([]byte(doc), &row))
		out[id] = row
	}
	must(t, rows.Err())
	return out
}

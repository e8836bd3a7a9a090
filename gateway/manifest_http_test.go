package gateway

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/walgate/walgate/policies"
)

// TestManifestRequests sends what is wrong with a request: each fault is 400 and names its field, and nothing is remembered of it.
func TestManifestRequests(t *testing.T) {
	t.Parallel()
	e := newFileEnv(t, setup{})
	a := tokenFor(t, "a", nil)
	for body, want := range map[string][]string{
		`{"since_version":0}`:                      {"client_id"},
		`{"client_id":"","since_version":0}`:       {"client_id"},
		`{"client_id":7,"since_version":0}`:        {"client_id"},
		`{"client_id":"c"}`:                        {"since_version"},
		`{"client_id":"c","since_version":-1}`:     {"since_version"},
		`{"client_id":"c","since_version":1.5}`:    {"since_version"},
		`{"client_id":"c","since_version":"42"}`:   {"since_version"},
		`{"client_id":"c","since_version":null}`:   {"since_version"},
		`{"client_id":null,"since_version":false}`: {"client_id", "since_version"},
	} {
		p := e.post(t, "/attachments/manifest", a, body).problem(t, InvalidRequest)
		var got []string
		for _, f := range p.Errors {
			got = append(got, f.Field)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: faults of %v, want %v", body, got, want)
		}
	}
	e.post(t, "/attachments/manifest", a, `not json`).problem(t, InvalidRequest)
	if n := e.one(t, `SELECT count(*)::text FROM walgate.manifests`); n != "0" {
		t.Errorf("%s clients are remembered", n)
	}
	if m := e.manifest(t, a, "c", 0, 0); m.brief() != "" {
		t.Errorf("%+v", m)
	}
	metrics := string(e.get(t, "/metrics", "").body)
	if !strings.Contains(metrics, `walgate_manifest_total{answer="read"} 1`) {
		t.Error("the one answer isn't counted")
	}
}

// TestManifestCollapses: of everything that happened to an attachment since, its latest operation is told, also to a client that
// never saw it, and each is told at the version that its request was answered with.
func TestManifestCollapses(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{options: func(o *Options) { o.AttachmentReplace = true }})
	ana := editor(t, "ana")
	e.name(t, "ana", "a")
	start := e.manifest(t, ana, "c", 0, 0).Current
	told := func(since int64, want string) *wireManifest {
		t.Helper()
		m := e.manifest(t, ana, "c", since, 0)
		if m.brief() != want {
			t.Fatalf("since %d: told %q, want %q", since, m.brief(), want)
		}
		return m
	}
	first := e.put(t, "a", ana, "one").created(t)
	m := told(start, "download a")
	if v, _ := m.Operations[0].Version.Int64(); v != *first.Version || m.Operations[0].SHA256 != first.SHA256 || m.Operations[0].Size != 3 {
		t.Errorf("told %+v, uploaded %+v", m.Operations[0], first)
	}
	seen := m.Current
	second := e.put(t, "a", ana, "other", "If-Match", etag(sha("one"))).uploaded(t, http.StatusOK)
	for _, since := range []int64{start, seen} {
		m := told(since, "download a")
		if v, _ := m.Operations[0].Version.Int64(); v != *second.Version || v <= *first.Version || m.Operations[0].SHA256 != second.SHA256 || m.Size != 5 {
			t.Errorf("replaced: told %+v, uploaded %+v", m.Operations[0], second)
		}
	}
	e.remove(t, "a", ana)
	for _, since := range []int64{start, seen, *second.Version} {
		if m := told(since, "delete a"); m.Size != 0 || m.Count.Delete != 1 {
			t.Errorf("%+v", m)
		}
	}
	told(0, "")
	third := e.put(t, "a", ana, "anew").created(t)
	for _, since := range []int64{0, start, seen, *second.Version} {
		if m := told(since, "download a"); m.Operations[0].SHA256 != third.SHA256 {
			t.Errorf("anew: %+v", m.Operations[0])
		}
	}
	told(*third.Version, "")
}

// TestManifestOfPrivateUpload: what is uploaded for one device is told to that device, until a row names it: then to all who see
// the row.
func TestManifestOfPrivateUpload(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{})
	ana := editor(t, "ana")
	e.put(t, "a?client_id=phone", ana, "x").created(t)
	e.put(t, "b", ana, "y").created(t)
	told := func(token, client, want string) {
		t.Helper()
		if m := e.manifest(t, token, client, 0, 0); m.brief() != want {
			t.Errorf("%s: %s, want %s", client, m.brief(), want)
		}
	}
	told(ana, "phone", "download a, download b")
	told(ana, "tablet", "download b")
	told(editor(t, "ben"), "phone", "")
	e.name(t, "ana", "a")
	told(ana, "tablet", "download b, download a")
	e.remove(t, "a", ana)
	told(ana, "phone", "download b")
	told(ana, "tablet", "download b")
}

// TestManifestAndRowsAreOneLine: rows, uploads and deletions have versions of one line: a reference's operation has its row's, and
// what comes later stands higher, whichever kind it is.
func TestManifestAndRowsAreOneLine(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{})
	ana := editor(t, "ana")
	start := e.here(t, ana)
	before := e.put(t, "a", ana, "1").created(t)
	e.name(t, "ana", "a")
	between := e.put(t, "b", ana, "2").created(t)
	e.name(t, "ana", "b")
	changes, last := e.pullAll(t, ana, start)
	if len(changes) != 2 || !(*before.Version < changes[0].Seq && changes[0].Seq < *between.Version && *between.Version < changes[1].Seq) {
		t.Fatalf("uploads at %d and %d, rows %+v", *before.Version, *between.Version, changes)
	}
	e.exec(t, `UPDATE photos SET file = NULL WHERE file = 'a'`)
	e.sync(t)
	changes, _ = e.pullAll(t, ana, last)
	m := e.manifest(t, ana, "c", *between.Version, 0)
	if len(changes) != 1 || len(m.Operations) == 0 || m.Operations[len(m.Operations)-1].Operation != "delete" || m.Operations[len(m.Operations)-1].Version.String() != fmt.Sprint(changes[0].Seq) {
		t.Errorf("rows %+v, files %+v", changes, m)
	}
}

// TestManifestLateCommit: who began first and commits last comes last; no client that has asked meanwhile passes it by.
func TestManifestLateCommit(t *testing.T) {
	t.Parallel()
	e := newFileEnv(t, setup{})
	a := tokenFor(t, "a", nil)
	e.upload(t, "late-row.jpg", "1", 1, "z", "")
	row, err := e.db.Begin(t.Context())
	ok(t, err)
	defer row.Rollback(t.Context())
	_, err = row.Exec(t.Context(), `INSERT INTO photos (id, owner, file) VALUES (1, 'a', 'late-row.jpg')`)
	ok(t, err)
	file, err := e.db.Begin(t.Context()) // an upload that is about to commit
	ok(t, err)
	defer file.Rollback(t.Context())
	_, err = file.Exec(t.Context(), `INSERT INTO walgate.attachments (attachment_id, event, size, content_type, sha256, subject) VALUES ('late-file.jpg', 'u', 7, 'image/jpeg', $1, 'z')`, digestOf("2"))
	ok(t, err)
	e.exec(t, `INSERT INTO photos (id, owner, file) VALUES (2, 'a', 'early.jpg'), (3, 'a', 'late-file.jpg')`)
	e.upload(t, "early.jpg", "3", 1, "z", "")
	e.sync(t)
	m := e.manifest(t, a, "c", 0, 0)
	if m.brief() != "download early.jpg" {
		t.Fatalf("before: %s", m.brief())
	}
	ok(t, file.Commit(t.Context()))
	ok(t, row.Commit(t.Context()))
	e.sync(t)
	if m := e.manifest(t, a, "c", m.Current, 0); m.brief() != "download late-file.jpg, download late-row.jpg" {
		t.Errorf("afterwards: %s", m.brief())
	}
}

// TestManifestPagesProgress: one row that names more files than a page may have doesn't hold its readers up, and a page that
// was not worked off comes again as it was.
func TestManifestPagesProgress(t *testing.T) {
	t.Parallel()
	e := newFileEnv(t, setup{before: `CREATE TABLE albums (id int PRIMARY KEY, owner text, pages text[]);`,
		specs: map[string]policies.Spec{"albums": {Table: "public.albums", Scope: []map[string]string{{"owner": "claims.sub"}}, Attachments: []policies.AttachmentSpec{{Column: "pages"}}}}})
	a := tokenFor(t, "a", nil)
	const many = 30
	e.exec(t, `INSERT INTO photos (id, owner, file) VALUES (1, 'a', 'before'), (2, 'a', 'after')`)
	e.upload(t, "before", "", 1, "z", "")
	for i := range many {
		e.upload(t, fmt.Sprint("page", i), "", 1, "z", "")
	}
	e.exec(t, `INSERT INTO albums SELECT 1, 'a', array_agg('page' || i) FROM generate_series(0, $1::int - 1) i`, many)
	e.upload(t, "after", "", 1, "z", "")
	e.sync(t)
	var ids []string
	pages := 0
	for since, more := int64(0), true; more; {
		m := e.manifest(t, a, "c", since, 1)
		if again := e.manifest(t, a, "c", since, 1); again.brief() != m.brief() || again.Current < m.Current || m.More && again.Current != m.Current {
			t.Fatalf("the same again from %d: %s to %d, it was %s to %d", since, again.brief(), again.Current, m.brief(), m.Current)
		}
		for _, o := range m.Operations {
			ids = append(ids, o.ID)
			if strings.HasPrefix(o.ID, "page") && len(m.Operations) < many {
				t.Errorf("a version is split: %s", m.brief())
			}
		}
		pages++
		since, more = m.Current, m.More // more without progress fails in manifest
	}
	slices.Sort(ids)
	if distinct := len(slices.Compact(slices.Clone(ids))); distinct != many+2 || len(ids) != many+2 || pages < 2 {
		t.Errorf("%d pages with %d operations of %d attachments", pages, len(ids), distinct)
	}
}

// TestManifestOfLargeFiles: sizes beyond 2 and 4 GiB, their sum, and the longest id come through as they are.
func TestManifestOfLargeFiles(t *testing.T) {
	t.Parallel()
	e := newFileEnv(t, setup{})
	a := tokenFor(t, "a", nil)
	long := strings.Repeat("x", 255)
	e.exec(t, `INSERT INTO photos (id, owner, file) VALUES (1, 'a', $1), (2, 'a', 'b')`, long)
	e.upload(t, long, "1", 5<<30, "a", "")
	e.upload(t, "b", "2", 3<<40, "a", "")
	e.sync(t)
	m := e.manifest(t, a, "c", 0, 0)
	if m.brief() != "download "+long+", download b" || m.Operations[0].Size != 5<<30 || m.Operations[1].Size != 3<<40 || m.Size != 5<<30+3<<40 {
		t.Errorf("%+v", m)
	}
}

// TestManifestOfLostRole: who may no longer read a collection is told to begin anew, and then lists none of its files.
func TestManifestOfLostRole(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{})
	e.name(t, "ben", "a")
	e.put(t, "a", editor(t, "ben"), "x").created(t)
	with, without := reader(t, "ben"), tokenFor(t, "ben", nil)
	m := e.manifest(t, with, "c", 0, 0)
	if m.brief() != "download a" {
		t.Fatalf("a reader: %s", m.brief())
	}
	if m := e.manifest(t, without, "c", m.Current, 0); m.brief() != "full_resync_required scopes_changed" {
		t.Errorf("without the role: %s", m.brief())
	}
	if m := e.manifest(t, without, "c", 0, 0); m.brief() != "" {
		t.Errorf("from 0: %s", m.brief())
	}
	if m := e.manifest(t, with, "c", 0, 0); m.brief() != "download a" {
		t.Errorf("with the role again: %s", m.brief())
	}
}

// TestManifestUnavailable: a manifest that can't be made is a problem to come back from, and never an empty list.
func TestManifestUnavailable(t *testing.T) {
	t.Parallel()
	e := newFileEnv(t, setup{})
	a := tokenFor(t, "a", nil)
	e.exec(t, `INSERT INTO photos (id, owner, file) VALUES (1, 'a', 'a')`)
	e.upload(t, "a", "", 1, "a", "")
	e.sync(t)
	for table, code := range map[string]Code{"attachment_operations": LogUnavailable, "manifests": SourceUnavailable} {
		e.exec(t, fmt.Sprintf(`ALTER TABLE walgate.%s RENAME TO hidden`, table))
		p := e.post(t, "/attachments/manifest", a, `{"client_id":"c","since_version":0}`).problem(t, code)
		if strings.Contains(p.Detail, "walgate") || !p.Retryable {
			t.Errorf("%+v", p)
		}
		e.exec(t, fmt.Sprintf(`ALTER TABLE walgate.hidden RENAME TO %s`, table))
	}
	if m := e.manifest(t, a, "c", 0, 0); m.brief() != "download a" {
		t.Errorf("afterwards: %s", m.brief())
	}
}

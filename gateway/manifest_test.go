package gateway

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/walgate/walgate/changelog"
)

// TestManifestExample is the documented flow, field for field.
func TestManifestExample(t *testing.T) {
	t.Parallel()
	e := newFileEnv(t, setup{})
	a := tokenFor(t, "a", nil)
	const photo, old = "abc123-def4-5678-9012-345678901234.jpg", "old456-file7-8901-2345-678901234567.png"
	empty := e.manifest(t, a, "mobile-app-123", 0, 0)
	if empty.brief() != "" || empty.Current == 0 || empty.Count.Download+empty.Count.Delete != 0 || empty.More {
		t.Errorf("%+v", empty)
	}
	e.exec(t, `INSERT INTO photos (id, owner, file) VALUES (1, 'a', $1), (2, 'a', 'nothing.jpg')`, old)
	e.upload(t, old, "old", 10, "a", "")
	e.upload(t, photo, "photo", 524288, "b", "")
	e.sync(t)
	first := e.manifest(t, a, "mobile-app-123", empty.Current, 0)
	if first.brief() != "download "+old {
		t.Fatalf("%+v", first)
	}
	e.exec(t, `UPDATE photos SET file = $1 WHERE id = 2`, photo)
	e.exec(t, `UPDATE photos SET file = NULL WHERE id = 1`)
	e.sync(t)
	res := e.post(t, "/attachments/manifest", a, fmt.Sprintf(`{"client_id": "mobile-app-123", "since_version": %d, "app_version": "1"}`, first.Current))
	var got map[string]any
	d := json.NewDecoder(strings.NewReader(string(res.body)))
	d.UseNumber()
	ok(t, d.Decode(&got))
	operations := got["operations"].([]any)
	if len(operations) != 2 {
		t.Fatalf("%s", res.body)
	}
	download, remove := operations[0].(map[string]any), operations[1].(map[string]any)
	for _, m := range []map[string]any{download, remove} {
		if n, err := m["version"].(json.Number).Int64(); err != nil || n <= first.Current {
			t.Errorf("version %v", m["version"])
		}
	}
	if !reflect.DeepEqual(remove, map[string]any{"operation": "delete", "attachment_id": old, "version": remove["version"]}) {
		t.Errorf("%v", remove)
	}
	want := map[string]any{"operation": "download", "attachment_id": photo, "version": download["version"], "download_url": download["download_url"],
		"size": json.Number("524288"), "content_type": "image/jpeg", "sha256": fmt.Sprintf("%x", digestOf("photo"))}
	if !reflect.DeepEqual(download, want) || !strings.HasPrefix(download["download_url"].(string), "https://sync.example/attachments/"+photo+"?") {
		t.Errorf("%v", download)
	}
	delete(got, "operations")
	delete(got, "current_version")
	if !reflect.DeepEqual(got, map[string]any{"total_download_size": json.Number("524288"), "operation_count": map[string]any{"download": json.Number("1"), "delete": json.Number("1")}, "has_more": false}) {
		t.Errorf("%v", got)
	}
	if m := e.manifest(t, a, "mobile-app-123", 0, 0); m.brief() != "download "+photo {
		t.Errorf("from 0: %s", m.brief())
	}
	if m := e.manifest(t, tokenFor(t, "b", nil), "x", 0, 0); m.brief() != "" {
		t.Errorf("another caller: %s", m.brief())
	}
}

// TestManifestValidation: what is wrong with a request is named; nothing else is refused.
func TestManifestValidation(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 256)
	for body, want := range map[string]string{
		``: " ", `[]`: " ", `null`: " ", `{`: " ", "{\"client_id\":\"\xff\",\"since_version\":0}": "",
		`{}`:                                                "client_id since_version ",
		`{"client_id":"c"}`:                                 "since_version ",
		`{"since_version":0}`:                               "client_id ",
		`{"client_id":"","since_version":0}`:                "client_id ",
		`{"client_id":7,"since_version":0}`:                 "client_id ",
		`{"client_id":null,"since_version":0}`:              "client_id ",
		`{"client_id":"a\u0000","since_version":0}`:         "client_id ",
		`{"client_id":"` + long + `","since_version":0}`:    "client_id ",
		`{"client_id":"c","since_version":-1}`:              "since_version ",
		`{"client_id":"c","since_version":1.5}`:             "since_version ",
		`{"client_id":"c","since_version":1e3}`:             "since_version ",
		`{"client_id":"c","since_version":"42"}`:            "since_version ",
		`{"client_id":"c","since_version":null}`:            "since_version ",
		`{"client_id":"c","since_version":0,"limit":0}`:     "limit ",
		`{"client_id":"c","since_version":0,"limit":10001}`: "limit ",
		`{"client_id":"c","since_version":0,"limit":"5"}`:   "limit ",
		`{"client_id":"c","since_version":0,"limit":null}`:  "limit ",
		`{"client_id":[],"since_version":{},"limit":1.0}`:   "client_id since_version limit ",
	} {
		_, err := parseManifest([]byte(body))
		p, _ := err.(*Problem)
		if p == nil || p.Code != InvalidRequest || p.Detail == "" {
			t.Errorf("%s: %v", body, err)
			continue
		}
		fields := ""
		for _, f := range p.Errors {
			fields += f.Field + " "
		}
		if fields != want {
			t.Errorf("%s: faults of %q, want %q", body, fields, want)
		}
	}
	r, err := parseManifest([]byte(` {"more":{},"limit":10000,"since_version":9007199254740993,"client_id":"` + long[1:] + `"} `))
	if err != nil || r.since != 9007199254740993 || r.limit != 10000 || len(r.clientID) != 255 {
		t.Errorf("%+v %v", r, err)
	}
}

// TestManifestAccess: tokens, devices, rates.
func TestManifestAccess(t *testing.T) {
	t.Parallel()
	e := newFileEnv(t, setup{options: func(o *Options) {
		auth, err := NewAuthenticator(t.Context(), AuthConfig{Secret: testSecret, ClientClaim: "device"}, nil)
		ok(t, err)
		o.Auth, o.RequestsPerSecond, o.Burst = auth, 1, 20
	}})
	const body = `{"client_id":"phone","since_version":0}`
	ask := func(token, body string) *answer {
		return e.post(t, "/attachments/manifest", token, body)
	}
	ask("", body).problem(t, InvalidToken)
	ask("nonsense", body).problem(t, InvalidToken)
	ask(tokenFor(t, "a", map[string]any{"exp": time.Now().Add(-time.Hour).Unix()}), body).problem(t, TokenExpired)
	ask(tokenFor(t, "a", nil), body).problem(t, ClientMismatch)
	ask(tokenFor(t, "a", map[string]any{"device": "tablet"}), body).problem(t, ClientMismatch)
	phone := tokenFor(t, "a", map[string]any{"device": "phone"})
	if a := ask(phone, body); a.status != http.StatusOK {
		t.Errorf("%d %s", a.status, a.body)
	}
	p := ask(phone, `{"client_id":"phone","since_version":-1}`).problem(t, InvalidRequest)
	if len(p.Errors) != 1 || p.Errors[0].Field != "since_version" {
		t.Errorf("%+v", p)
	}
	s := e.subscribe(t, phone, "0", `,"client_id":"tablet","attachments":true`)
	s.wantError(t, ClientMismatch)
	for range 40 {
		if a := ask(phone, body); a.status != http.StatusOK {
			a.problem(t, RateLimited)
			if a.header.Get("Retry-After") == "" {
				t.Error("without Retry-After")
			}
			return
		}
	}
	t.Error("41 requests were answered at a rate of 1 a second")
}

// TestManifestOfDevices: what no row names is its uploader's, of all devices or of one; once a row names it, it is theirs
// who see the row.
func TestManifestOfDevices(t *testing.T) {
	t.Parallel()
	e := newFileEnv(t, setup{})
	a, b := tokenFor(t, "a", nil), tokenFor(t, "b", nil)
	e.upload(t, "all.jpg", "1", 1, "a", "")
	e.upload(t, "phone.jpg", "2", 1, "a", "phone")
	e.sync(t)
	phone, tablet := e.manifest(t, a, "phone", 0, 0), e.manifest(t, a, "tablet", 0, 0)
	if phone.brief() != "download all.jpg, download phone.jpg" || tablet.brief() != "download all.jpg" {
		t.Errorf("%s; %s", phone.brief(), tablet.brief())
	}
	if m := e.manifest(t, b, "phone", 0, 0); m.brief() != "" {
		t.Errorf("another's device of the same name: %s", m.brief())
	}
	e.exec(t, `INSERT INTO photos (id, owner, file) VALUES (1, 'b', 'phone.jpg')`)
	e.unload(t, "all.jpg", "a")
	e.sync(t)
	if m := e.manifest(t, a, "phone", phone.Current, 0); m.brief() != "delete phone.jpg, delete all.jpg" {
		t.Errorf("the phone: %s", m.brief())
	}
	if m := e.manifest(t, a, "tablet", tablet.Current, 0); m.brief() != "delete all.jpg" {
		t.Errorf("the tablet: %s", m.brief())
	}
	if m := e.manifest(t, b, "phone", 0, 0); m.brief() != "download phone.jpg" {
		t.Errorf("who sees the row: %s", m.brief())
	}
}

// TestManifestSince: a position that the log can't continue from begins anew.
func TestManifestSince(t *testing.T) {
	t.Parallel()
	e := newFileEnv(t, setup{})
	a := tokenFor(t, "a", nil)
	for i := range 6 {
		e.exec(t, `INSERT INTO photos (id, owner, file) VALUES ($1, 'a', $2)`, i, fmt.Sprint(i))
		e.upload(t, fmt.Sprint(i), "", 1, "a", "")
	}
	e.sync(t)
	all := e.manifest(t, a, "c", 0, 0)
	if len(all.Operations) != 6 {
		t.Fatalf("%+v", all)
	}
	if m := e.manifest(t, a, "c", all.Current, 0); m.Resync || len(m.Operations) != 0 || m.Current < all.Current {
		t.Errorf("from the end: %+v", m)
	}
	for name, since := range map[string]int64{"above": all.Current + 1e9, "far above": 1<<53 - 1, "beyond all": 1<<62 + 1} {
		if m := e.manifest(t, a, "c", since, 0); m.brief() != "full_resync_required ahead_of_log" {
			t.Errorf("%s: %s", name, m.brief())
		}
	}
	if m := e.manifest(t, a, "c", 1, 0); len(m.Operations) != 6 {
		t.Errorf("in a log that has forgotten nothing: %s", m.brief())
	}
	e.exec(t, `UPDATE walgate.checkpoint SET floor = $1`, all.Current)
	newest, _ := all.Operations[5].Version.Int64() // before it, not all is quiet: the log has to be asked
	if m := e.manifest(t, a, "c", newest-1, 0); m.brief() != "full_resync_required too_old" {
		t.Errorf("of another history: %s", m.brief())
	}
	e.exec(t, `UPDATE walgate.checkpoint SET floor = 0`)
	// Deletions below the newest were forgotten: only from there on may a client continue, or in a listing from 0.
	stale, _ := all.Operations[3].Version.Int64()
	e.exec(t, `UPDATE walgate.checkpoint SET attachments_floor = $1`, all.Current)
	e.g.hub.mu.Lock()
	e.g.hub.seen.forget(changelog.Version(all.Current)) // as after a restart
	e.g.hub.mu.Unlock()
	if m := e.manifest(t, a, "c", all.Current, 0); m.Resync {
		t.Errorf("at the floor: %s", m.brief())
	}
	if m := e.manifest(t, a, "c", stale, 0); m.brief() != "full_resync_required too_old" {
		t.Errorf("below the floor: %s", m.brief())
	}
	for range 2 { // the second time from pages that are kept
		page := e.manifest(t, a, "c", 0, 2)
		again := e.manifest(t, a, "c", page.Current, 2)
		if last := e.manifest(t, a, "c", again.Current, 2); page.brief() != "download 0, download 1" || again.brief() != "download 2, download 3" || last.brief() != "download 4, download 5" || last.More {
			t.Errorf("listing: %s; %s; %s", page.brief(), again.brief(), last.brief())
		}
		if m := e.manifest(t, a, "c", page.Current, 2); m.brief() != again.brief() {
			t.Errorf("a page asked for again: %s", m.brief())
		}
		third, _ := all.Operations[2].Version.Int64()
		if m := e.manifest(t, a, "c", third, 2); m.brief() != "full_resync_required too_old" {
			t.Errorf("what is no page's end: %s", m.brief())
		}
	}
	page := e.manifest(t, a, "c", 0, 2)
	e.exec(t, `INSERT INTO news VALUES (1, 'x')`)
	e.sync(t)
	e.exec(t, `UPDATE walgate.checkpoint SET attachments_floor = version`)
	e.g.hub.mu.Lock()
	e.g.hub.seen.forget(e.g.hub.head.Version)
	e.g.hub.mu.Unlock()
	if m := e.manifest(t, a, "c", page.Current, 2); m.brief() != "full_resync_required too_old" {
		t.Errorf("a listing whose deletions were forgotten: %s", m.brief())
	}
}

// TestManifestScopesChanged: a position holds for the scopes that it was given for.
func TestManifestScopesChanged(t *testing.T) {
	t.Parallel()
	e := newFileEnv(t, setup{options: func(o *Options) { o.ClientsKept = 30 * 24 * time.Hour }})
	one, two := tokenFor(t, "a", map[string]any{"teams": []int{1}}), tokenFor(t, "a", map[string]any{"teams": []int{2}})
	for i := range 4 {
		e.exec(t, `INSERT INTO photos (id, team, file) VALUES ($1, $2, $3)`, i, i%2+1, fmt.Sprint(i))
		e.upload(t, fmt.Sprint(i), "", 1, "z", "")
	}
	e.sync(t)
	first := e.manifest(t, one, "c", 0, 0)
	e.exec(t, `INSERT INTO news VALUES (1, 'x')`)
	e.sync(t)
	for range 2 {
		if m := e.manifest(t, two, "c", first.Current, 0); m.brief() != "full_resync_required scopes_changed" {
			t.Errorf("other scopes: %s", m.brief())
		}
	}
	if m := e.manifest(t, one, "c", first.Current, 0); m.brief() != "" {
		t.Errorf("the same scopes: %s", m.brief())
	}
	page := e.manifest(t, two, "c", 0, 1)
	if page.brief() != "download 1" || !page.More {
		t.Fatalf("%+v", page)
	}
	if m := e.manifest(t, two, "c", first.Current, 0); m.brief() != "full_resync_required scopes_changed" {
		t.Errorf("the old position, after an answer that was lost: %s", m.brief())
	}
	rest := e.manifest(t, two, "c", page.Current, 1)
	if rest.brief() != "download 3" || rest.More {
		t.Errorf("the listing goes on: %s", rest.brief())
	}
	if m := e.manifest(t, two, "c", rest.Current, 1); m.brief() != "" {
		t.Errorf("and has come to its end: %s", m.brief())
	}
	if m := e.manifest(t, one, "c", rest.Current, 1); m.brief() != "full_resync_required scopes_changed" {
		t.Errorf("back to the first scopes: %s", m.brief())
	}
	if m := e.manifest(t, one, "new", rest.Current, 1); m.brief() != "" {
		t.Errorf("a client that never asked: %s", m.brief())
	}
	if m := e.manifest(t, two, "new", rest.Current, 1); m.brief() != "full_resync_required scopes_changed" {
		t.Errorf("it was remembered: %s", m.brief())
	}
	// Who comes after the time for which clients are remembered isn't believed.
	before := int64(changelog.VersionAt(time.Now().Add(-30 * 24 * time.Hour)))
	if m := e.manifest(t, one, "recent", before+(25*time.Hour).Milliseconds()<<12, 1); m.Resync {
		t.Errorf("a position of 29 days ago: %s", m.brief())
	}
	if m := e.manifest(t, one, "old", before+(23*time.Hour).Milliseconds()<<12, 1); m.brief() != "full_resync_required too_old" {
		t.Errorf("a position of 29 days and an hour ago: %s", m.brief())
	}
}

// TestManifestPaging: while everything is written at random, clients page with small limits; in the end each holds
// what its rows name, as if it had begun anew.
func TestManifestPaging(t *testing.T) {
	t.Parallel()
	e := newFileEnv(t, setup{})
	seed := uint64(time.Now().UnixNano())
	w := &fileWriter{e: e, rng: rand.New(rand.NewPCG(seed, 1))}
	stop := make(chan struct{})
	var clients sync.WaitGroup
	for i, subject := range []string{"a", "a", "b", "c"} {
		clients.Go(func() {
			token, client := tokenFor(t, subject, map[string]any{"teams": []int{1}}), fmt.Sprint("client ", i)
			held, since := files{}, int64(0)
			for last := false; ; {
				since = e.follow(t, held, token, client, since, 1+i)
				if last {
					break
				}
				select {
				case <-stop:
					e.sync(t)
					last = true
				default:
				}
			}
			anew := files{}
			e.follow(t, anew, token, client, 0, 3)
			if !maps.Equal(held, anew) {
				t.Errorf("seed %d, %s: held %v, anew %v", seed, client, held, anew)
			}
			e.holdsVisible(t, held, subject)
		})
	}
	for range 150 {
		w.step(t)
	}
	close(stop)
	clients.Wait()
	if t.Failed() {
		t.Logf("seed %d wrote:\n%s", seed, strings.Join(w.done, "\n"))
	}
}

// holdsVisible expects a client to hold what the rows that it sees name, and besides only its own uploads.
func (e *env) holdsVisible(t testing.TB, held files, subject string) {
	t.Helper()
	want := e.visible(t, subject, 1)
	for id, digest := range want {
		if held[id] != digest {
			t.Errorf("%s: %s is %.8s, want %.8s", subject, id, held[id], digest)
		}
	}
	for id := range held {
		var own bool
		ok(t, e.db.QueryRow(t.Context(), `SELECT coalesce(bool_or(state = 'u' AND subject = $2), false) FROM walgate.files WHERE attachment_id = $1`, id, subject).Scan(&own))
		if want[id] == "" && !own {
			t.Errorf("%s holds %s, which no row of it names", subject, id)
		}
	}
}

// fileWriter writes at random: an application, and uploads and deletions.
type fileWriter struct {
	e    *env
	rng  *rand.Rand
	n    int
	done []string
}

func (w *fileWriter) step(t testing.TB) {
	t.Helper()
	file := func() string { return fmt.Sprintf("f%d.jpg", w.rng.IntN(8)) }
	subject := func() string { return string(rune('a' + w.rng.IntN(3))) }
	w.n++
	var sql string
	switch w.rng.IntN(9) {
	case 0, 1:
		id, who, client := file(), subject(), ""
		if w.rng.IntN(2) == 0 {
			client = "client 1"
		}
		w.done = append(w.done, "upload "+id+" by "+who)
		w.e.upload(t, id, fmt.Sprint("content ", w.n), int64(w.n), who, client)
		return
	case 2:
		id := file()
		w.done = append(w.done, "delete "+id)
		w.e.unload(t, id, subject())
		return
	case 3, 4:
		sql = fmt.Sprintf(`INSERT INTO photos VALUES (%d, '%s', %d, '%s') ON CONFLICT (id) DO UPDATE SET file = excluded.file`, w.rng.IntN(10), subject(), w.rng.IntN(3), file())
	case 5:
		sql = fmt.Sprintf(`UPDATE photos SET owner = '%s', team = %d WHERE id = %d`, subject(), w.rng.IntN(3), w.rng.IntN(10))
	case 6:
		sql = fmt.Sprintf(`DELETE FROM photos WHERE id = %d; INSERT INTO posters VALUES (%d, '%s') ON CONFLICT DO NOTHING`, w.rng.IntN(10), w.rng.IntN(3), file())
	case 7:
		sql = fmt.Sprintf(`DELETE FROM posters WHERE id = %d`, w.rng.IntN(3))
	default: // a reference moves
		sql = fmt.Sprintf(`WITH f AS (UPDATE photos SET file = NULL WHERE id = %d RETURNING id) UPDATE photos SET file = '%s' WHERE id = %d; INSERT INTO news VALUES (%d, '')`, w.rng.IntN(5), file(), 5+w.rng.IntN(5), w.n)
	}
	w.done = append(w.done, sql)
	w.e.exec(t, sql)
}

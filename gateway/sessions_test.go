package gateway

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/walgate/walgate/changelog"
)

// wireSession is a session as devices see it.
type wireSession struct {
	ID       string  `json:"sync_uuid"`
	LastSync *string `json:"last_sync"`
	Checkin  string  `json:"max_checkin"`
}

func (w *wireSession) last() string {
	if w.LastSync == nil {
		return "null"
	}
	return *w.LastSync
}

// seven years ago, and as many ahead: what a client's clock says never matters.
var wrongClocks = [][]string{{"Date", "Thu, 21 Nov 2019 10:00:00 GMT"}, {"Date", "Tue, 21 Nov 2034 10:00:00 GMT"}, {"Date", "yesterday"}}

func (e *env) openSession(t testing.TB, token, device string) *wireSession {
	t.Helper()
	return wantSession(t, e.post(t, "/sync/sessions", token, fmt.Sprintf(`{"device_uuid":%q}`, device), wrongClocks[0]...))
}

func (e *env) complete(t testing.TB, token string, s *wireSession, lastUpdate string) *wireSession {
	t.Helper()
	return wantSession(t, e.post(t, "/sync/sessions/"+s.ID+"/complete", token, fmt.Sprintf(`{"last_update":%q}`, lastUpdate), wrongClocks[1]...))
}

func wantSession(t testing.TB, a *answer) *wireSession {
	t.Helper()
	w := &wireSession{}
	if err := json.Unmarshal(a.body, w); err != nil || a.status != http.StatusOK {
		t.Fatalf("%d %s", a.status, a.body)
	}
	return w
}

// pullSession is one page of a session; since "" is the first.
func (e *env) pullSession(t testing.TB, token string, s *wireSession, since string, params ...string) *wirePage {
	t.Helper()
	params = append(params, "session", s.ID)
	if since != "" {
		params = append(params, "since", since)
	}
	a := e.get(t, "/sync/pull?"+query(params...), token, wrongClocks[2]...)
	if a.status != http.StatusOK {
		t.Fatalf("pull: %d %s", a.status, a.body)
	}
	p := &wirePage{}
	ok(t, json.Unmarshal(a.body, p))
	return p
}

// pullWindow pulls a session to its end.
func (e *env) pullWindow(t testing.TB, token string, s *wireSession, since string, params ...string) (changes []wireChange, last string) {
	t.Helper()
	for {
		p := e.pullSession(t, token, s, since, params...)
		if p.Resync {
			t.Fatalf("unexpected resync: %v", *p)
		}
		if p.HasMore && p.LastSeq == since {
			t.Fatalf("has_more, but last_seq stays at %s", since)
		}
		changes, since = append(changes, p.Changes...), p.LastSeq
		if !p.HasMore {
			return changes, since
		}
	}
}

// pushed writes rows as a push of this device does: marked, in one transaction. locals are of the rows that it names by ids
// of its own.
func (e *env) pushed(t testing.TB, subject, device, sql string, locals ...changelog.Local) {
	t.Helper()
	sql = fmt.Sprintf(`INSERT INTO walgate.pushes (subject, client_id) VALUES ('%s', '%s'); %s;`, subject, device, sql)
	if len(locals) > 0 {
		text, err := json.Marshal(locals)
		ok(t, err)
		sql += fmt.Sprintf(`INSERT INTO walgate.pushes (subject, client_id, locals) VALUES ('%s', '%s', '%s')`, subject, device, text)
	}
	e.exec(t, sql)
}

// marks lists the changes of a page that are marked as the device's own, with what it calls the documents.
func marks(changes []wireChange) string {
	var out []string
	for _, c := range changes {
		if c.ClientID != "" || c.LocalID != "" {
			out = append(out, c.DocID+"="+c.ClientID+"/"+c.LocalID)
		}
	}
	return strings.Join(out, " ")
}

// synced opens, pulls and completes a session in which the device gets everything up to now by a full resync.
func (e *env) synced(t testing.TB, token, device string) *wireSession {
	t.Helper()
	e.sync(t)
	s := e.openSession(t, token, device)
	full := e.get(t, "/sync/full?limit=1000", token)
	return e.complete(t, token, s, full.header.Get("X-Sync-LastSeq"))
}

// TestSession follows a device through its sessions: the window holds what others committed before the session was opened,
// then come the rows that the device has pushed since, and what others commit meanwhile lies in the next window.
func TestSession(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{})
	a := tokenFor(t, "a", nil)
	e.exec(t, `INSERT INTO todos VALUES (1, 'a')`)
	e.sync(t)

	s := e.openSession(t, a, "phone")
	if s.LastSync != nil {
		t.Fatalf("the first session has last_sync %s", *s.LastSync)
	}
	if p := e.pullSession(t, a, s, ""); !p.Resync || p.Reason != reasonFirst || strings.Join(p.Collections, ",") != "news,notes,todos" {
		t.Fatalf("the first pull: %+v", p)
	}
	e.pushed(t, "a", "phone", `INSERT INTO todos VALUES (2, 'a', NULL, 'pushed before the full')`, changelog.Local{Collection: "todos", DocID: "2", LocalID: "my-2"})
	full := e.get(t, "/sync/full", a)
	last := full.header.Get("X-Sync-LastSeq")
	if last <= s.Checkin || !strings.Contains(string(full.body), "pushed before the full") {
		t.Fatalf("max_checkin %s, full up to %s: %s", s.Checkin, last, full.body)
	}
	changes, last := e.pullWindow(t, a, s, last)
	if got := briefs(changes); got != "upsert todos/2" || last != s.Checkin || marks(changes) != "2=phone/my-2" {
		t.Fatalf("after the full: %q up to %s, want the device's own row up to %s", got, last, s.Checkin)
	}
	for _, update := range []string{changes[0].Version, last} {
		if done := e.complete(t, a, s, update); done.last() != s.Checkin || done.ID != s.ID || done.Checkin != s.Checkin {
			t.Fatalf("completed with %s as %+v", update, done)
		}
	}

	e.exec(t, `UPDATE todos SET title = 'other' WHERE id = 1`)
	e.exec(t, `INSERT INTO todos VALUES (3, 'b')`)
	e.sync(t)
	was := s.Checkin
	if s = e.openSession(t, a, "phone"); s.last() != was {
		t.Fatalf("the second session begins at %s, want %s", s.last(), was)
	}
	e.exec(t, `INSERT INTO todos VALUES (4, 'a', NULL, 'after the opening')`)
	e.pushed(t, "a", "phone", `INSERT INTO todos VALUES (5, 'a'), (6, 'b'); UPDATE todos SET title = 'mine' WHERE id = 4`, changelog.Local{Collection: "todos", DocID: "5", LocalID: "my-5"})
	e.exec(t, `UPDATE todos SET title = 'theirs, then mine' WHERE id = 5`)
	e.pushed(t, "a", "phone", `UPDATE todos SET title = 'mine again' WHERE id = 5`)
	e.pushed(t, "a", "tablet", `INSERT INTO todos VALUES (7, 'a')`)
	e.pushed(t, "b", "phone", `INSERT INTO todos VALUES (8, 'a')`)
	e.exec(t, `UPDATE todos SET title = 'theirs' WHERE id = 4`)
	e.pushed(t, "a", "phone", `DELETE FROM todos WHERE id = 1`)
	for _, again := range []string{"", " again"} {
		changes, last = e.pullWindow(t, a, s, "")
		if got := briefs(changes); got != "upsert todos/2, upsert todos/1, upsert todos/4, upsert todos/5, delete todos/1" || last != s.Checkin {
			t.Fatalf("the second session%s: %q up to %s", again, got, last)
		}
		if got := marks(changes); got != "2=phone/my-2 4=phone/ 5=phone/my-5 1=phone/" {
			t.Fatalf("marked are %s", got)
		}
	}
	if title := string(changes[2].Data); !strings.Contains(title, "mine") {
		t.Errorf("of todos/4 came %s, want what the device wrote", title)
	}
	newest := changes[len(changes)-1].Version
	if newest <= s.Checkin {
		t.Fatalf("the newest row %s lies within the window", newest)
	}
	for range 2 {
		if done := e.complete(t, a, s, newest); done.last() != s.Checkin {
			t.Fatalf("completed with %s: last_sync %s, want max_checkin %s", newest, done.last(), s.Checkin)
		}
	}

	e.exec(t, `UPDATE todos SET title = 'theirs at last' WHERE id = 5`)
	e.sync(t)
	s = e.openSession(t, a, "phone")
	changes, _ = e.pullWindow(t, a, s, "")
	if got := briefs(changes); got != "upsert todos/7, upsert todos/8, upsert todos/4, delete todos/1, upsert todos/5" || marks(changes) != "1=phone/ 5=/my-5" {
		t.Errorf("the third session: %q, marked %q", got, marks(changes))
	}
}

// TestSessionPages: every limit hands out the same changes, each once and in order. The place of a page of own rows is no
// place in the log: what others wrote between them was not handed out.
func TestSessionPages(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{before: `CREATE SEQUENCE numbers;`})
	a := tokenFor(t, "a", nil)
	e.synced(t, a, "phone")
	insert := func(owner string, n int) string {
		return strings.Repeat(fmt.Sprintf(`INSERT INTO todos VALUES (nextval('numbers'), '%s');`, owner), n)
	}
	for _, n := range []int{3, 1, 5} {
		e.exec(t, insert("a", n))
		e.exec(t, insert("other", 4))
	}
	e.sync(t)
	s := e.openSession(t, a, "phone")
	for _, n := range []int{4, 1, 7} {
		e.pushed(t, "a", "phone", insert("a", n))
		e.exec(t, insert("a", 5)) // another page's worth where the limit is small
	}
	all, last := e.pullWindow(t, a, s, "")
	want := versionsOf(all)
	if len(want) != 9+12 || !slices.IsSorted(want) || last != s.Checkin {
		t.Fatalf("%d changes up to %s, want 21 in order: %s", len(want), last, briefs(all))
	}
	for limit := 1; limit <= 22; limit++ {
		var got []string
		since, pages := "", 0
		for more := true; more; pages++ {
			p := e.pullSession(t, a, s, since, "limit", fmt.Sprint(limit))
			if again := e.pullSession(t, a, s, since, "limit", fmt.Sprint(limit)); again.LastSeq != p.LastSeq || briefs(again.Changes) != briefs(p.Changes) {
				t.Fatalf("limit %d: the page after %q, asked for again, is another", limit, since)
			}
			if p.HasMore && (p.LastSeq <= since || len(p.Changes) == 0) {
				t.Fatalf("limit %d: has_more, but from %s to %s come %d changes", limit, since, p.LastSeq, len(p.Changes))
			}
			if at, _, own := strings.Cut(p.LastSeq, ownMark); own {
				if at != s.Checkin {
					t.Fatalf("limit %d: own rows are placed at %s, not at max_checkin %s", limit, at, s.Checkin)
				}
				e.get(t, "/sync/pull?"+query("since", p.LastSeq), a).problem(t, InvalidSince)
			}
			got, since, more = append(got, versionsOf(p.Changes)...), p.LastSeq, p.HasMore
		}
		if !slices.Equal(got, want) || since != s.Checkin {
			t.Errorf("limit %d: %d changes in %d pages up to %s, want %d up to %s", limit, len(got), pages, since, len(want), s.Checkin)
		}
	}
}

// TestPlacesOfEarlierSessions: a device that goes on in another session from where it was in the last one's own rows is given
// the window from there, for what lies between those rows is others'.
func TestPlacesOfEarlierSessions(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{})
	a := tokenFor(t, "a", nil)
	e.synced(t, a, "phone")
	s := e.openSession(t, a, "phone")
	for id := 1; id < 4; id++ {
		e.exec(t, `INSERT INTO todos VALUES ($1, 'a')`, 10*id)
		e.pushed(t, "a", "phone", fmt.Sprintf(`INSERT INTO todos VALUES (%d, 'a')`, 10*id+1))
	}
	p := e.pullSession(t, a, s, "", "limit", "1")
	if briefs(p.Changes) != "upsert todos/11" || !strings.Contains(p.LastSeq, ownMark) {
		t.Fatalf("own rows: %+v", p)
	}
	next := e.openSession(t, a, "phone")
	if changes, _ := e.pullWindow(t, a, next, p.LastSeq); briefs(changes) != "upsert todos/10, upsert todos/11, upsert todos/20, upsert todos/21, upsert todos/30, upsert todos/31" {
		t.Errorf("in the next session: %s", briefs(changes))
	}
	if done := e.complete(t, a, next, p.LastSeq); done.last() != s.Checkin {
		t.Errorf("last_sync is %s, want no more than the place that the last session's max_checkin was: %s", done.last(), s.Checkin)
	}
}

func versionsOf(changes []wireChange) (out []string) {
	for i := range changes {
		out = append(out, changes[i].Version)
	}
	return out
}

// TestOwnRowsWaitForTheLog: a push that was answered before the pull came is in it, however far the log is behind; where
// the log doesn't come on, the pull says so and loses nothing.
func TestOwnRowsWaitForTheLog(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{gateway: func(g *Gateway) { g.limits.fence = 200 * time.Millisecond }})
	a := tokenFor(t, "a", nil)
	e.synced(t, a, "phone")
	s := e.openSession(t, a, "phone")
	hold, err := e.db.Begin(t.Context())
	ok(t, err)
	defer hold.Rollback(context.Background())
	_, err = hold.Exec(t.Context(), `LOCK TABLE walgate.checkpoint IN SHARE MODE`) // the log stands still
	ok(t, err)
	e.pushed(t, "a", "phone", `INSERT INTO todos VALUES (1, 'a')`)
	e.get(t, "/sync/pull?session="+s.ID, a).problem(t, LogBehind)
	ok(t, hold.Rollback(t.Context()))
	eventually(t, "the own row comes", func() bool {
		a := e.get(t, "/sync/pull?session="+s.ID, a)
		if a.status == http.StatusServiceUnavailable {
			return false
		}
		var p wirePage
		ok(t, json.Unmarshal(a.body, &p))
		if briefs(p.Changes) != "upsert todos/1" {
			t.Fatalf("the own row is skipped: %s", a.body)
		}
		return true
	})
}

// TestSessionIsTheDevices: state is kept by subject and device; nobody else's session exists for a caller.
func TestSessionIsTheDevices(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{})
	a, b := tokenFor(t, "a", nil), tokenFor(t, "b", nil)
	first := e.synced(t, a, "phone")
	if s := e.openSession(t, b, "phone"); s.LastSync != nil || s.ID == first.ID {
		t.Errorf("b's session of the same device_uuid: %+v", s)
	}
	if s := e.openSession(t, a, "tablet"); s.LastSync != nil {
		t.Errorf("another device's session: %+v", s)
	}
	if s := e.openSession(t, a, strings.Repeat("ü", 255)); s.LastSync != nil {
		t.Errorf("a long device's session: %+v", s)
	}
	complete := func(id string) string { return "/sync/sessions/" + id + "/complete" }
	body := fmt.Sprintf(`{"last_update":%q}`, first.Checkin)
	second := e.openSession(t, a, "phone")
	for what, c := range map[string]struct{ token, id string }{
		"another subject's": {b, second.ID}, "superseded": {a, first.ID}, "never opened": {a, "00000000-0000-4000-8000-000000000000"},
		"no id": {a, "1"}, "in capitals": {a, strings.ToUpper(second.ID)},
	} {
		if p := e.post(t, complete(c.id), c.token, body).problem(t, UnknownSession); p.Retryable {
			t.Errorf("%s: retryable", what)
		}
		e.get(t, "/sync/pull?session="+c.id, c.token).problem(t, UnknownSession)
	}
	e.get(t, "/sync/pull?session=", a).problem(t, UnknownSession)
	if done := e.complete(t, a, second, second.Checkin); done.last() != second.Checkin {
		t.Errorf("the device's own session: %+v", done)
	}
}

// TestSessionBadInput: each fault is named; nothing of it changes the session.
func TestSessionBadInput(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{})
	a := tokenFor(t, "a", nil)
	for body, field := range map[string]string{
		``: "", `[]`: "", `null`: "", `"phone"`: "", `{"device_uuid":"phone"`: "", `{"device_uuid":"phone"} {}`: "", "{\"device_uuid\":\"\xff\"}": "",
		`{}`: "device_uuid", `{"device_uuid":null}`: "device_uuid", `{"device_uuid":7}`: "device_uuid", `{"device_uuid":""}`: "device_uuid",
		`{"device_uuid":"a\u0000b"}`: "device_uuid", `{"device_uuid":"` + strings.Repeat("ü", 256) + `"}`: "device_uuid",
		`{"device_uuid":"a","device_uuid":"b"}`: "device_uuid", `{"device_uuid":"a","client_id":"b"}`: "client_id",
	} {
		p := e.post(t, "/sync/sessions", a, body).problem(t, InvalidRequest)
		if len(p.Errors) != 1 || p.Errors[0].Field != field {
			t.Errorf("%q: %+v, want one of field %q", body, p.Errors, field)
		}
	}
	e.post(t, "/sync/sessions", a, `{"device_uuid":"`+strings.Repeat("x", sessionBody)+`"}`).problem(t, RequestTooLarge)
	e.post(t, "/sync/sessions", "", `{"device_uuid":"phone"}`).problem(t, InvalidToken)
	if n := e.count(t, `SELECT count(*) FROM walgate.sessions`); n != 0 {
		t.Fatalf("%d sessions were opened", n)
	}

	s := e.synced(t, a, "phone")
	path := "/sync/sessions/" + s.ID + "/complete"
	at, err := changelog.ParseCursor(s.Checkin)
	ok(t, err)
	for body, code := range map[string]Code{
		`{}`: InvalidRequest, `{"last_update":null}`: InvalidRequest, `{"last_update":""}`: InvalidRequest, `{"last_update":"2008-10-27 04:41:01"}`: InvalidRequest,
		`{"last_update":-1}`: InvalidRequest, `{"last_update":1.5}`: InvalidRequest, `{"last_update":1e3}`: InvalidRequest, `{"last_update":{}}`: InvalidRequest,
		`{"last_update":"` + s.Checkin + `~"}`: InvalidRequest, `{"last_update":"` + s.Checkin + `~1"}`: InvalidRequest,
		`{"last_update":"` + (at.Version + 1000).Text(at.History) + `"}`:          InvalidLastUpdate, // nobody has seen it
		`{"last_update":` + fmt.Sprint(int64(at.Version)+1000) + `}`:              InvalidLastUpdate,
		`{"last_update":"20991231T235959.999Z-0000-` + at.History + `-00000000"}`: InvalidLastUpdate, // a clock years ahead
		`{"last_update":"` + at.Version.Text(otherHistory(at.History)) + `"}`:     InvalidLastUpdate,
		`{"last_update":"20080101T000000.000Z-0000-` + at.History + `-00000000"}`: InvalidRequest, // before there were versions
	} {
		p := e.post(t, path, a, body).problem(t, code)
		if len(p.Errors) != 1 || p.Errors[0].Field != "last_update" {
			t.Errorf("%s: %+v", body, p.Errors)
		}
	}
	for _, params := range []string{"until=1", "wait=1", "client_id=phone", "cursor=x"} {
		e.get(t, "/sync/pull?session="+s.ID+"&"+params, a).problem(t, InvalidRequest)
	}
	e.get(t, "/sync/pull?session="+s.ID+"&since=x", a).problem(t, InvalidSince)
	e.get(t, "/sync/pull?session="+s.ID+"&since="+s.Checkin+"~x", a).problem(t, InvalidSince)
	e.get(t, "/sync/pull?session="+s.ID+"&limit=0", a).problem(t, InvalidLimit)
	e.get(t, "/sync/pull?session="+s.ID+"&collections=nothing", a).problem(t, UnknownCollection)
	if again := e.openSession(t, a, "phone"); again.last() != s.last() {
		t.Errorf("last_sync was %s and is %s", s.last(), again.last())
	}
}

func otherHistory(h string) string {
	if h == "ffff" {
		return "0000"
	}
	return "ffff"
}

func (e *env) count(t testing.TB, sql string, args ...any) (n int) {
	t.Helper()
	ok(t, e.db.QueryRow(t.Context(), sql, args...).Scan(&n))
	return n
}

// TestSessionRefused: a session goes the way of any cursor where scopes, floors or the history have changed.
func TestSessionRefused(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{})
	a := tokenFor(t, "a", nil)
	for _, step := range []string{"at the first page", "after the window"} {
		e.synced(t, a, "phone")
		s := e.openSession(t, a, "phone")
		since := ""
		if step == "after the window" {
			_, since = e.pullWindow(t, a, s, "")
		}
		moved := tokenFor(t, "a", map[string]any{"teams": []int{1}})
		if p := e.pullSession(t, moved, s, since); !p.Resync || p.Reason != reasonScopes || strings.Join(p.Collections, ",") != "news,notes,todos" {
			t.Errorf("%s, scopes changed: %+v", step, p)
		}
		e.exec(t, `TRUNCATE news`)
		e.sync(t)
		if p := e.pullSession(t, a, s, since); !p.Resync || p.Reason != reasonTooOld || strings.Join(p.Collections, ",") != "news,notes,todos" {
			t.Errorf("%s, truncated: %+v", step, p)
		}
		if p := e.pullSession(t, a, s, since, "collections", "todos"); p.Resync {
			t.Errorf("%s, another table truncated: %+v", step, p)
		}
		if p := e.pullSession(t, a, s, "1"); !p.Resync {
			t.Errorf("%s, from the beginning of time: %+v", step, p)
		}
	}
	e.synced(t, a, "phone")
	s := e.openSession(t, a, "phone")
	e.exec(t, `UPDATE walgate.sessions SET max_checkin = regexp_replace(max_checkin, '-[0-9a-f]{4}-([0-9a-f]{8})$', '-' || $1 || '-\1')`, otherHistory(historyOf(t, s.Checkin)))
	e.get(t, "/sync/pull?session="+s.ID, a).problem(t, SessionExpired)
	e.post(t, "/sync/sessions/"+s.ID+"/complete", a, fmt.Sprintf(`{"last_update":%q}`, s.Checkin)).problem(t, SessionExpired)
	if s = e.openSession(t, a, "phone"); e.pullSession(t, a, s, "").Resync {
		t.Error("a session that is opened anew doesn't go on")
	}
	e.exec(t, `UPDATE walgate.sessions SET last_sync = regexp_replace(last_sync, '-[0-9a-f]{4}-([0-9a-f]{8})$', '-' || $1 || '-\1')`, otherHistory(historyOf(t, s.Checkin)))
	if p := e.pullSession(t, a, s, ""); !p.Resync || p.Reason != reasonHistory {
		t.Errorf("last_sync of another history: %+v", p)
	}
	full := e.get(t, "/sync/full", a).header.Get("X-Sync-LastSeq")
	if done := e.complete(t, a, s, full); done.last() != s.Checkin {
		t.Errorf("after the full resync last_sync is %s, want %s", done.last(), s.Checkin)
	}
}

func historyOf(t testing.TB, cursor string) string {
	t.Helper()
	c, err := changelog.ParseCursor(cursor)
	ok(t, err)
	return c.History
}

// TestCompletedRules: min and max of last_update, max_checkin, what was pulled, and the last_sync before.
func TestCompletedRules(t *testing.T) {
	t.Parallel()
	const hash, other = "00000001", "00000002"
	place := func(v int, hash string) changelog.Cursor {
		return changelog.Cursor{Version: changelog.Version(v), History: "aaaa", ScopeHash: hash}
	}
	none := changelog.Cursor{}
	h := &changelog.Head{Version: 100, History: "aaaa"}
	for _, c := range []struct {
		name                         string
		last, pulled, update, result changelog.Cursor
	}{
		{"a position within the window", place(10, hash), none, place(20, hash), place(20, hash)},
		{"a position behind the window", place(10, hash), none, place(70, hash), place(50, hash)},
		{"a position before last_sync", place(10, hash), place(50, hash), place(9, hash), place(10, hash)},
		{"the first position", none, none, place(20, hash), place(20, hash)},
		{"a position after the scopes changed", place(10, other), none, place(9, hash), place(9, hash)},
		{"a position after the history changed", changelog.Cursor{Version: 99, History: "bbbb", ScopeHash: hash}, none, place(9, hash), place(9, hash)},
		{"a row of the window", place(10, hash), place(50, hash), place(20, ""), place(20, hash)},
		{"a row as a number", place(10, hash), place(50, hash), changelog.Cursor{Version: 20}, place(20, hash)},
		{"an own row", place(10, hash), place(50, hash), place(70, ""), place(50, hash)},
		{"an own row of a window that was pulled in part", place(10, hash), place(30, hash), place(70, ""), place(30, hash)},
		{"an own row, known from the push, and nothing pulled", place(10, hash), none, place(70, ""), place(10, hash)},
		{"the same on the first session", none, none, place(70, ""), none},
		{"a row from before last_sync", place(10, hash), place(50, hash), place(5, ""), place(10, hash)},
	} {
		s := &syncSession{lastSync: c.last, checkin: place(50, hash), pulled: c.pulled}
		if got, err := s.completed(c.update, h); err != nil || got != c.result {
			t.Errorf("%s: %v (%v), want %v", c.name, got, err, c.result)
		}
	}
}

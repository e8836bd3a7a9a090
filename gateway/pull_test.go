package gateway

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/walgate/walgate/changelog"
)

// TestPullMeaning: what each kind of write means to the callers concerned.
func TestPullMeaning(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{})
	for _, c := range []struct {
		name, before, sql   string
		a, b, teams, level3 string // what owner A, owner B, a member of teams 1 and 2, and a reader with level 3 are told
	}{
		{"insert", "", "INSERT INTO todos VALUES (1, 'a', 1, 'x')", "upsert todos/1", "", "upsert todos/1", ""},
		{"update", "INSERT INTO todos VALUES (1, 'a', 1, 'x')", "UPDATE todos SET title = 'y'", "upsert todos/1", "", "upsert todos/1", ""},
		{"delete", "INSERT INTO todos VALUES (1, 'a', 1)", "DELETE FROM todos", "delete todos/1", "", "delete todos/1", ""},
		{"another owner", "INSERT INTO todos VALUES (1, 'a', 9)", "UPDATE todos SET owner = 'b'", "delete todos/1 left", "upsert todos/1", "", ""},
		{"between two own scopes", "INSERT INTO todos VALUES (1, 'z', 1)", "UPDATE todos SET team = 2", "", "", "upsert todos/1", ""},
		{"from the owner to its team", "INSERT INTO todos VALUES (1, 'teams', NULL)", "UPDATE todos SET owner = NULL, team = 2", "", "", "upsert todos/1", ""},
		{"filter: out", "INSERT INTO todos VALUES (1, 'a', NULL)", "UPDATE todos SET archived = true", "delete todos/1 left", "", "", ""},
		{"filter: in", "INSERT INTO todos VALUES (1, 'a', NULL, '', true)", "UPDATE todos SET archived = false", "upsert todos/1", "", "", ""},
		{"filter: never seen", "INSERT INTO todos VALUES (1, 'a', NULL, '', true)", "UPDATE todos SET title = 'z'; DELETE FROM todos", "", "", "", ""},
		{"delete and insert in one transaction", "INSERT INTO todos VALUES (1, 'a')", "DELETE FROM todos; INSERT INTO todos VALUES (1, 'a', NULL, 'n')", "upsert todos/1", "", "", ""},
		{"twice in one page", "", "INSERT INTO todos VALUES (1, 'a'); UPDATE todos SET title = 'p'; UPDATE todos SET title = 'q'", "upsert todos/1", "", "", ""},
		{"changed key", "INSERT INTO todos VALUES (1, 'a')", "UPDATE todos SET id = 2", "delete todos/1, upsert todos/2", "", "", ""},
		{"nobody's", "", "INSERT INTO todos VALUES (1, NULL, NULL)", "", "", "", ""},
		{"claims: may see", "", "INSERT INTO notes VALUES ('n', 'en', 3)", "", "", "", `upsert notes/["n","en"]`},
		{"claims: may not see", "INSERT INTO notes VALUES ('n', 'en', 4)", "UPDATE notes SET body = 'x'; DELETE FROM notes", "", "", "", ""},
		{"claims: in", "INSERT INTO notes VALUES ('n', 'en', 4)", "UPDATE notes SET level = 2", "", "", "", `upsert notes/["n","en"]`},
		{"claims: out", "INSERT INTO notes VALUES ('n', 'en', 1)", "UPDATE notes SET level = 9", "", "", "", `delete notes/["n","en"] left`},
		{"claims: delete", "INSERT INTO notes VALUES ('n', 'en', 1)", "DELETE FROM notes", "", "", "", `delete notes/["n","en"]`},
	} {
		e.exec(t, "DELETE FROM todos; DELETE FROM notes")
		if c.before != "" {
			e.exec(t, c.before)
		}
		callers := map[string]string{tokenFor(t, "a", nil): c.a, tokenFor(t, "b", nil): c.b,
			tokenFor(t, "teams", map[string]any{"teams": []int{1, 2}}): c.teams, tokenFor(t, "c", map[string]any{"level": 3}): c.level3}
		since := map[string]string{}
		live := map[string]*stream{}
		for token := range callers {
			since[token] = e.here(t, token)
			live[token] = e.live(t, token, "")
		}
		e.exec(t, c.sql)
		e.exec(t, "INSERT INTO news VALUES (1) ON CONFLICT (id) DO UPDATE SET headline = 'end'")
		e.sync(t)
		for token, want := range callers {
			p := e.pull(t, token, since[token], "collections", "todos,notes")
			if got := briefs(p.Changes); got != want {
				t.Errorf("%s: got %q, want %q", c.name, got, want)
			}
			for i := range p.Changes {
				if ch := &p.Changes[i]; (ch.Operation == "upsert") != (string(ch.Data) != "null") {
					t.Errorf("%s: %+v", c.name, ch)
				}
			}
			if got := lastOf(live[token].until(t, "news")); got != want {
				t.Errorf("%s: the stream told %q, the pull %q", c.name, got, want)
			}
			live[token].conn.Close()
		}
	}
}

// until reads changes up to one of the collection, which is left out.
func (s *stream) until(t testing.TB, collection string) (changes []wireChange) {
	t.Helper()
	for {
		f := s.next(t)
		switch {
		case f.Type == "checkpoint" || f.Type == "ready" || f.Type == "heartbeat":
		case f.Type != "":
			t.Fatalf("unexpected frame %s", f.raw)
		case f.Collection == collection:
			return changes
		default:
			changes = append(changes, f.wireChange)
		}
	}
}

// lastOf is the last change of each document, as a page has it.
func lastOf(changes []wireChange) string {
	var out []wireChange
	for i, c := range changes {
		if !slices.ContainsFunc(changes[i+1:], func(d wireChange) bool { return d.Collection == c.Collection && d.DocID == c.DocID }) {
			out = append(out, c)
		}
	}
	return briefs(out)
}

// TestPullPages: pages end at transactions' ends; limits at the edges.
func TestPullPages(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{})
	a := tokenFor(t, "a", nil)
	since := e.here(t, a)
	next := 0
	insert := func(owner string, n int) {
		e.exec(t, `INSERT INTO todos SELECT i, $1 FROM generate_series($2::int, $3::int) i`, owner, next, next+n-1)
		next += n
	}
	for _, n := range []int{3, 4, 1, 10} { // a's transactions, with another's between
		insert("a", n)
		insert("other", 5)
	}
	e.sync(t)
	for limit, want := range map[string][]int{
		"1": {-1, -1, 1, -1, -1, -1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 1}, // below 0: partial
		"2": {-2, 1, -2, 2, 1, -2, -2, -2, -2, 2}, "3": {3, -3, 2, -3, -3, -3, 1}, "4": {3, 4, 1, -4, -4, 2}, "6": {3, 5, -6, 4},
		"7": {7, 1, -7, 3}, "8": {8, -8, 2}, "9": {8, -9, 1}, "10": {8, 10}, "17": {8, 10}, "18": {18}, "1000": {18}, "": {18},
	} {
		at, got, seen := since, []int{}, 0
		var versions []string
		for {
			p := e.pull(t, a, at, "limit", limit, "collections", "todos")
			n := len(p.Changes)
			seen += n
			for _, c := range p.Changes {
				versions = append(versions, c.Version)
			}
			if p.Partial {
				n = -n
			}
			if n != 0 {
				got = append(got, n)
			}
			if p.HasMore && p.LastSeq <= at {
				t.Fatalf("limit %s: last_seq stays at %s", limit, at)
			}
			if at = p.LastSeq; !p.HasMore {
				break
			}
		}
		if !slices.Equal(got, want) || seen != 18 {
			t.Errorf("limit %s: pages of %v, want %v", limit, got, want)
		}
		if !slices.IsSorted(versions) || len(slices.Compact(versions)) != 18 {
			t.Errorf("limit %s: versions out of order or twice: %v", limit, versions)
		}
	}
	// until stops at a version, inclusive, and the page's position is there.
	all := e.pull(t, a, since, "collections", "todos").Changes
	p := e.pull(t, a, since, "until", all[6].Version)
	if len(p.Changes) != 7 || p.HasMore || !strings.HasPrefix(p.LastSeq, all[6].Version) || p.Seq != all[6].Seq {
		t.Errorf("until: %d changes, %s", len(p.Changes), p.LastSeq)
	}
	if rest, _ := e.pullAll(t, a, p.LastSeq); len(rest) != 11 {
		t.Errorf("after until: %d", len(rest))
	}
	if p := e.pull(t, a, since, "until", since[:len(since)-9], "wait", "20"); len(p.Changes) != 0 || p.LastSeq != since {
		t.Errorf("until = since: %+v", p)
	}
	// last_seq moves past what the caller may not see.
	b := tokenFor(t, "nobody", nil)
	if p := e.pull(t, b, since[:len(since)-9]); len(p.Changes) != 0 || p.LastSeq[:24] <= since[:24] {
		t.Errorf("last_seq stays at %s", p.LastSeq)
	}
}

// TestPullBytes: a page ends at the byte limit; one larger row comes alone.
func TestPullBytes(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{})
	a := tokenFor(t, "a", nil)
	since := e.here(t, a)
	e.exec(t, `INSERT INTO todos SELECT i, 'a', NULL, repeat('x', 3 << 20) FROM generate_series(1, 7) i`)
	e.exec(t, `INSERT INTO todos SELECT 8, 'a', NULL, repeat('y', 9 << 20)`)
	e.exec(t, `INSERT INTO todos SELECT 9, 'a', NULL, 'small'`)
	e.sync(t)
	var pages []string
	for at, more := since, true; more; {
		p := e.pull(t, a, at)
		ids := []string{}
		for _, c := range p.Changes {
			ids = append(ids, c.DocID)
		}
		pages = append(pages, fmt.Sprint(strings.Join(ids, "+"), " ", p.Partial))
		at, more = p.LastSeq, p.HasMore
	}
	if got := strings.Join(pages, ", "); got != "1+2 true, 3+4 true, 5+6 true, 7 false, 8 false, 9 false" {
		t.Errorf("pages %s", got)
	}
}

// TestPullWait: a waiting pull answers when something comes for its caller, and when its time is over.
func TestPullWait(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{})
	a := tokenFor(t, "a", nil)
	since := e.here(t, a)
	start := time.Now()
	if p := e.pull(t, a, since, "wait", "50ms"); len(p.Changes) != 0 || time.Since(start) < 50*time.Millisecond {
		t.Errorf("%+v after %s", p, time.Since(start))
	}
	got := make(chan *wirePage, 1)
	began := time.Now()
	go func() { got <- e.pull(t, a, since, "wait", "25") }()
	e.waiting(t, 1)
	e.exec(t, `INSERT INTO todos VALUES (1, 'other')`)
	e.sync(t)
	e.exec(t, `INSERT INTO todos VALUES (2, 'a')`)
	if p := <-got; briefs(p.Changes) != "upsert todos/2" {
		t.Errorf("%+v", p)
	}
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("the change did not wake the pull: %s", took)
	}
	e.waiting(t, 0) // it is no subscriber any more
	// A policy that names claims: a change that the caller may not see does not end the wait.
	c := tokenFor(t, "c", map[string]any{"level": 1})
	since = e.here(t, c)
	go func() { got <- e.pull(t, c, since, "wait", "25", "collections", "notes") }()
	e.waiting(t, 1)
	e.exec(t, `INSERT INTO notes VALUES ('a', 'en', 5)`)
	e.sync(t)
	e.exec(t, `INSERT INTO notes VALUES ('b', 'en', 1)`)
	if p := <-got; briefs(p.Changes) != `upsert notes/["b","en"]` {
		t.Errorf("%+v", p)
	}
	// A drain ends the wait with an ordinary answer.
	since = e.here(t, a)
	go func() { got <- e.pull(t, a, since, "wait", "25") }()
	e.waiting(t, 1)
	e.stop()
	if p := <-got; len(p.Changes) != 0 || p.LastSeq < since {
		t.Errorf("%+v", p)
	}
}

// waiting waits until the hub has so many subscribers.
func (e *env) waiting(t testing.TB, n int) {
	t.Helper()
	eventually(t, fmt.Sprint(n, " subscribers"), func() bool {
		e.g.hub.mu.Lock()
		defer e.g.hub.mu.Unlock()
		return len(e.g.hub.subs) == n
	})
}

// TestSince: each form of since, and why one can't be continued from.
func TestSince(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{before: `INSERT INTO vault VALUES (1, 'old');`}) // not from the beginning: the log knows nothing of that row
	a := tokenFor(t, "a", nil)
	admin := tokenFor(t, "a", map[string]any{"roles": "admin"})
	e.exec(t, `INSERT INTO todos VALUES (1, 'a')`)
	last := e.here(t, a)
	c, err := changelog.ParseCursor(last)
	ok(t, err)
	version := c.Version.Text(c.History)
	other := "0000"
	if c.History == other {
		other = "0001"
	}
	resync := func(token, since, collections, reason string, params ...string) {
		t.Helper()
		p := e.pull(t, token, since, params...)
		if !p.Resync || strings.Join(p.Collections, ",") != collections || p.Reason != reason || p.LastSeq != "" {
			t.Errorf("since %s: %+v", since, p)
		}
		s := e.subscribe(t, token, since, streamCollections(params))
		if f := s.want(t, "full_resync_required"); strings.Join(f.Collections, ",") != collections || f.Reason != reason {
			t.Errorf("stream from %s: %s", since, f.raw)
		}
		s.wantClose(t, 4410)
	}
	continues := func(token, since, want string, params ...string) {
		t.Helper()
		if p := e.pull(t, token, since, params...); p.Resync || briefs(p.Changes) != want {
			t.Errorf("since %s: %+v", since, p)
		}
	}
	continues(a, "0", "upsert todos/1") // the log reaches back to the collections' beginning
	resync(admin, "0", "vault", "too_old")
	continues(admin, "0", "upsert todos/1", "collections", "todos,news")
	if p := e.pull(t, a, c.Version.Text(other), "until", last); !p.Resync || p.Reason != "history_changed" { // the other collections were resynchronised in the new history
		t.Errorf("until of a newer history than since: %+v", p)
	}
	continues(a, last, "")
	continues(a, version, "")
	continues(a, fmt.Sprint(int64(c.Version)), "")
	continues(a, fmt.Sprint(int64(c.Version)-1), "upsert todos/1")
	resync(a, strings.Replace(last, "-"+c.History+"-", "-"+other+"-", 1), "news,notes,todos", "history_changed")
	resync(a, c.Version.Text(other), "news,notes,todos", "history_changed")
	resync(a, (c.Version + 1<<40).Text(c.History), "news,notes,todos", "ahead_of_log")
	resync(a, fmt.Sprint(int64(c.Version+1<<40)), "todos", "ahead_of_log", "collections", "todos")
	resync(tokenFor(t, "b", nil), last, "notes,todos", "scopes_changed")
	resync(tokenFor(t, "a", map[string]any{"teams": []int{1}}), last, "todos", "scopes_changed", "collections", "todos,news")
	resync(admin, last, "notes,todos,vault", "scopes_changed")
	continues(tokenFor(t, "b", nil), last, "", "collections", "news")               // depends on no claim
	continues(tokenFor(t, "a", map[string]any{"unnamed": 1, "jti": "x"}), last, "") // no policy names it
	e.exec(t, `TRUNCATE todos`)
	e.sync(t)
	resync(a, last, "todos", "too_old")
	continues(a, last, "", "collections", "news,notes")

	for _, wrong := range []string{"", "-1", "01", "1.5", "x", "99999999999999999", last + "0", last[:len(last)-1], version[:len(version)-4] + "A1B2", version + "-ABCDEF01",
		"20260502T150000.000Z-1005-a1b2", "20260230T150000.000Z-0005-a1b2", "\x00", "0x1", " 1"} {
		e.get(t, "/sync/pull?"+query("since", wrong), a).problem(t, InvalidSince)
		text, err := json.Marshal(wrong)
		ok(t, err)
		s := e.dial(t, "", "Authorization", "Bearer "+a)
		s.send(t, `{"type":"subscribe","since":`+string(text)+`}`)
		s.wantError(t, InvalidSince)
	}
	p := e.get(t, "/sync/pull", a).problem(t, InvalidSince)
	if len(p.Errors) != 1 || p.Errors[0].Field != "since" {
		t.Errorf("%+v", p)
	}
	for _, until := range []string{"x", c.Version.Text(other)} {
		e.get(t, "/sync/pull?"+query("since", last, "until", until, "collections", "news,notes"), a).problem(t, InvalidSince)
	}
	// A resync may end below the position of the other collections: nothing lies between.
	if p := e.pull(t, a, last, "until", "1"); len(p.Changes) != 0 || p.HasMore {
		t.Errorf("until below since gave %+v", p)
	}
}

// streamCollections makes the member collections of a subscribe frame from pull's parameters.
func streamCollections(params []string) string {
	if len(params) < 2 {
		return ""
	}
	return `,"collections":["` + strings.ReplaceAll(params[1], ",", `","`) + `"]`
}

// TestPullParameters: whatever is wrong with a query is said, and never ignored.
func TestPullParameters(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{})
	a := tokenFor(t, "a", nil)
	for q, code := range map[string]Code{
		"since=0&limit=0": InvalidLimit, "since=0&limit=1001": InvalidLimit, "since=0&limit=-5": InvalidLimit, "since=0&limit=ten": InvalidLimit,
		"since=0&limit=99999999999999999999": InvalidLimit, "since=0&wait=26": InvalidRequest, "since=0&wait=-1s": InvalidRequest, "since=0&wait=soon": InvalidRequest,
		"since=0&limt=5": InvalidRequest, "since=0&token=" + a + "&x=1": InvalidRequest, "since=0&collections=todo": UnknownCollection,
		"since=0&collections=todos,%00": UnknownCollection, "since=0&collections=vault": Forbidden, "since=0&collections=todos,vault": Forbidden,
	} {
		p := e.get(t, "/sync/pull?"+q, a).problem(t, code)
		if code != Forbidden && len(p.Errors) == 0 {
			t.Errorf("%s: no field is named: %+v", q, p)
		}
	}
	p := e.pull(t, a, "0", "collections", " todos , ,todos,", "limit", "1000", "wait", "0")
	if p.Changes == nil || len(p.Changes) != 0 {
		t.Errorf("%+v", p)
	}
	many := make([]int, changelog.MaxScopes)
	for i := range many {
		many[i] = i
	}
	e.get(t, "/sync/pull?since=0", tokenFor(t, "a", map[string]any{"teams": many})).problem(t, TooManyScopes)
}

// TestLogUnavailable: a log that can't be read is a retryable problem that tells clients nothing of its cause.
func TestLogUnavailable(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{})
	a := tokenFor(t, "a", nil)
	e.exec(t, `ALTER TABLE walgate.changes RENAME TO hidden`)
	if p := e.get(t, "/sync/pull?since=0", a).problem(t, LogUnavailable); strings.Contains(p.Detail, "walgate") {
		t.Errorf("%+v", p)
	}
	s := e.subscribe(t, a, "0", "")
	s.wantError(t, LogUnavailable)
	_, err := e.db.Exec(context.WithoutCancel(t.Context()), `ALTER TABLE walgate.hidden RENAME TO changes`)
	ok(t, err)
}

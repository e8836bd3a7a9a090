package gateway

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/walgate/walgate/changelog"
)

// fullLine is a line of GET /sync/full.
type fullLine struct {
	Collection string          `json:"collection"`
	DocID      string          `json:"doc_id"`
	Data       json.RawMessage `json:"data"`
	Deleted    bool            `json:"deleted"`
	End        bool            `json:"end"`
	Count      int             `json:"count"`
	LastSeq    string          `json:"last_seq"`
}

func (a *answer) lines(t testing.TB) (lines []fullLine) {
	t.Helper()
	for text := range strings.Lines(string(decompress(t, a))) {
		var l fullLine
		ok(t, json.Unmarshal([]byte(text), &l))
		lines = append(lines, l)
	}
	return lines
}

// full expects a page.
func (e *env) full(t testing.TB, token string, params ...string) *answer {
	t.Helper()
	a := e.get(t, "/sync/full?"+query(params...), token)
	if a.status != http.StatusOK {
		t.Fatalf("full: %d %s", a.status, a.body)
	}
	return a
}

// fullAll reads all pages.
func (e *env) fullAll(t testing.TB, token string, params ...string) (lines []fullLine, last string) {
	t.Helper()
	cursor := ""
	for {
		p := params
		if cursor != "" {
			p = append(slices.Clone(params), "cursor", cursor)
		}
		a := e.full(t, token, p...)
		if l := a.header.Get("X-Sync-LastSeq"); last != "" && l != last {
			t.Fatalf("L moved from %s to %s", last, l)
		}
		last = a.header.Get("X-Sync-LastSeq")
		lines = append(lines, a.lines(t)...)
		if cursor = a.header.Get("X-Sync-Cursor"); cursor == "" {
			return lines, last
		}
	}
}

func ids(lines []fullLine) string {
	var out []string
	for _, l := range lines {
		switch {
		case l.Deleted:
			out = append(out, "-"+l.Collection+"/"+l.DocID)
		case !l.End:
			out = append(out, l.Collection+"/"+l.DocID)
		}
	}
	return strings.Join(out, " ")
}

// TestFull: pages in key order, the caller's rows only, the documents byte for byte those of a pull, and no gap after L.
func TestFull(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{})
	a := tokenFor(t, "a", map[string]any{"teams": []int{7}, "level": 2})
	e.exec(t, `INSERT INTO todos VALUES (3, 'a', NULL, 'three'), (1, 'b', 7, ''), (2, 'b', 8, ''), (10, 'a', 7, ''); INSERT INTO todos VALUES (11, 'a', NULL, '', true);
		INSERT INTO notes VALUES ('n', 'en', 2), ('n', 'de', 1), ('m', 'en', 3); INSERT INTO vault VALUES (1)`)
	const want = `notes/["n","de"] notes/["n","en"] todos/1 todos/3 todos/10`
	for _, limit := range []string{"1", "2", "4", "5", "6", "7", "1000"} {
		lines, last := e.fullAll(t, a, "limit", limit)
		if ids(lines) != want {
			t.Errorf("limit %s: %s", limit, ids(lines))
		}
		if p := e.pull(t, a, last); p.Resync || len(p.Changes) != 0 {
			t.Errorf("limit %s: pull from L: %+v", limit, p)
		}
	}
	all := e.full(t, a, "limit", "all").lines(t)
	end := all[len(all)-1]
	slices.SortStableFunc(all[:5], func(a, b fullLine) int {
		return cmp.Or(cmp.Compare(a.Collection, b.Collection), cmp.Compare(len(a.DocID), len(b.DocID)), cmp.Compare(a.DocID, b.DocID))
	})
	if ids(all) != want || !end.End || end.Count != 5 { // a stream has an order of its own
		t.Errorf("all: %s, end %+v", ids(all), end)
	}
	byID := map[string]string{}
	changes, _ := e.pullAll(t, a, "0")
	for _, c := range changes {
		byID[c.Collection+"/"+c.DocID] = string(c.Data)
	}
	for _, l := range all[:5] {
		if got := byID[l.Collection+"/"+l.DocID]; got != string(l.Data) {
			t.Errorf("%s: full %s, pull %s", l.DocID, l.Data, got)
		}
	}
	if lines, _ := e.fullAll(t, a, "collections", "todos"); ids(lines) != "todos/1 todos/3 todos/10" {
		t.Errorf("one collection: %s", ids(lines))
	}
	none := tokenFor(t, "nobody", nil)
	empty := e.full(t, none)
	if len(empty.body) != 0 || empty.header.Get("X-Sync-Mode") != "replace" || empty.header.Get("X-Sync-Cursor") != "" {
		t.Errorf("nothing visible: %v %s", empty.header, empty.body)
	}
	if lines := e.full(t, none, "limit", "all").lines(t); len(lines) != 1 || !lines[0].End || lines[0].Count != 0 {
		t.Errorf("nothing visible: %+v", lines)
	}
}

// TestFullPages: paging with changes between the pages: what a page missed comes by pull from L.
func TestFullPages(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{})
	a := tokenFor(t, "a", nil)
	e.exec(t, `INSERT INTO todos SELECT i, 'a' FROM generate_series(1, 25) i`)
	replica := map[string]string{}
	put := func(lines []fullLine) {
		for _, l := range lines {
			replica[l.DocID] = string(l.Data)
		}
	}
	first := e.full(t, a, "limit", "10")
	put(first.lines(t))
	e.exec(t, `DELETE FROM todos WHERE id IN (2, 20)`)
	e.exec(t, `UPDATE todos SET title = 'new' WHERE id IN (3, 21)`)
	e.exec(t, `INSERT INTO todos VALUES (0, 'a'), (26, 'a')`)
	for cursor := first.header.Get("X-Sync-Cursor"); cursor != ""; {
		p := e.full(t, a, "limit", "10", "cursor", cursor)
		if p.header.Get("X-Sync-LastSeq") != first.header.Get("X-Sync-LastSeq") {
			t.Fatal("L moved")
		}
		if p.header.Get("X-Sync-Settles") == "" {
			t.Error("a later page shows later states, and no X-Sync-Settles says so")
		}
		put(p.lines(t))
		cursor = p.header.Get("X-Sync-Cursor")
	}
	e.sync(t)
	changes, _ := e.pullAll(t, a, first.header.Get("X-Sync-LastSeq"))
	for _, c := range changes {
		if delete(replica, c.DocID); c.Operation == "upsert" {
			replica[c.DocID] = string(c.Data)
		}
	}
	rows, err := e.db.Query(t.Context(), `SELECT id::text, row_to_json(t)::text FROM todos t`)
	ok(t, err)
	n := 0
	for rows.Next() {
		var id, doc string
		ok(t, rows.Scan(&id, &doc))
		if n++; replica[id] != doc {
			t.Errorf("%s: %s, want %s", id, replica[id], doc)
		}
	}
	if len(replica) != n || n != 25 {
		t.Errorf("%d documents, the table has %d", len(replica), n)
	}
}

// TestFullEncodings: gzip and zstd, on pages and on limit=all.
func TestFullEncodings(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{})
	a := tokenFor(t, "a", nil)
	e.exec(t, `INSERT INTO todos SELECT i, 'a', NULL, repeat('word ', 20) FROM generate_series(1, 2000) i`)
	for _, limit := range []string{"10000", "all"} {
		plain := e.full(t, a, "limit", limit)
		for _, encoding := range []string{"gzip", "zstd"} {
			got := e.get(t, "/sync/full?"+query("limit", limit), a, "Accept-Encoding", encoding)
			if got.header.Get("Content-Encoding") != encoding || !strings.Contains(got.header.Get("Vary"), "Accept-Encoding") {
				t.Errorf("%s: %v", encoding, got.header)
			}
			if len(got.body) > len(plain.body)/3 || ids(got.lines(t)) != ids(plain.lines(t)) {
				t.Errorf("%s of %s: %d bytes, plain %d", encoding, limit, len(got.body), len(plain.body))
			}
		}
	}
}

// TestFullMerge: with since, documents and tombstones; where since can't be continued from, replace.
func TestFullMerge(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{})
	a := tokenFor(t, "a", nil)
	e.exec(t, `INSERT INTO todos SELECT i, 'a' FROM generate_series(1, 8) i`)
	since := e.here(t, a)
	e.exec(t, `DELETE FROM todos WHERE id IN (1, 2); UPDATE todos SET owner = 'b' WHERE id = 3; UPDATE todos SET archived = true WHERE id = 4`)
	e.exec(t, `INSERT INTO todos VALUES (1, 'a')`)
	const want = "-todos/2 -todos/3 -todos/4 todos/1 todos/5 todos/6 todos/7 todos/8"
	for _, limit := range []string{"all", "1000", "1", "2"} {
		var lines []fullLine
		if limit == "all" {
			got := e.full(t, a, "limit", limit, "since", since)
			if lines = got.lines(t); got.header.Get("X-Sync-Mode") != "merge" {
				t.Errorf("mode %s", got.header.Get("X-Sync-Mode"))
			}
		} else {
			lines, _ = e.fullAll(t, a, "limit", limit, "since", since)
		}
		// Where pages divide the tombstones, one may come for a document that follows later: applied in order it is the same.
		if got := held(lines); got != want {
			t.Errorf("limit %s: %s", limit, got)
		}
	}
	for name, c := range map[string]struct{ token, since string }{
		"zero of another history": {a, "20300101T000000.000Z-0000-ffff"}, "other scopes": {tokenFor(t, "a", map[string]any{"teams": []int{1}}), since},
		"ahead": {a, "20880101T000000.000Z-0000-" + since[26:30]},
	} {
		if got := e.full(t, c.token, "since", c.since); got.header.Get("X-Sync-Mode") != "replace" || strings.Contains(string(got.body), "deleted") {
			t.Errorf("%s: %v %s", name, got.header, got.body)
		}
	}
}

// held is what a client holds after the lines, sorted.
func held(lines []fullLine) string {
	state := map[string]bool{}
	for _, l := range lines {
		if !l.End {
			state[l.Collection+"/"+l.DocID] = !l.Deleted
		}
	}
	var out []string
	for id, there := range state {
		if !there {
			id = "-" + id
		}
		out = append(out, id)
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

// TestFullCursor: a cursor that nothing rests on any more, and one that was tampered with.
func TestFullCursor(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{})
	a := tokenFor(t, "a", nil)
	e.exec(t, `INSERT INTO todos SELECT i, CASE WHEN i % 2 = 0 THEN 'a' ELSE 'b' END FROM generate_series(1, 30) i`)
	cursor := e.full(t, a, "limit", "3").header.Get("X-Sync-Cursor")
	again := func(token, cursor string, params ...string) *answer {
		return e.get(t, "/sync/full?"+query(append([]string{"limit", "3", "cursor", cursor}, params...)...), token)
	}
	if got := again(a, cursor); got.status != http.StatusOK {
		t.Fatalf("%d %s", got.status, got.body)
	}
	again(tokenFor(t, "b", nil), cursor).problem(t, CursorExpired)
	again(tokenFor(t, "a", map[string]any{"teams": []int{1}}), cursor).problem(t, CursorExpired)
	again(a, cursor, "collections", "todos").problem(t, CursorExpired)
	altered := func(change func(*fullCursor)) string {
		c, err := parseFullCursor(cursor)
		ok(t, err)
		change(c)
		return c.String()
	}
	for name, c := range map[string]string{
		"history": altered(func(c *fullCursor) { c.History = "0" }), "floor": altered(func(c *fullCursor) { c.Floors[0]++ }),
		"ahead": altered(func(c *fullCursor) { c.Last += 1 << 40 }), "names": altered(func(c *fullCursor) { c.Collections[0] = "vault" }),
		"key of two": altered(func(c *fullCursor) { c.Key = []string{"1", "2"} }),
	} {
		if got := again(a, c); got.status != http.StatusGone && got.status != http.StatusForbidden {
			t.Errorf("%s: %d %s", name, got.status, got.body)
		}
	}
	// No cursor reads another's rows, whatever it holds.
	for _, c := range []string{altered(func(c *fullCursor) { c.Key = []string{"0"} }), altered(func(c *fullCursor) { c.Tombstones = 0; c.Merge = true })} {
		got := again(a, c)
		for _, l := range got.lines(t) {
			if !l.Deleted && !strings.Contains(string(l.Data), `"owner":"a"`) {
				t.Errorf("another's row: %s", l.Data)
			}
		}
	}
	for _, bad := range []string{"x", "%%%", "e30", cursor[:len(cursor)/2], altered(func(c *fullCursor) { c.Index = -1 }),
		altered(func(c *fullCursor) { c.Index = 99 }), altered(func(c *fullCursor) { c.Floors = nil }), altered(func(c *fullCursor) { c.Collections, c.Floors = nil, nil })} {
		again(a, bad).problem(t, InvalidCursor)
	}
	// A key that isn't of the column's type is the cursor's fault, not the source's.
	again(a, altered(func(c *fullCursor) { c.Key = []string{"x"} })).problem(t, InvalidCursor)
	e.exec(t, `TRUNCATE todos`)
	e.sync(t)
	again(a, cursor).problem(t, CursorExpired)
}

// TestFullParameters: wrong queries.
func TestFullParameters(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{})
	a := tokenFor(t, "a", nil)
	for q, code := range map[string]Code{
		"limit=0": InvalidLimit, "limit=10001": InvalidLimit, "limit=ALL": InvalidLimit, "since=x": InvalidSince, "colections=todos": InvalidRequest,
		"collections=nope": UnknownCollection, "collections=vault": Forbidden, "cursor=x": InvalidCursor, "limit=all&cursor=x": InvalidRequest,
	} {
		e.get(t, "/sync/full?"+q, a).problem(t, code)
	}
}

// TestFullDeparted: a client that goes away in the middle of limit=all leaves no connection, snapshot or place behind.
func TestFullDeparted(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{gateway: func(g *Gateway) { g.limits.fullWrite = 5 * time.Second }})
	a := tokenFor(t, "a", nil)
	e.exec(t, `INSERT INTO todos SELECT i, 'a', NULL, repeat(md5(i::text), 200) FROM generate_series(1, 8000) i`)
	for range 6 { // more than may run at a time
		ctx, cancel := context.WithCancel(t.Context())
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, e.base+"/sync/full?limit=all", nil)
		ok(t, err)
		req.Header.Set("Authorization", "Bearer "+a)
		res, err := e.client.Do(req)
		ok(t, err)
		if res.StatusCode != http.StatusOK {
			t.Fatalf("%d: a place was not given back", res.StatusCode)
		}
		_, err = bufio.NewReader(io.LimitReader(res.Body, 10000)).ReadString('\n')
		ok(t, err)
		cancel()
		res.Body.Close()
		eventually(t, "the place is free", func() bool {
			if !e.g.fulls.TryAcquire(4) {
				return false
			}
			e.g.fulls.Release(4)
			return true
		})
	}
	eventually(t, "no snapshot is open", func() bool {
		var n int
		ok(t, e.db.QueryRow(t.Context(), `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in transaction%'`).Scan(&n))
		return n == 0 && e.g.o.Source.Stat().AcquiredConns() == 0
	})
}

// TestFullBusy: full resyncs are admitted at a bounded rate; the others are told when to come again.
func TestFullBusy(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{})
	if !e.g.fulls.TryAcquire(4) {
		t.Fatal("places are taken at the start")
	}
	e.get(t, "/sync/full", tokenFor(t, "a", nil)).problem(t, RateLimited)
	e.g.fulls.Release(4)
	e.full(t, tokenFor(t, "a", nil))
}

// TestFullFence: without a fence passed there is no L, so the answer is a retryable problem; nothing is held afterwards.
func TestFullFence(t *testing.T) {
	t.Parallel()
	var mode atomic.Int32
	e := newEnv(t, setup{gateway: func(g *Gateway) { g.limits.fence = 2 * time.Second }, options: func(o *Options) {
		fence := o.Fence
		o.Fence = func(ctx context.Context) (changelog.LSN, error) {
			lsn, err := fence(ctx)
			switch mode.Load() {
			case 1:
				lsn += 1 << 40 // the log never gets there
			case 2:
				err = errors.New("no such host secret.internal")
			}
			return lsn, err
		}
	}})
	a := tokenFor(t, "a", nil)
	for want, m := range map[Code]int32{LogBehind: 1, SourceUnavailable: 2} {
		mode.Store(m)
		for _, limit := range []string{"10", "all"} {
			p := e.get(t, "/sync/full?limit="+limit, a).problem(t, want)
			if strings.Contains(p.Detail, "secret") {
				t.Errorf("%+v", p)
			}
		}
	}
	mode.Store(0)
	if n := e.g.o.Source.Stat().AcquiredConns(); n != 0 || !e.g.fulls.TryAcquire(4) {
		t.Errorf("%d connections are held, or places", n)
	}
	e.g.fulls.Release(4)
	e.full(t, a)
}

// TestFullLarge: rows of megabytes: pages end at the byte limit, one larger row alone, and all of them come.
func TestFullLarge(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{})
	a := tokenFor(t, "a", nil)
	e.exec(t, `INSERT INTO todos SELECT i, 'a', NULL, repeat('x', 3 << 20) FROM generate_series(1, 4) i`)
	e.exec(t, `INSERT INTO todos VALUES (5, 'a', NULL, repeat('x', 20 << 20)), (6, 'a', NULL, '')`)
	for limit, want := range map[string]string{"1000": "1+2 3+4 5 6", "3": "1+2 3+4 5 6", "1": "1 2 3 4 5 6"} {
		var pages []string
		for cursor, more := "", true; more; {
			p := []string{"limit", limit, "collections", "todos"}
			if cursor != "" {
				p = append(p, "cursor", cursor)
			}
			got := e.full(t, a, p...)
			var page []string
			for _, l := range got.lines(t) {
				page = append(page, l.DocID)
			}
			if len(page) > 0 { // the end may only show on a page of its own
				pages = append(pages, strings.Join(page, "+"))
			}
			cursor = got.header.Get("X-Sync-Cursor")
			more = cursor != ""
		}
		if got := strings.Join(pages, " "); got != want {
			t.Errorf("limit %s: pages %s, want %s", limit, got, want)
		}
	}
	if lines := e.full(t, a, "limit", "all").lines(t); ids(lines) != "todos/1 todos/2 todos/3 todos/4 todos/5 todos/6" || lines[6].Count != 6 {
		t.Errorf("all: %s", ids(lines))
	}
}

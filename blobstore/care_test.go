package blobstore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"
)

// naming is what rows name: the log's part in these tests.
type naming struct {
	mu       sync.Mutex
	ids      map[string]bool
	events   map[string]int64 // of files that nothing is withheld of
	unfilled string
	behind   error
	failing  error
	passes   int
	onPass   func(n int) // called with the number of the pass, before it is over
	asked    []int       // how many ids each question had
}

func (n *naming) Unfilled(context.Context) (string, error) { return n.unfilled, nil }

func (n *naming) Pass(context.Context) error {
	n.passes++
	if n.onPass != nil {
		n.onPass(n.passes)
	}
	return n.behind
}

func (n *naming) Named(_ context.Context, ids []string) ([]bool, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.asked = append(n.asked, len(ids))
	out := make([]bool, len(ids))
	for i, id := range ids {
		out[i] = n.ids[id]
	}
	return out, n.failing
}

func (n *naming) Unwithheld(_ context.Context, ids []string) ([]int64, error) {
	out := make([]int64, len(ids))
	for i, id := range ids {
		out[i] = n.events[id]
	}
	return out, nil
}

func (n *naming) set(id string, named bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.ids[id] = named
}

// caring is a fixture whose files are looked after.
type caring struct {
	*fixture
	names *naming
	care  *Care
}

func newCaring(t *testing.T) *caring {
	t.Helper()
	return caringOf(t, newFixture(t, RecordsOptions{Quota: 1 << 20}))
}

func caringOf(t *testing.T, f *fixture) *caring {
	names := &naming{ids: map[string]bool{}}
	return &caring{fixture: f, names: names, care: NewCare(CareOptions{Source: f.pool, Store: f.store, Records: f.Records, References: names,
		Grace: time.Hour, UploadTTL: time.Hour, Guard: 20, Logger: slog.New(slog.DiscardHandler)})}
}

func (c *caring) round(o RoundOptions) *Report {
	c.t.Helper()
	r, err := c.care.Round(c.t.Context(), o)
	if err != nil {
		c.t.Fatal(err)
	}
	return r
}

// file publishes a text.
func (c *caring) file(id, text string) {
	c.t.Helper()
	c.publish(c.upload("ana", id, text), Created)
}

// age makes what was noted lie the grace period back.
func (c *caring) age() {
	c.t.Helper()
	// In the order of their ids: a round that is under way may lock several as well.
	c.exec(`UPDATE walgate.files SET unreferenced_since = unreferenced_since - interval '2 hours'
		WHERE attachment_id IN (SELECT attachment_id FROM walgate.files WHERE unreferenced_since IS NOT NULL ORDER BY attachment_id FOR UPDATE) AND unreferenced_since IS NOT NULL`)
}

// state is a file's state, and whether its bytes are noted as gone.
func (c *caring) state(id string) string {
	c.t.Helper()
	return ask[string](c.fixture, `SELECT state::text || CASE WHEN bytes_gone THEN ' gone' ELSE '' END || CASE WHEN unreferenced_since IS NOT NULL THEN ' noted' ELSE '' END FROM walgate.files WHERE attachment_id = $1`, id)
}

// events are those of an id in the stream.
func (c *caring) events(id string) string {
	c.t.Helper()
	return ask[string](c.fixture, `SELECT string_agg(event::text, '' ORDER BY id) FROM walgate.attachments WHERE attachment_id = $1`, id)
}

// used is what counts of a subject's quota.
func (c *caring) used() int64 {
	c.t.Helper()
	return ask[int64](c.fixture, `SELECT used FROM walgate.quotas WHERE subject = 'ana'`)
}

func (c *caring) expect(id, state, events string) {
	c.t.Helper()
	if s, e := c.state(id), c.events(id); s != state || e != events {
		c.t.Errorf("%s is %q with events %s, want %q with %s", id, s, e, state, events)
	}
}

// there says whether an id's objects are in the store.
func (c *caring) there(key string) bool {
	c.t.Helper()
	_, err := c.store.Size(c.t.Context(), key)
	if err != nil && !errors.Is(err, ErrNotFound) {
		c.t.Fatal(err)
	}
	return err == nil
}

func (c *caring) key(id string) string {
	c.t.Helper()
	return ask[string](c.fixture, `SELECT storage_key FROM walgate.files WHERE attachment_id = $1`, id)
}

func TestSweepHasTwoPhases(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"file", "mem", "s3"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, RecordsOptions{Quota: 1 << 20})
			f.store = open(t, kind)
			c := caringOf(t, f)
			c.file("kept", "kept")
			c.file("lonely", "lonely")
			c.names.set("kept", true)
			key := c.key("lonely")
			r := c.round(RoundOptions{})
			c.expect("lonely", "u noted", "u")
			if r.Sweep.Noted != (Tally{1, 6}) {
				t.Errorf("noted %v", r.Sweep.Noted)
			}
			c.round(RoundOptions{})
			c.expect("lonely", "u noted", "u")
			c.age()
			r = c.round(RoundOptions{})
			c.expect("lonely", "d noted", "ud")
			if !c.there(key) || c.used() != 10 || r.Sweep.Deleted != (Tally{1, 6}) {
				t.Errorf("after the first phase: bytes there: %t, used %d, %+v", c.there(key), c.used(), r.Sweep)
			}
			r = c.round(RoundOptions{})
			c.expect("lonely", "d gone noted", "ud")
			if c.there(key) || c.used() != 4 || r.Sweep.Freed != (Tally{1, 6}) {
				t.Errorf("after the second phase: bytes there: %t, used %d, %+v", c.there(key), c.used(), r.Sweep)
			}
			c.round(RoundOptions{})
			c.expect("kept", "u", "u")
			if c.used() != 4 {
				t.Errorf("the quota was freed again: %d", c.used())
			}
			c.settled()
		})
	}
}

// TestFileIsNamedAgain has a row name a file at each point of its sweep.
func TestFileIsNamedAgain(t *testing.T) {
	t.Parallel()
	c := newCaring(t)
	c.file("photo", "bytes")
	for _, step := range []struct {
		what                   string
		before                 func()
		state, events, settled string
	}{
		{"while it waits", func() { c.round(RoundOptions{}); c.names.set("photo", true) }, "u", "u", "u"},
		{"when it is due", func() { c.round(RoundOptions{}); c.age(); c.names.set("photo", true) }, "u", "u", "u"},
		{"while the round decides", func() {
			c.round(RoundOptions{})
			c.age()
			c.names.passes, c.names.onPass = 0, func(n int) { c.names.set("photo", n > 1) }
		}, "u", "u", "u"},
		{"when it is deleted", func() { c.round(RoundOptions{}); c.age(); c.round(RoundOptions{}); c.names.set("photo", true) }, "u", "udr", "u"},
		{"while its bytes are about to go", func() {
			c.round(RoundOptions{})
			c.age()
			c.round(RoundOptions{})
			c.names.passes, c.names.onPass = 0, func(n int) { c.names.set("photo", n > 1) }
		}, "u", "udrdr", "u"},
	} {
		step.before()
		c.round(RoundOptions{})
		if got := c.text("photo"); got != "bytes" {
			t.Fatalf("named %s: it holds %q", step.what, got)
		}
		c.names.onPass = nil
		c.expect("photo", step.state, step.events)
		if t.Failed() {
			t.Fatalf("named %s", step.what)
		}
		c.names.set("photo", false)
	}
	c.settled()
}

func TestDeletedFileNeverReturns(t *testing.T) {
	t.Parallel()
	c := newCaring(t)
	c.file("photo", "bytes")
	c.round(RoundOptions{}) // noted
	c.names.set("photo", true)
	file, err := c.Find(t.Context(), "photo")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Remove(t.Context(), Removal{AttachmentID: "photo", EventID: file.EventID, Subject: "bob"}); err != nil {
		t.Fatal(err)
	}
	c.names.unfilled = "the log is new" // which doesn't matter to what somebody deleted
	c.round(RoundOptions{})
	c.expect("photo", "d gone", "ud")
	if c.there(file.StorageKey) || c.used() != 0 {
		t.Errorf("bytes there: %t, used %d", c.there(file.StorageKey), c.used())
	}
}

// TestBytesThatAreLostDontReturn names a swept file whose bytes have gone meanwhile.
func TestBytesThatAreLostDontReturn(t *testing.T) {
	t.Parallel()
	c := newCaring(t)
	c.file("photo", "bytes")
	c.round(RoundOptions{})
	c.age()
	c.round(RoundOptions{})
	c.names.set("photo", true)
	if err := c.store.Delete(t.Context(), c.key("photo")); err != nil {
		t.Fatal(err)
	}
	c.round(RoundOptions{})
	c.expect("photo", "d gone noted", "ud")
	c.settled()
}

// TestUnsureSweepsNothing keeps everything where the log can't say for certain what rows name.
func TestUnsureSweepsNothing(t *testing.T) {
	t.Parallel()
	c := newCaring(t)
	c.file("deleted", "deleted")
	c.round(RoundOptions{})
	c.age()
	c.round(RoundOptions{})
	c.file("due", "due")
	c.names.unfilled = "so that the bytes stay"
	c.round(RoundOptions{})
	c.file("new", "new")
	c.expect("deleted", "d noted", "ud")
	c.exec(`UPDATE walgate.files SET unreferenced_since = now() - interval '2 hours' WHERE attachment_id = 'due'`)
	for what, set := range map[string]func(){
		"a fill isn't done":      func() { c.names.unfilled = "collection docs: 3 of about 7" },
		"the log is behind":      func() { c.names.behind = errors.New("the log is behind") },
		"the log can't be asked": func() { c.names.failing = errors.New("connection refused") },
		"a fill begins meanwhile": func() {
			c.names.onPass = func(n int) { c.names.unfilled = map[bool]string{true: "a fill begins"}[n > 1] }
		},
	} {
		c.names.unfilled, c.names.behind, c.names.failing, c.names.onPass, c.names.passes = "", nil, nil, nil, 0
		set()
		before := c.dump()
		r, err := c.care.Round(t.Context(), RoundOptions{})
		if err == nil && len(r.HeldUp()) == 0 {
			t.Errorf("%s: nobody says so", what)
		}
		if after := c.dump(); what != "a fill begins meanwhile" && after != before {
			t.Errorf("%s: something was done:\n%s\n%s", what, before, after)
		}
		c.expect("due", "u noted", "u")
		c.expect("deleted", "d noted", "ud")
	}
}

// dump is what all tables that care may touch, and the store, hold, but for what care notes of itself.
func (c *caring) dump() string {
	c.t.Helper()
	var b strings.Builder
	for _, table := range []string{"files", "uploads", "quotas", "attachments", "pushes"} {
		b.WriteString(ask[string](c.fixture, fmt.Sprintf(`SELECT coalesce(string_agg(t::text, E'\n' ORDER BY t::text), '') FROM walgate.%s t`, table)))
		b.WriteString("\n")
	}
	for o, err := range c.store.List(c.t.Context(), "") {
		if err != nil {
			c.t.Fatal(err)
		}
		fmt.Fprintln(&b, o.Key, o.Size, o.ModTime)
	}
	return b.String()
}

func TestGuard(t *testing.T) {
	t.Parallel()
	c := newCaring(t)
	c.bulk(100)
	for i := range 100 {
		c.names.set(fmt.Sprint("bulk", i), i >= guardFloor) // as many as always may go
	}
	c.round(RoundOptions{})
	c.age()
	if r := c.round(RoundOptions{}); r.Sweep.Deleted.Files != guardFloor || len(r.HeldUp()) != 0 {
		t.Fatalf("%d of 100: %+v", guardFloor, r.Sweep)
	}
	c.exec(`TRUNCATE walgate.files, walgate.attachments`)
	c.bulk(300)
	for i := range 300 {
		c.names.set(fmt.Sprint("bulk", i), i >= 61) // more than 20 percent
	}
	c.round(RoundOptions{})
	c.age()
	before := c.dump()
	for _, dry := range []bool{true, false} {
		r := c.round(RoundOptions{DryRun: dry})
		if held := r.Sweep.HeldUp; len(held) != 1 || !held[0].Guard || !strings.Contains(held[0].Why, "61 of 300") || r.Sweep.Due.Files != 61 || r.Sweep.Deleted.Files != 0 || c.dump() != before {
			t.Fatalf("61 of 300, dry run %t: %+v", dry, r.Sweep)
		}
	}
	s, err := c.care.Status(t.Context())
	if err != nil || !s.GuardTripped() || s.Unreferenced.Files != 61 || s.Uploaded.Files != 300 {
		t.Errorf("status %+v (%v)", s, err)
	}
	if r := c.round(RoundOptions{Force: true}); r.Sweep.Deleted.Files != 61 || len(r.HeldUp()) != 0 {
		t.Errorf("by force: %+v", r.Sweep)
	}
	if s, err = c.care.Status(t.Context()); err != nil || s.GuardTripped() || s.Deleted.Files != 61 {
		t.Errorf("status by force %+v (%v)", s, err)
	}
}

// bulk makes records of files whose bytes aren't there, which a sweep doesn't ask for.
func (c *caring) bulk(n int) {
	c.t.Helper()
	c.exec(`INSERT INTO walgate.files (attachment_id, event_id, state, storage_key, size, content_type, sha256, subject)
		SELECT 'bulk' || i, i, 'u', format('walgate/%s/%s', left(h, 2), h), 1, 'text/plain', '', 'ana' FROM (SELECT i, md5(i::text) AS h FROM generate_series(0, $1::int - 1) i) s`, n)
	c.exec(`UPDATE walgate.care SET reconciled_at = now()`)
}

// heldRound begins a round that stands still until done is closed, and has another instance find that it is under way.
func (c *caring) heldRound() (first <-chan error, other *caring, done chan struct{}) {
	c.t.Helper()
	inside, done := make(chan struct{}), make(chan struct{})
	c.names.passes, c.names.onPass = 0, func(n int) {
		if n == 1 {
			close(inside)
			<-done
		}
	}
	ended := make(chan error, 1)
	go func() {
		_, err := c.care.Round(context.WithoutCancel(c.t.Context()), RoundOptions{})
		ended <- err
	}()
	<-inside
	other = caringOf(c.t, c.fixture)
	if _, err := other.care.Round(c.t.Context(), RoundOptions{}); !errors.Is(err, ErrCareBusy) {
		c.t.Errorf("a second round beside the first: %v", err)
	}
	return ended, other, done
}

func TestOneInstanceAtATime(t *testing.T) {
	t.Parallel()
	c := newCaring(t)
	c.file("photo", "bytes")
	first, other, done := c.heldRound()
	if r := other.round(RoundOptions{DryRun: true}); r.Sweep.Noted.Files != 1 {
		t.Errorf("a dry run beside it: %+v", r.Sweep)
	}
	close(done)
	if err := <-first; err != nil {
		t.Error(err)
	}
	other.round(RoundOptions{})
}

// TestUploadsAndPushesComeFirst leaves files alone that somebody has locked, and keeps one that was uploaded again.
func TestUploadsAndPushesComeFirst(t *testing.T) {
	t.Parallel()
	c := newCaring(t)
	c.file("busy", "bytes")
	c.file("again", "again")
	c.round(RoundOptions{})
	c.age()
	tx, err := c.pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(context.WithoutCancel(t.Context()))
	if _, err := tx.Exec(t.Context(), `SELECT pg_advisory_xact_lock_shared($1)`, LockKey("busy")); err != nil {
		t.Fatal(err)
	}
	c.names.passes, c.names.onPass = 0, func(n int) { // before the files are looked at
		if n == 1 {
			c.publish(c.upload("ana", "again", "again"), Same)
		}
	}
	if r := c.round(RoundOptions{}); r.Sweep.Busy != 1 || r.Sweep.Deleted.Files != 0 {
		t.Errorf("%+v", r.Sweep)
	}
	c.expect("busy", "u noted", "u")
	c.expect("again", "u noted", "u")
	if _, err := tx.Exec(t.Context(), `ROLLBACK; BEGIN; SELECT pg_advisory_xact_lock(`+fmt.Sprint(LockAll)+`)`); err != nil { // a push of many ids
		t.Fatal(err)
	}
	if r := c.round(RoundOptions{}); r.Sweep.Busy != 1 || r.Sweep.Deleted.Files != 0 {
		t.Errorf("%+v", r.Sweep)
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.round(RoundOptions{})
	c.expect("busy", "d noted", "ud")
	c.expect("again", "u noted", "u")
	old := c.key("busy") // is deleted, and uploaded anew while its bytes wait
	c.file("busy", "other")
	c.names.set("busy", true)
	c.round(RoundOptions{})
	if got := c.text("busy"); got != "other" || c.there(old) || c.used() != 10 {
		t.Errorf("it holds %q; the old bytes are there: %t; used %d", got, c.there(old), c.used())
	}
	c.settled()
}

// TestLookedAtAgain: what was seen before a file was locked may be another file's by then.
func TestLookedAtAgain(t *testing.T) {
	t.Parallel()
	c := newCaring(t)
	c.file("photo", "old")
	c.round(RoundOptions{})
	c.age()
	c.round(RoundOptions{})
	c.expect("photo", "d noted", "ud")
	conn, err := c.pool.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Release()
	r := &round{c: c.care, conn: conn.Conn()}
	seen, err := r.records(t.Context(), `state = 'd'`)
	if err != nil || len(seen) != 1 {
		t.Fatal(seen, err)
	}
	c.file("photo", "new")
	err = r.acting(t.Context(), seen, func(_ context.Context, list []record) error {
		t.Errorf("something is done to %+v, which nobody has looked at", list)
		return nil
	})
	if err != nil || r.Sweep.Busy != 1 {
		t.Errorf("%+v (%v)", r.Sweep, err)
	}
}

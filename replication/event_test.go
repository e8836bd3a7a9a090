package replication

import (
	"fmt"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/policies"
)

// operations returns what a scope is told, as "op id" in version order.
func (s *source) operations(scope policies.ScopeKey) string {
	s.t.Helper()
	s.settle()
	p, err := s.log.Operations(s.t.Context(), changelog.OperationsRequest{Scopes: [][16]byte{scope}, Limit: 1000})
	s.ok(err)
	var out []string
	for _, o := range p.Operations {
		op := "u"
		if o.Delete {
			op = "d"
		}
		out = append(out, op+" "+o.ID)
	}
	return strings.Join(out, ", ")
}

// scopeOf returns the scope of a person's things.
func (s *source) scopeOf(who string) policies.ScopeKey {
	s.t.Helper()
	set := s.watcher.Current().Set
	caller, err := set.NewCaller(who, nil, map[string]any{"sub": who})
	s.ok(err)
	return caller.Scopes(set.ByName("things"))[0]
}

// TestUploadsAreOrderedWithRows: an upload counts from its place in the order on, before, between and after the rows that
// name it, within their transaction or alone.
func TestUploadsAreOrderedWithRows(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{specs: thingsSpec(), before: thingsTable})
	s.filled()
	ana, bob := s.scopeOf("ana"), s.scopeOf("bob")
	expect := func(scope policies.ScopeKey, want string) {
		t.Helper()
		if got := s.operations(scope); got != want {
			t.Errorf("told: %s\nwant: %s\nlog:\n%s", got, want, s.logged)
		}
	}
	s.upload("before", "u")
	s.exec(`INSERT INTO things (a, b, owner, photo) VALUES (1, 'x', 'ana', 'before')`)
	s.exec(`INSERT INTO things (a, b, owner, photo) VALUES (2, 'x', 'ana', 'after')`)
	expect(ana, "u before")
	s.upload("after", "u")
	expect(ana, "u before, u after")
	s.exec(`BEGIN; INSERT INTO things (a, b, owner, photo) VALUES (3, 'x', 'ana', 'between')`)
	s.exec(uploadSQL, "between", "u")
	s.exec(`INSERT INTO things (a, b, owner, photo) VALUES (4, 'x', 'bob', 'between'); COMMIT`)
	expect(ana, "u before, u after, u between")
	expect(bob, "u between")
	s.exec(`UPDATE things SET owner = 'bob' WHERE a = 1`) // moves
	expect(ana, "u after, u between, d before")
	expect(bob, "u between, u before")
	s.upload("between", "d")
	expect(ana, "u after, d before, d between")
	s.exec(`BEGIN; DELETE FROM things WHERE a = 2; INSERT INTO things (a, b, owner, photo) VALUES (2, 'x', 'ana', 'after'); COMMIT`)
	s.exec(`BEGIN; UPDATE things SET photo = NULL WHERE a = 2; INSERT INTO things (a, b, owner, tags) VALUES (9, 'x', 'ana', '{after}'); COMMIT`)
	s.exec(`UPDATE things SET b = 'new' WHERE a = 9`) // another key
	s.exec(`BEGIN; UPDATE things SET gone = now() WHERE a = 9; ROLLBACK`)
	expect(ana, "u after, d before, d between") // nothing new, and at its old place
	s.exec(`UPDATE things SET hidden = true WHERE a = 9`)
	expect(ana, "d before, d between, d after")
	s.exec(`UPDATE things SET body = 'x' WHERE a = 9; UPDATE things SET hidden = false WHERE a = 9`)
	expect(ana, "d before, d between, u after")
	s.sameHeld()
}

// TestValuesStoredOutOfLine: an update of another column doesn't send them, and drops no reference.
func TestValuesStoredOutOfLine(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{specs: thingsSpec(), before: thingsTable})
	s.filled() // from here on the rows come by the stream only
	s.upload("far", "u")
	s.exec(`INSERT INTO things (a, b, owner, extra) VALUES (1, 'x', 'ana', jsonb_build_object('pad', repeat('0123456789', 2000), 'photos', '[{"id": "far"}]'::jsonb))`)
	s.exec(`UPDATE things SET body = 'one'; UPDATE things SET photo = 'far'; UPDATE things SET photo = NULL; UPDATE things SET owner = 'bob'; UPDATE things SET b = 'y'`)
	if n := len(s.documentsHeld("far")); n != 1 {
		t.Errorf("%d documents hold it, want 1", n)
	}
	s.sameHeld()
	if got := s.operations(s.scopeOf("bob")); got != "u far" {
		t.Errorf("told: %s", got)
	}
}

// TestEventsAlone: a transaction that holds nothing but an event has a version.
func TestEventsAlone(t *testing.T) {
	t.Parallel()
	s, pieces := bareStream(nil)
	s.seq.logged = 100
	r := &relation{oid: 300, schema: "walgate", name: "attachments"}
	for _, name := range eventColumns {
		r.columns = append(r.columns, relationColumn{name: name, typ: 25})
	}
	r.columns = append(r.columns, relationColumn{name: "of a newer walgate"})
	s.ok(t, s.relation(t.Context(), r))
	const scope = "00112233-4455-6677-8899-aabbccddeeff"
	for _, c := range []struct {
		begins, end changelog.LSN
		want        int
	}{{90, 100, 0}, {100, 110, 1}} {
		*pieces = nil
		s.seq.begin(&message{kind: msgBegin, xid: 9, begins: c.begins, commit: time.UnixMilli(1_900_000_000_000)})
		m := insert(row("5", "photo.png", "u", "7", "image/png", `\x0aff`, "ana", "phone", "{"+scope+","+scope+"}", "2026-11-21 15:00:00.25+00", "?"))
		m.relation = 300
		s.ok(t, s.change(t.Context(), &m))
		logged, err := s.seq.commit(&message{kind: msgCommit, end: c.end})
		s.ok(t, err)
		if len(*pieces) != c.want || logged != (c.want == 1) {
			t.Errorf("an event whose commit begins at %d: %+v", c.begins, *pieces)
		}
	}
	p := (*pieces)[0]
	if p.Tx == 0 || p.Version != p.Tx || !p.Final || len(p.Files) != 1 {
		t.Fatalf("handed over %+v", p)
	}
	u := [16]byte{0, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff}
	want := changelog.FileEvent{ID: 5, AttachmentID: "photo.png", Key: policies.AttachmentKey([]byte("photo.png")), Event: 'u', Size: 7, ContentType: "image/png", SHA256: []byte{10, 255},
		Home: policies.DeviceScope("ana", "phone"), Scopes: [][16]byte{u, u}, CreatedAt: time.Date(2026, 11, 21, 15, 0, 0, 250_000_000, time.UTC), Version: p.Tx}
	got := p.Files[0]
	got.CreatedAt = got.CreatedAt.UTC()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("read %+v\nwant %+v", got, want)
	}
}

// TestUnreadableEventsStopNothing: the rows of such a transaction are logged, and the files are read anew.
func TestUnreadableEventsStopNothing(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{specs: thingsSpec(), before: oneThing})
	s.upload("f1", "u")
	s.sameHeld()
	s.exec(`ALTER TABLE walgate.attachments RENAME content_type TO kind`)
	s.exec(`BEGIN; INSERT INTO walgate.attachments (attachment_id, event, size, kind, sha256, subject) VALUES ('f1', 'd', 0, '', '', 'ana');
		UPDATE walgate.files SET state = 'd', event_id = (SELECT max(id) FROM walgate.attachments) WHERE attachment_id = 'f1'; INSERT INTO things (a, b, owner) VALUES (8, 'x', 'ana'); COMMIT`)
	s.exec(`ALTER TABLE walgate.attachments RENAME kind TO content_type`)
	s.exec(`INSERT INTO walgate.attachments (attachment_id, event, size, content_type, sha256, subject) VALUES ('../etc', 'u', 0, '', '', 'ana')`)
	s.upload("f2", "u")
	s.sameHeld()
	if n := strings.Count(s.logged.String(), "was not recognised"); n != 2 {
		t.Errorf("%d of 2 events that can't be read were logged:\n%s", n, s.logged)
	}
	if got := s.operations(s.scopeOf("ana")); got != "d f1" {
		t.Errorf("told: %s", got)
	}
}

// TestLargeTransactionWithReferences streams 200000 rows of one transaction that name an attachment each, some of them there.
func TestLargeTransactionWithReferences(t *testing.T) {
	t.Parallel()
	const rows = 200_000
	s := newSource(t, setup{specs: thingsSpec(), before: thingsTable})
	s.filled()
	for n := range 5 {
		s.upload("f"+fmt.Sprint(n*1000), "u")
	}
	s.settle()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	before, peak := m.HeapInuse, uint64(0)
	s.exec(fmt.Sprintf(`INSERT INTO things (a, b, owner, photo, body) SELECT n, 'x', 'ana', 'f' || n, repeat('x', 100) FROM generate_series(1, %d) n`, rows))
	s.await("the transaction is logged", func() bool {
		runtime.ReadMemStats(&m)
		peak = max(peak, m.HeapInuse)
		return s.stats.Rows.Load() == rows
	})
	if grown := int64(peak) - int64(before); grown > 160<<20 {
		t.Errorf("memory grew by %d MB", grown>>20)
	}
	if n := query[int](s, `SELECT count(*) FROM walgate.attachment_references WHERE document <> '00000000-0000-0000-0000-000000000000'`); n != rows {
		t.Errorf("%d references are held, want %d", n, rows)
	}
	if got := s.operations(s.scopeOf("ana")); got != "u f1000, u f2000, u f3000, u f4000" {
		t.Errorf("told: %s", got)
	}
	s.exec(`DELETE FROM things`)
	s.await("the deletion is logged", func() bool { s.settle(); return s.operations(s.scopeOf("ana")) == "d f1000, d f2000, d f3000, d f4000" })
	if n := query[int](s, `SELECT count(*) FROM walgate.attachment_references WHERE document <> '00000000-0000-0000-0000-000000000000'`); n != 0 {
		t.Errorf("%d references are left", n)
	}
}

// TestFilesOfManyScopes: a step of the fill of the bytes has few files where each names many scopes, and none is left out.
func TestFilesOfManyScopes(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{specs: thingsSpec(), before: oneThing})
	s.exec(`INSERT INTO walgate.files (attachment_id, event_id, state, storage_key, size, content_type, sha256, subject, scopes)
		SELECT 'm' || n, n, 'u', 'm' || n, 1, 'x/y', '\x00', 'ana', (SELECT array_agg(gen_random_uuid()) FROM generate_series(1, 2000)) FROM generate_series(1, 300) n`)
	after, files, ended := "", 0, false
	for !ended {
		var events []changelog.FileEvent
		var err error
		events, ended, err = readFiles(t.Context(), s.pool, after, fillRows)
		s.ok(err)
		size := 0
		for i := range events {
			size += events[i].Bytes()
		}
		if size > fillBytes {
			t.Fatalf("%d files with %d bytes in one step", len(events), size)
		}
		if files += len(events); len(events) > 0 {
			after = events[len(events)-1].AttachmentID
		}
	}
	if files != 300 {
		t.Errorf("%d files were read, want 300", files)
	}
}

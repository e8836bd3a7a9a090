package gateway

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/walgate/walgate/blobstore"
	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/policies"
)

const attachmentTables = `
CREATE TABLE sheets (id bigint PRIMARY KEY, owner text, photo text, pages text[], extra jsonb, body text, deleted_at timestamptz, archived bool NOT NULL DEFAULT false);
ALTER TABLE sheets REPLICA IDENTITY FULL;
`

// attachmentSpecs: sheets name attachments, and belong to their owner or, where that is a team's name, to the team.
func attachmentSpecs() map[string]policies.Spec {
	return map[string]policies.Spec{"sheets": {Table: "public.sheets", SoftDelete: "deleted_at", Where: "!row.archived",
		Scope:       []map[string]string{{"owner": "claims.sub"}, {"owner": "claims.teams"}},
		Attachments: []policies.AttachmentSpec{{Column: "photo"}, {Column: "pages"}, {Column: "extra", Path: "$.files[*].id"}},
		Write:       &policies.WriteSpec{}}}
}

func newAttachmentEnv(t testing.TB, s setup) *env {
	t.Helper()
	s.before = attachmentTables + s.before
	s.specs = attachmentSpecs()
	return newPushEnv(t, s)
}

// sheet is a pushed change of a sheet.
func sheet(operation string, id int, data string) string {
	return fmt.Sprintf(`{"collection":"sheets","operation":%q,"doc_id":"%d","data":{%s}}`, operation, id, data)
}

// filed publishes a file of a subject, as an upload does.
func (e *env) filed(id, subject, state string) error {
	who, err := e.g.o.Policies().NewCaller(subject, nil, map[string]any{"sub": subject})
	if err != nil {
		return err
	}
	scopes := [][16]byte{}
	for _, key := range who.WritableScopes() {
		scopes = append(scopes, key)
	}
	return e.filedIn(id, subject, state, scopes)
}

// filedIn is filed by who may write in these scopes, or everywhere.
func (e *env) filedIn(id, subject, state string, scopes [][16]byte) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	records := blobstore.NewRecords(e.db, blobstore.RecordsOptions{UploadTTL: time.Hour})
	u, err := records.Reserve(ctx, blobstore.Reservation{Kind: blobstore.Put, AttachmentID: id, Subject: subject, Length: 1})
	if err != nil {
		return err
	}
	if _, err = records.Publish(ctx, blobstore.Publishing{Upload: u, Size: 1, SHA256: make([]byte, 32), Scopes: scopes}); err == nil {
		_, err = e.db.Exec(ctx, `UPDATE walgate.files SET state = $2 WHERE attachment_id = $1`, id, state)
	}
	return err
}

// TestPushNamesAttachments names ids in every column that holds some.
func TestPushNamesAttachments(t *testing.T) {
	t.Parallel()
	e := newAttachmentEnv(t, setup{before: `
		INSERT INTO sheets (id, owner, photo) VALUES (1, 'ana', 'theirs'), (2, 'bob', 'theirs'), (3, 'ana', NULL);
		CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF NEW.body = 'stamp' THEN NEW.photo = 'theirs'; END IF; RETURN NEW; END $$;
		CREATE TRIGGER stamp BEFORE INSERT OR UPDATE ON sheets FOR EACH ROW EXECUTE FUNCTION stamp();`})
	ana := tokenFor(t, "ana", nil)
	ok(t, e.filed("own", "ana", "u"))
	ok(t, e.filed("hidden", "bob", "u"))
	ok(t, e.filed("lost", "bob", "m"))
	ok(t, e.filed("deleted", "bob", "d"))
	ok(t, e.filed("swept", "bob", "d")) // it would return, and the row that names it read it
	ok(t, e.filed("gone", "bob", "d"))
	e.exec(t, `UPDATE walgate.files SET unreferenced_since = now(), bytes_gone = attachment_id = 'gone' WHERE attachment_id IN ('swept', 'gone')`)
	for _, x := range []struct{ what, change, want string }{
		{"nobody's", sheet("update", 3, `"photo":"future"`), "accepted 3"},
		{"own", sheet("update", 3, `"photo":"own","pages":["own","future"]`), "accepted 3"},
		{"deleted", sheet("update", 3, `"photo":"deleted"`), "accepted 3"},
		{"another's, swept", sheet("update", 3, `"photo":"swept"`), "rejected 3 attachment_missing"},
		{"swept, its bytes gone", sheet("update", 3, `"photo":"gone"`), "accepted 3"},
		{"no id", sheet("update", 3, `"photo":"../hidden"`), "accepted 3"},
		{"another's", sheet("update", 3, `"photo":"hidden"`), "rejected 3 attachment_missing"},
		{"another's, lost", sheet("update", 3, `"photo":"lost"`), "rejected 3 attachment_missing"},
		{"another's, in an array", sheet("update", 3, `"pages":["own","hidden"]`), "rejected 3 attachment_missing"},
		{"another's, by a path", sheet("update", 3, `"extra":{"files":[{"id":"own"},{"id":"hidden"}]}`), "rejected 3 attachment_missing"},
		{"another's, beside the path", sheet("update", 3, `"extra":{"id":"hidden"}`), "accepted 3"},
		{"another's, inserted", sheet("insert", 4, `"owner":"ana","photo":"hidden"`), "rejected 4 attachment_missing"},
		{"another's, upserted", sheet("upsert", 4, `"owner":"ana","photo":"hidden"`), "rejected 4 attachment_missing"},
		{"another's, out of sight", sheet("insert", 5, `"owner":"ana","photo":"hidden","archived":true`), "rejected 5 attachment_missing"},
		{"out of scope", sheet("insert", 6, `"owner":"bob","photo":"hidden"`), "rejected 6 out_of_scope"},
		{"a reference that stays", sheet("update", 1, `"photo":"theirs","body":"x"`), "accepted 1"},
		{"a trigger's", sheet("update", 3, `"body":"stamp"`), "accepted 3"},
	} {
		if strings.Contains(x.want, "attachment_missing") {
			e.submit(t, ana, "", x.change).want(t, x.want)
		}
		e.submit(t, ana, `,"atomic":false`, x.change, sheet("update", 1, `"body":"beside"`)).want(t, x.want+", accepted 1")
		if t.Failed() {
			t.Fatal(x.what)
		}
	}
	ok(t, e.filed("theirs", "bob", "u"))
	e.submit(t, ana, "", sheet("update", 1, `"photo":"theirs","body":"y"`)).want(t, "accepted 1") // named before, and still
	p := e.submit(t, ana, "", sheet("update", 3, `"pages":["theirs"]`)).want(t, "accepted 3")     // a trigger named it in this row
	if p.Results[0].Retryable {
		t.Error("retryable")
	}
	e.submit(t, ana, "", sheet("insert", 7, `"owner":"ana","body":"stamp"`)).want(t, "accepted 7") // the application's own business
}

// TestPushMovesReference carries a reference that its uploader keeps from the caller into another scope, and into sight: that
// would be a way to read it.
func TestPushMovesReference(t *testing.T) {
	t.Parallel()
	e := newAttachmentEnv(t, setup{})
	eve := tokenFor(t, "eve", map[string]any{"teams": []string{"red"}})
	e.submit(t, eve, "", sheet("insert", 1, `"owner":"eve","photo":"x"`), sheet("insert", 3, `"owner":"eve","photo":"x"`), sheet("insert", 4, `"owner":"eve","photo":"x"`)).want(t, "accepted 1, accepted 3, accepted 4")
	e.submit(t, eve, "", `{"collection":"sheets","operation":"delete","doc_id":"3"}`).want(t, "accepted 3")
	ok(t, e.filed("x", "bob", "u"))
	e.submit(t, eve, `,"atomic":false`, sheet("update", 1, `"owner":"red"`), sheet("upsert", 3, `"body":"back"`), sheet("insert", 5, `"owner":"eve","photo":"x"`),
		sheet("update", 4, `"body":"y"`), sheet("update", 4, `"archived":true`)).
		want(t, "rejected 1 attachment_missing, rejected 3 attachment_missing, rejected 5 attachment_missing, accepted 4, accepted 4")
	e.submit(t, eve, "", sheet("update", 1, `"photo":null`), `{"collection":"sheets","operation":"delete","doc_id":"4"}`).want(t, "accepted 1, accepted 4")
}

// TestPushWaitsForPublishing races with an upload: whichever commits first, the other one sees it.
func TestPushWaitsForPublishing(t *testing.T) {
	t.Parallel()
	e := newAttachmentEnv(t, setup{})
	eve := tokenFor(t, "eve", nil)
	change := sheet("upsert", 1, `"owner":"eve","photo":"x"`)

	// The upload first: the push waits for it.
	tx, err := e.db.Begin(t.Context())
	ok(t, err)
	defer tx.Rollback(context.Background())
	_, err = tx.Exec(t.Context(), `SELECT pg_advisory_xact_lock($1)`, blobstore.LockKey("x"))
	ok(t, err)
	pushed := make(chan *answer, 1)
	go func() {
		pushed <- e.post(t, "/sync/push", eve, `{"client_id":"phone","changes":[`+change+`]}`)
	}()
	e.blocked(t)
	_, err = tx.Exec(t.Context(), `INSERT INTO walgate.files (attachment_id, event_id, state, storage_key, size, content_type, sha256, subject) VALUES ('x', 1, 'u', 'walgate/x', 1, 'x/y', '\x00', 'bob')`)
	ok(t, err)
	ok(t, tx.Commit(t.Context()))
	if a := <-pushed; !strings.Contains(string(a.body), "attachment_missing") {
		t.Errorf("a push that came while the upload was published: %d %s", a.status, a.body)
	}

	// The push first: the upload waits for it, so that its event comes after the row, and withholds.
	named, second := "y", "z" // in the order in which a push locks them
	if blobstore.LockKey(named) > blobstore.LockKey(second) {
		named, second = second, named
	}
	row, err := e.db.Begin(t.Context()) // holds the push up behind its first lock
	ok(t, err)
	defer row.Rollback(context.Background())
	_, err = row.Exec(t.Context(), `SELECT pg_advisory_xact_lock($1)`, blobstore.LockKey(second))
	ok(t, err)
	go func() {
		pushed <- e.post(t, "/sync/push", eve, `{"client_id":"phone","changes":[`+strings.Replace(change, `"x"`, `"`+named+`"`, 1)+`,`+
			sheet("upsert", 2, `"owner":"eve","photo":"`+second+`"`)+`]}`)
	}()
	e.blocked(t)
	published := make(chan error, 1)
	go func() {
		err := e.filed(named, "bob", "u")
		if err == nil && e.one(t, `SELECT photo FROM sheets WHERE id = 1`) != named {
			err = errors.New("the upload went on before the push had committed")
		}
		published <- err
	}()
	eventually(t, "the upload waits", func() bool {
		return e.one(t, `SELECT count(*)::text FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`) == "2" // behind the push, which waits too
	})
	ok(t, row.Commit(t.Context()))
	if a := <-pushed; a.status != 200 || strings.Contains(string(a.body), "rejected") {
		t.Errorf("a push that was there first: %d %s", a.status, a.body)
	}
	ok(t, <-published)
	e.sync(t)
	var keys [][16]byte
	for _, key := range e.caller(t, "eve", nil).ReadableScopes() {
		keys = append(keys, key)
	}
	held, err := e.log.Held(t.Context(), [][16]byte{policies.AttachmentKey([]byte(named))}, keys)
	ok(t, err)
	if h := held[0]; !h.Within || h.Readable || h.Known {
		t.Errorf("a file whose id was named first by who may not have it: %+v", h)
	}
	page, err := e.log.Operations(t.Context(), changelog.OperationsRequest{Scopes: keys, Limit: 10})
	ok(t, err)
	if len(page.Operations) > 0 {
		t.Errorf("it is announced there: %+v", page.Operations)
	}
}

// TestPushOfManyAttachments: a push may name more ids than the server has room for locks.
func TestPushOfManyAttachments(t *testing.T) {
	t.Parallel()
	e := newAttachmentEnv(t, setup{})
	var ids []string
	for i := range 50_000 {
		ids = append(ids, fmt.Sprintf(`"n%d"`, i))
	}
	e.submit(t, tokenFor(t, "eve", nil), "", sheet("insert", 1, `"owner":"eve","pages":[`+strings.Join(ids, ",")+`]`)).want(t, "accepted 1")
}

func (e *env) caller(t testing.TB, subject string, claims map[string]any) *policies.Caller {
	t.Helper()
	all := map[string]any{"sub": subject}
	maps.Copy(all, claims)
	c, err := e.g.o.Policies().NewCaller(subject, nil, all)
	ok(t, err)
	return c
}

// TestPushKnownAttachments names what colleagues uploaded: what the caller reads, or read since it was uploaded.
func TestPushKnownAttachments(t *testing.T) {
	t.Parallel()
	e := newAttachmentEnv(t, setup{})
	red, blue := map[string]any{"teams": []string{"red"}}, map[string]any{"teams": []string{"blue"}}
	ana, bob, eve := tokenFor(t, "ana", red), tokenFor(t, "bob", red), tokenFor(t, "eve", blue)
	e.submit(t, ana, "", sheet("insert", 1, `"owner":"ana","photo":"p"`)).want(t, "accepted 1")
	ok(t, e.filed("p", "ana", "u"))
	e.submit(t, bob, "", sheet("insert", 2, `"owner":"red","photo":"p"`)).want(t, "rejected 2 attachment_missing")
	e.submit(t, ana, "", sheet("update", 1, `"owner":"red"`)).want(t, "accepted 1")
	e.submit(t, eve, "", sheet("insert", 9, `"owner":"blue","photo":"p"`)).want(t, "rejected 9 attachment_missing")
	e.submit(t, bob, "", sheet("insert", 2, `"owner":"red","photo":"p"`)).want(t, "accepted 2")
	e.submit(t, bob, "", sheet("insert", 3, `"owner":"bob","pages":["p"]`)).want(t, "accepted 3")
	// Gone from every row of the team, it may come back: by a row that returns, or in another one.
	gone := func(id int) string {
		return fmt.Sprintf(`{"collection":"sheets","operation":"delete","doc_id":"%d"}`, id)
	}
	e.submit(t, bob, "", gone(1), gone(2), gone(3)).want(t, "accepted 1, accepted 2, accepted 3")
	e.submit(t, bob, "", sheet("upsert", 2, `"body":"back"`)).want(t, "conflict_resolved 2 resurrect_on_update")
	e.exec(t, `UPDATE sheets SET photo = NULL, pages = NULL`)
	e.submit(t, bob, "", sheet("insert", 4, `"owner":"red","photo":"p"`)).want(t, "accepted 4")
	e.submit(t, eve, "", sheet("insert", 9, `"owner":"blue","photo":"p"`)).want(t, "rejected 9 attachment_missing")
	// A row of the team that nobody sees at present has given it to the team as well.
	e.exec(t, `INSERT INTO sheets (id, owner, photo, archived) VALUES (5, 'red', 'q', true)`)
	ok(t, e.filedIn("q", "ana", "u", nil))
	e.submit(t, eve, "", sheet("insert", 9, `"owner":"blue","photo":"q"`)).want(t, "rejected 9 attachment_missing")
	e.submit(t, bob, "", sheet("insert", 6, `"owner":"bob","photo":"q"`)).want(t, "accepted 6")
}

// TestPushAttachmentsLate names a file that the log doesn't know yet: it is waited for, not refused.
func TestPushAttachmentsLate(t *testing.T) {
	t.Parallel()
	e := newAttachmentEnv(t, setup{gateway: func(g *Gateway) { g.limits.fence = 200 * time.Millisecond }})
	tx, err := e.db.Begin(t.Context())
	ok(t, err)
	defer tx.Rollback(context.Background())
	_, err = tx.Exec(t.Context(), `SELECT FROM walgate.checkpoint FOR UPDATE`)
	ok(t, err)
	e.exec(t, `INSERT INTO sheets (id, owner, photo) VALUES (1, 'red', 'p')`)
	ok(t, e.filedIn("p", "ana", "u", nil))
	bob := tokenFor(t, "bob", map[string]any{"teams": []string{"red"}})
	change := sheet("insert", 2, `"owner":"bob","photo":"p"`)
	e.post(t, "/sync/push", bob, `{"client_id":"phone","changes":[`+change+`]}`).problem(t, LogBehind)
	ok(t, tx.Rollback(t.Context()))
	e.sync(t)
	e.submit(t, bob, "", change).want(t, "accepted 2")
}

// blocked waits until a push waits for a lock.
func (e *env) blocked(t testing.TB) {
	t.Helper()
	eventually(t, "the push waits", func() bool {
		return e.one(t, `SELECT count(*)::text FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`) != "0"
	})
}

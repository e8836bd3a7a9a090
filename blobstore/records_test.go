package blobstore

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/walgate/walgate/internal/pgserver"
	"github.com/walgate/walgate/schema"
)

// fixture is a source of a test's own, and a store.
type fixture struct {
	*Records
	t     *testing.T
	pool  *pgxpool.Pool
	store *Store
}

func newFixture(t *testing.T, o RecordsOptions) *fixture {
	t.Helper()
	dsn := pgserver.ForTest(t).Database(t)
	pool, err := schema.OpenPool(t.Context(), dsn, 20)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	if err := pool.AcquireFunc(t.Context(), func(c *pgxpool.Conn) error { return schema.Migrate(t.Context(), c.Conn()) }); err != nil {
		t.Fatal(err)
	}
	if o.UploadTTL == 0 {
		o.UploadTTL = time.Hour
	}
	return &fixture{Records: NewRecords(pool, o), t: t, pool: pool, store: open(t, "file")}
}

func (f *fixture) exec(sql string, args ...any) {
	f.t.Helper()
	if _, err := f.pool.Exec(f.t.Context(), sql, args...); err != nil {
		f.t.Fatal(err)
	}
}

func ask[T any](f *fixture, sql string, args ...any) (v T) {
	f.t.Helper()
	if err := f.pool.QueryRow(f.t.Context(), sql, args...).Scan(&v); err != nil {
		f.t.Fatal(err)
	}
	return v
}

// upload writes a text as an upload's object; what it returns can be published.
func (f *fixture) upload(subject, id, text string) Publishing {
	f.t.Helper()
	u, err := f.Reserve(f.t.Context(), Reservation{Kind: Put, AttachmentID: id, Subject: subject, Length: int64(len(text)), ContentType: "text/plain", Filename: "a.txt"})
	if err != nil {
		f.t.Fatal(err)
	}
	w := mustWrite(f.t, f.store, u.StorageKey, strings.NewReader(text))
	return Publishing{Upload: u, Size: w.Size, SHA256: w.SHA256, Client: "phone"}
}

func (f *fixture) publish(p Publishing, want Outcome) Published {
	f.t.Helper()
	done, err := f.Publish(f.t.Context(), p)
	if err != nil || done.Outcome != want {
		f.t.Fatalf("outcome %d, want %d (%v)", done.Outcome, want, err)
	}
	if err := f.Release(f.t.Context(), f.store, p.Upload); err != nil {
		f.t.Fatal(err)
	}
	return done
}

// text returns what an id holds.
func (f *fixture) text(id string) string {
	f.t.Helper()
	file, err := f.Find(f.t.Context(), id)
	if err != nil {
		f.t.Fatal(err)
	}
	r, err := f.store.ReadParts(f.t.Context(), file.StorageKey, file.Parts, 0, file.Size)
	return string(readAll(f.t, r, err))
}

// settled expires what is left and holds the tables against each other, and against the store.
func (f *fixture) settled() {
	f.t.Helper()
	for more := true; more; {
		var err error
		if _, _, more, err = f.Expire(f.t.Context(), f.store); err != nil {
			f.t.Fatal(err)
		}
	}
	for what, sql := range map[string]string{
		"used":     `SELECT coalesce(string_agg(format('%s %s/%s', subject, used, size), ', '), '') FROM walgate.quotas FULL JOIN (SELECT subject, sum(size) AS size FROM walgate.files WHERE NOT bytes_gone GROUP BY 1) f USING (subject) WHERE coalesce(used, 0) <> coalesce(size, 0)`,
		"reserved": `SELECT coalesce(string_agg(format('%s %s/%s', subject, q.reserved, u.reserved), ', '), '') FROM walgate.quotas q FULL JOIN (SELECT subject, sum(reserved) AS reserved FROM walgate.uploads GROUP BY 1) u USING (subject) WHERE coalesce(q.reserved, 0) <> coalesce(u.reserved, 0)`,
	} {
		if wrong := ask[string](f, sql); wrong != "" {
			f.t.Errorf("%s is not what the tables say: %s", what, wrong)
		}
	}
	rows, _ := f.pool.Query(f.t.Context(), `SELECT `+fileColumns+` FROM walgate.files WHERE NOT bytes_gone`)
	files, err := pgx.CollectRows(rows, scanFile)
	if err != nil {
		f.t.Fatal(err)
	}
	var want []string
	for _, file := range files {
		want = append(want, file.Objects()...)
	}
	slices.Sort(want)
	if got := keys(f.t, f.store, ""); !slices.Equal(got, want) && ask[int](f, `SELECT count(*) FROM walgate.uploads`) == 0 {
		f.t.Errorf("the store holds %v, the records %v", got, want)
	}
}

func TestPublishIsOneTransaction(t *testing.T) {
	t.Parallel()
	f := newFixture(t, RecordsOptions{Quota: 100})
	device, scopes := "phone", [][16]byte{{1}, {2}}
	p := f.upload("ana", "photo", "hello")
	if u, err := f.Usage(t.Context(), "ana"); err != nil || u != (Usage{Used: 0, Reserved: 5, Quota: 100}) {
		t.Errorf("before: %+v, %v", u, err)
	}
	p.Upload.ClientID, p.Scopes = &device, scopes
	f.exec(`UPDATE walgate.uploads SET client_id = 'phone'`)
	done := f.publish(p, Created)
	if u, err := f.Usage(t.Context(), "ana"); err != nil || u != (Usage{Used: 5, Quota: 100}) {
		t.Errorf("after: %+v, %v", u, err)
	}
	var event, subject, client string
	var size int64
	var digest []byte
	var at [][16]byte
	var transactions int
	err := f.pool.QueryRow(t.Context(), `SELECT event::text, size, sha256, subject, client_id, scopes, (SELECT count(DISTINCT x) FROM (SELECT xmin::text FROM walgate.attachments UNION ALL SELECT xmin::text FROM walgate.pushes WHERE id = $2 AND subject = 'ana' AND client_id = 'phone'
		UNION ALL SELECT xmin::text FROM walgate.files UNION ALL SELECT xmin::text FROM walgate.quotas) t(x)) FROM walgate.attachments WHERE id = $1`, done.EventID, done.PushID).Scan(&event, &size, &digest, &subject, &client, &at, &transactions)
	if err != nil || event != "u" || size != 5 || !bytes.Equal(digest, p.SHA256) || subject != "ana" || client != "phone" || !slices.Equal(at, scopes) || transactions != 1 {
		t.Errorf("event %s of %d bytes by %s on %s for %v, %d transactions (%v)", event, size, subject, client, at, transactions, err)
	}
	found, err := f.Find(t.Context(), "photo")
	if err != nil {
		t.Fatal(err)
	}
	if a, b := fmt.Sprintf("%+v", *found), fmt.Sprintf("%+v", *done.File); strings.ReplaceAll(a, client, "") == "" || found.EventID != done.EventID || !slices.Equal(found.Scopes, scopes) || found.Filename != "a.txt" || found.ContentType != "text/plain" || !found.CreatedAt.Equal(done.File.CreatedAt) {
		t.Errorf("found %s, published %s", a, b)
	}
	if got := f.text("photo"); got != "hello" {
		t.Errorf("the file holds %q", got)
	}
	f.settled()
}

// TestOneUploadWins: of many to one id one is published, those with its bytes are the same, the others conflict.
func TestOneUploadWins(t *testing.T) {
	t.Parallel()
	f := newFixture(t, RecordsOptions{})
	var uploads []Publishing
	for i := range 16 {
		uploads = append(uploads, f.upload(fmt.Sprint("subject", i%3), "photo", []string{"these", "those"}[i%2]))
	}
	outcomes := make([]Outcome, len(uploads))
	var done sync.WaitGroup
	for i, p := range uploads {
		done.Go(func() {
			published, err := f.Publish(t.Context(), p)
			if err == nil {
				err = f.Release(t.Context(), f.store, p.Upload)
			}
			if err != nil {
				t.Error(err)
			}
			outcomes[i] = published.Outcome
		})
	}
	done.Wait()
	winner := slices.Index(outcomes, Created)
	for i, o := range outcomes {
		want := Conflict
		if i == winner {
			want = Created
		} else if winner >= 0 && bytes.Equal(uploads[i].SHA256, uploads[winner].SHA256) {
			want = Same
		}
		if o != want {
			t.Errorf("upload %d: outcome %d, want %d", i, o, want)
		}
	}
	if n := ask[int](f, `SELECT count(*) FROM walgate.attachments`); n != 1 {
		t.Errorf("%d events", n)
	}
	if got, want := f.text("photo"), []string{"these", "those"}[winner%2]; got != want {
		t.Errorf("the file holds %q, want %q", got, want)
	}
	if n := ask[int](f, `SELECT count(*) FROM walgate.uploads`); n != 0 {
		t.Errorf("%d uploads are left", n)
	}
	f.settled()
}

// TestQuotaIsExact: at its edge, whoever comes at the same time, in whatever way.
func TestQuotaIsExact(t *testing.T) {
	t.Parallel()
	f := newFixture(t, RecordsOptions{Quota: 255})
	f.publish(f.upload("ana", "photo", "hello"), Created)
	var mu sync.Mutex
	var taken []*Upload
	var done sync.WaitGroup
	for i := range 50 {
		done.Go(func() {
			r := Reservation{Kind: Put, AttachmentID: fmt.Sprint("x", i), Subject: "ana", Length: 10}
			if i%2 == 0 {
				r.Length = -1
			}
			u, err := f.Reserve(t.Context(), r)
			if err == nil && i%2 == 0 {
				err = f.Grow(t.Context(), u, 10)
			}
			if err == nil {
				mu.Lock()
				defer mu.Unlock()
				taken = append(taken, u)
			} else if !errors.Is(err, ErrQuota) {
				t.Error(err)
			}
		})
	}
	done.Wait()
	if u, err := f.Usage(t.Context(), "ana"); err != nil || len(taken) != 25 || u != (Usage{Used: 5, Reserved: 250, Quota: 255}) {
		t.Errorf("%d uploads go on, %+v (%v); want 25", len(taken), u, err)
	}
	if _, err := f.Reserve(t.Context(), Reservation{Kind: Put, AttachmentID: "y", Subject: "ana", Length: 1}); !errors.Is(err, ErrQuota) {
		t.Errorf("one byte more: %v", err)
	}
	if _, err := f.Reserve(t.Context(), Reservation{Kind: Put, AttachmentID: "y", Subject: "bob", Length: 256}); !errors.Is(err, ErrQuota) {
		t.Errorf("more than all, of a subject without anything: %v", err)
	}
	if u, err := f.Reserve(t.Context(), Reservation{Kind: Put, AttachmentID: "y", Subject: "bob", Length: 255}); err != nil {
		t.Error(err)
	} else if err := f.SetLength(t.Context(), u, 255); err != nil {
		t.Error(err)
	}
	if err := f.Grow(t.Context(), taken[0], 11); !errors.Is(err, ErrQuota) || taken[0].Reserved != 10 {
		t.Errorf("one byte more than was reserved: %v, %d are reserved", err, taken[0].Reserved)
	}
	if err := f.Release(t.Context(), f.store, taken[1]); err != nil {
		t.Fatal(err)
	}
	if err := f.Grow(t.Context(), taken[0], 20); err != nil {
		t.Errorf("what another has given back: %v", err)
	}
	f.settled()
	for _, u := range taken {
		if err := f.Release(t.Context(), f.store, u); err != nil {
			t.Error(err)
		}
	}
	if u, err := f.Usage(t.Context(), "ana"); err != nil || u.Reserved != 0 || u.Used != 5 {
		t.Errorf("at the end %+v (%v)", u, err)
	}
	f.settled()
}

// TestQuotaRowsAreLockedInOrder: transactions that change the same two subjects' rows never wait for each other.
func TestQuotaRowsAreLockedInOrder(t *testing.T) {
	t.Parallel()
	f := newFixture(t, RecordsOptions{})
	var done sync.WaitGroup
	for range 8 {
		done.Go(func() {
			for range 50 {
				err := f.inTransaction(t.Context(), "change quotas", func(tx pgx.Tx) error {
					return changeQuotas(t.Context(), tx, map[string]quotaChange{"ana": {used: 1}, "bob": {reserved: 1}})
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	done.Wait()
	for subject, want := range map[string]Usage{"ana": {Used: 400}, "bob": {Reserved: 400}} {
		if u, err := f.Usage(t.Context(), subject); err != nil || u != want {
			t.Errorf("%s has %+v (%v), want %+v", subject, u, err, want)
		}
	}
}

func TestWhatAnUploadBecomes(t *testing.T) {
	t.Parallel()
	f := newFixture(t, RecordsOptions{})
	sum := func(text string) []byte { s := sha256.Sum256([]byte(text)); return s[:] }
	matching := func(p Publishing, text string) Publishing { p.IfMatch = sum(text); return p }
	first := f.publish(f.upload("ana", "photo", "one"), Created)
	if same := f.publish(f.upload("bob", "photo", "one"), Same); same.PushID != 0 || same.EventID != 0 || same.File.Subject != "ana" {
		t.Errorf("the same bytes: %+v", same)
	}
	f.publish(f.upload("bob", "photo", "two"), Conflict)
	f.publish(matching(f.upload("bob", "photo", "two"), "else"), Conflict)
	f.publish(matching(f.upload("bob", "other", "two"), "one"), Conflict)
	f.settled()
	second := f.publish(matching(f.upload("bob", "photo", "two"), "one"), Replaced)
	if f.text("photo") != "two" || second.EventID <= first.EventID {
		t.Errorf("replaced by %q, event %d after %d", f.text("photo"), second.EventID, first.EventID)
	}
	f.settled()
	if u, err := f.Usage(t.Context(), "ana"); err != nil || u != (Usage{}) {
		t.Errorf("whose file was replaced has %+v (%v)", u, err)
	}
	for _, v := range []Removal{{AttachmentID: "photo", EventID: first.EventID}, {AttachmentID: "none", EventID: 1}} {
		if _, err := f.Remove(t.Context(), v); !errors.Is(err, ErrChanged) && !errors.Is(err, ErrNotFound) {
			t.Errorf("%+v: %v", v, err)
		}
	}
	removed, err := f.Remove(t.Context(), Removal{AttachmentID: "photo", EventID: second.EventID, Subject: "ana", Client: "laptop"})
	if err != nil || removed.PushID == 0 || removed.File.State != Deleted {
		t.Fatalf("%+v, %v", removed, err)
	}
	if got := ask[string](f, `SELECT format('%s %s %s', a.event, p.subject, p.client_id) FROM walgate.attachments a, walgate.pushes p WHERE a.id = $1 AND p.id = $2 AND a.xmin = p.xmin`, removed.EventID, removed.PushID); got != "d ana laptop" {
		t.Errorf("the deletion's event is %s", got)
	}
	if _, err := f.Remove(t.Context(), Removal{AttachmentID: "photo", EventID: removed.EventID}); !errors.Is(err, ErrNotFound) {
		t.Errorf("deleted twice: %v", err)
	}
	f.settled() // the bytes are there until care deletes them
	f.exec(`UPDATE walgate.files SET unreferenced_since = now()`)
	f.publish(f.upload("ana", "photo", "anew"), Created)
	file, err := f.Find(t.Context(), "photo")
	if err != nil || file.State != There || file.DeletedAt != nil || file.UnreferencedSince != nil || file.BytesGone {
		t.Errorf("uploaded anew: %+v (%v)", file, err)
	}
	f.settled()
	f.exec(`UPDATE walgate.files SET state = 'm'`)
	f.publish(f.upload("bob", "photo", "three"), Conflict)
	f.publish(f.upload("bob", "photo", "anew"), Created) // brings lost bytes back
	if f.text("photo") != "anew" {
		t.Errorf("brought back as %q", f.text("photo"))
	}
	direct := f.upload("bob", "direct", "four")
	direct.Key = NewKey()
	if err := f.store.Copy(t.Context(), direct.Key, direct.Upload.StorageKey); err != nil {
		t.Fatal(err)
	}
	f.publish(direct, Created)
	f.settled()
	if f.text("direct") != "four" {
		t.Errorf("the copy is %q", f.text("direct"))
	}
	if _, err := f.Find(t.Context(), "none"); !errors.Is(err, ErrNotFound) {
		t.Errorf("what was never uploaded: %v", err)
	}
}

// TestPublishingWaitsForPushes that name the attachment: they look at its file before they commit.
func TestPublishingWaitsForPushes(t *testing.T) {
	t.Parallel()
	f := newFixture(t, RecordsOptions{})
	f.publish(f.upload("ana", "another", "one"), Created)
	f.waitsFor(`SELECT pg_advisory_xact_lock_shared($1)`, LockKey("photo"))
	f.waitsFor(`SELECT pg_advisory_xact_lock($1)`, LockAll) // of many ids
}

// waitsFor publishes the photo beside a push that has taken a lock.
func (f *fixture) waitsFor(lock string, key int64) {
	t := f.t
	t.Helper()
	p := f.upload("ana", "photo", "one")
	push, err := f.pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer push.Rollback(context.Background())
	if _, err := push.Exec(t.Context(), lock, key); err != nil {
		t.Fatal(err)
	}
	published := make(chan error, 1)
	go func() {
		_, err := f.Publish(t.Context(), p)
		published <- err
	}()
	for tick := time.Tick(5 * time.Millisecond); ask[int](f, `SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`) == 0; <-tick {
		select {
		case err := <-published:
			t.Fatalf("published beside a push that names it (%v)", err)
		default:
		}
	}
	if err := push.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-published; err != nil {
		t.Error(err)
	}
}

package blobstore

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// faulty is a store with faults.
type faulty struct {
	objects
	onList   func(n int) error // before the n-th object
	onSize   func(key string) error
	onDelete func(key string) error
	after    []string // from where it was listed
}

func (f *faulty) List(ctx context.Context, after string) iter.Seq2[Object, error] {
	f.after = append(f.after, after)
	return func(yield func(Object, error) bool) {
		n := 0
		for o, err := range f.objects.List(ctx, after) {
			if n++; err == nil && f.onList != nil {
				err = f.onList(n)
			}
			if !yield(o, err) || err != nil {
				return
			}
		}
	}
}

func (f *faulty) Size(ctx context.Context, key string) (int64, error) {
	if f.onSize != nil {
		if err := f.onSize(key); err != nil {
			return 0, err
		}
	}
	return f.objects.Size(ctx, key)
}

func (f *faulty) Delete(ctx context.Context, key string) error {
	if f.onDelete != nil {
		if err := f.onDelete(key); err != nil {
			return err
		}
	}
	return f.objects.Delete(ctx, key)
}

// reconcile runs a round that reconciles, some time later.
func (c *caring) reconcile(later time.Duration) *Reconciled {
	c.t.Helper()
	c.care.now = func() time.Time { return time.Now().Add(later) }
	return c.round(RoundOptions{Reconcile: true}).Reconcile
}

// put writes an object.
func (c *caring) put(key, text string) string {
	c.t.Helper()
	mustWrite(c.t, c.store, key, strings.NewReader(text))
	return key
}

func TestObjectsWithoutRecordGo(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"file", "mem", "s3"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, RecordsOptions{UploadTTL: 24 * time.Hour})
			f.store = open(t, kind)
			c := caringOf(t, f)
			c.care.o.Grace = 40 * time.Minute // an upload may be under way for an hour
			for _, id := range []string{"photo", "replaced", "deleted"} {
				c.file(id, "bytes of "+id)
				c.names.set(id, true)
			}
			tus, err := c.Reserve(t.Context(), Reservation{Kind: Tus, AttachmentID: "video", Subject: "ana", Length: 100})
			if err != nil {
				t.Fatal(err)
			}
			part, key, err := c.BeginPart(t.Context(), tus)
			if err != nil {
				t.Fatal(err)
			}
			c.put(key, "first part")
			if err := c.AddPart(t.Context(), tus, part, 0, 10, []byte("hash")); err != nil {
				t.Fatal(err)
			}
			stays := []string{c.put("walgate/00/README", "not walgate's"), c.key("photo"), key, c.upload("bob", "under-way", "x").Upload.StorageKey}
			goes := []string{c.put(NewKey(), "nobody's"), c.put(PartKey(NewKey(), 3), "a part"), c.put(c.key("photo")+".0", "not a part"), c.put(c.key("photo")+".17300000.tmp", "half")}
			old := c.key("replaced")
			next := c.upload("ana", "replaced", "another")
			file, err := c.Find(t.Context(), "replaced")
			if err != nil {
				t.Fatal(err)
			}
			next.IfMatch = file.SHA256
			c.publish(next, Replaced)
			stays = append(stays, c.key("replaced"))
			if r := c.reconcile(50 * time.Minute); r.Orphans.Files != 0 {
				t.Fatalf("young objects were taken for orphans: %+v", r)
			}
			for _, key := range goes {
				if !c.there(key) {
					t.Errorf("young %s is gone", key)
				}
			}
			r := c.reconcile(2 * time.Hour)
			if r.Orphans.Files != int64(len(goes)) || r.Deleted != r.Orphans || r.Foreign.Files != 1 || r.Missing.Files != 0 {
				t.Errorf("%+v", r)
			}
			for _, key := range append(goes, old) {
				if c.there(key) {
					t.Errorf("%s is still there", key)
				}
			}
			for _, key := range stays {
				if !c.there(key) {
					t.Errorf("%s is gone", key)
				}
			}
			if r = c.reconcile(2 * time.Hour); r.Orphans.Files != 0 {
				t.Errorf("again: %+v", r)
			}
		})
	}
}

func TestFilesWithoutBytesAreMissing(t *testing.T) {
	t.Parallel()
	c := newCaring(t)
	for _, id := range []string{"whole", "lost", "cut", "emptied"} {
		c.file(id, "bytes of "+id)
		c.names.set(id, true)
	}
	lose := func() {
		if err := c.store.Delete(t.Context(), c.key("lost")); err != nil {
			t.Fatal(err)
		}
		c.put(c.key("cut"), "bytes")
		c.put(c.key("emptied"), "")
	}
	lose()
	r := c.reconcile(0)
	if r.Lost.Files != 3 || r.Missing.Files != 3 {
		t.Errorf("%+v", r)
	}
	for _, id := range []string{"lost", "cut", "emptied"} {
		c.expect(id, "m", "um")
	}
	if r = c.reconcile(0); r.Lost.Files != 0 || r.Missing.Files != 3 {
		t.Errorf("told again: %+v", r)
	}
	for _, id := range []string{"lost", "cut", "emptied"} {
		c.put(c.key(id), "bytes of "+id)
	}
	if r = c.reconcile(0); r.Returned.Files != 3 || r.Missing.Files != 0 {
		t.Errorf("%+v", r)
	}
	for _, id := range []string{"lost", "cut", "emptied"} {
		c.expect(id, "u", "umr")
	}
	c.expect("whole", "u", "u")
	lose()
	c.reconcile(0)
	c.publish(c.upload("ana", "lost", "bytes of lost"), Created) // sent again by who still has it
	c.names.set("cut", false)                                    // no row names it any more
	c.reconcile(0)
	c.age()
	c.reconcile(0)
	c.expect("lost", "u", "umrmu")
	c.expect("cut", "d noted", "umrmd")
	c.reconcile(0)
	c.expect("cut", "d gone noted", "umrmd")
	c.settled()
}

// TestErrorsOfTheStoreConcludeNothing has each call to the store fail.
func TestErrorsOfTheStoreConcludeNothing(t *testing.T) {
	t.Parallel()
	c := newCaring(t)
	for i := range 20 {
		id := fmt.Sprint("photo", i)
		c.file(id, "bytes")
		c.names.set(id, true)
	}
	orphan, lost := c.put(NewKey(), "nobody's"), c.key("photo3")
	c.file("going", "going")
	c.round(RoundOptions{})
	c.age()
	c.round(RoundOptions{})
	if err := c.store.Delete(t.Context(), lost); err != nil {
		t.Fatal(err)
	}
	before, away := c.dump(), errors.New("the store is away")
	for what, f := range map[string]*faulty{
		"listing, at once":  {onList: func(int) error { return away }},
		"listing, half-way": {onList: func(n int) error { return map[bool]error{true: away}[n == 10] }},
		"looking":           {onSize: func(string) error { return away }, onDelete: func(string) error { return away }},
	} {
		f.objects = c.store
		if f.onDelete == nil {
			f.onDelete = func(string) error { return away }
		}
		c.care.store, c.care.now = f, func() time.Time { return time.Now().Add(2 * time.Hour) }
		if _, err := c.care.Round(t.Context(), RoundOptions{Reconcile: true}); !errors.Is(err, away) {
			t.Errorf("%s: %v", what, err)
		}
		if after := c.dump(); after != before {
			t.Errorf("%s: something was concluded:\n%s\n%s", what, before, after)
		}
	}
	c.care.store = c.store
	c.reconcile(2 * time.Hour)
	c.expect("photo3", "m", "um")
	c.expect("going", "d gone noted", "ud")
	if c.there(orphan) {
		t.Error("the orphan is there")
	}
}

// TestStoreThatIsNotTheStore mounts an empty directory in its place, or another installation's.
func TestStoreThatIsNotTheStore(t *testing.T) {
	t.Parallel()
	c := newCaring(t)
	for _, id := range []string{"a", "b", "c"} {
		c.file(id, id)
		c.names.set(id, true)
	}
	before, mine := c.dump(), c.care.store
	c.care.store = open(t, "mem")
	r := c.reconcile(2 * time.Hour)
	if len(r.HeldUp) != 1 || !r.HeldUp[0].Guard || c.dump() != before {
		t.Fatalf("an empty store: %+v", r)
	}
	c.care.store = mine
	for range guardFloor + 1 {
		c.put(NewKey(), "of another walgate")
	}
	before = c.dump()
	r = c.reconcile(2 * time.Hour)
	if len(r.HeldUp) != 1 || !r.HeldUp[0].Guard || r.Orphans.Files != guardFloor+1 || c.dump() != before {
		t.Fatalf("a store of two: %+v", r)
	}
	if s, err := c.care.Status(t.Context()); err != nil || !s.GuardTripped() {
		t.Errorf("%+v (%v)", s, err)
	}
	c.care.now = func() time.Time { return time.Now().Add(2 * time.Hour) }
	if r := c.round(RoundOptions{Reconcile: true, Force: true}).Reconcile; r.Deleted.Files != guardFloor+1 {
		t.Errorf("by force: %+v", r)
	}
	c.bulk(300) // whose bytes aren't there
	for i := range 300 {
		c.names.set(fmt.Sprint("bulk", i), true)
	}
	if r = c.reconcile(0); len(r.HeldUp) != 1 || r.Lost.Files != 300 || c.state("bulk7") != "u" {
		t.Errorf("most are lost: %+v", r)
	}
	if r := c.round(RoundOptions{Reconcile: true, Force: true}).Reconcile; r.Lost.Files != 300 || c.state("bulk7") != "m" {
		t.Errorf("by force: %+v", r)
	}
}

// TestDryRunChangesNothing holds what a dry run says against what a round then does.
func TestDryRunChangesNothing(t *testing.T) {
	t.Parallel()
	c := newCaring(t)
	for _, id := range []string{"lost", "back", "freed", "returned", "due", "young", "kept"} {
		c.file(id, "bytes of "+id)
		c.names.set(id, !slices.Contains([]string{"freed", "returned"}, id))
	}
	back := c.key("back")
	if err := c.store.Delete(t.Context(), back); err != nil {
		t.Fatal(err)
	}
	c.reconcile(0)
	c.age()
	c.round(RoundOptions{})
	c.names.set("returned", true)
	c.names.set("due", false)
	c.names.unfilled = "so that bytes stay"
	c.round(RoundOptions{})
	c.names.unfilled = ""
	c.exec(`UPDATE walgate.files SET unreferenced_since = now() - interval '2 hours' WHERE attachment_id = 'due'`)
	c.names.set("young", false)
	c.put(back, "bytes of back")
	if err := c.store.Delete(t.Context(), c.key("lost")); err != nil {
		t.Fatal(err)
	}
	c.put(NewKey(), "nobody's")
	u := c.upload("bob", "expired", "half")
	c.exec(`UPDATE walgate.uploads SET expires_at = now() - interval '1 s' WHERE id = $1::text::uuid`, u.Upload.ID)
	state := func() string {
		return c.dump() + ask[string](c.fixture, `SELECT c::text FROM walgate.care c`)
	}
	before := state()
	c.care.now = func() time.Time { return time.Now().Add(2 * time.Hour) }
	would := c.round(RoundOptions{DryRun: true, Reconcile: true})
	if after := state(); after != before {
		t.Errorf("a dry run changed something:\n%s\n%s", before, after)
	}
	did := c.round(RoundOptions{Reconcile: true})
	would.Reconcile.Deleted = did.Reconcile.Deleted                                                                         // which it doesn't foretell but by Orphans
	would.Reconcile.Objects.Files, would.Reconcile.Objects.Bytes = did.Reconcile.Objects.Files, did.Reconcile.Objects.Bytes // of which the round has deleted some by then
	if a, b := fmt.Sprintf("%+v %+v", would.Sweep, *would.Reconcile), fmt.Sprintf("%+v %+v", did.Sweep, *did.Reconcile); a != b {
		t.Errorf("a dry run says\n%s\nand the round does\n%s", a, b)
	}
	if s := did.Sweep; s.Noted.Files != 1 || s.Due.Files != 1 || s.Deleted.Files != 1 || s.Returned.Files != 1 || s.Freed.Files != 1 || s.Uploads.Files != 1 {
		t.Errorf("the round did %+v", s)
	}
	if r := did.Reconcile; r.Orphans.Files != 1 || r.Lost.Files != 1 || r.Returned.Files != 1 {
		t.Errorf("the round found %+v", r)
	}
}

// TestInterruptedWalkGoesOn cuts a reconciliation off while it looks and while it mends.
func TestInterruptedWalkGoesOn(t *testing.T) {
	t.Parallel()
	c := newCaring(t)
	s := openURL(t, "file://"+t.TempDir()+"/many")
	c.store = s
	c.bulk(0)
	const n = 2*lookBatch + 500
	for i := range n { // written past the driver, which waits for the disk each time
		key := fmt.Sprintf("walgate/%02x/%02x%030x", i%256, i%256, i)
		path := filepath.Join(s.files.root, key)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte("x"), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	away := errors.New("the store is away")
	f := &faulty{objects: s}
	c.care.store, c.care.now = f, func() time.Time { return time.Now().Add(2 * time.Hour) }
	var deleted atomic.Int64
	for _, step := range []struct {
		what          string
		onList        func(int) error
		onDelete      func(string) error
		fails, goesOn bool
	}{
		{"looking is cut off", func(k int) error { return map[bool]error{true: away}[k == lookBatch+100] }, nil, true, false},
		{"mending is cut off", nil, func(string) error { return map[bool]error{true: away}[deleted.Load() > lookBatch+100] }, true, true},
		{"the rest", nil, nil, false, true},
	} {
		f.onList, f.after = step.onList, nil
		f.onDelete = func(key string) error {
			var err error
			if step.onDelete != nil {
				err = step.onDelete(key)
			}
			if err == nil {
				deleted.Add(1)
			}
			return err
		}
		_, err := c.care.Round(t.Context(), RoundOptions{Reconcile: true, Force: true})
		if errors.Is(err, away) != step.fails {
			t.Fatalf("%s: %v", step.what, err)
		}
		if goesOn := f.after[0] != ""; goesOn != step.goesOn {
			t.Errorf("%s: it begins after %q", step.what, f.after)
		}
	}
	if left := keys(t, s, ""); len(left) != 0 {
		t.Errorf("%d objects are left", len(left))
	}
	if p := ask[string](c.fixture, `SELECT progress::text FROM walgate.care`); p != "{}" {
		t.Errorf("at the end the progress is %s", p)
	}
}

// TestListingBesideUploads lists a folder in which temporary files come and go.
func TestListingBesideUploads(t *testing.T) {
	t.Parallel()
	s := open(t, "file")
	key := NewKey()
	mustWrite(t, s, key, strings.NewReader("x"))
	path, stop, ended := filepath.Join(s.files.root, key), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			tmp := fmt.Sprintf("%s.%d.tmp", path, i%20)
			if err := errors.Join(os.WriteFile(tmp, nil, 0o600), os.Remove(tmp)); err != nil {
				t.Error(err)
			}
		}
	}()
	for range 300 {
		if got := keys(t, s, ""); !slices.Contains(got, key) {
			t.Errorf("listed %v", got)
		}
	}
	close(stop)
	<-ended
}

// TestWalkIsOvertaken has a record come after the walk has read the records, and bytes come back after it has listed them.
func TestWalkIsOvertaken(t *testing.T) {
	t.Parallel()
	c := newCaring(t)
	for _, id := range []string{"photo", "picture", "video"} {
		c.file(id, "bytes of "+id)
		c.names.set(id, true)
	}
	last := c.put("walgate/ff/ffffffffffffffffffffffffffffffff", "new")
	key := c.key("video")
	if err := c.store.Delete(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	f := &faulty{objects: c.store}
	f.onList = func(n int) error {
		if len(f.after) == 2 && n == 3 { // it mends, and has read the records
			p := c.upload("ana", "new", "new")
			p.Key = last
			c.publish(p, Created)
			c.put(key, "bytes of video")
		}
		return nil
	}
	c.care.store = f
	r := c.reconcile(2 * time.Hour)
	if r.Orphans.Files != 1 || r.Missing.Files != 1 {
		t.Fatalf("the look found %+v", r)
	}
	if r.Deleted.Files != 0 || r.Lost.Files != 0 || c.text("new") != "new" || c.text("video") != "bytes of video" {
		t.Errorf("%+v", r)
	}
	c.expect("video", "u", "u")
}

// vanishing is a store that loses much between the look and the mending.
type vanishing struct {
	objects
	lists int
	lose  func()
}

func (v *vanishing) List(ctx context.Context, after string) iter.Seq2[Object, error] {
	if v.lists++; v.lists == 2 {
		v.lose()
	}
	return v.objects.List(ctx, after)
}

// TestMendingStops: what goes beyond what the look found is not mended: the guard never saw it.
func TestMendingStops(t *testing.T) {
	t.Parallel()
	c := newCaring(t)
	c.store = openURL(t, "mem://")
	const n = guardFloor + 1
	c.bulk(n)
	var files []string
	for i := range n {
		files = append(files, c.put(ask[string](c.fixture, `SELECT storage_key FROM walgate.files WHERE attachment_id = $1`, fmt.Sprint("bulk", i)), "x"))
		c.names.set(fmt.Sprint("bulk", i), true)
	}
	c.put(NewKey(), "nobody's") // so that there is something to mend
	c.care.now = func() time.Time { return time.Now().Add(2 * time.Hour) }
	c.care.store = &vanishing{objects: c.store, lose: func() {
		for _, key := range files {
			if err := c.store.Delete(t.Context(), key); err != nil {
				t.Error(err)
			}
		}
	}}
	if _, err := c.care.Round(t.Context(), RoundOptions{Reconcile: true}); err == nil || !strings.Contains(err.Error(), "mending stops here") {
		t.Errorf("the round ended with %v", err)
	}
	if told := ask[int](c.fixture, `SELECT count(*)::int FROM walgate.files WHERE state <> 'u'`); told != 0 {
		t.Errorf("clients were told that %d files are missing", told)
	}
}

package blobstore

import (
	"context"
	"crypto/sha256"
	"encoding"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// TestPartsOfAnUpload: what two requests send for one offset is added once, and never mixed.
func TestPartsOfAnUpload(t *testing.T) {
	t.Parallel()
	f := newFixture(t, RecordsOptions{Quota: 1000})
	u, err := f.Reserve(t.Context(), Reservation{Kind: Tus, AttachmentID: "film", Subject: "ana", Length: 10})
	if err != nil {
		t.Fatal(err)
	}
	send := func(text string, offset int64) error {
		u, err := f.Upload(t.Context(), u.ID, "ana") // as another request, perhaps of another instance
		if err != nil {
			return err
		}
		part, key, err := f.BeginPart(t.Context(), u)
		if err != nil {
			return err
		}
		h := sha256.New()
		if u.Hash != nil {
			if err := h.(encoding.BinaryUnmarshaler).UnmarshalBinary(u.Hash); err != nil {
				return err
			}
		}
		h.Write([]byte(text))
		state, err := h.(encoding.BinaryMarshaler).MarshalBinary()
		if err != nil {
			return err
		}
		mustWrite(t, f.store, key, strings.NewReader(text))
		return f.AddPart(t.Context(), u, part, offset, int64(len(text)), state)
	}
	if err := send("0123", 0); err != nil {
		t.Fatal(err)
	}
	var done sync.WaitGroup
	var mu sync.Mutex
	added := 0
	for i := range 4 {
		done.Go(func() {
			err := send(strings.Repeat(fmt.Sprint(i), 3), 4)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				added++
			} else if !errors.Is(err, ErrOffset) {
				t.Error(err)
			}
		})
	}
	done.Wait()
	if added != 1 {
		t.Errorf("%d parts were added at one offset", added)
	}
	if err := send("789", 7); err != nil {
		t.Fatal(err)
	}
	if err := send("late", 4); !errors.Is(err, ErrOffset) {
		t.Errorf("at an offset that has passed: %v", err)
	}
	if _, err := f.Upload(t.Context(), u.ID, "bob"); !errors.Is(err, ErrNotFound) {
		t.Errorf("another subject's upload: %v", err)
	}
	for _, id := range []string{"", "x", "00000000-0000-0000-0000-000000000000"} {
		if _, err := f.Upload(t.Context(), id, "ana"); !errors.Is(err, ErrNotFound) {
			t.Errorf("upload %q: %v", id, err)
		}
	}
	if u, err = f.Upload(t.Context(), u.ID, "ana"); err != nil || u.Received != 10 || u.Length != 10 || u.Reserved != 10 {
		t.Fatalf("%+v, %v", u, err)
	}
	h := sha256.New()
	if err := h.(encoding.BinaryUnmarshaler).UnmarshalBinary(u.Hash); err != nil {
		t.Fatal(err)
	}
	f.publish(Publishing{Upload: u, Size: u.Received, SHA256: h.Sum(nil)}, Created)
	text := f.text("film")
	if sum := sha256.Sum256([]byte(text)); string(sum[:]) != string(h.Sum(nil)) || text[:4] != "0123" || text[7:] != "789" || text[4] != text[6] {
		t.Errorf("the file holds %q", text)
	}
	file, err := f.Find(t.Context(), "film")
	if err != nil || len(file.Objects()) != 3 || len(keys(t, f.store, "")) != 7 {
		t.Errorf("%v of %d objects (%v)", file.Objects(), len(keys(t, f.store, "")), err)
	}
	if _, _, err := f.BeginPart(t.Context(), u); !errors.Is(err, ErrGivenUp) {
		t.Errorf("a part of what is published: %v", err)
	}
	nothing, err := f.Reserve(t.Context(), Reservation{Kind: Tus, AttachmentID: "empty", Subject: "ana", Length: -1})
	if err == nil {
		err = f.SetLength(t.Context(), nothing, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(nil)
	if f.publish(Publishing{Upload: nothing, SHA256: sum[:]}, Created); f.text("empty") != "" {
		t.Error("a file of nothing holds something")
	}
}

func TestSetLength(t *testing.T) {
	t.Parallel()
	f := newFixture(t, RecordsOptions{Quota: 100})
	u, err := f.Reserve(t.Context(), Reservation{Kind: Tus, AttachmentID: "film", Subject: "ana", Length: -1})
	if err != nil || u.Length != -1 || u.Reserved != 0 {
		t.Fatalf("%+v, %v", u, err)
	}
	if err := f.Grow(t.Context(), u, 30); err != nil {
		t.Fatal(err)
	}
	if err := f.SetLength(t.Context(), u, 101); !errors.Is(err, ErrQuota) {
		t.Errorf("more than the quota: %v", err)
	}
	if err := f.SetLength(t.Context(), u, 100); err != nil || u.Reserved != 100 {
		t.Errorf("%d reserved (%v)", u.Reserved, err)
	}
	if err := f.SetLength(t.Context(), u, 99); !errors.Is(err, ErrOffset) {
		t.Errorf("another length: %v", err)
	}
	f.settled()
}

// TestExpiredUploads: their objects go, what they reserved is free, and nobody can go on with them.
func TestExpiredUploads(t *testing.T) {
	t.Parallel()
	f := newFixture(t, RecordsOptions{})
	kept, late := f.upload("ana", "kept", "kept"), f.upload("ana", "late", "late")
	parts, err := f.Reserve(t.Context(), Reservation{Kind: Tus, AttachmentID: "film", Subject: "ana", Length: 10})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 2 { // the second is written and never added
		part, key, err := f.BeginPart(t.Context(), parts)
		if err == nil && i == 0 {
			err = f.AddPart(t.Context(), parts, part, 0, 4, nil)
		}
		if err != nil {
			t.Fatal(err)
		}
		mustWrite(t, f.store, key, strings.NewReader("part"))
	}
	f.exec(`UPDATE walgate.uploads SET expires_at = now() - interval '1 second' WHERE attachment_id IN ('late', 'film')`)
	if n, size, more, err := f.Expire(t.Context(), f.store); n != 2 || size != 14 || more || err != nil {
		t.Errorf("expired %d with %d bytes, more %v (%v)", n, size, more, err)
	}
	if u, err := f.Usage(t.Context(), "ana"); err != nil || u.Reserved != 4 || len(keys(t, f.store, "")) != 1 {
		t.Errorf("%+v, and %v (%v)", u, keys(t, f.store, ""), err)
	}
	if _, err := f.Publish(t.Context(), late); !errors.Is(err, ErrGivenUp) {
		t.Errorf("published what has expired: %v", err)
	}
	if err := f.Grow(t.Context(), late.Upload, 10); !errors.Is(err, ErrGivenUp) {
		t.Errorf("went on with what has expired: %v", err)
	}
	if err := f.AddPart(t.Context(), parts, 1, 4, 4, nil); !errors.Is(err, ErrGivenUp) {
		t.Errorf("added to what has expired: %v", err)
	}
	f.exec(`UPDATE walgate.uploads SET expires_at = now() - interval '1 second'`)
	if err := f.Grow(t.Context(), kept.Upload, 4); err != nil { // who goes on has more time again
		t.Fatal(err)
	}
	if n, _, _, err := f.Expire(t.Context(), f.store); n != 0 || err != nil {
		t.Errorf("expired %d that go on (%v)", n, err)
	}
	f.publish(kept, Created)
	f.settled()
}

// TestReleaseIsTakenUpAgain where it was cut off, at either of its steps: the quota is free only when the bytes are gone.
func TestReleaseIsTakenUpAgain(t *testing.T) {
	t.Parallel()
	f := newFixture(t, RecordsOptions{})
	p := f.upload("ana", "photo", "hello")
	path := filepath.Join(f.store.files.root, p.Upload.StorageKey)
	for _, err := range []error{os.Remove(path), os.Mkdir(path, 0o700), os.WriteFile(path+"/in the way", nil, 0o600)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := f.Release(ended, f.store, p.Upload); err == nil || errors.Is(err, context.Canceled) {
		t.Errorf("released although its object can't be deleted: %v", err)
	}
	if n, _, _, err := f.Expire(t.Context(), f.store); n != 0 || err == nil {
		t.Errorf("expired %d (%v)", n, err)
	}
	if u, err := f.Usage(t.Context(), "ana"); err != nil || u.Reserved != 5 {
		t.Errorf("%+v (%v)", u, err)
	}
	if _, err := f.Upload(t.Context(), p.Upload.ID, "ana"); !errors.Is(err, ErrGivenUp) {
		t.Errorf("an upload that was given up: %v", err)
	}
	if _, err := f.Publish(t.Context(), p); !errors.Is(err, ErrGivenUp) {
		t.Errorf("published what was given up: %v", err)
	}
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
	if n, _, _, err := f.Expire(t.Context(), f.store); n != 1 || err != nil {
		t.Errorf("expired %d (%v)", n, err)
	}
	if u, err := f.Usage(t.Context(), "ana"); err != nil || u != (Usage{}) {
		t.Errorf("%+v (%v)", u, err)
	}
}

// TestQuotasAddUp: whatever happens to a few ids at once, the quotas are what the tables say, the store holds what the records
// name, and nobody waits for ever.
func TestQuotasAddUp(t *testing.T) {
	t.Parallel()
	f := newFixture(t, RecordsOptions{Quota: 200})
	var done sync.WaitGroup
	for worker := range uint64(6) {
		done.Go(func() {
			r := rand.New(rand.NewPCG(worker, 1))
			for range 40 {
				f.anything(r)
			}
		})
	}
	done.Wait()
	f.exec(`UPDATE walgate.uploads SET expires_at = now()`)
	f.settled()
	if n := ask[int](f, `SELECT count(*) FROM walgate.uploads`); n != 0 {
		t.Errorf("%d uploads are left", n)
	}
	if n := ask[int](f, `SELECT count(*) FROM walgate.quotas WHERE used > 200`); n != 0 {
		t.Errorf("%d subjects have more than their quota", n)
	}
}

// anything does one of the things that can happen.
func (f *fixture) anything(r *rand.Rand) {
	ctx, id, subject := f.t.Context(), fmt.Sprint("id", r.IntN(3)), fmt.Sprint("subject", r.IntN(2))
	old, err := f.Find(ctx, id)
	switch {
	case err != nil && !errors.Is(err, ErrNotFound):
		f.t.Error(err)
		return
	case r.IntN(6) == 0 && old != nil:
		_, err = f.Remove(ctx, Removal{AttachmentID: id, EventID: old.EventID, Subject: subject})
	case r.IntN(10) == 0:
		_, _, _, err = f.Expire(ctx, f.store)
	default:
		err = f.uploadSomething(ctx, r, old, id, subject)
	}
	for _, expected := range []error{ErrNotFound, ErrChanged, ErrQuota, ErrGivenUp} {
		if errors.Is(err, expected) {
			return
		}
	}
	if err != nil {
		f.t.Error(err)
	}
}

func (f *fixture) uploadSomething(ctx context.Context, r *rand.Rand, old *File, id, subject string) error {
	size := int64(r.IntN(60))
	u, err := f.Reserve(ctx, Reservation{Kind: Put, AttachmentID: id, Subject: subject, Length: size * int64(r.IntN(2))})
	if err != nil {
		return err
	}
	if err := f.Grow(ctx, u, size); err != nil {
		return errors.Join(err, f.Release(ctx, f.store, u))
	}
	w, err := f.store.Write(ctx, u.StorageKey, stream(size), WriteOptions{})
	if err != nil {
		return err
	}
	if r.IntN(5) == 0 {
		return nil // and nothing more is heard of it
	}
	p := Publishing{Upload: u, Size: w.Size, SHA256: w.SHA256}
	if old != nil && r.IntN(2) == 0 {
		p.IfMatch = old.SHA256
	}
	_, err = f.Publish(ctx, p)
	return errors.Join(err, f.Release(ctx, f.store, u))
}

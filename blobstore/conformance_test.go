package blobstore

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/s3"
)

// stream yields n bytes that look random, the same each time.
func stream(n int64) io.Reader {
	return io.LimitReader(rand.NewChaCha8([32]byte{1}), n)
}

func mustWrite(t testing.TB, s *Store, key string, r io.Reader) Written {
	t.Helper()
	w, err := s.Write(t.Context(), key, r, WriteOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func readAll(t testing.TB, r io.ReadCloser, err error) []byte {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	return text
}

// keys lists a store.
func keys(t testing.TB, s *Store, after string) []string {
	t.Helper()
	var list []string
	for o, err := range s.List(t.Context(), after) {
		if err != nil {
			t.Fatal(err)
		}
		if o.Size < 0 || time.Since(o.ModTime) > time.Hour {
			t.Errorf("listed %+v", o)
		}
		list = append(list, o.Key)
	}
	return list
}

// empty fails unless nothing is left in a store, nor half of something.
func empty(t testing.TB, s *Store, key string) {
	t.Helper()
	if _, err := s.Size(t.Context(), key); !errors.Is(err, ErrNotFound) {
		t.Errorf("the size of what wasn't written: %v", err)
	}
	if r, err := s.Read(t.Context(), key, 0, -1); !errors.Is(err, ErrNotFound) {
		t.Errorf("reading what wasn't written: %v", err)
		if r != nil {
			r.Close()
		}
	}
	if list := keys(t, s, ""); len(list) > 0 {
		t.Errorf("left behind: %v", list)
	}
	var client *s3.Client
	if s.bucket.As(&client) {
		name := "files"
		parts, err := client.ListMultipartUploads(t.Context(), &s3.ListMultipartUploadsInput{Bucket: &name})
		if err != nil {
			if strings.Contains(err.Error(), "NoSuchUpload") { // the stand-in's way to say that there are none at all
				return
			}
			t.Fatal(err)
		}
		for _, u := range parts.Uploads {
			if strings.HasSuffix(*u.Key, key) {
				t.Errorf("parts of %s are left, and cost money", *u.Key)
			}
		}
	}
	if s.files != nil {
		err := filepath.WalkDir(s.files.root, func(path string, d os.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				t.Errorf("left behind: %s", path)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
}

func TestObjectsComeBackAsTheyWere(t *testing.T) {
	everyKind(t, func(t *testing.T, s *Store) {
		for _, size := range []int64{0, 1, partSize - 1, partSize, partSize + 1, 16<<20 + 7, 70_000_000} {
			want, err := io.ReadAll(stream(size))
			if err != nil {
				t.Fatal(err)
			}
			sum, key := sha256.Sum256(want), NewKey()
			w, err := s.Write(t.Context(), key, stream(size), WriteOptions{Limit: size, Disposition: "attachment"})
			if err != nil || w.Size != size || !bytes.Equal(w.SHA256, sum[:]) {
				t.Fatalf("wrote %d bytes: %+v, %v", size, w, err)
			}
			if n, err := s.Size(t.Context(), key); err != nil || n != size {
				t.Errorf("%d bytes have size %d, %v", size, n, err)
			}
			for _, span := range [][2]int64{{0, -1}, {0, size}, {0, 0}, {size, 0}, {0, 1}, {size - 1, 1}, {size / 2, size - size/2}, {size / 3, min(size/3, 999)}, {size / 2, -1}} {
				if offset, n := span[0], span[1]; offset >= 0 && offset+n <= size && (size < 1<<23 || n < 1000 && offset <= 0 || n >= 0 && n < 1000) {
					end := offset + n
					if n < 0 {
						end = size
					}
					r, err := s.Read(t.Context(), key, offset, n)
					if got := readAll(t, r, err); !bytes.Equal(got, want[offset:end]) {
						t.Errorf("of %d bytes, %d from %d on are %d others", size, n, offset, len(got))
					}
				}
			}
			a, err := s.bucket.Attributes(t.Context(), key)
			if typed := s.scheme != "file" && s.scheme != "gs"; err != nil || typed && a.ContentType != "application/octet-stream" { // those two stand-ins keep none
				t.Errorf("%d bytes have type %s (%v): a signed URL would hand them out as that", size, a.ContentType, err)
			}
			if err := s.Delete(t.Context(), key); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// TestNothingIsLeftOfAFailedWrite: whatever ends a write, before or after parts of it were sent.
func TestNothingIsLeftOfAFailedWrite(t *testing.T) {
	broken := errors.New("the client went away")
	everyKind(t, func(t *testing.T, s *Store) {
		for _, size := range []int64{0, 1, 100_000, 2*partSize + 1, 4 * partSize} {
			key := NewKey()
			if _, err := s.Write(t.Context(), key, io.MultiReader(stream(size), failingReader{broken}), WriteOptions{}); !errors.Is(err, broken) {
				t.Errorf("a reader that fails after %d bytes: %v", size, err)
			}
			empty(t, s, key)
			ctx, cancel := context.WithCancelCause(t.Context())
			if _, err := s.Write(ctx, key, io.MultiReader(stream(size), cancelling{func() { cancel(broken) }}, stream(1)), WriteOptions{}); !errors.Is(err, broken) {
				t.Errorf("cancelled after %d bytes: %v", size, err)
			}
			empty(t, s, key)
			if _, err := s.Write(ctx, key, stream(size), WriteOptions{}); err == nil {
				t.Errorf("cancelled before %d bytes: %v", size, err)
			}
			empty(t, s, key)
			if size == 0 {
				continue
			}
			if _, err := s.Write(t.Context(), key, stream(size), WriteOptions{Limit: max(size-1, 1)}); size > 1 && !errors.Is(err, ErrTooLarge) {
				t.Errorf("one byte more than %d: %v", size-1, err)
			}
			if size > 1 {
				empty(t, s, key)
			}
			_ = s.Delete(t.Context(), key)
		}
	})
}

type failingReader struct{ err error }

func (f failingReader) Read([]byte) (int, error) { return 0, f.err }

// cancelling does something when it is read, and holds nothing.
type cancelling struct{ do func() }

func (c cancelling) Read([]byte) (int, error) { c.do(); return 0, io.EOF }

func TestListingIsOrderedAndResumes(t *testing.T) {
	everyKind(t, func(t *testing.T, s *Store) {
		want := []string{"walgate/00/00", "walgate/00/00.0", "walgate/00/00.1", "walgate/00/00.10", "walgate/00/00.2", "walgate/00/0a", "walgate/0f/0f", "walgate/a0/a0", "walgate/a0/a1", "walgate/a0/a2", "walgate/a0/a3", "walgate/ff/ff"}
		for _, key := range append([]string{"else/where", "walgate-probe/x"}, want...) {
			mustWrite(t, s, key, stream(3))
		}
		if got := keys(t, s, ""); !slices.Equal(got, want) {
			t.Errorf("listed %v\nwant %v", got, want)
		}
		for i, key := range want {
			if got := keys(t, s, key); !slices.Equal(got, want[i+1:]) {
				t.Errorf("after %s: %v", key, got)
			}
		}
		for after, n := range map[string]int{"a": len(want), "walgate/": len(want), "walgate/00/000": 7, "walgate/5": 5, "walgate/a0": 5, "walgate/a0/": 5, "walgate/a00": 1, "walgate/ff/zz": 0, "walgate/g": 0, "x": 0} {
			if got := keys(t, s, after); len(got) != n {
				t.Errorf("after %s: %v, want %d", after, got, n)
			}
		}
		for o := range s.List(t.Context(), "") { // a reader may stop
			if o.Key != want[0] || o.Size != 3 {
				t.Errorf("the first is %+v", o)
			}
			break
		}
	})
}

func TestDeletionAndCopy(t *testing.T) {
	everyKind(t, func(t *testing.T, s *Store) {
		key, other := NewKey(), NewKey()
		mustWrite(t, s, key, stream(1000))
		if err := s.Copy(t.Context(), other, key); err != nil {
			t.Fatal(err)
		}
		if err := s.Copy(t.Context(), NewKey(), NewKey()); err == nil {
			t.Error("what isn't there was copied")
		}
		for range 2 {
			if err := s.Delete(t.Context(), key); err != nil {
				t.Errorf("delete: %v", err)
			}
		}
		if _, err := s.Size(t.Context(), key); !errors.Is(err, ErrNotFound) {
			t.Errorf("deleted, but: %v", err)
		}
		r, err := s.Read(t.Context(), other, 0, -1)
		if got := readAll(t, r, err); len(got) != 1000 {
			t.Errorf("the copy has %d bytes", len(got))
		}
		if err := s.Check(t.Context()); err != nil {
			t.Errorf("check: %v", err)
		}
		if got := keys(t, s, ""); !slices.Equal(got, []string{other}) {
			t.Errorf("left are %v", got)
		}
	})
}

func TestPartsAreReadAsOne(t *testing.T) {
	everyKind(t, func(t *testing.T, s *Store) {
		want, _ := io.ReadAll(stream(100))
		key, parts := NewKey(), []int64{0, 10, 0, 50, 40, 0}
		at := int64(0)
		for i, n := range parts {
			if n > 0 {
				mustWrite(t, s, PartKey(key, i), bytes.NewReader(want[at:at+n]))
				at += n
			}
		}
		for from := int64(0); from <= 100; from += 5 {
			for to := from; to <= 100; to += 5 {
				r, err := s.ReadParts(t.Context(), key, parts, from, to-from)
				if got := readAll(t, r, err); !bytes.Equal(got, want[from:to]) {
					t.Fatalf("%d to %d: %d other bytes", from, to, len(got))
				}
			}
		}
		if _, err := s.ReadParts(t.Context(), key, parts, 0, 101); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("more than there is: %v", err)
		}
		r, err := s.ReadParts(t.Context(), key, []int64{}, 0, 0)
		if got := readAll(t, r, err); len(got) > 0 {
			t.Errorf("a file of nothing holds %d bytes", len(got))
		}
		if _, err := s.ReadParts(t.Context(), key, nil, 0, 0); !errors.Is(err, ErrNotFound) {
			t.Errorf("one object that isn't there: %v", err)
		}
		mustWrite(t, s, PartKey(key, 3), bytes.NewReader(want[:49]))
		for _, r := range []func() (io.ReadCloser, error){
			func() (io.ReadCloser, error) { return s.ReadParts(t.Context(), key, parts, 0, 100) },
			func() (io.ReadCloser, error) { return s.ReadParts(t.Context(), PartKey(key, 3), nil, 0, 50) },
		} {
			in, err := r()
			if err != nil {
				t.Fatal(err)
			}
			if n, err := io.Copy(io.Discard, in); !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("a part that lost its end is read as %d bytes: %v", n, err)
			}
			in.Close()
		}
	})
}

// TestSignedURLs: where the store can, whoever has the URL reads or writes one object, and writes it once.
func TestSignedURLs(t *testing.T) {
	everyKind(t, func(t *testing.T, s *Store) {
		key := NewKey()
		put, err := s.SignPut(t.Context(), key, 1000, time.Minute)
		if s.scheme == "file" || s.scheme == "mem" || s.scheme == "gs" { // Google's needs an account with a key
			if _, getErr := s.SignGet(t.Context(), key, time.Minute); !errors.Is(err, ErrNotSigned) || !errors.Is(getErr, ErrNotSigned) {
				t.Errorf("%v, %v; want that it can't", err, getErr)
			}
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		if u, err := url.Parse(put.URL); s.scheme == "s3" && (err != nil || u.Query().Get("X-Amz-SignedHeaders") != "content-length;host;if-none-match") { // the stand-in checks no signature
			t.Errorf("signed are %s (%v)", u.Query().Get("X-Amz-SignedHeaders"), err)
		}
		for i, want := range []bool{true, false} {
			if status := send(t, http.MethodPut, put, stream(1000)); status/100 == 2 != want {
				t.Errorf("PUT number %d: %d", i+1, status)
			}
		}
		get, err := s.SignGet(t.Context(), key, time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		if status := send(t, http.MethodGet, get, nil); status != http.StatusOK {
			t.Errorf("GET: %d", status)
		}
		if n, err := s.Size(t.Context(), key); err != nil || n != 1000 {
			t.Errorf("%d bytes were written (%v)", n, err)
		}
	})
}

func send(t *testing.T, method string, u Signed, body io.Reader) int {
	t.Helper()
	var text []byte
	if body != nil {
		text, _ = io.ReadAll(body)
	}
	r, err := http.NewRequestWithContext(t.Context(), method, u.URL, bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range u.Headers {
		r.Header.Set(name, value)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	answer, err := client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, answer.Body)
	answer.Body.Close()
	return answer.StatusCode
}

// TestAbsentBucket: of a bucket that isn't there nobody may conclude that its files are lost.
func TestAbsentBucket(t *testing.T) {
	t.Parallel()
	gone := t.TempDir() + "/blobs"
	urls := map[string]string{"file": "file://" + gone}
	for _, kind := range []string{"s3", "gs", "azblob"} {
		urls[kind] = strings.Replace(buckets[kind], "//files", "//nowhere", 1)
	}
	for kind, address := range urls {
		s := openURL(t, address)
		if kind == "file" {
			if err := os.Remove(gone); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := s.Size(t.Context(), NewKey()); err == nil || errors.Is(err, ErrNotFound) {
			t.Errorf("%s: size: %v", kind, err)
		}
		if err := s.Check(t.Context()); err == nil && kind != "file" { // which makes its directories
			t.Errorf("%s: check finds nothing wrong", kind)
		}
	}
}

func TestRefusedURLs(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "x")
	for address, want := range map[string]string{
		"":                                "scheme must be one of",
		"/var/lib/walgate":                "scheme must be one of",
		"ftp://x":                         "scheme must be one of",
		"file://var/lib/walgate":          "third slash",
		"file:///":                        "names no directory",
		"file://":                         "names no directory",
		"s3://files?regoin=eu-central-1":  "regoin",
		"file://" + dir + "?metdata=skip": "metdata",
		"s3://%zz":                        "URL",
	} {
		if s, err := Open(t.Context(), address); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, %v; want %q", address, s, err, want)
		}
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("a URL that was refused made a directory")
	}
}

// TestFilesAreTheirBytes: nothing beside them, readable by nobody else, no temporary file elsewhere.
func TestFilesAreTheirBytes(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := openURL(t, "file://"+dir+"/a/blobs")
	key := NewKey()
	mustWrite(t, s, key, stream(100))
	var found []string
	err := filepath.WalkDir(dir+"/a", func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if d.IsDir() && info.Mode().Perm() != 0o700 {
			t.Errorf("%s has mode %s", path, info.Mode())
		}
		if !d.IsDir() {
			found = append(found, path)
		}
		return err
	})
	if want := []string{dir + "/a/blobs/" + key}; err != nil || !slices.Equal(found, want) {
		t.Errorf("found %v, want %v (%v)", found, want, err)
	}
}

package blobstore

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"gocloud.dev/blob"
	"gocloud.dev/blob/azureblob" // azblob://
	"gocloud.dev/blob/fileblob"
	_ "gocloud.dev/blob/gcsblob" // gs://
	_ "gocloud.dev/blob/memblob" // mem://
	_ "gocloud.dev/blob/s3blob"  // s3://
	"gocloud.dev/gcerrors"
)

// What can be wrong with an object.
var (
	ErrNotFound  = errors.New("there is no such file")
	ErrTooLarge  = errors.New("more bytes came than are allowed")
	ErrNotSigned = errors.New("this blob store can't sign URLs")
)

// keyPrefix is that of all keys of files. What Check writes has another, so that a listing never holds it.
const keyPrefix, probePrefix = "walgate/", "walgate-probe/"

// partSize is how much of an object is sent at once to a bucket behind a network, and so what an upload takes of memory: S3 has
// no smaller parts, and takes 10,000 of them.
const partSize, mostParts = 5 << 20, 10_000

// Schemes are those of the URLs that Open understands.
var Schemes = []string{"file", "mem", "s3", "gs", "azblob"}

// Store is a bucket. It is safe for concurrent use.
type Store struct {
	bucket *blob.Bucket
	scheme string
	files  *durable // of scheme file, else nil
}

// Open opens the bucket that a URL of gocloud.dev names, without looking whether it is there (Check does). The directory of a
// file URL is made.
func Open(ctx context.Context, rawURL string) (*Store, error) {
	u, err := url.Parse(rawURL)
	if err != nil {
		return nil, fmt.Errorf("the blob store's URL: %w", err)
	}
	if !slices.Contains(Schemes, u.Scheme) {
		return nil, fmt.Errorf("the blob store's URL %q: its scheme must be one of %s, as in file:///var/lib/walgate/blobs or s3://bucket?region=eu-central-1", rawURL, strings.Join(Schemes, ", "))
	}
	s := &Store{scheme: u.Scheme}
	if u.Scheme == fileblob.Scheme {
		if s.files, err = durableFiles(u); err != nil {
			return nil, err
		}
	}
	if s.bucket, err = blob.OpenBucket(ctx, u.String()); err != nil {
		return nil, fmt.Errorf("open the blob store: %w", err)
	}
	return s, nil
}

// Scheme returns the scheme of the store's URL.
func (s *Store) Scheme() string { return s.scheme }

// Close ends the use of the bucket.
func (s *Store) Close() error { return s.bucket.Close() }

// NewKey returns a new storage key.
func NewKey() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	return keyNamed(hex.EncodeToString(b[:]))
}

func keyNamed(name string) string { return keyPrefix + name[:2] + "/" + name }

// WriteOptions say how an object is written.
type WriteOptions struct {
	ContentType string // kept with the object, where a signed URL may hand it out
	Disposition string // Content-Disposition, likewise
	Limit       int64  // bytes; one more is ErrTooLarge; 0: no limit
}

// Written is what an object became.
type Written struct {
	Size   int64
	SHA256 []byte
}

// Write makes an object of what r holds until io.EOF. Nothing is visible of one that isn't complete: whatever ends the write
// early, also the context, leaves nothing. An error of r comes back as it is. r isn't read any more once Write has returned.
func (s *Store) Write(ctx context.Context, key string, r io.Reader, o WriteOptions) (Written, error) {
	caller := ctx
	ctx, abort := context.WithCancel(ctx)
	defer abort()
	in := &source{ctx: ctx, r: r, hash: sha256.New(), limit: o.Limit}
	var file *os.File
	options := &blob.WriterOptions{ContentType: o.contentType(), ContentDisposition: o.Disposition, BufferSize: o.partSize(), MaxConcurrency: 1,
		BeforeWrite: func(as func(any) bool) error {
			if s.files != nil && !as(&file) {
				return errors.New("the driver doesn't show the file that it writes to")
			}
			return s.boundParts(as, o.partSize())
		}}
	if s.scheme == azureblob.Scheme { // its Writer panics where the service fails; its Upload publishes nothing where the reader does
		return s.written(caller, key, in, s.bucket.Upload(ctx, key, in, options))
	}
	w, err := s.bucket.NewWriter(ctx, key, options)
	if err != nil {
		return Written{}, s.failed("write", key, err)
	}
	var sent int64 // to the disk
	wrote := func(n int64) {
		if file != nil && n-sent >= sendBytes {
			sendToDisk(file, sent, n-sent)
			sent = n
		}
	}
	if err = in.copyTo(w, wrote); err == nil && file != nil {
		err = s.files.sync(file)
	}
	if err != nil {
		abort()
		_ = w.Close() // which gives up, for its context has ended
		return s.written(caller, key, in, err)
	}
	if err = w.Close(); err == nil && s.files != nil {
		err = s.files.settle(key)
	}
	return s.written(caller, key, in, err)
}

// written ends a write.
func (s *Store) written(ctx context.Context, key string, in *source, err error) (Written, error) {
	switch {
	case in.err != nil:
		return Written{}, in.err
	case err == nil:
		return Written{Size: in.n, SHA256: in.hash.Sum(nil)}, nil
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	}
	if in.ended { // perhaps only the answer was lost
		late, end := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
		defer end()
		_ = s.bucket.Delete(late, key)
	}
	return Written{}, s.failed("write", key, err)
}

// source reads the bytes of an object, counts and digests them, and remembers what is wrong with them.
type source struct {
	ctx   context.Context
	r     io.Reader
	hash  hash.Hash
	later bool // somebody else digests what is read
	n     int64
	limit int64
	err   error // why they can't all be had
	ended bool  // all were had
}

// Read reads on.
func (s *source) Read(p []byte) (int, error) {
	if s.err != nil {
		return 0, s.err
	}
	if s.ctx.Err() != nil {
		s.err = context.Cause(s.ctx)
		return 0, s.err
	}
	n, err := s.r.Read(p)
	if !s.later {
		_, _ = s.hash.Write(p[:n]) // never fails
	}
	s.n += int64(n)
	switch {
	case s.limit > 0 && s.n > s.limit:
		s.err = ErrTooLarge
	case err == io.EOF:
		s.ended = true
		return n, err
	default:
		s.err = err
	}
	return n, s.err
}

// undoTimeout bounds what is done after a write that failed.
const undoTimeout = 15 * time.Second

func (o WriteOptions) contentType() string {
	if o.ContentType == "" { // else the driver waits for bytes to guess by, and some services refuse an empty one
		return "application/octet-stream"
	}
	return o.ContentType
}

// partSize is such that the largest object has no more parts than S3 takes.
func (o WriteOptions) partSize() int { return int(max(partSize, o.Limit/(mostParts-1)+1)) }

// Read reads an object from an offset on; length -1: to its end.
func (s *Store) Read(ctx context.Context, key string, offset, length int64) (io.ReadCloser, error) {
	if length == 0 { // which some services refuse of an object without bytes
		_, err := s.Size(ctx, key)
		return io.NopCloser(strings.NewReader("")), err
	}
	r, err := s.bucket.NewRangeReader(ctx, key, offset, length, nil)
	if err != nil {
		return nil, s.failed("read", key, err)
	}
	return r, nil
}

// Size returns an object's size. ErrNotFound says for sure that there is no such object in a bucket that is there.
func (s *Store) Size(ctx context.Context, key string) (int64, error) {
	a, err := s.bucket.Attributes(ctx, key)
	if err == nil {
		return a.Size, nil
	}
	if gcerrors.Code(err) == gcerrors.NotFound { // of a bucket that isn't there too
		if err := s.accessible(ctx); err != nil {
			return 0, fmt.Errorf("the blob store's bucket can't be listed: %w", err)
		}
	}
	return 0, s.failed("look at", key, err)
}

// accessible says what is wrong with the bucket itself.
func (s *Store) accessible(ctx context.Context) error {
	if s.files != nil { // the driver lists a directory that isn't there as an empty one
		_, err := os.ReadDir(s.files.root)
		return err
	}
	there, err := s.bucket.IsAccessible(ctx)
	if err == nil && !there {
		err = errors.New("it is not there")
	}
	return err
}

// Delete deletes an object. One that isn't there is no error.
func (s *Store) Delete(ctx context.Context, key string) error {
	if err := s.bucket.Delete(ctx, key); err != nil && gcerrors.Code(err) != gcerrors.NotFound {
		return s.failed("delete", key, err)
	}
	return nil
}

// Copy copies an object within the bucket: what can still be overwritten by who holds a signed URL to one that can't.
func (s *Store) Copy(ctx context.Context, dst, src string) error {
	if s.files != nil { // the driver's copy doesn't wait for the disk
		r, err := s.Read(ctx, src, 0, -1)
		if err != nil {
			return err
		}
		defer r.Close()
		_, err = s.Write(ctx, dst, r, WriteOptions{})
		return err
	}
	if err := s.bucket.Copy(ctx, dst, src, nil); err != nil {
		return s.failed("copy", src, err)
	}
	return nil
}

// failed says what couldn't be done; ErrNotFound where there is no such object.
func (s *Store) failed(what, key string, err error) error {
	if gcerrors.Code(err) == gcerrors.NotFound {
		return fmt.Errorf("%s %s in the blob store: %w (%w)", what, key, ErrNotFound, err)
	}
	return fmt.Errorf("%s %s in the blob store: %w", what, key, err)
}

// Check tries what the store is needed for: it writes an object, reads it and deletes it.
func (s *Store) Check(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	key, text := probePrefix+rand.Text(), []byte("walgate looks whether it can write here; nobody needs this object\n")
	if _, err := s.Write(ctx, key, bytes.NewReader(text), WriteOptions{ContentType: "text/plain"}); err != nil {
		return err
	}
	r, err := s.Read(ctx, key, 0, -1)
	if err != nil {
		return err
	}
	got, err := io.ReadAll(r)
	r.Close()
	if err != nil || !bytes.Equal(got, text) {
		return fmt.Errorf("the blob store gave back other bytes than were written to %s: %q (%w)", key, got, cmp.Or(err, io.ErrUnexpectedEOF))
	}
	return s.Delete(ctx, key)
}

const checkTimeout = 20 * time.Second

package gateway

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"hash"
	"io"

	"github.com/walgate/walgate/blobstore"
)

// tusPart is how many bytes become one object, and are committed together, at most. What a gateway that dies has received of
// a part is lost; a cut connection loses nothing.
const tusPart = 64 << 20

// tusWritten is a part that is written and not yet committed.
type tusWritten struct {
	number int
	size   int64
	state  []byte // of the SHA-256 after it
}

// receive takes the bytes of a request, commits them part by part and, once all are there, publishes them. Bytes that come
// with a checksum are committed only when it is right.
func (t *tusUpload) receive() error {
	defer context.AfterFunc(t.g.serving, t.body.interrupt)() // what has come by then is kept
	most := t.room()
	if t.body.length > most {
		if t.upload.Length >= 0 {
			return NewProblem(RequestTooLarge, "the upload has %d bytes, of which %d are missing", t.upload.Length, most)
		}
		return t.g.tooLong()
	}
	state, err := restoredHash(t.upload.Hash)
	if err != nil {
		return err
	}
	from := bufio.NewReaderSize(t.body, sendBytes)
	var kept []tusWritten
	end := t.upload.Received // with kept
	for last := end + most; err == nil && end < last; {
		var w tusWritten
		if w, err = t.part(from, state, end, last); w.size == 0 || err != nil {
			break
		}
		end += w.size
		if t.sum != nil {
			kept = append(kept, w)
		} else {
			err = t.add(w)
		}
	}
	if err == nil && t.body.err == nil {
		_, _ = from.Peek(1) // the end of the body, if nothing follows
	}
	t.g.metrics.attachmentBytes.WithLabelValues("received").Add(float64(t.body.n))
	if t.sum != nil {
		err = t.addChecked(kept, err)
	}
	switch {
	case err != nil:
		return err
	case t.body.err != nil:
		return t.cut()
	}
	return t.finish()
}

// room is how many bytes may still come.
func (t *tusUpload) room() int64 {
	switch u := t.upload; {
	case u.Length >= 0:
		return u.Length - u.Received
	case t.g.o.AttachmentLimit > 0:
		return t.g.o.AttachmentLimit - u.Received
	}
	return 1 << 62
}

// cut is what is told of a body that ended early. Its bytes are kept.
func (t *tusUpload) cut() error {
	if t.body.err != errInterrupted {
		return t.body.problem()
	}
	if t.g.serving.Err() != nil {
		return &Problem{Code: ShuttingDown}
	}
	return NewProblem(UploadLocked, "another request has taken the upload over")
}

// part writes what comes between two offsets, or the first of it, as an object. An end of the body, however it came, is the
// end of the object.
func (t *tusUpload) part(from *bufio.Reader, state hash.Hash, offset, last int64) (w tusWritten, err error) {
	if _, err := from.Peek(1); err != nil {
		return w, nil // nothing more comes; the body knows why
	}
	most := min(tusPart, last-offset)
	if t.upload.Length < 0 { // else it is reserved
		if left := t.body.length - t.body.n + int64(from.Buffered()); t.body.length >= 0 {
			most = min(most, left)
		} else {
			most = min(most, growLeast)
		}
		if err := t.grow(offset + most); err != nil {
			return w, err
		}
	}
	records, cancel := context.WithTimeout(t.g.working, recordsMost)
	number, key, err := t.g.o.Files.BeginPart(records, t.upload)
	cancel()
	if err != nil {
		return w, t.g.recordsProblem(err)
	}
	w.number = number
	to := []io.Writer{state}
	if t.sum != nil {
		to = append(to, t.sum.hash)
	}
	came := io.TeeReader(io.LimitReader(endingReader{from}, most), io.MultiWriter(to...))
	written, err := t.g.o.Blobs.Write(t.g.working, key, came, blobstore.WriteOptions{})
	if err != nil {
		return w, t.g.storeProblem(err)
	}
	w.size = written.Size
	w.state, err = state.(interface{ MarshalBinary() ([]byte, error) }).MarshalBinary()
	return w, err
}

// grow reserves room for an upload that hasn't said its length.
func (t *tusUpload) grow(size int64) error {
	ctx, cancel := context.WithTimeout(t.g.working, recordsMost)
	defer cancel()
	if err := t.g.o.Files.Grow(ctx, t.upload, size); err != nil {
		return t.g.uploadProblem(t.g.working, t.who.Subject, err)
	}
	return nil
}

// endingReader ends where its reader fails.
type endingReader struct{ r io.Reader }

// Read reads on.
func (e endingReader) Read(p []byte) (int, error) {
	n, err := e.r.Read(p)
	if err != nil {
		err = io.EOF
	}
	return n, err
}

// add commits a part. Where another request was first, it goes.
func (t *tusUpload) add(w tusWritten) error {
	ctx, cancel := context.WithTimeout(t.g.working, recordsMost)
	defer cancel()
	err := t.g.o.Files.AddPart(ctx, t.upload, w.number, t.upload.Received, w.size, w.state)
	if errors.Is(err, blobstore.ErrOffset) || errors.Is(err, blobstore.ErrGivenUp) {
		t.drop(w)
	}
	if errors.Is(err, blobstore.ErrOffset) {
		return (&Problem{Code: UploadOffset, Detail: "another request was faster"}).Because(err)
	}
	return t.g.recordsProblem(err)
}

// drop deletes a part that is not committed. What can't be deleted now goes with the upload.
func (t *tusUpload) drop(parts ...tusWritten) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.g.working), recordsMost)
	defer cancel()
	for _, w := range parts {
		if err := t.g.o.Blobs.Delete(ctx, blobstore.PartKey(t.upload.StorageKey, w.number)); err != nil {
			t.g.o.Logger.Warn("a part of an upload could not be deleted; it is once the upload ends or expires", "attachment", t.upload.AttachmentID, "error", err)
		}
	}
}

// addChecked commits parts whose checksum is right. A body that ended early can't be checked.
func (t *tusUpload) addChecked(parts []tusWritten, err error) error {
	switch {
	case err != nil:
	case t.body.err != nil:
		err = t.cut()
	case !bytes.Equal(t.sum.hash.Sum(nil), t.sum.want):
		err = &Problem{Code: ChecksumMismatch}
	default:
		for len(parts) > 0 && err == nil {
			if err = t.add(parts[0]); err == nil {
				parts = parts[1:]
			}
		}
	}
	if err != nil {
		t.drop(parts...)
	}
	return err
}

// finish publishes an upload that is whole. By now the caller may have lost the right, or another upload may have the id.
func (t *tusUpload) finish() error {
	u := t.upload
	if u.Published || u.Received != u.Length {
		return nil
	}
	v, err := t.g.lookAt(t.g.working, t.who, u.AttachmentID)
	switch {
	case err != nil:
		return err
	case !v.upload:
		return NewProblem(Forbidden, "no collection with attachments lets the caller write")
	case !v.mayUpload():
		return v.exists()
	}
	state, err := restoredHash(u.Hash)
	if err != nil {
		return err
	}
	done, err := t.g.publish(t.g.working, v, blobstore.Publishing{Upload: u, Size: u.Received, SHA256: state.Sum(nil), Client: deref(u.ClientID), Scopes: v.scopes})
	var p *Problem
	if err == nil && done.Outcome == blobstore.Same || errors.As(err, &p) && p.Code == AttachmentExists {
		t.g.release(t.g.working, u)
	}
	if errors.As(err, &p) && p.Code == UploadGone && t.find(u.ID) == nil && t.upload.Published {
		return nil // another instance was asked for it, too, and was first
	}
	if err != nil {
		return err
	}
	u.Published = true
	t.g.echoVersion(t.g.working, done.PushID)
	return nil
}

// restoredHash continues a SHA-256 from its state; without one it begins.
func restoredHash(state []byte) (hash.Hash, error) {
	h := sha256.New()
	if len(state) == 0 {
		return h, nil
	}
	return h, h.(interface{ UnmarshalBinary([]byte) error }).UnmarshalBinary(state)
}

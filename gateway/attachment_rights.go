package gateway

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/gofiber/fiber/v2"
	"github.com/gofiber/fiber/v2/utils"

	"github.com/walgate/walgate/blobstore"
	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/policies"
)

// attachmentView is an attachment as one caller stands to it. What it may do comes from the rows that name the attachment, as
// the change log knows them, and from who uploaded it. An answer never tells one that it can't see from one that isn't there.
type attachmentView struct {
	id      string
	subject string
	file    *blobstore.File // nil: nothing was ever uploaded
	read    changelog.Held  // in what the caller may read
	write   changelog.Held  // in where it may write rows
	scopes  [][16]byte      // where it may write rows
	upload  bool            // it may write rows that name attachments at all
	keeper  bool            // it may delete whatever it sees
}

// attachmentID reads the id in the path, which is as the client wrote it: ids need no escapes, so none is understood.
func attachmentID(c *fiber.Ctx) (string, error) {
	id := c.Params("id")
	if !policies.ValidAttachmentID(id) || strings.HasSuffix(c.Path(), "/") {
		return "", &Problem{Code: InvalidAttachmentID}
	}
	return utils.CopyString(id), nil
}

// servesAttachments says whether there are attachments at all.
func (g *Gateway) servesAttachments() error {
	if g.o.Blobs == nil || g.o.Files == nil {
		return &Problem{Code: NotFound, Detail: "no collection has attachments here"}
	}
	return nil
}

// attachmentView looks at an attachment for a caller.
func (g *Gateway) attachmentView(ctx context.Context, who *Identity, id string) (*attachmentView, error) {
	if err := g.servesAttachments(); err != nil {
		return nil, err
	}
	caller, err := g.callerOf(who)
	if err != nil {
		return nil, err
	}
	v := &attachmentView{id: id, subject: who.Subject, upload: caller.MayUpload()}
	v.keeper = slices.ContainsFunc(who.Roles, func(role string) bool { return slices.Contains(g.o.AttachmentDeleteRoles, role) })
	v.scopes = [][16]byte{}
	for _, key := range caller.WritableScopes() {
		v.scopes = append(v.scopes, key)
	}
	readable := [][16]byte{policies.SubjectScope(who.Subject)}
	for _, key := range caller.ReadableScopes() {
		readable = append(readable, key)
	}
	if v.file, err = g.file(ctx, id); err != nil {
		return nil, err
	}
	release, err := g.admitReader(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	keys := [][16]byte{policies.AttachmentKey([]byte(id))}
	held, err := g.o.Log.Held(ctx, keys, readable)
	if err != nil {
		return nil, g.logProblem(err)
	}
	v.read = held[0]
	if held, err = g.o.Log.Held(ctx, keys, v.scopes); err != nil {
		return nil, g.logProblem(err)
	}
	v.write = held[0]
	return v, nil
}

// callerOf makes a caller of a verified token.
func (g *Gateway) callerOf(who *Identity) (*policies.Caller, error) {
	caller, err := g.o.Policies().NewCaller(who.Subject, who.Roles, who.Claims)
	if errors.Is(err, policies.ErrTooManyScopes) {
		return nil, NewProblem(TooManyScopes, "the token's claims select more than %d scopes", changelog.MaxScopes)
	}
	return caller, err
}

// file reads the record of an attachment; nil: there is none.
func (g *Gateway) file(ctx context.Context, id string) (*blobstore.File, error) {
	f, err := g.o.Files.Find(ctx, id)
	if errors.Is(err, blobstore.ErrNotFound) {
		return nil, nil
	}
	return f, g.recordsProblem(err)
}

// there says whether bytes are kept under the id.
func (v *attachmentView) there() bool { return v.file != nil && v.file.State == blobstore.There }

// mine says whether the caller uploaded it and no row names it yet.
func (v *attachmentView) mine() bool {
	return v.file != nil && v.file.Subject == v.subject && !v.read.Any
}

// mayRead says whether the caller may have the bytes, which are there.
func (v *attachmentView) mayRead() bool { return v.there() && (v.read.Readable || v.mine()) }

// unreadable is why the caller can't have the bytes; nil: it can.
func (v *attachmentView) unreadable() error {
	switch {
	case v.mayRead():
		return nil
	case !v.read.Within && !v.mine():
		return &Problem{Code: NotFound}
	case v.file != nil && v.file.State == blobstore.Deleted:
		return &Problem{Code: AttachmentDeleted}
	}
	return &Problem{Code: AttachmentMissing}
}

// mayUpload says whether the caller may give the id bytes: where rows name it, one must be where the caller may write.
func (v *attachmentView) mayUpload() bool { return !v.write.Any || v.write.Within }

// taken says whether the caller finds the id taken.
func (v *attachmentView) taken() bool { return v.there() || !v.mayUpload() }

// visible says whether the caller knows of the bytes: to name an id is no right to what somebody else uploads under it.
func (v *attachmentView) visible() bool { return v.read.Within && v.read.Known || v.mine() }

// mayDelete says whether the caller may delete the bytes.
func (v *attachmentView) mayDelete() bool {
	return v.mine() || v.keeper && v.visible() || v.write.Within && v.write.Known && !v.write.Outside
}

// mayCompare says whether the caller may be told that it sent what is there already: it can read that, or sent it itself.
func (v *attachmentView) mayCompare() bool {
	return v.there() && (v.mayRead() || v.file.Subject == v.subject)
}

// knownSame says whether a digest is that of what is there, to who may be told so.
func (v *attachmentView) knownSame(digest []byte) bool {
	return v.mayCompare() && bytes.Equal(v.file.SHA256, digest)
}

// renew keeps a file from being swept soon; false: it isn't there any more.
func (g *Gateway) renew(ctx context.Context, f *blobstore.File) (there bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, recordsMost)
	defer cancel()
	there, err = g.o.Files.Renew(ctx, f)
	return there, g.recordsProblem(err)
}

// exists is the refusal of an upload to an id that is taken. Only who may read what is there learns of it.
func (v *attachmentView) exists() error {
	if v.mayRead() {
		return NewProblem(AttachmentExists, "what is there has %d bytes and the SHA-256 %x", v.file.Size, v.file.SHA256)
	}
	return &Problem{Code: AttachmentExists}
}

// recordsProblem tells why the records of files could not be read or written.
func (g *Gateway) recordsProblem(err error) error {
	switch {
	case err == nil:
		return nil
	case g.draining.Load() && g.working.Err() != nil:
		return (&Problem{Code: ShuttingDown}).Because(err)
	case errors.Is(err, blobstore.ErrQuota):
		return (&Problem{Code: QuotaExceeded}).Because(err)
	case errors.Is(err, blobstore.ErrGivenUp):
		return (&Problem{Code: UploadGone}).Because(err)
	}
	return (&Problem{Code: SourceUnavailable}).Because(err)
}

// storeProblem tells why the blob store could not be read or written.
func (g *Gateway) storeProblem(err error) error {
	switch {
	case err == nil:
		return nil
	case g.draining.Load() && g.working.Err() != nil:
		return (&Problem{Code: ShuttingDown}).Because(err)
	case errors.Is(err, syscall.ENOSPC):
		return (&Problem{Code: StoreUnavailable, Detail: "the blob store is full", RetryAfter: time.Minute}).Because(err)
	}
	return (&Problem{Code: StoreUnavailable}).Because(err)
}

const (
	uploadsMost       = 256 // at a time
	uploadsPerSubject = 32
)

// admitUpload bounds how many uploads run at a time: each takes memory for what is on its way to the store.
func (g *Gateway) admitUpload(subject string) (release func(), err error) {
	busy := &Problem{Code: RateLimited, Detail: "as many uploads are running as are allowed", RetryAfter: pushRetryAfter()}
	if !g.uploads.add("", uploadsMost) { // no subject is empty
		return nil, busy
	}
	if !g.uploads.add(subject, uploadsPerSubject) {
		g.uploads.remove("")
		return nil, busy
	}
	return func() {
		g.uploads.remove(subject)
		g.uploads.remove("")
	}, nil
}

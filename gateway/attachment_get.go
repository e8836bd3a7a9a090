package gateway

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/gofiber/fiber/v2"

	"github.com/walgate/walgate/blobstore"
)

// getAttachment answers GET and HEAD /attachments/{id}, with a token or with a signed URL.
func (g *Gateway) getAttachment(c *fiber.Ctx) error {
	if c.Context().QueryArgs().Has("signature") {
		return g.getSigned(c)
	}
	if err := g.authenticate(c); err != nil {
		return err
	}
	if err := g.servesAttachments(); err != nil {
		return err
	}
	id, err := attachmentID(c)
	if err != nil {
		return err
	}
	if err := knownParameters(c); err != nil {
		return err
	}
	v, err := g.lookAt(g.working, identityOf(c), id)
	if err != nil {
		return err
	}
	if err := v.unreadable(); err != nil {
		return err
	}
	return g.serveFile(c, v.file)
}

// getSigned serves whoever holds a signed URL.
func (g *Gateway) getSigned(c *fiber.Ctx) error {
	if g.draining.Load() {
		return &Problem{Code: ShuttingDown, RetryAfter: 2 * time.Second}
	}
	if err := g.servesAttachments(); err != nil {
		return err
	}
	id, err := attachmentID(c)
	if err != nil {
		return err
	}
	if err := knownParameters(c, "expires", "signature"); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(g.working, recordsMost)
	defer cancel()
	f, err := g.file(ctx, id)
	if err != nil {
		return err
	}
	var digest []byte
	if f != nil {
		digest = f.SHA256
	}
	if err := g.checkSignature(id, digest, c.Query("expires"), c.Query("signature")); err != nil {
		return err
	}
	switch {
	case f == nil: // nobody signs for no content
		return &Problem{Code: SignatureInvalid}
	case f.State == blobstore.Deleted:
		return &Problem{Code: AttachmentDeleted}
	case f.State != blobstore.There:
		return &Problem{Code: AttachmentMissing}
	}
	return g.serveFile(c, f)
}

// serveFile answers with a file's bytes, or those of them that are asked for.
func (g *Gateway) serveFile(c *fiber.Ctx, f *blobstore.File) error {
	c.Set(fiber.HeaderETag, etag(f.SHA256))
	c.Set(fiber.HeaderLastModified, f.CreatedAt.UTC().Format(http.TimeFormat))
	c.Set(fiber.HeaderCacheControl, "private, no-cache") // a caller's rights may end
	c.Set(fiber.HeaderAcceptRanges, "bytes")
	c.Vary(fiber.HeaderAuthorization)
	switch conditions(c, f) {
	case fiber.StatusNotModified:
		c.Status(fiber.StatusNotModified)
		return nil
	case fiber.StatusPreconditionFailed:
		return &Problem{Code: PreconditionFailed}
	}
	r, partial, ok := requestedRange(c, f)
	if !ok {
		c.Set(fiber.HeaderContentRange, fmt.Sprintf("bytes */%d", f.Size))
		return &Problem{Code: RangeNotSatisfiable}
	}
	d := &download{g: g, conn: c.Context().Conn(), length: r.length}
	if c.Method() == fiber.MethodGet {
		if err := d.open(f, r.first); err != nil {
			return err
		}
	}
	name := f.Filename
	if name == "" {
		name = f.ID
	}
	setContentHeaders(c, f.ContentType, name)
	c.Set("Repr-Digest", sha256Field(f.SHA256))
	if partial {
		c.Status(fiber.StatusPartialContent)
		c.Set(fiber.HeaderContentRange, fmt.Sprintf("bytes %d-%d/%d", r.first, r.first+r.length-1, f.Size))
	}
	if c.Method() != fiber.MethodGet {
		c.Response().SkipBody = true
		c.Response().Header.SetContentLength(int(f.Size))
		return nil
	}
	c.Context().SetBodyStream(d, int(r.length))
	return nil
}

// open opens the bytes, so that their absence is told before anything else.
func (d *download) open(f *blobstore.File, first int64) (err error) {
	d.ctx, d.cancel = context.WithCancel(d.g.working)
	if d.length > 0 {
		if d.r, err = d.g.o.Blobs.ReadParts(d.ctx, f.StorageKey, f.Parts, first, d.length); err != nil {
			d.cancel()
			if errors.Is(err, blobstore.ErrNotFound) {
				d.g.o.Logger.Error("the bytes of an attachment are not in the blob store although nobody deleted them there; reconciling (walgate attachments gc) marks it missing, so that it can be uploaded anew", "attachment", f.ID, "key", f.StorageKey, "error", err)
				return (&Problem{Code: AttachmentMissing}).Because(err)
			}
			return d.g.storeProblem(err)
		}
	}
	d.began, d.err = time.Now(), errNotSent
	d.g.streams.Add(1)
	d.stop = context.AfterFunc(d.g.working, d.abort)
	return nil
}

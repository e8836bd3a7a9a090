package gateway

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/gofiber/fiber/v2"
	"github.com/gofiber/fiber/v2/utils"

	"github.com/walgate/walgate/blobstore"
	"github.com/walgate/walgate/policies"
)

// turnMost is how long a request waits for another one that works on the same upload.
const turnMost = 10 * time.Second

// tusRoutes serves resumable uploads. What they become is published as by PUT.
func (g *Gateway) tusRoutes(app *fiber.App) {
	app.Options("/uploads", g.tusOptions)
	app.Options("/uploads/:upload_id", g.tusOptions)
	app.Post("/uploads", g.tusRequest, g.authenticated, g.counted("tus_create", g.createUpload))
	for _, method := range []string{fiber.MethodHead, fiber.MethodPatch, fiber.MethodDelete, fiber.MethodPost} {
		app.Add(method, "/uploads/:upload_id", g.tusRequest, g.authenticated, g.resumeUpload)
	}
}

// tusUpload is a request about an upload.
type tusUpload struct {
	g      *Gateway
	who    *Identity
	body   *uploadBody
	sum    *tusChecksum
	upload *blobstore.Upload
}

// begin reads what all requests with bytes have in common.
func (g *Gateway) beginTus(c *fiber.Ctx) (*tusUpload, error) {
	t := &tusUpload{g: g, who: identityOf(c), body: g.uploadBody(c)}
	if !t.body.whole && !strings.EqualFold(c.Get(fiber.HeaderContentType), tusBody) {
		return nil, NewProblem(UnsupportedMediaType, "send the bytes as %s", tusBody)
	}
	var err error
	t.sum, err = parseUploadChecksum(utils.CopyString(c.Get("Upload-Checksum")))
	return t, err
}

// createUpload answers POST /uploads.
func (g *Gateway) createUpload(c *fiber.Ctx) error {
	t, err := g.beginTus(c)
	if err != nil {
		return err
	}
	r, err := g.tusReservation(c)
	if err != nil {
		return err
	}
	release, err := g.admitUpload(t.who.Subject)
	if err != nil {
		return err
	}
	defer release()
	g.streams.Add(1)
	defer g.streams.Done()
	if err := t.admitted(r); err != nil {
		return err
	}
	records, cancel := context.WithTimeout(g.working, recordsMost)
	t.upload, err = g.o.Files.Reserve(records, r)
	cancel()
	if err != nil {
		return g.uploadProblem(g.working, t.who.Subject, err)
	}
	id := t.upload.ID
	turn, err := g.turns.take(g.working, turnKey{t.who.Subject, id}, t.body)
	if err != nil {
		return err
	}
	defer turn.end()
	withBytes := !t.body.whole
	if err := t.receive(); err != nil {
		g.release(g.working, t.upload) // its client never learns where it is
		return err
	}
	c.Set(fiber.HeaderLocation, g.uploadPath(id))
	if withBytes {
		c.Set("Upload-Offset", strconv.FormatInt(t.upload.Received, 10))
	}
	t.setExpiry(c)
	c.Status(http.StatusCreated)
	return nil
}

// uploadPath is where an upload is found, below the path of the public URL.
func (g *Gateway) uploadPath(id string) string {
	prefix := ""
	if u, err := url.Parse(g.o.PublicURL); err == nil {
		prefix = strings.TrimRight(u.EscapedPath(), "/")
	}
	return prefix + "/uploads/" + id
}

// tusReservation reads what an upload shall become.
func (g *Gateway) tusReservation(c *fiber.Ctx) (r blobstore.Reservation, err error) {
	r = blobstore.Reservation{Kind: blobstore.Tus, Subject: identityOf(c).Subject}
	if r.Length, err = g.uploadLength(c); err != nil {
		return r, err
	}
	m, err := parseUploadMetadata(utils.CopyString(c.Get("Upload-Metadata")))
	if err != nil {
		return r, err
	}
	if r.AttachmentID = m.attachmentID; !policies.ValidAttachmentID(m.attachmentID) {
		return r, NewProblem(InvalidAttachmentID, "Upload-Metadata names it as attachment_id")
	}
	if r.ContentType, err = parseType(m.fileType); err != nil {
		return r, err
	}
	if err := g.typeAllowed(r.ContentType); err != nil {
		return r, err
	}
	r.Filename = cleanFilename(m.filename)
	if m.clientID == "" {
		return r, nil
	}
	if detail := clientFault(m.clientID); detail != "" {
		return r, NewProblem(InvalidRequest, "Upload-Metadata: client_id %s", detail)
	}
	r.ClientID = &m.clientID
	return r, g.checkClient(identityOf(c), m.clientID)
}

// admitted decides by rights, as PUT does: bytes may come again under the id that they have.
func (t *tusUpload) admitted(r blobstore.Reservation) error {
	v, err := t.g.lookAt(t.g.working, t.who, r.AttachmentID)
	switch {
	case err != nil:
		return err
	case !v.upload:
		return NewProblem(Forbidden, "no collection with attachments lets the caller write")
	case !v.taken(), v.mayUpload() && (v.mayRead() || v.file.Subject == v.subject) && (r.Length < 0 || r.Length == v.file.Size):
		return nil
	}
	return v.exists()
}

// resumeUpload answers HEAD, PATCH and DELETE /uploads/{upload_id}, and POST in place of them.
func (g *Gateway) resumeUpload(c *fiber.Ctx) error {
	method := c.Method()
	if method == fiber.MethodPost {
		method = strings.ToUpper(utils.CopyString(c.Get("X-HTTP-Method-Override")))
	}
	answers := map[string]func(*fiber.Ctx, *tusUpload) error{fiber.MethodHead: g.headUpload, fiber.MethodPatch: g.patchUpload, fiber.MethodDelete: g.deleteUpload}
	answer := answers[method]
	if answer == nil {
		c.Set(fiber.HeaderAllow, "HEAD, PATCH, DELETE, OPTIONS")
		return NewProblem(MethodNotAllowed, "X-HTTP-Method-Override must be HEAD, PATCH or DELETE")
	}
	return g.counted("tus_"+strings.ToLower(method), func(c *fiber.Ctx) error {
		release, err := g.admitUpload(identityOf(c).Subject)
		if err != nil {
			return err
		}
		defer release()
		g.streams.Add(1)
		defer g.streams.Done()
		t := &tusUpload{g: g, who: identityOf(c), body: g.uploadBody(c)}
		waiting, cancel := context.WithTimeout(g.working, turnMost)
		defer cancel()
		id := utils.CopyString(c.Params("upload_id"))
		turn, err := g.turns.take(waiting, turnKey{t.who.Subject, id}, t.body)
		if err != nil {
			return err
		}
		defer turn.end()
		if err := t.find(id); err != nil {
			return err
		}
		return answer(c, t)
	})(c)
}

// find looks for the upload, which may have become a file.
func (t *tusUpload) find(id string) error {
	ctx, cancel := context.WithTimeout(t.g.working, recordsMost)
	defer cancel()
	u, err := t.g.o.Files.Upload(ctx, id, t.who.Subject)
	if errors.Is(err, blobstore.ErrNotFound) {
		u, err = t.g.o.Files.Finished(ctx, id, t.who.Subject)
	}
	switch {
	case errors.Is(err, blobstore.ErrNotFound), err == nil && (u.Kind != blobstore.Tus || !u.Published && u.ExpiresAt.Before(time.Now())):
		return &Problem{Code: UploadGone}
	case err != nil:
		return t.g.recordsProblem(err)
	}
	t.upload = u
	return nil
}

// headUpload answers how far an upload has come. What is whole and could not be published is published now.
func (g *Gateway) headUpload(c *fiber.Ctx, t *tusUpload) error {
	if err := t.finish(); err != nil {
		return err
	}
	u := t.upload
	c.Set("Upload-Offset", strconv.FormatInt(u.Received, 10))
	if u.Length >= 0 {
		c.Set("Upload-Length", strconv.FormatInt(u.Length, 10))
	} else {
		c.Set("Upload-Defer-Length", "1")
	}
	c.Set("Upload-Metadata", tusMetadata{u.AttachmentID, u.ContentType, u.Filename, deref(u.ClientID)}.String())
	t.setExpiry(c)
	c.Status(http.StatusOK)
	return nil
}

// setExpiry tells until when an upload may be continued.
func (t *tusUpload) setExpiry(c *fiber.Ctx) {
	if !t.upload.Published {
		c.Set("Upload-Expires", t.upload.ExpiresAt.UTC().Format(http.TimeFormat))
	}
}

// deleteUpload gives an upload up.
func (g *Gateway) deleteUpload(c *fiber.Ctx, t *tusUpload) error {
	if t.upload.Published {
		return NewProblem(UploadGone, "the upload has become an attachment: delete that")
	}
	if err := g.o.Files.Release(g.working, g.o.Blobs, t.upload); err != nil {
		return g.recordsProblem(err)
	}
	return noContent(c)
}

// patchUpload takes bytes.
func (g *Gateway) patchUpload(c *fiber.Ctx, t *tusUpload) (err error) {
	if !strings.EqualFold(c.Get(fiber.HeaderContentType), tusBody) {
		return NewProblem(UnsupportedMediaType, "send the bytes as %s", tusBody)
	}
	if t.sum, err = parseUploadChecksum(utils.CopyString(c.Get("Upload-Checksum"))); err != nil {
		return err
	}
	offset, said, err := sizeHeader(c, "Upload-Offset")
	if err != nil {
		return err
	}
	if !said {
		return NewProblem(InvalidRequest, "Upload-Offset is missing")
	}
	if offset != t.upload.Received {
		return NewProblem(UploadOffset, "the upload is at %d", t.upload.Received)
	}
	if err := t.setLength(c); err != nil {
		return err
	}
	if err := t.receive(); err != nil {
		return err
	}
	c.Set("Upload-Offset", strconv.FormatInt(t.upload.Received, 10))
	t.setExpiry(c)
	return noContent(c)
}

// setLength takes the length of an upload that began without.
func (t *tusUpload) setLength(c *fiber.Ctx) error {
	length, said, err := sizeHeader(c, "Upload-Length")
	switch {
	case err != nil || !said || length == t.upload.Length:
		return err
	case t.upload.Length >= 0 || length < t.upload.Received:
		return NewProblem(InvalidRequest, "Upload-Length is another than the upload's, or less than has come")
	case t.g.o.AttachmentLimit > 0 && length > t.g.o.AttachmentLimit:
		return t.g.tooLong()
	}
	ctx, cancel := context.WithTimeout(t.g.working, recordsMost)
	defer cancel()
	if err := t.g.o.Files.SetLength(ctx, t.upload, length); err != nil {
		return t.g.uploadProblem(t.g.working, t.who.Subject, err)
	}
	return nil
}

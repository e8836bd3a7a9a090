package gateway

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/gofiber/fiber/v2"

	"github.com/walgate/walgate/blobstore"
)

// A direct upload goes from the client to the blob store, with a URL that the store signed. Such a URL can be used again until
// it expires, and no store checks what was sent: so when the client says that it is done, the bytes are read, checked and
// written to a key that no URL names.

// directRequest is the body of POST /attachments/{id}/upload-url.
type directRequest struct {
	Size        *int64  `json:"size"`
	ContentType string  `json:"content_type"`
	SHA256      *string `json:"sha256"`
	ClientID    string  `json:"client_id"`
	Filename    string  `json:"filename"`
	digest      []byte
}

// parse reads and checks the body.
func (r *directRequest) parse(g *Gateway, body []byte) error {
	if err := json.Unmarshal(body, r); err != nil {
		return NewProblem(InvalidRequest, "the body is not JSON with size, content_type and sha256")
	}
	var faults []FieldError
	if r.Size == nil || *r.Size < 0 {
		faults = append(faults, FieldError{"size", "must be the number of bytes"})
	}
	if r.SHA256 != nil {
		var err error
		if r.digest, err = hex.DecodeString(*r.SHA256); err != nil || len(r.digest) != 32 {
			faults = append(faults, FieldError{"sha256", "must be 64 hex digits"})
		}
	}
	if detail := clientFault(r.ClientID); detail != "" {
		faults = append(faults, FieldError{"client_id", detail})
	}
	if len(faults) > 0 {
		return &Problem{Code: InvalidRequest, Errors: faults}
	}
	if g.o.AttachmentLimit > 0 && *r.Size > g.o.AttachmentLimit {
		return g.tooLong()
	}
	r.Filename = cleanFilename(r.Filename)
	var err error
	if r.ContentType, err = parseType(r.ContentType); err != nil {
		return err
	}
	return g.typeAllowed(r.ContentType)
}

// uploadLink answers POST /attachments/{id}/upload-url.
func (g *Gateway) uploadLink(c *fiber.Ctx) error {
	id, err := g.namedAttachment(c)
	if err != nil {
		return err
	}
	body, err := readSmallBody(c)
	if err != nil {
		return err
	}
	var r directRequest
	if err := r.parse(g, body); err != nil {
		return err
	}
	who := identityOf(c)
	if r.ClientID != "" {
		if err := g.checkClient(who, r.ClientID); err != nil {
			return err
		}
	}
	if !g.o.AttachmentDirect {
		return NewProblem(DirectUnavailable, "attachments.direct is off")
	}
	v, err := g.lookAt(g.working, who, id)
	for err == nil && v.upload && r.digest != nil && v.knownSame(r.digest) {
		there, err := g.renew(g.working, v.file)
		if err != nil {
			return err
		}
		if there {
			return answerUpload(c, fiber.StatusOK, v.file, 0)
		}
		if v, err = g.lookAt(g.working, who, id); err != nil { // it was deleted or replaced meanwhile
			return err
		}
	}
	if err != nil {
		return err
	}
	switch {
	case !v.upload:
		return NewProblem(Forbidden, "no collection with attachments lets the caller write")
	case v.taken():
		return v.exists()
	}
	ctx, cancel := context.WithTimeout(g.working, recordsMost)
	defer cancel()
	reservation := blobstore.Reservation{Kind: blobstore.Direct, AttachmentID: id, Subject: who.Subject, Length: *r.Size, ContentType: r.ContentType, Filename: r.Filename, SHA256: r.digest}
	if r.ClientID != "" {
		reservation.ClientID = &r.ClientID
	}
	u, err := g.o.Files.Reserve(ctx, reservation)
	if err != nil {
		return g.uploadProblem(ctx, who.Subject, err)
	}
	expires := time.Now().Add(min(g.o.AttachmentURLTTL, time.Until(u.ExpiresAt)))
	signed, err := g.o.Blobs.SignPut(ctx, u.StorageKey, *r.Size, time.Until(expires))
	if err != nil {
		g.release(ctx, u)
		if errors.Is(err, blobstore.ErrNotSigned) {
			return (&Problem{Code: DirectUnavailable, Detail: "this blob store can't sign URLs"}).Because(err)
		}
		return g.storeProblem(err)
	}
	headers := signed.Headers
	if headers == nil {
		headers = map[string]string{}
	}
	return sendJSON(c, fiber.StatusOK, fiber.Map{"upload_id": u.ID, "url": signed.URL, "method": fiber.MethodPut, "headers": headers, "expires_at": expires.UTC().Format(time.RFC3339)})
}

// release gives up an upload that isn't published.
func (g *Gateway) release(ctx context.Context, u *blobstore.Upload) {
	if err := g.o.Files.Release(ctx, g.o.Blobs, u); err != nil {
		g.o.Logger.Warn("an upload that was given up is still kept; it is deleted when it expires (attachments.upload_ttl)", "attachment", u.AttachmentID, "error", err)
	}
}

// uploadComplete answers POST /attachments/{id}/upload-complete.
func (g *Gateway) uploadComplete(c *fiber.Ctx) error {
	id, err := g.namedAttachment(c)
	if err != nil {
		return err
	}
	var uploadID string
	err = readMember(c, "upload_id", func(value json.RawMessage) string {
		if json.Unmarshal(value, &uploadID) != nil || uploadID == "" {
			return "must be the upload_id that upload-url gave"
		}
		return ""
	})
	if err != nil {
		return err
	}
	who := identityOf(c)
	ctx, cancel := context.WithTimeout(g.working, recordsMost)
	defer cancel()
	u, err := g.o.Files.Upload(ctx, uploadID, who.Subject)
	if errors.Is(err, blobstore.ErrNotFound) || err == nil && (u.Kind != blobstore.Direct || u.AttachmentID != id) {
		return &Problem{Code: UploadGone}
	}
	if err != nil {
		return g.recordsProblem(err)
	}
	v, err := g.lookAt(g.working, who, id)
	if err != nil {
		return err
	}
	if !v.upload || !v.mayUpload() {
		g.release(ctx, u)
		return v.exists()
	}
	done, err := g.finishDirect(g.working, v, u)
	if err != nil {
		return err
	}
	status := fiber.StatusOK
	if done.Outcome == blobstore.Created {
		status = fiber.StatusCreated
	}
	return answerUpload(c, status, done.File, g.echoVersion(g.working, done.PushID))
}

// finishDirect takes what the client wrote and publishes it. What isn't as it was said is given up.
func (g *Gateway) finishDirect(ctx context.Context, v *attachmentView, u *blobstore.Upload) (done blobstore.Published, err error) {
	r, err := g.o.Blobs.Read(ctx, u.StorageKey, 0, -1)
	if errors.Is(err, blobstore.ErrNotFound) {
		return done, NewProblem(InvalidRequest, "nothing was written to the URL yet")
	}
	if err != nil {
		return done, g.storeProblem(err)
	}
	defer r.Close()
	key := blobstore.NewKey()
	written, err := g.o.Blobs.Write(ctx, key, r, blobstore.WriteOptions{ContentType: u.ContentType, Disposition: disposition(u.ContentType, u.Filename), Limit: max(u.Length, 1)})
	published := false
	defer func() {
		if !published {
			late, cancel := context.WithTimeout(context.WithoutCancel(ctx), recordsMost)
			defer cancel()
			_ = g.o.Blobs.Delete(late, key) // else reconciling does
		}
	}()
	switch {
	case errors.Is(err, blobstore.ErrTooLarge), err == nil && written.Size != u.Length:
		g.release(ctx, u)
		return done, &Problem{Code: DigestMismatch, Detail: fmt.Sprintf("other than the %d bytes were written that upload-url was asked for", u.Length)}
	case err != nil:
		return done, g.storeProblem(err)
	case u.SHA256 != nil && hexText(u.SHA256) != hexText(written.SHA256):
		g.release(ctx, u)
		return done, &Problem{Code: DigestMismatch}
	}
	done, err = g.publish(ctx, v, blobstore.Publishing{Upload: u, Key: key, Size: written.Size, SHA256: written.SHA256, Client: deref(u.ClientID), Scopes: v.scopes})
	published = err == nil && done.Outcome == blobstore.Created
	if !published {
		g.release(ctx, u)
	}
	return done, err
}

func deref(s *string) string {
	if s == nil {
		return ""
	}
	return *s
}

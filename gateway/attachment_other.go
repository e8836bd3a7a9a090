package gateway

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"time"

	"github.com/gofiber/fiber/v2"
	"github.com/gofiber/fiber/v2/utils"

	"github.com/walgate/walgate/blobstore"
	"github.com/walgate/walgate/changelog"
)

// deleteAttachment answers DELETE /attachments/{id}. What isn't there, or not for the caller to see, is deleted already.
func (g *Gateway) deleteAttachment(c *fiber.Ctx) error {
	id, err := g.namedAttachment(c, "client_id")
	if err != nil {
		return err
	}
	client, err := g.uploadClient(c)
	if err != nil {
		return err
	}
	who := identityOf(c)
	ifMatch := utils.CopyString(c.Get(fiber.HeaderIfMatch))
	for {
		v, err := g.lookAt(g.working, who, id)
		if err != nil {
			return err
		}
		switch {
		case v.file == nil, v.file.State == blobstore.Deleted, !v.mayDelete() && !v.visible():
			return noContent(c)
		case !v.mayDelete():
			return NewProblem(Forbidden, "only who may write all rows that name the attachment can delete it")
		case ifMatch != "" && !matches(ifMatch, v.file.SHA256):
			return &Problem{Code: PreconditionFailed}
		}
		ctx, cancel := context.WithTimeout(g.working, recordsMost)
		done, err := g.o.Files.Remove(ctx, blobstore.Removal{AttachmentID: id, EventID: v.file.EventID, Subject: who.Subject, Client: client})
		cancel()
		switch {
		case errors.Is(err, blobstore.ErrChanged):
			continue // it was replaced or deleted meanwhile
		case errors.Is(err, blobstore.ErrNotFound):
			return noContent(c)
		case err != nil:
			return g.recordsProblem(err)
		}
		g.echoVersion(g.working, done.PushID)
		return noContent(c)
	}
}

func noContent(c *fiber.Ctx) error {
	c.Status(fiber.StatusNoContent).Response().Header.SetNoDefaultContentType(true)
	return nil
}

// namedAttachment reads the id, and refuses what isn't one.
func (g *Gateway) namedAttachment(c *fiber.Ctx, parameters ...string) (string, error) {
	if err := g.servesAttachments(); err != nil {
		return "", err
	}
	id, err := attachmentID(c)
	if err != nil {
		return "", err
	}
	return id, knownParameters(c, parameters...)
}

// downloadLink answers GET /attachments/{id}/download-url.
func (g *Gateway) downloadLink(c *fiber.Ctx) error {
	id, err := g.namedAttachment(c)
	if err != nil {
		return err
	}
	v, err := g.lookAt(g.working, identityOf(c), id)
	if err != nil {
		return err
	}
	if err := v.unreadable(); err != nil {
		return err
	}
	url, expires := g.linkTo(v.file)
	return sendJSON(c, fiber.StatusOK, fiber.Map{"url": url, "expires_at": expires.UTC().Format(time.RFC3339)})
}

// linkTo makes a URL that reads a file: of the store, where clients may be sent there and it can sign, else of this server.
func (g *Gateway) linkTo(f *blobstore.File) (string, time.Time) {
	expires := g.urlExpiry(time.Now())
	if g.o.AttachmentDirect && f.Parts == nil {
		ctx, cancel := context.WithTimeout(g.working, recordsMost)
		defer cancel()
		ttl := time.Until(expires)
		if signed, err := g.o.Blobs.SignGet(ctx, f.StorageKey, ttl); err == nil && len(signed.Headers) == 0 {
			return signed.URL, expires
		}
	}
	return g.downloadURL(f.ID, f.SHA256, expires), expires
}

const (
	listLimit = 100
	listMost  = 1000
)

// listedAttachment is one attachment of a list.
type listedAttachment struct {
	AttachmentID string `json:"attachment_id"`
	Size         int64  `json:"size"`
	ContentType  string `json:"content_type"`
	SHA256       string `json:"sha256"`
	CreatedAt    string `json:"created_at"`
	Version      int64  `json:"version"`
}

// listAttachments answers GET /attachments: what the caller may read.
func (g *Gateway) listAttachments(c *fiber.Ctx) error {
	if strings.HasSuffix(c.Path(), "/") { // asks for an attachment with an empty id
		return &Problem{Code: InvalidAttachmentID}
	}
	if err := g.servesAttachments(); err != nil {
		return err
	}
	if err := knownParameters(c, "order", "after", "limit", "content_type", "prefix", "count", "client_id"); err != nil {
		return err
	}
	client, err := g.uploadClient(c)
	if err != nil {
		return err
	}
	r := changelog.ListRequest{Order: utils.CopyString(c.Query("order", "date")), After: utils.CopyString(c.Query("after")), Limit: listLimit,
		ContentType: utils.CopyString(c.Query("content_type")), IDPrefix: utils.CopyString(c.Query("prefix"))}
	if text := c.Query("limit"); text != "" {
		if r.Limit, err = strconv.Atoi(text); err != nil || r.Limit < 1 || r.Limit > listMost {
			return NewProblem(InvalidLimit, "limit must be a whole number from 1 to %d", listMost)
		}
	}
	switch count := c.Query("count"); count {
	case "":
	case "only":
		r.CountOnly = true
	default:
		return &Problem{Code: InvalidRequest, Errors: []FieldError{{"count", "must be only, or absent"}}}
	}
	for name, text := range map[string]string{"prefix": r.IDPrefix, "content_type": r.ContentType} {
		if detail := clientFault(text); detail != "" {
			return &Problem{Code: InvalidRequest, Errors: []FieldError{{name, detail}}}
		}
	}
	caller, err := g.callerOf(identityOf(c))
	if err != nil {
		return err
	}
	r.Scopes = newFileScopes(g.o.Policies(), caller, client).keys
	ctx, cancel := context.WithTimeout(g.working, recordsMost)
	defer cancel()
	release, err := g.admitReader(ctx)
	if err != nil {
		return err
	}
	defer release()
	list, err := g.o.Log.Attachments(ctx, r)
	if errors.Is(err, changelog.ErrListOrder) {
		return &Problem{Code: InvalidRequest, Detail: "order is one of date, id and size, or with a hyphen before it; after is next of the page before in the same order",
			Errors: []FieldError{{"order", "unknown, or after is of another order"}}}
	}
	if err != nil {
		return g.logProblem(err)
	}
	if r.CountOnly {
		return sendJSON(c, fiber.StatusOK, fiber.Map{"attachments": []int{}, "next": "", "count": list.Count})
	}
	out := make([]listedAttachment, 0, len(list.Attachments))
	for i := range list.Attachments {
		o := &list.Attachments[i]
		out = append(out, listedAttachment{o.ID, o.Size, o.ContentType, hexText(o.SHA256), o.CreatedAt.UTC().Format(time.RFC3339Nano), int64(o.Version)})
	}
	return sendJSON(c, fiber.StatusOK, fiber.Map{"attachments": out, "next": list.Next})
}

package gateway

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"mime"
	"mime/multipart"
	"strings"
	"time"

	"github.com/gofiber/fiber/v2"
	"github.com/gofiber/fiber/v2/utils"

	"github.com/walgate/walgate/blobstore"
)

const (
	recordsMost   = 30 * time.Second // a look at, or a change of, what is known of an attachment
	multipartHead = 64 << 10         // how much longer than its file a multipart body may be
)

// upload is a PUT on its way.
type upload struct {
	g           *Gateway
	who         *Identity
	id          string
	client      string // ?client_id=
	ifNoneMatch string
	ifMatch     string
	boundary    string // not empty: a multipart body
	contentType string
	filename    string
	length      int64   // of the body; -1: not said
	content     digests // of the body
	repr        digests // of the file
	body        *uploadBody
	view        *attachmentView
}

// putAttachment answers PUT /attachments/{id}.
func (g *Gateway) putAttachment(c *fiber.Ctx) error {
	u, err := g.newUpload(c)
	if err != nil {
		return err
	}
	release, err := g.admitUpload(u.who.Subject)
	if err != nil {
		return err
	}
	defer release()
	g.streams.Add(1)
	defer g.streams.Done()
	defer context.AfterFunc(g.working, u.body.interrupt)()
	done, err := u.run(g.working)
	g.metrics.attachmentBytes.WithLabelValues("received").Add(float64(u.body.n))
	if err != nil {
		return err
	}
	status := fiber.StatusOK
	if done.Outcome == blobstore.Created {
		status = fiber.StatusCreated
	}
	return answerUpload(c, status, done.File, g.echoVersion(g.working, done.PushID))
}

// newUpload reads all of the request but its body, and refuses what needs no look at the attachment.
func (g *Gateway) newUpload(c *fiber.Ctx) (*upload, error) {
	if err := g.servesAttachments(); err != nil {
		return nil, err
	}
	id, err := attachmentID(c)
	if err != nil {
		return nil, err
	}
	if err := knownParameters(c, "client_id"); err != nil {
		return nil, err
	}
	client, err := g.uploadClient(c)
	if err != nil {
		return nil, err
	}
	u := &upload{g: g, who: identityOf(c), id: id, client: client, body: g.uploadBody(c),
		ifNoneMatch: utils.CopyString(c.Get(fiber.HeaderIfNoneMatch)), ifMatch: utils.CopyString(c.Get(fiber.HeaderIfMatch))}
	u.length = u.body.length
	if e := c.Get(fiber.HeaderContentEncoding); e != "" && !strings.EqualFold(e, "identity") {
		return nil, NewProblem(UnsupportedMediaType, "send the bytes without a content encoding")
	}
	if c.Get(fiber.HeaderContentRange) != "" {
		return nil, NewProblem(InvalidRequest, "a PUT sends all bytes; resume uploads through /uploads")
	}
	if u.content, err = readDigests(c, "Content-Digest"); err != nil {
		return nil, err
	}
	if u.repr, err = readDigests(c, "Repr-Digest"); err != nil {
		return nil, err
	}
	if err := u.readType(utils.CopyString(c.Get(fiber.HeaderContentType))); err != nil {
		return nil, err
	}
	return u, nil
}

// uploadClient reads whose device an upload is private to; "": nobody's.
func (g *Gateway) uploadClient(c *fiber.Ctx) (string, error) {
	client, err := clientParameter(c)
	if err != nil || client == "" {
		return "", err
	}
	return client, g.checkClient(identityOf(c), client)
}

// readType reads the Content-Type, and how long the file can be.
func (u *upload) readType(text string) (err error) {
	media, params, parseErr := mime.ParseMediaType(text)
	if parseErr == nil && strings.HasPrefix(media, "multipart/") && media != "multipart/form-data" {
		return NewProblem(AttachmentTypeRefused, "a multipart body must be multipart/form-data with one part, file")
	}
	most := u.g.o.AttachmentLimit
	if parseErr == nil && media == "multipart/form-data" {
		if u.boundary = params["boundary"]; u.boundary == "" {
			return NewProblem(InvalidRequest, "the multipart body names no boundary")
		}
		most += multipartHead
	} else {
		if u.contentType, err = parseType(text); err != nil {
			return err
		}
		if err := u.g.typeAllowed(u.contentType); err != nil {
			return err
		}
	}
	if u.g.o.AttachmentLimit > 0 && u.length > most {
		return u.g.tooLong()
	}
	return nil
}

func (g *Gateway) tooLong() error {
	return NewProblem(RequestTooLarge, "an attachment may have %d bytes (limits.attachment)", g.o.AttachmentLimit)
}

// run takes the bytes, if they are to be taken, and publishes them.
func (u *upload) run(ctx context.Context) (done blobstore.Published, err error) {
	if u.view, err = u.g.lookAt(ctx, u.who, u.id); err != nil {
		return done, err
	}
	replace, err := u.admitted()
	if err != nil {
		return done, err
	}
	if u.view.taken() && replace == nil {
		return u.compare(ctx)
	}
	file, content, err := u.file()
	if err != nil {
		return done, err
	}
	return u.store(ctx, file, content, replace)
}

// lookAt is attachmentView with a time limit.
func (g *Gateway) lookAt(ctx context.Context, who *Identity, id string) (*attachmentView, error) {
	ctx, cancel := context.WithTimeout(ctx, recordsMost)
	defer cancel()
	return g.attachmentView(ctx, who, id)
}

// admitted decides by rights and conditions. replace is the digest of the file that the upload is to replace, or nil.
func (u *upload) admitted() (replace []byte, err error) {
	v := u.view
	switch {
	case !v.upload:
		return nil, NewProblem(Forbidden, "no collection with attachments lets the caller write")
	case u.ifNoneMatch != "" && u.ifNoneMatch != "*":
		return nil, NewProblem(InvalidRequest, "If-None-Match of a PUT must be *")
	case u.ifNoneMatch == "*" && v.taken():
		return nil, &Problem{Code: PreconditionFailed}
	case u.ifMatch == "":
		return nil, nil
	case !v.taken(), u.g.o.AttachmentReplace && v.mayUpload() && v.mayRead() && !matches(u.ifMatch, v.file.SHA256):
		return nil, &Problem{Code: PreconditionFailed}
	case u.g.o.AttachmentReplace && v.mayUpload() && v.mayRead():
		return v.file.SHA256, nil
	}
	return nil, v.exists() // attachments.replace is off, or it isn't the caller's to replace
}

// compare answers an upload to an id that is taken: a repeat is no error, and its file as young as any other.
func (u *upload) compare(ctx context.Context) (done blobstore.Published, err error) {
	v := u.view
	done = blobstore.Published{Outcome: blobstore.Same, File: v.file}
	if !v.mayCompare() {
		return done, v.exists()
	}
	said := u.repr.sha256
	if said == nil && u.boundary == "" {
		said = u.content.sha256
	}
	if said != nil && !v.knownSame(said) || u.boundary == "" && u.length >= 0 && u.length != v.file.Size {
		return done, v.exists()
	}
	there, err := u.g.renew(ctx, v.file)
	if err != nil {
		return done, err
	}
	if !there { // it was deleted or replaced since v was looked at
		return u.run(ctx)
	}
	file, content, err := u.file()
	if err != nil {
		return done, err
	}
	sum := newDigesting(io.LimitReader(file, v.file.Size+1), digests{sha256: v.file.SHA256}, false)
	n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, sum, make([]byte, sendBytes))
	if err != nil {
		return done, u.failed(err)
	}
	if n != v.file.Size || sum.check(nil) != nil {
		return done, v.exists()
	}
	return done, u.ended(content, v.file.SHA256)
}

// file is the file within the body; content is the body around it, where its digest is asked for.
func (u *upload) file() (file io.Reader, content *digesting, err error) {
	var body io.Reader = u.body
	if u.boundary != "" && u.g.o.AttachmentLimit > 0 { // what is around a file is limited by nothing else
		body = &atMost{u.body, u.g.o.AttachmentLimit + multipartHead, u.g.tooLong()}
	}
	content = newDigesting(body, u.content, u.boundary == "")
	if u.boundary == "" {
		if u.repr.sha512 != nil && u.content.sha512 == nil { // of the same bytes
			content.want.sha512 = u.repr.sha512
			content = newDigesting(u.body, content.want, true)
		}
		return content, content, nil
	}
	parts := multipart.NewReader(bufio.NewReaderSize(content, sendBytes), u.boundary)
	part, err := parts.NextRawPart()
	if err != nil {
		if p := (*Problem)(nil); u.body.err == nil && !errors.As(err, &p) {
			err = NewProblem(InvalidRequest, "the body is not multipart/form-data with the part file")
		}
		return nil, nil, u.failed(err)
	}
	if part.FormName() != "file" {
		return nil, nil, NewProblem(InvalidRequest, "the body's one part must be named file")
	}
	if u.contentType, err = parseType(part.Header.Get(fiber.HeaderContentType)); err != nil {
		return nil, nil, err
	}
	if err := u.g.typeAllowed(u.contentType); err != nil {
		return nil, nil, err
	}
	u.filename = cleanFilename(part.FileName())
	return &onePart{part: part, parts: parts, body: content}, content, nil
}

// onePart reads a part that must be the last one.
type onePart struct {
	part  *multipart.Part
	parts *multipart.Reader
	body  io.Reader // around it
}

// Read reads on; io.EOF comes once the whole body has ended well.
func (p *onePart) Read(b []byte) (int, error) {
	n, err := p.part.Read(b)
	if err != io.EOF {
		return n, err
	}
	switch _, err := p.parts.NextRawPart(); err {
	case io.EOF: // what comes behind is nothing's, but it belongs to the body
		if n, err := io.CopyN(io.Discard, p.body, multipartHead); err != io.EOF {
			return 0, cmp.Or(err, error(NewProblem(InvalidRequest, "%d bytes and more come behind the last boundary", n)))
		}
		return n, io.EOF
	case nil:
		return n, NewProblem(InvalidRequest, "the body has more than one part")
	default:
		return n, err
	}
}

// store writes the bytes and publishes them. Whatever fails leaves nothing.
func (u *upload) store(ctx context.Context, file io.Reader, content *digesting, replace []byte) (done blobstore.Published, err error) {
	g := u.g
	r := blobstore.Reservation{Kind: blobstore.Put, AttachmentID: u.id, Subject: u.who.Subject, Length: -1, ContentType: u.contentType, Filename: u.filename}
	if u.boundary == "" {
		r.Length = u.length
	}
	if u.client != "" {
		r.ClientID = &u.client
	}
	records, cancel := context.WithTimeout(ctx, recordsMost)
	defer cancel()
	reserved, err := g.o.Files.Reserve(records, r)
	if err != nil {
		return done, g.uploadProblem(ctx, u.who.Subject, err)
	}
	defer func() {
		if err != nil || done.Outcome == blobstore.Same || done.Outcome == blobstore.Conflict {
			g.release(ctx, reserved)
		}
	}()
	if r.Length < 0 {
		file = &growing{ctx: ctx, g: g, u: reserved, r: file}
	}
	written, err := g.o.Blobs.Write(ctx, reserved.StorageKey, file, blobstore.WriteOptions{ContentType: u.contentType, Disposition: disposition(u.contentType, u.filename), Limit: g.o.AttachmentLimit})
	if err != nil {
		return done, u.failed(err)
	}
	if err := u.ended(content, written.SHA256); err != nil {
		return done, err
	}
	return g.publish(ctx, u.view, blobstore.Publishing{Upload: reserved, Size: written.Size, SHA256: written.SHA256, Client: u.client, Scopes: u.view.scopes, IfMatch: replace})
}

// ended holds what came against the digests that the client sent.
func (u *upload) ended(content *digesting, sum []byte) error {
	if u.repr.sha256 != nil && !bytes.Equal(u.repr.sha256, sum) {
		return &Problem{Code: DigestMismatch}
	}
	if u.boundary != "" {
		sum = nil // of the file, not of the body
	}
	return content.check(sum)
}

// failed is why the bytes did not come, or could not be kept.
func (u *upload) failed(err error) error {
	var p *Problem
	switch {
	case u.body.err == errInterrupted:
		return (&Problem{Code: ShuttingDown}).Because(err)
	case u.body.err != nil:
		return u.body.problem()
	case errors.As(err, &p):
		return p
	case errors.Is(err, blobstore.ErrTooLarge):
		return u.g.tooLong()
	case errors.Is(err, blobstore.ErrQuota), errors.Is(err, blobstore.ErrGivenUp):
		return u.g.uploadProblem(u.g.working, u.who.Subject, err)
	case u.boundary != "" && u.body.whole:
		return (&Problem{Code: InvalidRequest, Detail: "the multipart body is malformed"}).Because(err)
	}
	return u.g.storeProblem(err)
}

// uploadProblem is recordsProblem, and says what a subject without room has.
func (g *Gateway) uploadProblem(ctx context.Context, subject string, err error) error {
	if !errors.Is(err, blobstore.ErrQuota) {
		return g.recordsProblem(err)
	}
	ctx, cancel := context.WithTimeout(ctx, recordsMost)
	defer cancel()
	usage, usageErr := g.o.Files.Usage(ctx, subject)
	if usageErr != nil {
		return g.recordsProblem(err)
	}
	return NewProblem(QuotaExceeded, "the caller's attachments have %d bytes, its uploads under way %d, of %d", usage.Used, usage.Reserved, usage.Quota).Because(err)
}

// publish makes a file of an upload, for whoever uploads: v is what the caller may do.
func (g *Gateway) publish(ctx context.Context, v *attachmentView, p blobstore.Publishing) (blobstore.Published, error) {
	ctx, cancel := context.WithTimeout(ctx, recordsMost)
	defer cancel()
	done, err := g.o.Files.Publish(ctx, p)
	if err != nil {
		return done, g.recordsProblem(err)
	}
	if done.Outcome == blobstore.Created || done.Outcome == blobstore.Replaced {
		return done, nil
	}
	if p.IfMatch != nil && done.Outcome == blobstore.Conflict {
		return done, &Problem{Code: PreconditionFailed}
	}
	// Somebody else was first, since v was looked at.
	now := *v
	now.file = done.File
	if now.knownSame(p.SHA256) {
		return done, nil
	}
	return done, now.exists()
}

// growing reserves room for an upload of unknown length as its bytes come.
type growing struct {
	ctx context.Context
	g   *Gateway
	u   *blobstore.Upload
	r   io.Reader
	n   int64
}

const (
	growLeast = 1 << 20
	growMost  = 64 << 20
)

// Read reads on; what it returns is reserved.
func (r *growing) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	if r.n += int64(n); r.n <= r.u.Reserved {
		return n, err
	}
	ctx, cancel := context.WithTimeout(r.ctx, recordsMost)
	defer cancel()
	ahead := min(max(r.n, growLeast), growMost)
	if limit := r.g.o.AttachmentLimit; limit > 0 {
		ahead = max(min(ahead, limit-r.n), 0)
	}
	growErr := r.g.o.Files.Grow(ctx, r.u, r.n+ahead)
	if errors.Is(growErr, blobstore.ErrQuota) && ahead > 0 {
		growErr = r.g.o.Files.Grow(ctx, r.u, r.n)
	}
	if growErr != nil {
		return n, growErr
	}
	return n, err
}

// echoVersion waits until what a marked transaction did is in the log, and returns its version; 0: the log is late.
func (g *Gateway) echoVersion(ctx context.Context, push int64) int64 {
	if push == 0 {
		return 0
	}
	ctx, cancel := context.WithTimeout(ctx, g.o.EchoTimeout)
	defer cancel()
	done, forget := g.hub.awaitPush(push)
	defer forget()
	found, err := g.o.Log.Pushed(ctx, []int64{push}) // it may have come before
	if err == nil && len(found) > 0 {
		g.hub.hear(found[0].Last)
		return int64(found[0].Last)
	}
	select {
	case at := <-done:
		return int64(at.Last)
	case <-ctx.Done():
		g.metrics.echoesMissed.Inc()
		return 0
	}
}

func hexText(b []byte) string { return hex.EncodeToString(b) }

// uploadAnswer is the answer to an upload.
type uploadAnswer struct {
	Status       string `json:"status"`
	AttachmentID string `json:"attachment_id"`
	Size         int64  `json:"size"`
	ContentType  string `json:"content_type"`
	SHA256       string `json:"sha256"`
	Version      *int64 `json:"version"`
}

func answerUpload(c *fiber.Ctx, status int, f *blobstore.File, version int64) error {
	a := uploadAnswer{"success", f.ID, f.Size, f.ContentType, hexText(f.SHA256), nil}
	if version != 0 {
		a.Version = &version
	}
	c.Set(fiber.HeaderETag, etag(f.SHA256))
	return sendJSON(c, status, a)
}

// sendJSON answers with what only its caller is to keep.
func sendJSON(c *fiber.Ctx, status int, v any) error {
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	c.Set(fiber.HeaderContentType, fiber.MIMEApplicationJSON)
	c.Set(fiber.HeaderCacheControl, "no-store")
	return c.Status(status).Send(text)
}

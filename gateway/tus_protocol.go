package gateway

import (
	"crypto/sha1"
	"crypto/sha256"
	"encoding/base64"
	"hash"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/gofiber/fiber/v2"
	"github.com/gofiber/fiber/v2/utils"
)

// The headers of tus 1.0.0, https://tus.io/protocols/resumable-upload.
const (
	tusVersion    = "1.0.0"
	tusExtensions = "creation,creation-with-upload,creation-defer-length,expiration,checksum,termination"
	tusAlgorithms = "sha1,sha256"
	tusBody       = "application/offset+octet-stream"

	tusRequestHeaders = "Tus-Resumable, Upload-Length, Upload-Defer-Length, Upload-Offset, Upload-Metadata, Upload-Checksum, X-HTTP-Method-Override, X-Requested-With"
	tusAnswerHeaders  = "Location, Tus-Resumable, Tus-Version, Tus-Extension, Tus-Max-Size, Tus-Checksum-Algorithm, Upload-Length, Upload-Defer-Length, Upload-Offset, Upload-Metadata, Upload-Expires"
)

// tusRequest lets through what speaks the version of tus that is spoken here.
func (g *Gateway) tusRequest(c *fiber.Ctx) error {
	c.Set("Tus-Resumable", tusVersion)
	c.Set(fiber.HeaderCacheControl, "no-store")
	if err := g.servesAttachments(); err != nil {
		return err
	}
	if c.Get("Tus-Resumable") != tusVersion {
		c.Set("Tus-Version", tusVersion)
		return NewProblem(TusVersion, "send Tus-Resumable: %s", tusVersion)
	}
	return c.Next()
}

// tusOptions answers OPTIONS, which says what is spoken here.
func (g *Gateway) tusOptions(c *fiber.Ctx) error {
	if err := g.servesAttachments(); err != nil {
		return err
	}
	c.Set("Tus-Resumable", tusVersion)
	c.Set("Tus-Version", tusVersion)
	c.Set("Tus-Extension", tusExtensions)
	c.Set("Tus-Checksum-Algorithm", tusAlgorithms)
	if g.o.AttachmentLimit > 0 {
		c.Set("Tus-Max-Size", strconv.FormatInt(g.o.AttachmentLimit, 10))
	}
	return noContent(c)
}

// tusMetadata is what Upload-Metadata says.
type tusMetadata struct{ attachmentID, fileType, filename, clientID string }

// parseUploadMetadata reads pairs of a key and, in base64, a value. Keys that are not known are passed over.
func parseUploadMetadata(text string) (m tusMetadata, err error) {
	into := map[string]*string{"attachment_id": &m.attachmentID, "filetype": &m.fileType, "filename": &m.filename, "client_id": &m.clientID}
	seen := map[string]bool{}
	for pair := range strings.SplitSeq(text, ",") {
		if pair = strings.TrimSpace(pair); pair == "" && strings.TrimSpace(text) == "" {
			break
		}
		key, encoded, _ := strings.Cut(pair, " ")
		value, decodeErr := base64.StdEncoding.DecodeString(encoded)
		switch {
		case key == "", seen[key]:
			return m, NewProblem(InvalidRequest, "Upload-Metadata has an empty key, or one twice")
		case decodeErr != nil:
			return m, NewProblem(InvalidRequest, "Upload-Metadata: a value is not base64")
		}
		seen[key] = true
		if to := into[key]; to != nil {
			if !utf8.Valid(value) {
				return m, NewProblem(InvalidRequest, "Upload-Metadata: %s is not UTF-8", key)
			}
			*to = string(value)
		}
	}
	return m, nil
}

// String writes the metadata as a client would.
func (m tusMetadata) String() string {
	var b strings.Builder
	for _, pair := range [][2]string{{"attachment_id", m.attachmentID}, {"filetype", m.fileType}, {"filename", m.filename}, {"client_id", m.clientID}} {
		if pair[1] == "" {
			continue
		}
		if b.Len() > 0 {
			b.WriteByte(',')
		}
		b.WriteString(pair[0] + " " + base64.StdEncoding.EncodeToString([]byte(pair[1])))
	}
	return b.String()
}

// tusChecksum is what the body of one request should come to.
type tusChecksum struct {
	hash hash.Hash
	want []byte
}

// parseUploadChecksum reads an algorithm and, in base64, a checksum; nil: none was sent.
func parseUploadChecksum(text string) (*tusChecksum, error) {
	if text == "" {
		return nil, nil
	}
	algorithm, encoded, _ := strings.Cut(text, " ")
	s := &tusChecksum{}
	switch algorithm {
	case "sha1":
		s.hash = sha1.New()
	case "sha256":
		s.hash = sha256.New()
	default:
		return nil, NewProblem(InvalidRequest, "Upload-Checksum: known are %s", tusAlgorithms)
	}
	var err error
	if s.want, err = base64.StdEncoding.DecodeString(encoded); err != nil || len(s.want) != s.hash.Size() {
		return nil, NewProblem(InvalidRequest, "Upload-Checksum is not an algorithm and a checksum of it in base64")
	}
	return s, nil
}

// sizeHeader reads a whole number, 0 or more; ok is false where there is none.
func sizeHeader(c *fiber.Ctx, name string) (n int64, ok bool, err error) {
	text := utils.CopyString(c.Get(name))
	if text == "" {
		return 0, false, nil
	}
	n, err = strconv.ParseInt(text, 10, 64)
	if err != nil || n < 0 || text[0] == '+' {
		return 0, false, NewProblem(InvalidRequest, "%s must be a whole number from 0 on", name)
	}
	return n, true, nil
}

// uploadLength reads how long an upload will be; -1: its client will say so later.
func (g *Gateway) uploadLength(c *fiber.Ctx) (int64, error) {
	length, said, err := sizeHeader(c, "Upload-Length")
	deferred := c.Get("Upload-Defer-Length")
	switch {
	case err != nil:
		return 0, err
	case said && deferred != "" || !said && deferred != "1":
		return 0, NewProblem(InvalidRequest, "an upload begins with Upload-Length, or with Upload-Defer-Length: 1")
	case !said:
		return -1, nil
	case g.o.AttachmentLimit > 0 && length > g.o.AttachmentLimit:
		return 0, g.tooLong()
	}
	return length, nil
}

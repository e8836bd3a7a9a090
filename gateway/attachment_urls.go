package gateway

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// A signed URL is a right to read one attachment's present bytes until it expires, for whoever holds it: it is for clients,
// such as a browser's img, that send no token. It names the content by its digest in what is signed, so that it ends as well
// when other bytes take its place.

// signedURLs begins what is signed, so that a signature is good for nothing else.
const signedURLs = "walgate download\n"

// downloadURL returns a signed URL of an attachment with this content, absolute on the public URL.
func (g *Gateway) downloadURL(id string, digest []byte, expires time.Time) string {
	b := g.appendAttachmentURL(nil, id)
	b = append(b, "?expires="...)
	b = strconv.AppendInt(b, expires.Unix(), 10)
	b = append(b, "&signature="...)
	return string(append(b, g.signature(id, digest, expires.Unix())...))
}

// urlExpiry is when URLs that are made now expire. All those of one minute are the same, so that answers and frames are made
// once for many.
func (g *Gateway) urlExpiry(now time.Time) time.Time {
	return now.Add(g.o.AttachmentURLTTL).Truncate(time.Minute).Add(time.Minute)
}

func (g *Gateway) appendAttachmentURL(b []byte, id string) []byte {
	b = append(b, strings.TrimRight(g.o.PublicURL, "/")...)
	b = append(b, "/attachments/"...)
	return append(b, url.PathEscape(id)...) // ids need no escapes; what isn't an id must not become another path
}

func (g *Gateway) signature(id string, digest []byte, expires int64) string {
	mac := hmac.New(sha256.New, g.o.AttachmentSigningKey)
	mac.Write([]byte(signedURLs))
	var sized [8]byte
	for _, part := range [][]byte{[]byte(id), digest} {
		binary.BigEndian.PutUint64(sized[:], uint64(len(part)))
		mac.Write(sized[:])
		mac.Write(part)
	}
	binary.BigEndian.PutUint64(sized[:], uint64(expires))
	mac.Write(sized[:])
	return base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
}

// checkSignature says whether a URL's parameters are a right to read an attachment with this content now. A wrong signature
// is told before the time is looked at: who can't sign learns nothing.
func (g *Gateway) checkSignature(id string, digest []byte, expires, signature string) error {
	at, err := strconv.ParseInt(expires, 10, 64)
	if err != nil || len(g.o.AttachmentSigningKey) == 0 || !hmac.Equal([]byte(signature), []byte(g.signature(id, digest, at))) {
		return &Problem{Code: SignatureInvalid}
	}
	if time.Now().Unix() >= at {
		return &Problem{Code: SignatureExpired}
	}
	return nil
}

package gateway

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"hash"
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
	return string(g.newURLSigner(expires.Unix()).appendURL(nil, id, digest))
}

// urlExpiry is when URLs that are made now expire. All those of one minute are the same, so that answers and frames are made
// once for many.
func (g *Gateway) urlExpiry(now time.Time) time.Time {
	return now.Add(g.o.AttachmentURLTTL).Truncate(time.Minute).Add(time.Minute)
}

// urlSigner signs URLs of one expiry. It is for one goroutine.
type urlSigner struct {
	prefix  string
	expires int64 // Unix seconds
	mac     hash.Hash
	message []byte
	sum     [sha256.Size]byte
}

func (g *Gateway) newURLSigner(expires int64) *urlSigner {
	return &urlSigner{prefix: strings.TrimRight(g.o.PublicURL, "/") + "/attachments/", expires: expires, mac: hmac.New(sha256.New, g.o.AttachmentSigningKey)}
}

// appendURL appends the URL of an attachment with this content.
func (s *urlSigner) appendURL(b []byte, id string, digest []byte) []byte {
	b = append(b, s.prefix...)
	b = append(b, url.PathEscape(id)...) // ids need no escapes; what isn't an id must not become another path
	b = append(b, "?expires="...)
	b = strconv.AppendInt(b, s.expires, 10)
	b = append(b, "&signature="...)
	return s.appendSignature(b, id, digest)
}

func (s *urlSigner) appendSignature(b []byte, id string, digest []byte) []byte {
	m := append(s.message[:0], signedURLs...)
	m = binary.BigEndian.AppendUint64(m, uint64(len(id)))
	m = append(m, id...)
	m = binary.BigEndian.AppendUint64(m, uint64(len(digest)))
	m = append(m, digest...)
	m = binary.BigEndian.AppendUint64(m, uint64(s.expires))
	s.mac.Reset()
	s.mac.Write(m)
	s.message = m
	return base64.RawURLEncoding.AppendEncode(b, s.mac.Sum(s.sum[:0]))
}

func (g *Gateway) signature(id string, digest []byte, expires int64) string {
	return string(g.newURLSigner(expires).appendSignature(nil, id, digest))
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

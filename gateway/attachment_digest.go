package gateway

import (
	"bytes"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"hash"
	"io"
	"strings"

	"github.com/gofiber/fiber/v2"
)

// digests are what a client says that its bytes come to (RFC 9530). The zero value says nothing.
type digests struct{ sha256, sha512 []byte }

// readDigests reads Content-Digest or Repr-Digest, on however many lines.
func readDigests(c *fiber.Ctx, field string) (digests, error) {
	return parseDigests(field, string(bytes.Join(c.Request().Header.PeekAll(field), []byte(","))))
}

// parseDigests reads a dictionary of byte sequences. Algorithms other than the two are passed over.
func parseDigests(field, text string) (d digests, err error) {
	for member := range strings.SplitSeq(text, ",") {
		name, value, _ := strings.Cut(strings.TrimSpace(member), "=")
		var into *[]byte
		size := 0
		switch strings.ToLower(name) {
		case "sha-256":
			into, size = &d.sha256, sha256.Size
		case "sha-512":
			into, size = &d.sha512, sha512.Size
		default:
			continue
		}
		value, _, _ = strings.Cut(value, ";")
		value = strings.TrimSpace(value)
		sum, decodeErr := base64.StdEncoding.DecodeString(strings.Trim(value, ":"))
		if len(value) < 2 || value[0] != ':' || value[len(value)-1] != ':' || decodeErr != nil || len(sum) != size {
			return d, NewProblem(InvalidRequest, "%s is not of the form sha-256=:base64:", field)
		}
		*into = sum
	}
	return d, nil
}

// digesting reads on and computes what digests need.
type digesting struct {
	r     io.Reader
	want  digests
	short hash.Hash // nil: not needed
	long  hash.Hash
}

// newDigesting reads r; where known is true somebody else computes the SHA-256.
func newDigesting(r io.Reader, want digests, known bool) *digesting {
	d := &digesting{r: r, want: want}
	if want.sha256 != nil && !known {
		d.short = sha256.New()
	}
	if want.sha512 != nil {
		d.long = sha512.New()
	}
	return d
}

// Read reads on.
func (d *digesting) Read(p []byte) (int, error) {
	n, err := d.r.Read(p)
	if d.short != nil {
		_, _ = d.short.Write(p[:n]) // a hash never fails
	}
	if d.long != nil {
		_, _ = d.long.Write(p[:n])
	}
	return n, err
}

// check says whether what was read is what it should be. sum is its SHA-256 where somebody else computed it.
func (d *digesting) check(sum []byte) error {
	if d.short != nil {
		sum = d.short.Sum(nil)
	}
	if d.want.sha256 != nil && !bytes.Equal(d.want.sha256, sum) || d.long != nil && !bytes.Equal(d.want.sha512, d.long.Sum(nil)) {
		return &Problem{Code: DigestMismatch}
	}
	return nil
}

// sha256Field is a digest as RFC 9530 writes it.
func sha256Field(sum []byte) string {
	return "sha-256=:" + base64.StdEncoding.EncodeToString(sum) + ":"
}

package gateway

import (
	"encoding/hex"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/gofiber/fiber/v2"

	"github.com/walgate/walgate/blobstore"
)

// etag is the entity tag of bytes with a digest.
func etag(digest []byte) string { return `"` + hex.EncodeToString(digest) + `"` }

// matches says whether a list of entity tags holds that of a digest, as If-Match compares them.
func matches(list string, digest []byte) bool {
	return strings.TrimSpace(list) == "*" || holdsTag(list, etag(digest), false)
}

// holdsTag says whether a list of entity tags holds one; weak ones are told apart unless weak is true.
func holdsTag(list, tag string, weak bool) bool {
	for one := range strings.SplitSeq(list, ",") { // ours hold no comma
		one = strings.TrimSpace(one)
		if weak {
			one = strings.TrimPrefix(one, "W/")
		}
		if one == tag {
			return true
		}
	}
	return false
}

// conditions decides by If-Match, If-Unmodified-Since, If-None-Match and If-Modified-Since, in the order of RFC 9110: 0, 304
// or 412.
func conditions(c *fiber.Ctx, f *blobstore.File) int {
	modified := f.CreatedAt.Truncate(time.Second)
	if list := c.Get(fiber.HeaderIfMatch); list != "" {
		if !matches(list, f.SHA256) {
			return fiber.StatusPreconditionFailed
		}
	} else if at, err := http.ParseTime(c.Get(fiber.HeaderIfUnmodifiedSince)); err == nil && modified.After(at) {
		return fiber.StatusPreconditionFailed
	}
	if list := c.Get(fiber.HeaderIfNoneMatch); list != "" {
		if strings.TrimSpace(list) == "*" || holdsTag(list, etag(f.SHA256), true) {
			return fiber.StatusNotModified
		}
	} else if at, err := http.ParseTime(c.Get(fiber.HeaderIfModifiedSince)); err == nil && !modified.After(at) {
		return fiber.StatusNotModified
	}
	return 0
}

// byteRange is a piece of an attachment.
type byteRange struct{ first, length int64 }

// whole is what a request without a range asks for.
func whole(f *blobstore.File) byteRange { return byteRange{0, f.Size} }

// requestedRange reads Range and If-Range. partial is false where all is asked for; ok is false where there is no such range.
func requestedRange(c *fiber.Ctx, f *blobstore.File) (r byteRange, partial, ok bool) {
	r = whole(f)
	text := c.Get(fiber.HeaderRange)
	unit, set, found := strings.Cut(text, "=")
	if c.Method() != fiber.MethodGet || !found || !strings.EqualFold(strings.TrimSpace(unit), "bytes") {
		return r, false, true // another unit is to be ignored
	}
	if condition := strings.TrimSpace(c.Get(fiber.HeaderIfRange)); condition != "" {
		at, err := http.ParseTime(condition)
		if condition != etag(f.SHA256) && (err != nil || !at.Equal(f.CreatedAt.Truncate(time.Second))) {
			return r, false, true
		}
	}
	r, ok = parseRange(strings.TrimSpace(set), f.Size)
	return r, true, ok
}

// parseRange reads one range of something of a size: first-last, first- or -length. Several ranges are not served.
func parseRange(set string, size int64) (r byteRange, ok bool) {
	from, to, dash := strings.Cut(set, "-")
	first, firstOK := parsePosition(from)
	last, lastOK := parsePosition(to)
	switch {
	case !dash, from != "" && !firstOK, to != "" && !lastOK, from == "" && to == "":
		return r, false
	case from == "": // the last bytes
		r.length = min(last, size)
		r.first = size - r.length
		return r, r.length > 0
	case to == "":
		last = size - 1
	case last < first:
		return r, false
	}
	last = min(last, size-1)
	return byteRange{first, last - first + 1}, first < size
}

// parsePosition reads digits; what is too large for a number is as large as any.
func parsePosition(text string) (int64, bool) {
	if text == "" || strings.Trim(text, "0123456789") != "" {
		return 0, false
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return 1<<63 - 1, true
	}
	return n, true
}

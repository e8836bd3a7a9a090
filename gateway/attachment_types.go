package gateway

import (
	"mime"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/gofiber/fiber/v2"
)

// A browser runs what it takes for a document, and believes the one who hosts it. So attachments are downloads, but for types
// that no browser runs; no browser is let to guess another type; and whatever is shown nevertheless may do nothing.

// octetStream is the type of bytes of which no other is known.
const octetStream = "application/octet-stream"

// longestType is in bytes, with parameters.
const longestType = 255

// shownTypes are those that may be shown in place.
var shownTypes = []string{"image/png", "image/jpeg", "image/gif", "image/webp", "image/avif", "audio/mpeg", "audio/ogg", "audio/wav", "audio/webm",
	"video/mp4", "video/webm", "video/ogg", "text/plain"}

// parseType reads a Content-Type; without one it is octetStream.
func parseType(text string) (string, error) {
	if text == "" {
		return octetStream, nil
	}
	media, params, err := mime.ParseMediaType(text)
	formatted := mime.FormatMediaType(media, params)
	if err != nil || !strings.Contains(media, "/") || formatted == "" || len(formatted) > longestType {
		return "", NewProblem(AttachmentTypeRefused, "the Content-Type is not a media type such as image/jpeg")
	}
	return formatted, nil
}

// typeAllowed refuses types that the configuration doesn't name.
func (g *Gateway) typeAllowed(formatted string) error {
	if len(g.o.AttachmentTypes) == 0 {
		return nil
	}
	media, _, _ := strings.Cut(formatted, ";")
	kind, _, _ := strings.Cut(media, "/")
	for _, allowed := range g.o.AttachmentTypes {
		if strings.EqualFold(allowed, media) || allowed == "*/*" || strings.EqualFold(allowed, kind+"/*") {
			return nil
		}
	}
	return NewProblem(AttachmentTypeRefused, "taken are %s", strings.Join(g.o.AttachmentTypes, ", "))
}

// disposition is the Content-Disposition of an attachment. name may be empty.
func disposition(formatted, name string) string {
	kind := "attachment"
	if media, _, _ := strings.Cut(formatted, ";"); slices.Contains(shownTypes, media) {
		kind = "inline"
	}
	if name == "" {
		return kind
	}
	if text := mime.FormatMediaType(kind, map[string]string{"filename": name}); text != "" {
		return text
	}
	return kind
}

// longestFilename is in bytes.
const longestFilename = 255

// cleanFilename makes of what a client calls a file a name without directories and control characters; it may be empty.
func cleanFilename(name string) string {
	if at := strings.LastIndexAny(name, `/\`); at >= 0 {
		name = name[at+1:]
	}
	name = strings.Map(func(r rune) rune {
		if r == utf8.RuneError || unicode.IsControl(r) || unicode.Is(unicode.Cf, r) {
			return -1
		}
		return r
	}, name)
	for len(name) > longestFilename {
		_, size := utf8.DecodeLastRuneInString(name)
		name = name[:len(name)-size]
	}
	if strings.Trim(name, ".") == "" {
		return ""
	}
	return name
}

// setContentHeaders says what bytes of a type are, and that nobody is to run them.
func setContentHeaders(c *fiber.Ctx, formatted, name string) {
	c.Set(fiber.HeaderContentType, formatted)
	c.Set(fiber.HeaderContentDisposition, disposition(formatted, name))
	c.Set(fiber.HeaderXContentTypeOptions, "nosniff")
	c.Set(fiber.HeaderContentSecurityPolicy, "sandbox; default-src 'none'")
}

package gateway

import (
	"errors"
	"net/url"
	"strings"
	"testing"
	"time"
)

// TestSignedURLs: a URL is good for its attachment, its content and its time, and for nothing else.
func TestSignedURLs(t *testing.T) {
	t.Parallel()
	g := &Gateway{o: Options{PublicURL: "https://sync.example/base/", AttachmentSigningKey: []byte("a key of the tests"), AttachmentURLTTL: 15 * time.Minute}}
	digest := []byte("digest")
	make := func(id string, expires time.Time) (e, s string) {
		text := g.downloadURL(id, digest, expires)
		u, err := url.Parse(text)
		ok(t, err)
		if !strings.HasPrefix(text, "https://sync.example/base/attachments/"+id+"?") || len(u.Query()) != 2 {
			t.Fatalf("got %s", text)
		}
		return u.Query().Get("expires"), u.Query().Get("signature")
	}
	now := time.Now()
	expires, signature := make("a.jpg", g.urlExpiry(now))
	if left := time.Until(g.urlExpiry(now)); left < 14*time.Minute || left > 16*time.Minute {
		t.Errorf("good for %s", left)
	}
	ok(t, g.checkSignature("a.jpg", digest, expires, signature))
	old, oldSignature := make("a.jpg", now.Add(-time.Second))
	other := &Gateway{o: g.o}
	other.o.AttachmentSigningKey = []byte("another key")
	unset := &Gateway{}
	for name, c := range map[string]struct {
		g                      *Gateway
		id, expires, signature string
		digest                 string
		want                   Code
	}{
		"another attachment": {g, "b.jpg", expires, signature, "digest", SignatureInvalid},
		"other content":      {g, "a.jpg", expires, signature, "other", SignatureInvalid},
		"moved bounds":       {g, "a.jp", expires, signature, "gdigest", SignatureInvalid},
		"another time":       {g, "a.jpg", old, signature, "digest", SignatureInvalid},
		"a longer one":       {g, "a.jpg", old, oldSignature + "A", "digest", SignatureInvalid},
		"no time":            {g, "a.jpg", "", signature, "digest", SignatureInvalid},
		"no signature":       {g, "a.jpg", expires, "", "digest", SignatureInvalid},
		"another key":        {other, "a.jpg", expires, signature, "digest", SignatureInvalid},
		"no key":             {unset, "a.jpg", expires, unset.signature("a.jpg", digest, g.urlExpiry(now).Unix()), "digest", SignatureInvalid},
		"expired":            {g, "a.jpg", old, oldSignature, "digest", SignatureExpired},
	} {
		var p *Problem
		if err := c.g.checkSignature(c.id, []byte(c.digest), c.expires, c.signature); !errors.As(err, &p) || p.Code != c.want {
			t.Errorf("%s: got %v, want %s", name, err, c.want)
		}
	}
}

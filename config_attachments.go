package main

import (
	"fmt"
	"net/url"
	"path"
	"regexp"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"

	"github.com/walgate/walgate/policies"
)

// BlobsConfig is where the bytes of attachments are.
type BlobsConfig struct{ URL string }

// AttachmentsConfig says what clients may do with attachments and how long what nobody needs is kept.
type AttachmentsConfig struct {
	Grace       time.Duration
	SigningKey  Secret // empty: the one that init made, in the source
	URLTTL      time.Duration
	Types       []string // empty: any
	Replace     bool
	DeleteRoles []string
	SweepGuard  int
	UploadTTL   time.Duration
	Direct      bool
}

// longestURL is how long the signatures of object stores may hold.
const longestURL = 7 * 24 * time.Hour

// attachmentKeys lists the keys of attachments and of where their bytes are.
func attachmentKeys(c *Config) []key {
	second, a := int64(time.Second), &c.Attachments
	return []key{
		{path: "blobs.url", into: &c.Blobs.URL, check: checkBlobs},
		{path: "attachments.grace", into: &a.Grace, min: second, max: int64(maxRetention)},
		{path: "attachments.signing_key", into: &a.SigningKey, check: checkSecret},
		{path: "attachments.url_ttl", into: &a.URLTTL, min: second, max: int64(longestURL)},
		{path: "attachments.types", into: &a.Types, check: checkMediaType},
		{path: "attachments.replace", into: &a.Replace},
		{path: "attachments.delete_roles", into: &a.DeleteRoles},
		{path: "attachments.sweep_guard", into: &a.SweepGuard, min: 0, max: 100},
		{path: "attachments.upload_ttl", into: &a.UploadTTL, min: second, max: int64(maxRetention)},
		{path: "attachments.direct", into: &a.Direct},
	}
}

func checkBlobs(text string) string {
	const want = "file:///DIRECTORY, s3://BUCKET, gs://BUCKET, azblob://CONTAINER or, for trials, mem://"
	u, err := url.Parse(text)
	switch {
	case err != nil || u.User != nil || u.Fragment != "":
		return want
	case u.Scheme == "mem" && u.Host == "":
		return ""
	case u.Scheme == "file" && u.Host == "" && path.Clean(u.Path) != "/" && strings.HasPrefix(u.Path, "/"):
		return ""
	case (u.Scheme == "s3" || u.Scheme == "gs" || u.Scheme == "azblob") && u.Host != "":
		return ""
	}
	return want
}

var mediaPattern = regexp.MustCompile(`^[a-z0-9!#$&^_.+-]+/(\*|[a-z0-9!#$&^_.+-]+)$`)

func checkMediaType(text string) string {
	if mediaPattern.MatchString(text) {
		return ""
	}
	return "a media type in small letters, such as application/pdf or image/*"
}

// checkQuota refuses a limit that no caller's quota would let pass.
func (d *decoder) checkQuota(l LimitsConfig) {
	const path = "limits.attachment"
	if l.Attachment > l.Quota && !d.badWithin("limits") {
		d.fault(d.where(path), path, formatSize(int64(l.Attachment), 10), fmt.Sprintf("no more than limits.quota, which is %s", formatSize(int64(l.Quota), 10)), "")
	}
}

// specAttachments decodes where the rows of a collection name attachments.
func (d *decoder) specAttachments(path string, n ast.Node) []policies.AttachmentSpec {
	const entry = "{column: NAME}, with a path or a pattern where the column holds more than ids"
	seq, ok := n.(*ast.SequenceNode)
	if !ok {
		d.fault(nodeMark(n), path, describe(n), "a list of "+entry, "write it as [{column: photo_id}]")
		return nil
	}
	if len(seq.Values) == 0 {
		d.fault(nodeMark(n), path, "an empty list", "a list of "+entry, "leave attachments out where rows name none")
	}
	var specs []policies.AttachmentSpec
	for i, item := range seq.Values {
		at := fmt.Sprintf("%s.%d", path, i)
		d.positions[at] = nodeMark(item)
		var s policies.AttachmentSpec
		d.mapping(item, at+".", attachmentSpecKeys(at, &s), nil)
		if s.Column == "" && !d.badWithin(at) {
			d.fault(nodeMark(item), at, "no column", entry, "")
		}
		specs = append(specs, s)
	}
	return specs
}

// attachmentSpecKeys lists the keys of one such entry.
func attachmentSpecKeys(path string, s *policies.AttachmentSpec) []key {
	return []key{
		{path: path + ".column", into: &s.Column, nonEmpty: true},
		{path: path + ".path", into: &s.Path, nonEmpty: true},
		{path: path + ".pattern", into: &s.Pattern, nonEmpty: true},
	}
}

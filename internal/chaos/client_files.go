package chaos

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
)

// files is what a client keeps of attachments: by the position of its manifests, and only once a page's files are there.
type files struct {
	since int64
	kept  map[string]string // id to the SHA-256 of what was downloaded; "gone" where it could not be
	fresh map[string]string // what was listed since 0, while that goes on
}

// fileBytes is what every upload of an id holds, so that whoever has a file can tell whether it is the right one.
func fileBytes(id string) []byte {
	seed := sha256.Sum256([]byte(id))
	out := make([]byte, 300+int(seed[0])*20)
	_, _ = rand.NewChaCha8(seed).Read(out) // never fails
	return out
}

// keepFiles uploads, deletes or follows the manifest.
func (c *client) keepFiles(ctx context.Context) error {
	if len(c.w.uploads) == 0 {
		return nil
	}
	id := pick(c.rng, c.w.uploads)
	switch n := c.rng.IntN(12); {
	case n < 5 && c.caller.MayUpload():
		return c.upload(ctx, id)
	case n == 5 && c.caller.MayUpload():
		return c.remove(ctx, id)
	}
	return c.syncFiles(ctx)
}

func (c *client) upload(ctx context.Context, id string) error {
	body := fileBytes(id)
	digest := sha256.Sum256(body)
	path := "/attachments/" + id
	if c.rng.IntN(2) == 0 {
		path += "?client_id=" + c.device
	}
	a, err := c.ask(ctx, http.MethodPut, path, nil, body, "Content-Type", "image/jpeg", "Content-Digest", "sha-256=:"+base64.StdEncoding.EncodeToString(digest[:])+":")
	if err != nil {
		return err
	}
	code, _ := problem(a.body)
	c.note("PUT %s: %d %s%s", id, a.status, code, from(a.header))
	c.w.count(fmt.Sprintf("files: PUT %d %s", a.status, code))
	switch a.status {
	case http.StatusCreated, http.StatusOK, http.StatusConflict, http.StatusForbidden, http.StatusNotFound: // taken, or named by rows of others
		return nil
	}
	return c.wrong("PUT "+path, a)
}

func (c *client) remove(ctx context.Context, id string) error {
	a, err := c.ask(ctx, http.MethodDelete, "/attachments/"+id, nil, nil)
	if err != nil {
		return err
	}
	c.note("DELETE %s: %d%s", id, a.status, from(a.header))
	c.w.count(fmt.Sprintf("files: DELETE %d", a.status))
	switch a.status {
	case http.StatusNoContent, http.StatusForbidden, http.StatusNotFound:
		return nil
	}
	return c.wrong("DELETE "+id, a)
}

// manifest is the answer to POST /attachments/manifest.
type manifest struct {
	CurrentVersion int64 `json:"current_version"`
	Operations     []struct {
		Operation    string `json:"operation"`
		AttachmentID string `json:"attachment_id"`
		Version      int64  `json:"version"`
		DownloadURL  string `json:"download_url"`
		Size         int64  `json:"size"`
		SHA256       string `json:"sha256"`
	} `json:"operations"`
	HasMore bool   `json:"has_more"`
	Resync  bool   `json:"full_resync_required"`
	Reason  string `json:"reason"`
}

// syncFiles follows manifests to their end.
func (c *client) syncFiles(ctx context.Context) error {
	for {
		f := &c.files
		ask := map[string]any{"client_id": c.device, "since_version": f.since}
		if !c.calm && c.rng.IntN(3) == 0 {
			ask["limit"] = 1 + c.rng.IntN(5)
		}
		body, _ := json.Marshal(ask) // texts and numbers
		a, err := c.ask(ctx, http.MethodPost, "/attachments/manifest", nil, body, "Content-Type", "application/json")
		if err != nil {
			return err
		}
		var m manifest
		if a.status != http.StatusOK || json.Unmarshal(a.body, &m) != nil {
			return c.wrong("manifest", a)
		}
		c.w.count("files: manifests")
		if m.Resync {
			c.note("manifest from %d: resync, %s%s", f.since, m.Reason, from(a.header))
			c.w.count("files: resync " + m.Reason)
			if f.since == 0 {
				return c.wrong("a manifest from 0 asks for a resync", a)
			}
			f.since, f.fresh = 0, nil
			continue
		}
		c.note("manifest from %d: %d operations to %d, more %t%s", f.since, len(m.Operations), m.CurrentVersion, m.HasMore, from(a.header))
		if err := c.takeManifest(ctx, &m); err != nil {
			return err
		}
		if !m.HasMore {
			return nil
		}
	}
}

// takeManifest takes a page over once all of its files are there.
func (c *client) takeManifest(ctx context.Context, m *manifest) error {
	f := &c.files
	c.checkManifest(m)
	into := maps.Clone(f.kept)
	listed := map[string]string{} // since 0: what wasn't listed is deleted at the end
	if f.since == 0 {
		f.fresh = map[string]string{}
	}
	if f.fresh != nil {
		listed = maps.Clone(f.fresh)
	}
	for _, op := range m.Operations {
		if op.Operation == "delete" {
			delete(into, op.AttachmentID)
			delete(listed, op.AttachmentID)
			continue
		}
		if into[op.AttachmentID] != op.SHA256 {
			digest, err := c.download(ctx, op.AttachmentID, op.DownloadURL, op.SHA256)
			if err != nil {
				return err
			}
			into[op.AttachmentID] = digest
		}
		listed[op.AttachmentID] = into[op.AttachmentID]
	}
	f.kept, f.since = into, m.CurrentVersion
	if f.fresh != nil {
		if f.fresh = listed; !m.HasMore {
			f.kept, f.fresh = listed, nil
		}
	}
	return nil
}

// checkManifest holds a page against what every client relies on.
func (c *client) checkManifest(m *manifest) {
	last, seen := c.files.since, map[string]bool{}
	for _, op := range m.Operations {
		if op.Version < last {
			c.violation("a manifest is in the order of versions", "from %d: %s at %d comes after %d", c.files.since, op.AttachmentID, op.Version, last)
		}
		if seen[op.AttachmentID] {
			c.violation("an attachment is once in a manifest", "from %d: %s is there twice", c.files.since, op.AttachmentID)
		}
		last, seen[op.AttachmentID] = op.Version, true
	}
	if m.CurrentVersion < last || m.HasMore && m.CurrentVersion <= c.files.since {
		c.violation("a manifest's position doesn't go back", "from %d, with operations up to %d, it ends at %d, more %t", c.files.since, last, m.CurrentVersion, m.HasMore)
	}
}

// download fetches one file. One that is gone by now is told of by a later operation.
func (c *client) download(ctx context.Context, id, address, digest string) (string, error) {
	if i := strings.Index(address, "/attachments/"); i >= 0 && c.rng.IntN(2) == 0 {
		address = address[i:] // through the balancer, whatever the public URL is
	} else {
		address = "/attachments/" + id
	}
	a, err := c.ask(ctx, http.MethodGet, address, nil, nil)
	if err != nil {
		return "", err
	}
	c.w.count(fmt.Sprintf("files: GET %d", a.status))
	switch a.status {
	case http.StatusOK:
	case http.StatusNotFound, http.StatusGone:
		c.note("GET %s: %d, gone meanwhile%s", id, a.status, from(a.header))
		return "gone", nil
	case http.StatusForbidden: // the signature's time is over: the next manifest has another
		return "", errAway
	default:
		return "", c.wrong("GET "+address, a)
	}
	sum := sha256.Sum256(a.body)
	if got := hex.EncodeToString(sum[:]); got != digest || !bytes.Equal(a.body, fileBytes(id)) {
		c.violation("a download is what was uploaded", "%s came with %d bytes, %s; the manifest says %s; %d were uploaded", id, len(a.body), got, digest, len(fileBytes(id)))
		return "", errWrong
	}
	return digest, nil
}

// compare says how what is kept differs from what rows name; more may be kept where also allows it, and less where a file
// is withheld: what was named before it was uploaded isn't given to scopes in which its uploader may not write.
func (f *files) compare(want map[string]string, also, withheld func(id string) bool) error {
	var lines []string
	for _, id := range slices.Sorted(maps.Keys(want)) {
		if digest, ok := f.kept[id]; !ok && !withheld(id) {
			lines = append(lines, fmt.Sprintf("%s is missing, which %s names and the store has", id, want[id]))
		} else if digest == "gone" {
			lines = append(lines, fmt.Sprintf("%s could not be fetched, which %s names and the store has", id, want[id]))
		}
	}
	for _, id := range slices.Sorted(maps.Keys(f.kept)) {
		if want[id] == "" && f.kept[id] != "gone" && !also(id) {
			lines = append(lines, id+" is kept, though no row that the client sees names it")
		}
	}
	if lines == nil {
		return nil
	}
	return fmt.Errorf("%w: files at %d:\n    %s", errDiffers, f.since, strings.Join(lines[:min(len(lines), shownDifferences)], "\n    "))
}

// refused says whether a GET tells the client that there is no such file for it, which is what a manifest must agree with.
func (c *client) refused(ctx context.Context, id string) bool {
	a, err := c.ask(ctx, http.MethodGet, "/attachments/"+id, nil, nil)
	if err != nil || a.status != http.StatusNotFound {
		return false
	}
	c.w.count("files: withheld")
	return true
}

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/walgate/walgate/blobstore"
)

// fileBytes is what every upload of an id holds in these tests, so that whoever has a file can tell whether it is the right one.
func fileBytes(id string) []byte {
	seed := sha256.Sum256([]byte(id))
	out := make([]byte, 1000+int(seed[0])*100)
	_, _ = rand.NewChaCha8(seed).Read(out) // never fails
	return out
}

// manifestAnswer is the answer to POST /attachments/manifest.
type manifestAnswer struct {
	CurrentVersion int64 `json:"current_version"`
	Operations     []struct {
		Operation    string `json:"operation"`
		AttachmentID string `json:"attachment_id"`
		Version      int64  `json:"version"`
		DownloadURL  string `json:"download_url"`
		Size         *int64 `json:"size"`
		ContentType  string `json:"content_type"`
		SHA256       string `json:"sha256"`
	} `json:"operations"`
	TotalDownloadSize int64 `json:"total_download_size"`
	OperationCount    struct {
		Download int `json:"download"`
		Delete   int `json:"delete"`
	} `json:"operation_count"`
	HasMore bool   `json:"has_more"`
	Resync  bool   `json:"full_resync_required"`
	Reason  string `json:"reason"`
}

// fileDevice keeps the files that its manifests name, as a phone would: by the answer's position, and only once a page's
// files are there.
type fileDevice struct {
	t      *testing.T
	base   string
	token  string
	sub    string
	id     string // client_id
	http   *http.Client
	since  int64
	files  map[string]string // id to the SHA-256 of what was downloaded
	limit  int               // of a page; 0: the server's
	counts map[string]int
}

func newFileDevice(t *testing.T, cfg *Config, base, sub, device string, roles []string, claims map[string]any) *fileDevice {
	t.Helper()
	token, err := signToken(cfg, sub, roles, claims, time.Hour)
	must(t, err)
	d := &fileDevice{t: t, base: base, token: token, sub: sub, id: device, http: &http.Client{Transport: &http.Transport{}}, files: map[string]string{}, counts: map[string]int{}}
	t.Cleanup(d.http.CloseIdleConnections)
	return d
}

// do makes a request; errAway is a lost connection or a retryable problem.
func (d *fileDevice) do(ctx context.Context, method, address string, body []byte, header ...string) (status int, answer []byte, err error) {
	if !strings.HasPrefix(address, "http") {
		address = d.base + address
	}
	req, err := http.NewRequestWithContext(ctx, method, address, bytes.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set("Authorization", "Bearer "+d.token)
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	res, err := d.http.Do(req)
	if err != nil {
		return 0, nil, errAway
	}
	defer res.Body.Close()
	if answer, err = io.ReadAll(res.Body); err != nil {
		return 0, nil, errAway
	}
	var p struct {
		Code      string
		Retryable bool
	}
	if res.StatusCode >= http.StatusInternalServerError && json.Unmarshal(answer, &p) == nil && p.Retryable && p.Code != "internal" {
		d.counts[p.Code]++
		return res.StatusCode, answer, errAway
	}
	return res.StatusCode, answer, nil
}

// put uploads an id's bytes.
func (d *fileDevice) put(ctx context.Context, id, query string) (status int, answer []byte, err error) {
	return d.do(ctx, http.MethodPut, "/attachments/"+id+query, fileBytes(id), "Content-Type", "image/jpeg")
}

// sync follows manifests to their end.
func (d *fileDevice) sync(ctx context.Context) error {
	for {
		m, err := d.manifest(ctx)
		if err != nil {
			return err
		}
		if m.Resync {
			d.counts["resync "+m.Reason]++
			if d.since == 0 {
				return fmt.Errorf("a manifest from 0 asks for a resync: %s", m.Reason)
			}
			d.since = 0
			continue
		}
		if err := d.apply(ctx, m); err != nil {
			return err
		}
		if !m.HasMore {
			return nil
		}
	}
}

func (d *fileDevice) manifest(ctx context.Context) (*manifestAnswer, error) {
	ask := map[string]any{"client_id": d.id, "since_version": d.since}
	if d.limit > 0 {
		ask["limit"] = d.limit
	}
	body, err := json.Marshal(ask)
	if err != nil {
		return nil, err
	}
	status, answer, err := d.do(ctx, http.MethodPost, "/attachments/manifest", body, "Content-Type", "application/json")
	if err != nil {
		return nil, err
	}
	m := &manifestAnswer{}
	if err := json.Unmarshal(answer, m); err != nil || status != http.StatusOK {
		return nil, fmt.Errorf("manifest: %d %s", status, answer)
	}
	return m, nil
}

// apply takes a page over. What it holds against the page is what every client relies on.
func (d *fileDevice) apply(ctx context.Context, m *manifestAnswer) error {
	last, total, seen := d.since, int64(0), map[string]bool{}
	kept := d.files
	if d.since == 0 { // the whole set, over all pages
		kept = map[string]string{}
	}
	downloads := 0
	for _, op := range m.Operations {
		switch {
		case op.Version < last:
			return fmt.Errorf("manifest from %d: %s at %d comes after %d", d.since, op.AttachmentID, op.Version, last)
		case seen[op.AttachmentID]:
			return fmt.Errorf("manifest from %d: %s is named twice", d.since, op.AttachmentID)
		}
		last, seen[op.AttachmentID] = op.Version, true
		if op.Operation == "delete" {
			if op.DownloadURL != "" || op.Size != nil || op.ContentType != "" {
				return fmt.Errorf("a delete of %s carries what only a download has", op.AttachmentID)
			}
			delete(kept, op.AttachmentID)
			d.counts["delete"]++
			continue
		}
		downloads++
		total += *op.Size
		if have, ok := d.files[op.AttachmentID]; ok && have == op.SHA256 {
			kept[op.AttachmentID] = have
			d.counts["kept"]++
			continue
		}
		if err := d.download(ctx, kept, op.AttachmentID, op.DownloadURL, op.SHA256, *op.Size); err != nil {
			return err
		}
	}
	if downloads != m.OperationCount.Download || len(m.Operations)-downloads != m.OperationCount.Delete || total != m.TotalDownloadSize {
		return fmt.Errorf("manifest: %d downloads of %d bytes and %d deletes are counted as %+v of %d", downloads, total, len(m.Operations)-downloads, m.OperationCount, m.TotalDownloadSize)
	}
	if m.CurrentVersion < last || m.HasMore && m.CurrentVersion <= d.since {
		return fmt.Errorf("a manifest from %d to %d says that it ends at %d, more %t", d.since, last, m.CurrentVersion, m.HasMore)
	}
	d.files, d.since = kept, m.CurrentVersion
	return nil
}

// download fetches one file. One that is gone by now is deleted by a later operation.
func (d *fileDevice) download(ctx context.Context, into map[string]string, id, address, digest string, size int64) error {
	status, body, err := d.do(ctx, http.MethodGet, address, nil)
	if err != nil {
		return err
	}
	d.counts["download"]++
	switch status {
	case http.StatusOK:
	case http.StatusNotFound, http.StatusGone:
		d.counts["gone before it was fetched"]++
		into[id] = "gone"
		return nil
	default:
		return fmt.Errorf("download of %s: %d %.300s", id, status, body)
	}
	sum := sha256.Sum256(body)
	if got := hex.EncodeToString(sum[:]); got != digest || int64(len(body)) != size || !bytes.Equal(body, fileBytes(id)) {
		return fmt.Errorf("%s came with %d bytes, %s; the manifest says %d, %s; it should be %d", id, len(body), got, size, digest, len(fileBytes(id)))
	}
	into[id] = digest
	return nil
}

// has is the sorted list of what the device holds.
func (d *fileDevice) has() []string {
	var out []string
	for id := range d.files {
		out = append(out, id)
	}
	slices.Sort(out)
	return out
}

// push sends one change and returns its outcome.
func (d *fileDevice) push(ctx context.Context, change pushChange) (pushResult, error) {
	body, err := json.Marshal(map[string]any{"client_id": d.id, "changes": []pushChange{change}})
	if err != nil {
		return pushResult{}, err
	}
	status, text, err := d.do(ctx, http.MethodPost, pushPath, body, "Content-Type", "application/json")
	if err != nil {
		return pushResult{}, err
	}
	answer, err := parsePush(status, text)
	if err != nil || len(answer.Results) != 1 {
		return pushResult{}, errors.Join(err, fmt.Errorf("push: %d %s", status, text))
	}
	return answer.Results[0], nil
}

// storedObjects are the objects in a directory that a file:// store keeps, but for the one that says whose it is.
func storedObjects(t *testing.T, dir string) (names []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, entry os.DirEntry, err error) error {
		if errors.Is(err, os.ErrNotExist) {
			return nil // went meanwhile
		}
		if err == nil && !entry.IsDir() && entry.Name() != blobstore.OwnerKey {
			names = append(names, strings.TrimPrefix(path, dir))
		}
		return err
	})
	must(t, err)
	return names
}

// fileURL is the store's URL for a directory.
func fileURL(dir string) string {
	return (&url.URL{Scheme: "file", Path: filepath.ToSlash(dir)}).String()
}

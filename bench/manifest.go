package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

// newOperations is how many of all operations a client has not seen.
const newOperations = 10_000

// filesSQL says of the rows from one number to another that their attachments are there, as uploads would: the state, and for
// what comes later the events.
const (
	filesSQL  = `INSERT INTO walgate.files (attachment_id, event_id, state, storage_key, size, content_type, sha256, subject) SELECT id::text, 0, 'u', 'walgate/00/' || md5(id::text), 1000, 'image/jpeg', sha256(id::text::bytea), '1' FROM items`
	eventsSQL = `WITH fresh AS (INSERT INTO items (owner, title, body) SELECT 0, 'photo', '' FROM generate_series(1, %d) RETURNING id)
		INSERT INTO walgate.attachments (attachment_id, event, size, content_type, sha256, subject) SELECT id::text, 'u', 1000, 'image/jpeg', sha256(id::text::bytea), '1' FROM fresh`
)

// runManifest lets one caller see a million attachments, and asks for the ten thousand that came last.
func runManifest(ctx context.Context, b *bench) (results []result, err error) {
	d, err := b.newDatabase(ctx, referring)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	if err := d.dropSlot(ctx, d.bareSlot()); err != nil {
		return nil, err
	}
	n := b.of(1_000_000)
	for _, sql := range []string{fmt.Sprintf(rowsSQL, 1, 1, n), filesSQL, `SELECT pg_replication_slot_advance('` + d.name + `', pg_current_wal_lsn())`} {
		if _, err := d.Exec(ctx, sql); err != nil { // all of one owner: 0
			return nil, err
		}
	}
	began := time.Now()
	if err := d.caughtUp(ctx); err != nil {
		return nil, err
	}
	if err := d.operations(ctx, n); err != nil {
		return nil, err
	}
	filled := time.Since(began)
	if _, err := d.Exec(ctx, `INSERT INTO items (owner, title, body) SELECT 0, 'no photo', '' FROM generate_series(1, 20)`); err != nil { // versions without operations
		return nil, err
	}
	target, err := d.mark(ctx)
	if err != nil {
		return nil, err
	}
	if _, err := d.gateway.logged(ctx, target); err != nil {
		return nil, err
	}
	since, err := d.currentVersion(ctx)
	if err != nil {
		return nil, err
	}
	fresh := min(newOperations, n)
	if _, err := d.Exec(ctx, fmt.Sprintf(eventsSQL, fresh)); err != nil {
		return nil, err
	}
	if err := d.operations(ctx, n+fresh); err != nil {
		return nil, err
	}
	var best time.Duration
	var size int
	for i := range 7 {
		i %= 18 // the position differs each time, so that no answer is kept from the time before
		m, err := d.manifest(ctx, since-int64(i), fresh)
		if err != nil {
			return nil, err
		}
		if best == 0 || m.took < best {
			best = m.took
		}
		if m.operations != fresh {
			return nil, fmt.Errorf("the manifest has %d operations instead of %d", m.operations, fresh)
		}
		size = m.size
	}
	asked := time.Now()
	const polls = 1000
	current, err := d.currentVersion(ctx)
	if err != nil {
		return nil, err
	}
	for range polls {
		if m, err := d.manifest(ctx, current, fresh); err != nil {
			return nil, err
		} else if m.operations != 0 {
			return nil, fmt.Errorf("a poll brings %d operations", m.operations)
		}
	}
	idle := time.Since(asked)
	return []result{
		{name: "10,000 operations of a million", walgate: milliseconds(best), unit: "ms", less: true, wanted: 50, note: fmt.Sprintf("%d of %d, %.1f MB of JSON, at the client", fresh, n+fresh, float64(size)/1e6)},
		{name: "polls without news", walgate: polls / idle.Seconds(), unit: "/s", note: "by one client"},
		{name: "existing rows, and as many files, looked through", walgate: float64(n) / filled.Seconds(), unit: "/s", note: fmt.Sprintf("%d of each in %.1f s", n, filled.Seconds())},
	}, nil
}

// operations waits until nothing is being filled in and the log has all that is committed; then it must hold so many downloads.
func (d *database) operations(ctx context.Context, want int) error {
	err := until(ctx, func() (filled bool, err error) {
		if err := d.gateway.alive(); err != nil {
			return false, err
		}
		err = d.QueryRow(ctx, `SELECT coalesce(bool_and(swept), false) FROM walgate.attachment_fills`).Scan(&filled)
		return filled, err
	})
	if err != nil {
		return err
	}
	target, err := d.mark(ctx)
	if err != nil {
		return err
	}
	if _, err := d.gateway.logged(ctx, target); err != nil {
		return err
	}
	var have int
	if err := d.QueryRow(ctx, `SELECT count(*) FROM walgate.attachment_operations WHERE op = 'u'`).Scan(&have); err != nil {
		return err
	}
	if have != want {
		return fmt.Errorf("the log holds %d downloads instead of %d", have, want)
	}
	return nil
}

// currentVersion is the version at which a manifest ends now.
func (d *database) currentVersion(ctx context.Context) (version int64, err error) {
	err = d.QueryRow(ctx, `SELECT version FROM walgate.checkpoint`).Scan(&version)
	return version, err
}

// answered is a manifest, and how long it took to its last byte.
type answered struct {
	operations, size int
	took             time.Duration
}

// manifest asks for what is new since a version.
func (d *database) manifest(ctx context.Context, since int64, limit int) (a answered, err error) {
	body := fmt.Sprintf(`{"client_id":"bench","since_version":%d,"limit":%d}`, since, limit)
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, d.gateway.base+"/attachments/manifest", strings.NewReader(body))
	if err != nil {
		return a, err
	}
	request.Header.Set("Authorization", "Bearer "+token("0"))
	request.Header.Set("Content-Type", "application/json")
	began := time.Now()
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return a, err
	}
	text, err := io.ReadAll(response.Body)
	a.took, a.size = time.Since(began), len(text)
	if err := errors.Join(err, response.Body.Close()); err != nil {
		return a, err
	}
	var answer struct {
		Operations []json.RawMessage `json:"operations"`
		HasMore    bool              `json:"has_more"`
	}
	if err := json.Unmarshal(text, &answer); err != nil || response.StatusCode != http.StatusOK || answer.HasMore {
		return a, errors.Join(err, fmt.Errorf("POST /attachments/manifest: %s, more %t", response.Status, answer.HasMore))
	}
	a.operations = len(answer.Operations)
	return a, nil
}

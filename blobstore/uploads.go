package blobstore

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// Kinds of uploads.
const (
	Put    = "put"    // one request
	Tus    = "tus"    // in parts, which survive a cut
	Direct = "direct" // by a signed URL to the store
	gone   = "gone"   // its objects are to be deleted
)

// Reservation is what an upload begins with.
type Reservation struct {
	Kind         string // Put, Tus or Direct
	AttachmentID string
	Subject      string
	ClientID     *string // nil: not private to a device
	Length       int64   // -1: not said; Grow as bytes come
	ContentType  string
	Filename     string
	SHA256       []byte // that the bytes should have; nil: not said
}

// Upload is one under way.
type Upload struct {
	Reservation
	ID         string // a UUID
	StorageKey string
	Received   int64   // of kind Tus
	Parts      []int64 // of kind Tus, as in File
	Hash       []byte  // of kind Tus: marshalled state of the SHA-256 over what was received
	Reserved   int64   // bytes of the subject's quota
	CreatedAt  time.Time
	ExpiresAt  time.Time
	Published  bool // it has become a file
}

// newUploadID returns the id of a new upload, a UUID.
func newUploadID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return uuidText(b[:])
}

func uuidText(b []byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// uploadKey is the storage key of an upload, and of the file that it becomes: so one is found by the other's id. ok is false
// for what is no id.
func uploadKey(id string) (key string, ok bool) {
	b, err := hex.DecodeString(strings.ReplaceAll(id, "-", ""))
	if err != nil || len(b) != 16 || uuidText(b) != id {
		return "", false
	}
	return keyNamed(hex.EncodeToString(b)), true
}

const uploadColumns = `id::text, kind, attachment_id, subject, client_id, storage_key, coalesce(length, -1), received, parts, hash, content_type, filename, sha256, reserved, created_at, expires_at`

func scanUpload(row pgx.CollectableRow) (*Upload, error) {
	u := &Upload{}
	return u, row.Scan(&u.ID, &u.Kind, &u.AttachmentID, &u.Subject, &u.ClientID, &u.StorageKey, &u.Length, &u.Received, &u.Parts, &u.Hash, &u.ContentType, &u.Filename, &u.SHA256, &u.Reserved, &u.CreatedAt, &u.ExpiresAt)
}

// inTransaction runs f in one transaction of the source.
func (r *Records) inTransaction(ctx context.Context, what string, f func(tx pgx.Tx) error) error {
	if err := pgx.BeginTxFunc(ctx, r.pool, pgx.TxOptions{IsoLevel: pgx.ReadCommitted, AccessMode: pgx.ReadWrite}, f); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// Reserve begins an upload: it has a storage key, and its length is reserved of the subject's quota. ErrQuota where that doesn't
// allow it. End it with Publish or Release.
func (r *Records) Reserve(ctx context.Context, v Reservation) (u *Upload, err error) {
	err = r.inTransaction(ctx, "begin an upload", func(tx pgx.Tx) error {
		var parts []int64
		if v.Kind == Tus {
			parts = []int64{}
		}
		var length *int64
		if v.Length >= 0 {
			length = &v.Length
		}
		id := newUploadID()
		key, _ := uploadKey(id)
		rows, _ := tx.Query(ctx, `INSERT INTO walgate.uploads (id, kind, attachment_id, subject, client_id, storage_key, length, parts, content_type, filename, sha256, reserved, expires_at)
			VALUES ($13::text::uuid, $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, now() + $12) RETURNING `+uploadColumns,
			v.Kind, v.AttachmentID, v.Subject, v.ClientID, key, length, parts, v.ContentType, v.Filename, v.SHA256, max(v.Length, 0), r.o.UploadTTL, id)
		if u, err = pgx.CollectExactlyOneRow(rows, scanUpload); err != nil {
			return err
		}
		return r.reserve(ctx, tx, v.Subject, max(v.Length, 0))
	})
	return u, err
}

// Upload returns a subject's upload that goes on. ErrNotFound: there is none, or not of this subject. ErrGivenUp: it has expired.
func (r *Records) Upload(ctx context.Context, id, subject string) (*Upload, error) {
	if _, ok := uploadKey(id); !ok {
		return nil, fmt.Errorf("upload %q: %w", id, ErrNotFound)
	}
	rows, _ := r.pool.Query(ctx, `SELECT `+uploadColumns+` FROM walgate.uploads WHERE id = $1::text::uuid AND subject = $2`, id, subject)
	u, err := pgx.CollectExactlyOneRow(rows, scanUpload)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, fmt.Errorf("upload %s: %w", id, ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("read walgate.uploads: %w", err)
	}
	if u.Kind == gone {
		return nil, fmt.Errorf("upload %s: %w", id, ErrGivenUp)
	}
	return u, nil
}

// Finished returns a subject's upload that has become a file, by the id that the upload had. ErrNotFound: there is none, or the
// file was deleted or replaced.
func (r *Records) Finished(ctx context.Context, id, subject string) (*Upload, error) {
	key, _ := uploadKey(id)
	rows, _ := r.pool.Query(ctx, `SELECT `+fileColumns+` FROM walgate.files WHERE storage_key = $1 AND subject = $2 AND state <> 'd'`, key, subject)
	f, err := pgx.CollectExactlyOneRow(rows, scanFile)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, fmt.Errorf("upload %s: %w", id, ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("read walgate.files: %w", err)
	}
	return &Upload{Reservation: Reservation{Kind: Tus, AttachmentID: f.ID, Subject: f.Subject, ClientID: f.ClientID, Length: f.Size, ContentType: f.ContentType, Filename: f.Filename, SHA256: f.SHA256},
		ID: id, StorageKey: f.StorageKey, Parts: f.Parts, Received: f.Size, CreatedAt: f.CreatedAt, Published: true}, nil
}

// lockUpload returns the upload as it is now, locked; ErrGivenUp where it isn't there any more.
func lockUpload(ctx context.Context, tx pgx.Tx, id string) (*Upload, error) {
	rows, _ := tx.Query(ctx, `SELECT `+uploadColumns+` FROM walgate.uploads WHERE id = $1::text::uuid AND kind <> 'gone' FOR UPDATE`, id)
	u, err := pgx.CollectExactlyOneRow(rows, scanUpload)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, fmt.Errorf("upload %s: %w", id, ErrGivenUp)
	}
	return u, err
}

// Grow reserves what is missing for an upload of the given size, and a little ahead, and puts its end off. ErrQuota leaves
// everything as it was.
func (r *Records) Grow(ctx context.Context, u *Upload, size int64) error {
	return r.inTransaction(ctx, "reserve room for an upload", func(tx pgx.Tx) error {
		now, err := lockUpload(ctx, tx, u.ID)
		if err != nil {
			return err
		}
		more := max(size-now.Reserved, 0)
		if err := tx.QueryRow(ctx, `UPDATE walgate.uploads SET reserved = reserved + $2, expires_at = now() + $3 WHERE id = $1::text::uuid RETURNING expires_at`, u.ID, more, r.o.UploadTTL).Scan(&u.ExpiresAt); err != nil {
			return err
		}
		if err := r.reserve(ctx, tx, u.Subject, more); err != nil {
			return err
		}
		u.Reserved = now.Reserved + more
		return nil
	})
}

// BeginPart returns the number of the next part and the key to write it at. Each attempt has a number and a key of its own, so
// that two of them never write to one object; those that don't come to AddPart stay in the list with size 0. ErrGivenUp where
// there are too many: each is a row written anew, and an object to delete one day.
func (r *Records) BeginPart(ctx context.Context, u *Upload) (part int, key string, err error) {
	err = r.inTransaction(ctx, "begin a part", func(tx pgx.Tx) error {
		now, err := lockUpload(ctx, tx, u.ID)
		if err != nil {
			return err
		}
		if len(now.Parts) >= mostParts {
			return fmt.Errorf("upload %s has %d parts: %w", u.ID, mostParts, ErrGivenUp)
		}
		part, key = len(now.Parts), PartKey(now.StorageKey, len(now.Parts))
		return tx.QueryRow(ctx, `UPDATE walgate.uploads SET parts = parts || 0::bigint, expires_at = now() + $2 WHERE id = $1::text::uuid RETURNING parts, expires_at`, u.ID, r.o.UploadTTL).Scan(&u.Parts, &u.ExpiresAt)
	})
	return part, key, err
}

// AddPart adds a part that was written to what was received; hash is the state of the SHA-256 over all of it. ErrOffset where
// the upload isn't at this offset: another request has added a part meanwhile; the part's object should then be deleted.
func (r *Records) AddPart(ctx context.Context, u *Upload, part int, offset, size int64, hash []byte) error {
	return r.inTransaction(ctx, "add a part", func(tx pgx.Tx) error {
		now, err := lockUpload(ctx, tx, u.ID)
		if err != nil {
			return err
		}
		if now.Received != offset || part >= len(now.Parts) || now.Parts[part] != 0 {
			return fmt.Errorf("upload %s is at %d, not at %d: %w", u.ID, now.Received, offset, ErrOffset)
		}
		rows, _ := tx.Query(ctx, `UPDATE walgate.uploads SET received = received + $3, parts[$2 + 1] = $3, hash = $4, expires_at = now() + $5 WHERE id = $1::text::uuid RETURNING `+uploadColumns, u.ID, part, size, hash, r.o.UploadTTL)
		if now, err = pgx.CollectExactlyOneRow(rows, scanUpload); err == nil {
			*u = *now
		}
		return err
	})
}

// SetLength says how long an upload will be that hadn't said so, and reserves that. ErrQuota leaves everything as it was.
func (r *Records) SetLength(ctx context.Context, u *Upload, length int64) error {
	return r.inTransaction(ctx, "set an upload's length", func(tx pgx.Tx) error {
		now, err := lockUpload(ctx, tx, u.ID)
		if err != nil {
			return err
		}
		if now.Length >= 0 && now.Length != length || length < now.Received {
			return fmt.Errorf("upload %s: %w", u.ID, ErrOffset)
		}
		more := max(length-now.Reserved, 0)
		if _, err := tx.Exec(ctx, `UPDATE walgate.uploads SET length = $2, reserved = reserved + $3 WHERE id = $1::text::uuid`, u.ID, length, more); err != nil {
			return err
		}
		if err := r.reserve(ctx, tx, u.Subject, more); err != nil {
			return err
		}
		u.Length, u.Reserved = length, now.Reserved+more
		return nil
	})
}

// Release gives up an upload that wasn't published: its objects are deleted and what it reserved is free. What fails is done by
// Expire later. It does nothing to what Publish has published. The context may have ended.
func (r *Records) Release(ctx context.Context, s *Store, u *Upload) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	tag, err := r.pool.Exec(ctx, `UPDATE walgate.uploads SET kind = 'gone', expires_at = now() WHERE id = $1::text::uuid`, u.ID)
	if err != nil || tag.RowsAffected() == 0 {
		return err
	}
	return r.discard(ctx, s, u.ID)
}

// expireBatch bounds what Expire does at once.
const expireBatch = 100

// Expire gives up uploads that have come to no end in their time, and deletes what others have left; more says that there may be
// more.
func (r *Records) Expire(ctx context.Context, s *Store) (n int, bytes int64, more bool, err error) {
	rows, _ := r.pool.Query(ctx, `UPDATE walgate.uploads SET kind = 'gone' WHERE id = ANY (ARRAY(SELECT id FROM walgate.uploads WHERE expires_at < now() ORDER BY expires_at LIMIT $1 FOR UPDATE SKIP LOCKED)) RETURNING id::text, greatest(received, reserved)`, expireBatch)
	type expired struct {
		ID    string
		Bytes int64
	}
	list, err := pgx.CollectRows(rows, pgx.RowToStructByPos[expired])
	if err != nil {
		return 0, 0, false, fmt.Errorf("find expired uploads: %w", err)
	}
	var failed []error
	for _, e := range list {
		if err := r.discard(ctx, s, e.ID); err != nil {
			failed = append(failed, err)
			continue
		}
		n, bytes = n+1, bytes+e.Bytes
	}
	return n, bytes, len(list) == expireBatch && len(failed) == 0, errors.Join(failed...)
}

// discard deletes the objects of an upload of kind gone, then its row. Nobody adds to it any more.
func (r *Records) discard(ctx context.Context, s *Store, id string) error {
	rows, _ := r.pool.Query(ctx, `SELECT `+uploadColumns+` FROM walgate.uploads WHERE id = $1::text::uuid AND kind = 'gone'`, id)
	u, err := pgx.CollectExactlyOneRow(rows, scanUpload)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil // somebody else has done it
	}
	if err != nil {
		return fmt.Errorf("read walgate.uploads: %w", err)
	}
	keys := []string{u.StorageKey}
	for i := range u.Parts { // of those of size 0 too: one may have come and not been added
		keys = append(keys, PartKey(u.StorageKey, i))
	}
	for _, key := range keys {
		if err := s.Delete(ctx, key); err != nil {
			return err
		}
	}
	return r.inTransaction(ctx, "end an upload", func(tx pgx.Tx) error {
		var reserved int64
		err := tx.QueryRow(ctx, `DELETE FROM walgate.uploads WHERE id = $1::text::uuid AND kind = 'gone' RETURNING reserved`, id).Scan(&reserved)
		if errors.Is(err, pgx.ErrNoRows) {
			return nil
		}
		if err != nil {
			return err
		}
		return changeQuotas(ctx, tx, map[string]quotaChange{u.Subject: {reserved: -reserved}})
	})
}

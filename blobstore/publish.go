package blobstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/internal/failpoint"
)

// Outcome is what became of an upload.
type Outcome int

// Outcomes of an upload.
const (
	Created  Outcome = iota // the id has a file now
	Same                    // it has one with the same bytes already
	Conflict                // it has another one
	Replaced                // the other one is replaced
)

// Publishing is an upload whose bytes are in the store.
type Publishing struct {
	Upload  *Upload
	Key     string // of the object, where it isn't the upload's StorageKey: a copy of it
	Size    int64
	SHA256  []byte
	Client  string     // marks the event as this client's; may be empty
	Scopes  [][16]byte // in which the uploader may write; nil: all
	IfMatch []byte     // digest of the file to replace; nil: none is replaced
}

// Published is what Publish or Remove committed.
type Published struct {
	PushID  int64 // walgate.pushes.id that marks the transaction; 0: nothing was written
	EventID int64
	Outcome Outcome
	File    *File // that the id has now
}

// Publish makes a file of an upload, in one transaction with the event that tells the stream. Of several uploads to one id
// exactly one is first, and the others are Same or Conflict; call Release after those (always, it does no harm).
func (r *Records) Publish(ctx context.Context, p Publishing) (done Published, err error) {
	failpoint.Here(failpoint.BytesWritten)
	err = r.inTransaction(ctx, "publish an upload", func(tx pgx.Tx) error {
		done = Published{}
		old, err := lockFile(ctx, tx, p.Upload.AttachmentID)
		if err != nil && !errors.Is(err, ErrNotFound) {
			return err
		}
		u, err := lockUpload(ctx, tx, p.Upload.ID)
		if err != nil {
			return err
		}
		if done.Outcome = decide(old, p); done.Outcome == Same || done.Outcome == Conflict {
			done.File = old
			if done.Outcome == Same { // as young as if it were new: its row may come yet
				if err := renew(ctx, tx, u.AttachmentID); err != nil {
					return err
				}
			}
			_, err := tx.Exec(ctx, `UPDATE walgate.uploads SET kind = 'gone', expires_at = now() WHERE id = $1::text::uuid`, u.ID)
			return err
		}
		done.File = &File{ID: u.AttachmentID, State: There, StorageKey: u.StorageKey, Parts: u.Parts, Size: p.Size, ContentType: WriteOptions{ContentType: u.ContentType}.contentType(), Filename: u.Filename,
			SHA256: p.SHA256, Subject: u.Subject, ClientID: u.ClientID, Scopes: p.Scopes}
		if p.Key != "" {
			done.File.StorageKey, done.File.Parts = p.Key, nil
		}
		if err := writeEvent(ctx, tx, done.File, There, u.Subject, p.Client, &done); err != nil {
			return err
		}
		return settleUpload(ctx, tx, u, old, done.File)
	})
	return done, err
}

// Renew makes a file as young as if it had been uploaded now: its bytes were sent again, and the row that names it may come yet. It
// returns false where the id has that file no more.
func (r *Records) Renew(ctx context.Context, f *File) (there bool, err error) {
	err = r.inTransaction(ctx, "note that a file was sent again", func(tx pgx.Tx) error {
		now, err := lockFile(ctx, tx, f.ID)
		if errors.Is(err, ErrNotFound) {
			there = false
			return nil
		}
		if err != nil {
			return err
		}
		if there = now.State == There && now.EventID == f.EventID; !there {
			return nil
		}
		return renew(ctx, tx, f.ID)
	})
	return there, err
}

func renew(ctx context.Context, tx pgx.Tx, attachmentID string) error {
	_, err := tx.Exec(ctx, `UPDATE walgate.files SET unreferenced_since = NULL WHERE attachment_id = $1`, attachmentID)
	return err
}

// lockFile takes the attachment id's lock, then looks.
func lockFile(ctx context.Context, tx pgx.Tx, attachmentID string) (*File, error) {
	b := &pgx.Batch{}
	b.Queue(`SELECT pg_advisory_xact_lock_shared($1)`, int64(LockAll))
	b.Queue(`SELECT pg_advisory_xact_lock($1)`, LockKey(attachmentID))
	if err := tx.SendBatch(ctx, b).Close(); err != nil {
		return nil, err
	}
	return findFile(ctx, tx, attachmentID, " FOR UPDATE")
}

// decide says what becomes of an upload where there is an old file, or none.
func decide(old *File, p Publishing) Outcome {
	switch {
	case old == nil || old.State == Deleted:
		if p.IfMatch != nil {
			return Conflict
		}
		return Created
	case p.IfMatch != nil && !bytes.Equal(old.SHA256, p.IfMatch):
		return Conflict
	case bytes.Equal(old.SHA256, p.SHA256) && old.State == There:
		return Same
	case bytes.Equal(old.SHA256, p.SHA256): // its bytes were lost, and are brought back
		return Created
	case p.IfMatch != nil:
		return Replaced
	}
	return Conflict
}

// writeEvent marks the transaction as a client's and tells the stream what happens to a file.
func writeEvent(ctx context.Context, tx pgx.Tx, f *File, event byte, subject, client string, done *Published) error {
	b := &pgx.Batch{}
	b.Queue(`INSERT INTO walgate.pushes (subject, client_id) VALUES ($1, $2) RETURNING id`, subject, client).QueryRow(func(row pgx.Row) error { return row.Scan(&done.PushID) })
	b.Queue(`INSERT INTO walgate.attachments (attachment_id, event, size, content_type, sha256, subject, client_id, scopes) VALUES ($1, $2, $3, $4, $5, $6, $7, $8) RETURNING id, created_at`,
		f.ID, string(event), f.Size, f.ContentType, f.SHA256, f.Subject, f.ClientID, f.Scopes).QueryRow(func(row pgx.Row) error { return row.Scan(&done.EventID, &f.CreatedAt) })
	if err := tx.SendBatch(ctx, b).Close(); err != nil {
		return fmt.Errorf("write the event: %w", err)
	}
	f.EventID = done.EventID
	return nil
}

// settleUpload writes the file's row and the quotas, and ends the upload. What becomes of the old file's objects, and of those of
// the upload that aren't the file's, is left to Expire as an upload of kind gone.
func settleUpload(ctx context.Context, tx pgx.Tx, u *Upload, old, f *File) error {
	if _, err := tx.Exec(ctx, `INSERT INTO walgate.files (attachment_id, event_id, state, storage_key, parts, size, content_type, filename, sha256, subject, client_id, scopes, created_at)
		VALUES ($1, $2, 'u', $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
		ON CONFLICT (attachment_id) DO UPDATE SET event_id = $2, state = 'u', storage_key = $3, parts = $4, size = $5, content_type = $6, filename = $7, sha256 = $8, subject = $9, client_id = $10, scopes = $11,
			created_at = $12, deleted_at = NULL, unreferenced_since = NULL, bytes_gone = false`,
		f.ID, f.EventID, f.StorageKey, f.Parts, f.Size, f.ContentType, f.Filename, f.SHA256, f.Subject, f.ClientID, f.Scopes, f.CreatedAt); err != nil {
		return fmt.Errorf("write walgate.files: %w", err)
	}
	if _, err := tx.Exec(ctx, `DELETE FROM walgate.uploads WHERE id = $1::text::uuid`, u.ID); err != nil {
		return fmt.Errorf("end the upload: %w", err)
	}
	if u.StorageKey != f.StorageKey {
		if err := leave(ctx, tx, u.AttachmentID, u.Subject, u.StorageKey, u.Parts); err != nil {
			return err
		}
	}
	changes := map[string]quotaChange{u.Subject: {used: f.Size, reserved: -u.Reserved}}
	if old != nil && !old.BytesGone {
		c := changes[old.Subject]
		c.used -= old.Size
		changes[old.Subject] = c
		if err := leave(ctx, tx, old.ID, old.Subject, old.StorageKey, old.Parts); err != nil {
			return err
		}
	}
	return changeQuotas(ctx, tx, changes)
}

// leave notes objects that nothing names any more.
func leave(ctx context.Context, tx pgx.Tx, attachmentID, subject, key string, parts []int64) error {
	if _, err := tx.Exec(ctx, `INSERT INTO walgate.uploads (id, kind, attachment_id, subject, storage_key, parts, reserved, expires_at) VALUES (gen_random_uuid(), 'gone', $1, $2, $3, $4, 0, now())`, attachmentID, subject, key, parts); err != nil {
		return fmt.Errorf("note what is to be deleted: %w", err)
	}
	return nil
}

// Removal is a client's deletion.
type Removal struct {
	AttachmentID string
	EventID      int64 // of the file that was looked at
	Subject      string
	Client       string // marks the event as this client's; may be empty
}

// Remove deletes a file: the stream is told, and care deletes its bytes. ErrNotFound where there is none, or it is deleted
// already; ErrChanged where it isn't the one that was looked at.
func (r *Records) Remove(ctx context.Context, v Removal) (done Published, err error) {
	err = r.inTransaction(ctx, "delete an attachment", func(tx pgx.Tx) error {
		done = Published{}
		f, err := lockFile(ctx, tx, v.AttachmentID)
		switch {
		case err != nil:
			return err
		case f.State == Deleted:
			return fmt.Errorf("attachment %s: %w", f.ID, ErrNotFound)
		case f.EventID != v.EventID:
			return fmt.Errorf("attachment %s: %w", f.ID, ErrChanged)
		}
		created := f.CreatedAt
		if err := writeEvent(ctx, tx, f, Deleted, v.Subject, v.Client, &done); err != nil {
			return err
		}
		f.State, f.CreatedAt, done.File = Deleted, created, f
		if _, err := tx.Exec(ctx, `UPDATE walgate.files SET event_id = $2, state = 'd', deleted_at = now(), unreferenced_since = NULL WHERE attachment_id = $1`, f.ID, f.EventID); err != nil {
			return fmt.Errorf("write walgate.files: %w", err)
		}
		return nil
	})
	return done, err
}

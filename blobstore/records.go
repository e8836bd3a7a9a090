package blobstore

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// What a record can refuse. ErrNotFound is another.
var (
	ErrQuota   = errors.New("the subject's quota doesn't allow so many bytes")
	ErrOffset  = errors.New("the upload is at another offset")
	ErrGivenUp = errors.New("the upload was given up or has expired")
	ErrChanged = errors.New("the file is not the one that was looked at any more")
)

// States of a file.
const (
	There   = 'u' // its bytes can be read
	Deleted = 'd'
	Missing = 'm' // the store has lost its bytes
)

// File is what is known of an attachment id.
type File struct {
	ID                string
	EventID           int64 // walgate.attachments.id of its latest event
	State             byte
	StorageKey        string
	Parts             []int64 // sizes; nil: one object; 0: there is no such object
	Size              int64
	ContentType       string
	Filename          string
	SHA256            []byte
	Subject           string     // of the uploader
	ClientID          *string    // nil: not private to a device
	Scopes            [][16]byte // in which the uploader may write; nil: all
	CreatedAt         time.Time
	DeletedAt         *time.Time
	UnreferencedSince *time.Time
	BytesGone         bool
}

// Objects returns the keys of the objects that hold the file's bytes.
func (f *File) Objects() []string { return partKeys(f.StorageKey, f.Parts) }

// RecordsOptions bound what subjects may keep.
type RecordsOptions struct {
	Quota     int64         // bytes of a subject; 0: no limit
	UploadTTL time.Duration // how long an upload may pause
}

// Records are what the source database knows of files, uploads and quotas. They are safe for concurrent use.
type Records struct {
	pool *pgxpool.Pool
	o    RecordsOptions
}

// NewRecords uses a pool of the source, which stays the caller's.
func NewRecords(pool *pgxpool.Pool, o RecordsOptions) *Records { return &Records{pool: pool, o: o} }

// LockKey returns the key of the advisory lock that is held, within a transaction, by whoever changes an attachment id's file,
// and shared by a push that names the id in a row. Several are locked in the order of their keys.
func LockKey(attachmentID string) int64 {
	sum := sha256.Sum256([]byte("walgate attachment\n" + attachmentID))
	return int64(binary.BigEndian.Uint64(sum[:]))
}

// LockAll is the key of the advisory lock that a push takes that names too many ids to lock each. Who changes a file holds it
// shared, and takes it first.
const LockAll = 0x77616c6766696c65 // "walgfile" in ASCII

// Querier reads from the source.
type Querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

const fileColumns = `attachment_id, event_id, state::text, storage_key, parts, size, content_type, filename, sha256, subject, client_id, scopes, created_at, deleted_at, unreferenced_since, bytes_gone`

func scanFile(row pgx.CollectableRow) (*File, error) {
	f := &File{}
	var state string
	err := row.Scan(&f.ID, &f.EventID, &state, &f.StorageKey, &f.Parts, &f.Size, &f.ContentType, &f.Filename, &f.SHA256, &f.Subject, &f.ClientID, &f.Scopes, &f.CreatedAt, &f.DeletedAt, &f.UnreferencedSince, &f.BytesGone)
	if err == nil {
		f.State = state[0]
	}
	return f, err
}

// Find returns what is known of an attachment id; ErrNotFound: nothing.
func (r *Records) Find(ctx context.Context, attachmentID string) (*File, error) {
	return findFile(ctx, r.pool, attachmentID, "")
}

// findFile is Find, with a clause to lock the row.
func findFile(ctx context.Context, q Querier, attachmentID, lock string) (*File, error) {
	rows, _ := q.Query(ctx, `SELECT `+fileColumns+` FROM walgate.files WHERE attachment_id = $1`+lock, attachmentID)
	f, err := pgx.CollectExactlyOneRow(rows, scanFile)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, fmt.Errorf("attachment %s: %w", attachmentID, ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("read walgate.files: %w", err)
	}
	return f, nil
}

package blobstore

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"strings"

	"gocloud.dev/blob/memblob"
)

// ErrOtherStore says that the blob store isn't the one in which the files are.
var ErrOtherStore = errors.New("the blob store is not the one that belongs to this database")

// OwnerKey is of the object that says to which source a store belongs.
const OwnerKey = "walgate-owner"

// ownerName is of the secret that says the same there.
const ownerName = "blob_store"

// Bind makes sure that the store belongs to this source and to no other: else a volume that isn't mounted would look like files
// that were lost, and two installations in one bucket would take each other's objects for rubbish and delete them. Where neither
// side knows an owner, it binds them. A store in memory is nobody's.
func (r *Records) Bind(ctx context.Context, s *Store) error {
	if s.scheme == memblob.Scheme {
		return nil
	}
	var ours string
	var files bool // and the store must have had its owner since
	_, err := r.pool.Exec(ctx, `INSERT INTO walgate.secrets (name, value) VALUES ($1, convert_to($2, 'UTF8')) ON CONFLICT (name) DO NOTHING`, ownerName, "new "+rand.Text())
	if err == nil {
		err = r.pool.QueryRow(ctx, `SELECT convert_from(value, 'UTF8'), EXISTS (SELECT FROM walgate.files WHERE NOT bytes_gone) FROM walgate.secrets WHERE name = $1`, ownerName).Scan(&ours, &files)
	}
	if err != nil {
		return fmt.Errorf("bind the blob store: %w", err)
	}
	ours, fresh := strings.CutPrefix(ours, "new ") // until it is in the store
	theirs, err := s.owner(ctx)
	switch {
	case err != nil:
		return fmt.Errorf("bind the blob store: %w", err)
	case theirs != "" && theirs != ours:
		return fmt.Errorf("%w: its object %s names another one; give each installation a bucket, or a folder of one as in s3://bucket?prefix=walgate-2/; if the other one is gone for good, delete that object", ErrOtherStore, OwnerKey)
	case theirs == "" && files && !fresh:
		return fmt.Errorf("%w: files were put into it, but it lacks the object %s; is its volume mounted, and blobs.url right? If it was moved, copy all of its objects; if the files are lost for good, say so with DELETE FROM walgate.secrets WHERE name = '%s'", ErrOtherStore, OwnerKey, ownerName)
	case theirs == "":
		if _, err := s.Write(ctx, OwnerKey, strings.NewReader(ours), WriteOptions{ContentType: "text/plain"}); err != nil {
			return fmt.Errorf("bind the blob store: %w", err)
		}
	}
	if fresh {
		_, err = r.pool.Exec(ctx, `UPDATE walgate.secrets SET value = convert_to($2, 'UTF8') WHERE name = $1 AND value = convert_to('new ' || $2, 'UTF8')`, ownerName, ours)
	}
	return err
}

// Unbind takes back what Bind wrote into the store, if it is still this source's.
func (r *Records) Unbind(ctx context.Context, s *Store) error {
	if s.scheme == memblob.Scheme {
		return nil
	}
	var ours string
	err := r.pool.QueryRow(ctx, `SELECT coalesce((SELECT convert_from(value, 'UTF8') FROM walgate.secrets WHERE name = $1), '')`, ownerName).Scan(&ours)
	theirs := ""
	if err == nil {
		theirs, err = s.owner(ctx)
	}
	if err == nil && theirs != "" && theirs == strings.TrimPrefix(ours, "new ") {
		err = s.Delete(ctx, OwnerKey)
	}
	if err != nil {
		return fmt.Errorf("unbind the blob store: %w", err)
	}
	return nil
}

// owner returns what the store's owner object holds; empty: there is none.
func (s *Store) owner(ctx context.Context) (string, error) {
	r, err := s.Read(ctx, OwnerKey, 0, -1)
	if errors.Is(err, ErrNotFound) {
		return "", s.accessible(ctx)
	}
	if err != nil {
		return "", err
	}
	defer r.Close()
	text, err := io.ReadAll(io.LimitReader(r, 1000))
	return string(text), err
}

package blobstore

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"cloud.google.com/go/storage"
	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"gocloud.dev/blob"
	"gocloud.dev/gcerrors"
)

// Signed is a URL that needs no token, with the headers that whoever uses it must send.
type Signed struct {
	URL     string
	Headers map[string]string
}

// SignGet returns a URL that reads one object. ErrNotSigned where the store can't.
func (s *Store) SignGet(ctx context.Context, key string, ttl time.Duration) (Signed, error) {
	return s.sign(ctx, key, &blob.SignedURLOptions{Method: http.MethodGet, Expiry: ttl})
}

// SignPut returns a URL that writes one object of the given size. ErrNotSigned where the store can't. No service binds all of
// size, type and content, and not every one keeps the URL from being used a second time: what was written must be looked at,
// after it was copied to a key that no URL names.
func (s *Store) SignPut(ctx context.Context, key string, size int64, ttl time.Duration) (Signed, error) {
	headers := map[string]string{}
	signed, err := s.sign(ctx, key, &blob.SignedURLOptions{Method: http.MethodPut, Expiry: ttl, BeforeSign: func(as func(any) bool) error {
		var put *s3.PutObjectInput
		var google *storage.SignedURLOptions
		switch {
		case as(&put):
			put.ContentLength, put.IfNoneMatch = aws.Int64(size), aws.String("*")
			headers["If-None-Match"] = "*"
		case as(&google):
			google.Headers = append(google.Headers, "x-goog-if-generation-match:0")
			headers["x-goog-if-generation-match"] = "0"
		case s.scheme == "azblob":
			headers["x-ms-blob-type"], headers["If-None-Match"] = "BlockBlob", "*"
		}
		return nil
	}})
	signed.Headers = headers
	return signed, err
}

func (s *Store) sign(ctx context.Context, key string, o *blob.SignedURLOptions) (Signed, error) {
	u, err := s.bucket.SignedURL(ctx, key, o)
	switch {
	case err == nil:
		return Signed{URL: u}, nil
	case gcerrors.Code(err) == gcerrors.Unimplemented:
		return Signed{}, fmt.Errorf("%w: %w", ErrNotSigned, err)
	case errors.Is(err, context.Canceled):
		return Signed{}, err
	}
	return Signed{}, fmt.Errorf("sign a URL of the blob store: %w", err)
}

package blobstore

import (
	"github.com/aws/aws-sdk-go-v2/feature/s3/transfermanager"
	"github.com/aws/aws-sdk-go-v2/service/s3"
)

// boundParts makes uploads to S3 take as little memory as can be, and lets go of the parts of one that is given up: by itself
// the transfer manager collects 16 MiB first, and aborts with the context that has ended, which fails.
func (s *Store) boundParts(as func(any) bool, partSize int) error {
	var manager *transfermanager.Client
	var client *s3.Client
	if !as(&manager) || !s.bucket.As(&client) {
		return nil // not S3
	}
	*manager = *transfermanager.New(client, func(o *transfermanager.Options) {
		o.PartSizeBytes, o.MultipartUploadThreshold, o.Concurrency, o.FailTimeout = int64(partSize), int64(partSize), 1, undoTimeout
		o.RequestChecksumCalculation = client.Options().RequestChecksumCalculation
	})
	return nil
}

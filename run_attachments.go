package main

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/url"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/walgate/walgate/blobstore"
	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/schema"
)

// hasAttachments says whether rows of any collection name attachments.
func (c *Config) hasAttachments() bool {
	for _, spec := range c.Collections {
		if spec.Attachments != nil {
			return true
		}
	}
	return false
}

// openBlobs opens the blob store and tries it, if any collection has attachments.
func (p *parts) openBlobs(ctx context.Context, cfg *Config, logger *slog.Logger) error {
	if !cfg.hasAttachments() {
		return nil
	}
	store, err := blobstore.Open(ctx, cfg.Blobs.URL)
	if err == nil {
		p.blobs = store
		err = store.Check(ctx)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil && p.blobs != nil && store.Scheme() != "file" { // a service that is away must not keep rows from their clients
		f := blobsFault(cfg.Blobs.URL, err)
		logger.Error("rows are synced, but uploads and downloads of attachments fail until the blob store works", "found", f.Got, "remedy", f.Hint)
	} else if err != nil {
		return FaultsError(cfg, []policies.Fault{blobsFault(cfg.Blobs.URL, err)})
	}
	if others := reachedFromElsewhere(cfg); others != "" {
		logger.Warn("http.public_url leads every device to itself, so that the download URLs of attachments work on this machine only; set it to the address at which clients reach this server", "public_url", cfg.HTTP.PublicURL, "listen", others)
	}
	if store.Scheme() == "mem" {
		logger.Warn("blobs.url is mem://: the bytes of attachments are lost when this process ends, and no other instance has them")
	}
	return nil
}

// reachedFromElsewhere returns http.listen where other machines reach it, although http.public_url names this machine; else "".
func reachedFromElsewhere(cfg *Config) string {
	public, err := url.Parse(cfg.HTTP.PublicURL)
	host, _, splitErr := net.SplitHostPort(cfg.HTTP.Listen)
	if err != nil || splitErr != nil || !loopback(public.Hostname()) || loopback(host) {
		return ""
	}
	return cfg.HTTP.Listen
}

func loopback(host string) bool {
	return host == "localhost" || net.ParseIP(host).IsLoopback()
}

// blobsFault says what to do about a blob store that can't be used.
func blobsFault(raw string, err error) policies.Fault {
	f := policies.Fault{Path: "blobs.url", Got: "a blob store that can't be used: " + err.Error(), Want: "one in which walgate can write, read and delete"}
	u, parseErr := url.Parse(raw)
	if parseErr != nil {
		return f
	}
	switch u.Scheme {
	case "file":
		f.Hint = "let the user that walgate runs as make and write the directory " + u.Path + ", or name another; several instances need one that all share"
	case "s3":
		f.Hint = "credentials are looked for as the aws command does (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, the machine's role); another service than AWS takes ?endpoint=https://HOST&region=REGION"
	case "gs":
		f.Hint = "credentials are looked for as gcloud does (GOOGLE_APPLICATION_CREDENTIALS or the machine's service account)"
	case "azblob":
		f.Hint = "the account is AZURE_STORAGE_ACCOUNT, with AZURE_STORAGE_KEY, AZURE_STORAGE_SAS_TOKEN or the machine's identity"
	}
	return f
}

// openFiles makes what serving attachments takes of the source, once walgate's tables are there.
func (p *parts) openFiles(ctx context.Context, cfg *Config) (err error) {
	if !cfg.hasAttachments() {
		return nil
	}
	p.files = blobstore.NewRecords(p.source, blobstore.RecordsOptions{Quota: int64(cfg.Limits.Quota), UploadTTL: cfg.Attachments.UploadTTL})
	if p.signingKey = []byte(cfg.Attachments.SigningKey); len(p.signingKey) == 0 {
		p.signingKey, err = schema.SigningKey(ctx, p.source)
	}
	return err
}

// bindBlobs makes sure that the blob store is the one in which the files are. One that is away is held against the source
// later, by the attachments' care.
func (p *parts) bindBlobs(ctx context.Context, cfg *Config) error {
	if p.files == nil {
		return nil
	}
	err := p.files.Bind(ctx, p.blobs)
	if !errors.Is(err, blobstore.ErrOtherStore) && p.blobs.Scheme() != "file" {
		return nil
	}
	if err != nil && ctx.Err() == nil {
		return FaultsError(cfg, []policies.Fault{{Path: "blobs.url", Got: err.Error(), Want: "the blob store of this database"}})
	}
	return err
}

// unbindBlobs leaves the blob store to whoever comes next. Its files stay.
func unbindBlobs(ctx context.Context, cfg *Config, source *pgxpool.Pool, logger *slog.Logger) {
	if !cfg.hasAttachments() {
		return
	}
	store, err := blobstore.Open(ctx, cfg.Blobs.URL)
	if err == nil {
		defer store.Close()
		err = blobstore.NewRecords(source, blobstore.RecordsOptions{}).Unbind(ctx, store)
	}
	if err != nil {
		logger.Warn("the blob store still says that it belongs to this installation; before another one uses it, delete its object "+blobstore.OwnerKey, "error", err)
	}
	logger.Info("the files of attachments stay where blobs.url says; delete them if nobody needs them")
}

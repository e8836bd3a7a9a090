package main

import (
	"bytes"
	"context"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/walgate/walgate/internal/pgserver"
	"github.com/walgate/walgate/replication"
)

// TestAttachmentsRefused: what can't name attachments is refused with the rest, each with its place and the remedy.
func TestAttachmentsRefused(t *testing.T) {
	t.Parallel()
	dsn := pgserver.ForTest(t).Database(t)
	conn := connect(t, dsn)
	resyncExec(t, conn, `CREATE TABLE tasks (id int PRIMARY KEY, owner text, photo_id text, price numeric, extra jsonb, hidden text, twice text GENERATED ALWAYS AS (photo_id) STORED);
		CREATE TABLE fine (id int PRIMARY KEY, photo_id uuid, photos varchar(20)[], extra json, notes text)`)
	path := refuseConfig(t, dsn, "", `  fine:
    table: fine
    attachments: [{column: photo_id}, {column: photos}, {column: extra, path: "$..id"}, {column: notes, pattern: 'img_\d+'}]
  tasks:
    table: tasks
    columns: {exclude: [hidden]}
    where: row.owner == claims.sub
    attachments:
      - {column: photoid}
      - {column: price}
      - {column: extra}
      - {column: extra, path: "photos"}
      - {column: twice}
      - {column: hidden}
      - {column: photo_id, pattern: "("}
`)
	requireRefused(t, path, path+`:13:|claims, in a collection with attachments|say it with scope|:15:|tasks.attachments.0.column: found photoid,|did you mean photo_id?|price, a numeric|extra, a jsonb, without a path|`+
		`did you mean $.photos?|twice, a generated column|hidden, an excluded column|missing closing )`)
	if _, err := walgate(t, "init", "--config", path); strings.Contains(err.Error(), "fine") {
		t.Errorf("what is right is refused: %v", err)
	}
}

// noDirectory is the URL of a directory that nobody can make, not even root.
func noDirectory(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return (&url.URL{Scheme: "file", Path: filepath.Join(file, "blobs")}).String()
}

// TestBlobStoreRefused: serve doesn't begin with a blob store that can't be written, and has prepared nothing by then; where no
// collection has attachments nobody looks at it, nor makes its directory.
func TestBlobStoreRefused(t *testing.T) {
	t.Parallel()
	dsn := pgserver.ForTest(t).Database(t)
	conn := connect(t, dsn)
	resyncExec(t, conn, `CREATE TABLE tasks (id int PRIMARY KEY, photo_id text)`)
	config := func(blobs, collections string) *Config {
		path := refuseConfig(t, dsn, "auto_init: true\nblobs: {url: \""+blobs+"\"}\n", collections)
		cfg, err := Load(path, os.LookupEnv)
		if err != nil {
			t.Fatal(err)
		}
		return cfg
	}
	const with, without = "  tasks: {table: tasks, attachments: [{column: photo_id}]}\n", "  tasks: {table: tasks}\n"
	cfg := config(noDirectory(t), with)
	err := serve(t.Context(), cfg, newLogger(cfg, t.Output()), nil)
	if err == nil || !strings.Contains(err.Error(), cfg.Position("blobs.url")+": blobs.url: found a blob store that can't be used") || !strings.Contains(err.Error(), "make and write the directory") {
		t.Errorf("serve: %v", err)
	}
	var made int
	if resyncScan(t, conn, []any{&made}, `SELECT (SELECT count(*) FROM pg_publication) + (SELECT count(*) FROM pg_namespace WHERE nspname = 'walgate')`); made != 0 {
		t.Error("something was prepared before the blob store was found wanting")
	}
	blobs := filepath.Join(t.TempDir(), "blobs")
	if err := os.WriteFile(filepath.Join(filepath.Dir(blobs), "walgate-probe"), nil, 0o600); err != nil { // a directory that is there, but can't take what is tried
		t.Fatal(err)
	}
	cfg = config("file://"+filepath.Dir(blobs), with)
	ctx, cancel := context.WithTimeout(t.Context(), refuseWait)
	defer cancel()
	if err := serve(ctx, cfg, newLogger(cfg, t.Output()), nil); err == nil || !strings.Contains(err.Error(), "blobs.url: found a blob store that can't be used") {
		t.Errorf("serve where nothing can be written: %v", err)
	}
	serveOnce(t, config("s3://away?endpoint=http://127.0.0.1:1&region=here&use_path_style=true&anonymous=true", with)) // rows don't wait for it
	serveOnce(t, config("file://"+blobs, without))
	if _, err := os.Stat(blobs); !os.IsNotExist(err) {
		t.Errorf("the directory that nobody needs: %v", err)
	}
	serveOnce(t, config("file://"+blobs, with))
	if _, err := os.Stat(blobs); err != nil {
		t.Error(err)
	}
}

// TestBlobStoreOfAnother: serve doesn't begin with the blob store of another installation, until that one is uninstalled.
func TestBlobStoreOfAnother(t *testing.T) {
	t.Parallel()
	blobs := "file://" + filepath.Join(t.TempDir(), "blobs")
	var configs [2]*Config
	for i := range configs {
		dsn := pgserver.ForTest(t).Database(t)
		resyncExec(t, connect(t, dsn), `CREATE TABLE tasks (id int PRIMARY KEY, photo_id text)`)
		cfg, err := Load(refuseConfig(t, dsn, "auto_init: true\nblobs: {url: \""+blobs+"\"}\n", "  tasks: {table: tasks, attachments: [{column: photo_id}]}\n"), os.LookupEnv)
		if err != nil {
			t.Fatal(err)
		}
		configs[i] = cfg
	}
	first, second := configs[0], configs[1]
	serveOnce(t, first)
	serveOnce(t, first)
	ctx, cancel := context.WithTimeout(t.Context(), refuseWait)
	defer cancel()
	err := serve(ctx, second, newLogger(second, t.Output()), nil)
	if err == nil || !strings.Contains(err.Error(), second.Position("blobs.url")+": blobs.url: found the blob store is not the one") || !strings.Contains(err.Error(), "walgate-owner") {
		t.Errorf("another's blob store: %v", err)
	}
	if err := uninstall(t.Context(), first, false, newLogger(first, t.Output())); err != nil {
		t.Fatal(err)
	}
	serveOnce(t, second)
}

// serveOnce serves until clients can connect.
func serveOnce(t *testing.T, cfg *Config) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	ready, done := make(chan string, 1), make(chan error, 1)
	go func() { done <- serve(ctx, cfg, newLogger(cfg, t.Output()), ready) }()
	select {
	case <-ready:
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	case err := <-done:
		t.Fatalf("serve ended before clients could connect: %v", err)
	}
	conn := connect(t, string(cfg.Database.URL))
	resyncExec(t, conn, `SELECT pg_drop_replication_slot('`+cfg.Replication.Slot+`')`)
}

// TestAttachmentOptions: the gateway gets what is configured, and the signing key of the source where none is.
func TestAttachmentOptions(t *testing.T) {
	t.Parallel()
	dsn := pgserver.ForTest(t).Database(t)
	conn := connect(t, dsn)
	resyncExec(t, conn, `CREATE TABLE tasks (id int PRIMARY KEY, photo_id text)`)
	const collections = "  tasks: {table: tasks, attachments: [{column: photo_id}]}\n"
	const keys = `attachments: {url_ttl: 7m, types: [image/*], replace: true, delete_roles: [keeper], upload_ttl: 3h, direct: true%s}
limits: {attachment: 3MB, quota: 5MB}
blobs: {url: "mem://"}
`
	for _, key := range []string{"", strings.Repeat("k", 32)} {
		written := ""
		if key != "" {
			written = ", signing_key: " + key
		}
		path := refuseConfig(t, dsn, strings.Replace(keys, "%s", written, 1), collections)
		if _, err := walgate(t, "init", "--config", path); err != nil {
			t.Fatal(err)
		}
		cfg, err := Load(path, os.LookupEnv)
		if err != nil {
			t.Fatal(err)
		}
		defer resyncExec(t, conn, `SELECT pg_drop_replication_slot('`+cfg.Replication.Slot+`')`)
		logger := newLogger(cfg, t.Output())
		p, err := open(t.Context(), cfg, toServe, logger)
		if err != nil {
			t.Fatal(err)
		}
		defer p.close()
		if err := p.openBlobs(t.Context(), cfg, logger); err != nil {
			t.Fatal(err)
		}
		if err := p.openFiles(t.Context(), cfg); err != nil {
			t.Fatal(err)
		}
		o := gatewayOptions(cfg, p, nil, nil, &replication.Stats{}, logger)
		want := []byte(key)
		if key == "" {
			resyncScan(t, conn, []any{&want}, `SELECT value FROM walgate.secrets WHERE name = 'signing_key'`)
		}
		if !bytes.Equal(o.AttachmentSigningKey, want) || len(want) != 32 {
			t.Errorf("signing key %q, want %q", o.AttachmentSigningKey, want)
		}
		for _, check := range [][2]any{{o.AttachmentLimit, int64(3 << 20)}, {o.Quota, int64(5 << 20)}, {o.AttachmentTypes, []string{"image/*"}}, {o.AttachmentReplace, true},
			{o.AttachmentDeleteRoles, []string{"keeper"}}, {o.AttachmentURLTTL, 7 * time.Minute}, {o.UploadTTL, 3 * time.Hour}, {o.AttachmentDirect, true}, {o.Blobs != nil && o.Files != nil, true}} {
			if !reflect.DeepEqual(check[0], check[1]) {
				t.Errorf("got %v, want %v", check[0], check[1])
			}
		}
	}
}

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/gofiber/fiber/v2"
	"golang.org/x/sync/errgroup"
)

// bareFilesCommand is the argument that makes this program the bare file server.
const bareFilesCommand = "bare-files"

const (
	largeFile  = 100 << 20
	smallFile  = 4 << 10
	smallFiles = 8 // clients at once
)

// serveBareFiles is the least that takes and serves files on the library that walgate uses: it copies a body to a file and a
// file to an answer. Nobody signs in, nothing is hashed, recorded or made durable.
func serveBareFiles(dir string) error {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	app := fiber.New(fiber.Config{DisableStartupMessage: true, StreamRequestBody: true, BodyLimit: 1 << 20})
	app.Put("/attachments/:id", func(c *fiber.Ctx) error {
		f, err := os.Create(filepath.Join(dir, filepath.Base(c.Params("id"))))
		if err != nil {
			return err
		}
		_, err = io.Copy(f, c.Context().RequestBodyStream())
		return errors.Join(err, f.Close())
	})
	app.Get("/attachments/:id", func(c *fiber.Ctx) error {
		return c.SendFile(filepath.Join(dir, filepath.Base(c.Params("id"))))
	})
	fmt.Printf("http://%s\n", listener.Addr())
	go func() {
		io.Copy(io.Discard, os.Stdin)
		listener.Close()
	}()
	if err := app.Listener(listener); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// runFiles sends and fetches one large file and many small ones.
func runFiles(ctx context.Context, b *bench) (results []result, err error) {
	d, err := b.newDatabase(ctx, scoped+writable+"    attachments: [{column: id}]\n")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	if err := d.dropSlot(ctx, d.bareSlot()); err != nil {
		return nil, err
	}
	if err := d.caughtUp(ctx); err != nil {
		return nil, err
	}
	bare, err := b.bareTransfers(ctx)
	if err != nil {
		return nil, err
	}
	d.gateway.forgetPeak()
	before := d.gateway.memory()
	ours := &transfers{base: d.gateway.base, auth: "Bearer " + token("1")}
	if err := ours.measure(ctx, b.of(10_000)); err != nil {
		return nil, err
	}
	return []result{
		{name: "upload of 100 MB", walgate: ours.up, bare: bare.up, unit: "MB/s", share: 0.5, note: "digest computed, bytes durable, recorded, echoed"},
		{name: "download of 100 MB", walgate: ours.down, bare: bare.down, unit: "MB/s", share: 0.5},
		{name: "uploads of 4 KB", walgate: ours.smallUp, bare: bare.smallUp, unit: "/s", note: fmt.Sprintf("%d by %d clients, each with its commit and its echo", b.of(10_000), smallFiles)},
		{name: "downloads of 4 KB", walgate: ours.smallDown, bare: bare.smallDown, unit: "/s", note: "each with a look at who may read it"},
		{name: "memory for it", walgate: d.gateway.peakMemory() - before, unit: "MB", less: true, wanted: 150},
	}, nil
}

// bareTransfers measures the bare server, in a process of its own.
func (b *bench) bareTransfers(ctx context.Context) (t *transfers, err error) {
	dir, err := os.MkdirTemp(b.dir, "bare-files-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	server, err := startBareServer(ctx, bareFilesCommand, dir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, server.stop()) }()
	t = &transfers{base: server.base}
	return t, t.measure(ctx, b.of(10_000))
}

// transfers is what clients of one server reach: megabytes a second of one client, small files a second of several.
type transfers struct {
	base, auth                   string
	up, down, smallUp, smallDown float64
}

func (t *transfers) measure(ctx context.Context, count int) (err error) {
	if t.up, err = t.best(ctx, http.MethodPut); err != nil {
		return err
	}
	if t.down, err = t.best(ctx, http.MethodGet); err != nil {
		return err
	}
	if t.smallUp, err = t.many(ctx, http.MethodPut, count); err != nil {
		return err
	}
	t.smallDown, err = t.many(ctx, http.MethodGet, count)
	return err
}

// largeRuns is how often the large file is moved: the disk's cache makes the first time another one.
const largeRuns = 5

// best moves the large file a few times and returns the best rate.
func (t *transfers) best(ctx context.Context, method string) (rate float64, err error) {
	client := &http.Client{Transport: &http.Transport{DisableCompression: true}}
	defer client.CloseIdleConnections()
	for i := range largeRuns {
		began := time.Now()
		if err := t.move(ctx, client, method, fmt.Sprintf("large-%d", i), largeFile); err != nil {
			return 0, err
		}
		rate = max(rate, largeFile/1e6/time.Since(began).Seconds())
	}
	return rate, nil
}

// many moves small files by several clients.
func (t *transfers) many(ctx context.Context, method string, count int) (float64, error) {
	began := time.Now()
	g, ctx := errgroup.WithContext(ctx)
	for c := range smallFiles {
		g.Go(func() error {
			client := &http.Client{Transport: &http.Transport{DisableCompression: true}}
			defer client.CloseIdleConnections()
			for i := c; i < count; i += smallFiles {
				if err := t.move(ctx, client, method, fmt.Sprintf("small-%d", i), smallFile); err != nil {
					return err
				}
			}
			return nil
		})
	}
	err := g.Wait()
	return float64(count) / time.Since(began).Seconds(), err
}

// filler is what all files hold.
var filler = bytes.Repeat([]byte("walgate's benchmark \n"), largeFile/21+1)

// move sends or fetches one file.
func (t *transfers) move(ctx context.Context, client *http.Client, method, id string, size int) error {
	var body io.Reader
	if method == http.MethodPut {
		body = bytes.NewReader(filler[:size])
	}
	request, err := http.NewRequestWithContext(ctx, method, t.base+"/attachments/"+id, body)
	if err != nil {
		return err
	}
	if t.auth != "" {
		request.Header.Set("Authorization", t.auth)
	}
	request.Header.Set("Content-Type", "image/jpeg")
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	got, err := io.Copy(io.Discard, response.Body)
	if err == nil && (response.StatusCode/100 != 2 || method == http.MethodGet && got != int64(size)) {
		err = fmt.Errorf("%s %s: %s, %d bytes", method, id, response.Status, got)
	}
	return err
}

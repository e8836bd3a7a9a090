package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	stormClients = 500
	// largeDocument makes a page end at its bytes, not at its number of changes.
	largeDocument = 100_000
	largeChanges  = 80
)

// runStorm starts walgate and lets many clients pull all that they missed as soon as it listens: once changes of the
// usual size, each client its own, and once pages full of large documents, the same for everybody.
func runStorm(ctx context.Context, b *bench) ([]result, error) {
	l, err := b.bigLog(ctx, 10*b.of(500_000))
	if err != nil {
		return nil, err
	}
	usual, err := l.storm(ctx, l.since, l.rows/owners, fmt.Sprintf("%d clients pull %d changes each after a restart, peak memory", stormClients, l.rows/owners), func(i int) string { return strconv.Itoa(1 + i) })
	if err != nil {
		return nil, err
	}
	large, err := b.largeStorm(ctx)
	return append(usual, large...), err
}

func (b *bench) largeStorm(ctx context.Context) (results []result, err error) {
	d, since, err := b.servedDatabase(ctx, open)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	_, err = d.Exec(ctx, fmt.Sprintf(`INSERT INTO items (owner, title, body)
		SELECT 1, 'large', left(repeat(md5(i::text), %d), %d) FROM generate_series(1, %d) AS i`, largeDocument/32+1, largeDocument, largeChanges))
	if err != nil {
		return nil, err
	}
	target, err := d.mark(ctx)
	if err != nil {
		return nil, err
	}
	if _, err := d.gateway.logged(ctx, target); err != nil {
		return nil, err
	}
	if err := d.gateway.stop(); err != nil {
		return nil, err
	}
	name := fmt.Sprintf("%d clients pull %d documents of %d kB after a restart, peak memory", stormClients, largeChanges, largeDocument/1000)
	return d.storm(ctx, since, largeChanges, name, func(i int) string { return strconv.Itoa(i) })
}

// storm starts walgate, serves everybody and stops it.
func (d *database) storm(ctx context.Context, since string, least int, name string, subject func(i int) string) (results []result, err error) {
	if err := d.gateway.start(ctx); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.gateway.stop()) }()
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: stormClients}}
	defer client.CloseIdleConnections()
	var refused, pages, received atomic.Int64
	g, gctx := errgroup.WithContext(ctx)
	for i := range stormClients {
		g.Go(func() error {
			at := since
			for got := 0; ; {
				p, again, err := d.stormPull(gctx, client, subject(i), at)
				if err != nil {
					return err
				}
				if again > 0 {
					refused.Add(1)
					time.Sleep(again)
					continue
				}
				pages.Add(1)
				received.Add(int64(p.bytes))
				if got += p.changes; p.HasMore {
					at = p.LastSeq
					continue
				}
				if got < least {
					return fmt.Errorf("subject %s got %d changes instead of %d", subject(i), got, least)
				}
				return nil
			}
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return []result{{name: name, walgate: d.gateway.peakMemory(), unit: "MB", less: true,
		note: fmt.Sprintf("everybody served %.1f s after the start of the process: %d pages, %.0f MB; %d requests had to come again", time.Since(d.gateway.started).Seconds(), pages.Load(), float64(received.Load())/1e6, refused.Load())}}, nil
}

type stormPage struct {
	LastSeq string `json:"last_seq"`
	HasMore bool   `json:"has_more"`
	changes int
	bytes   int
}

// stormPull asks for one page; again says after which time to ask again.
func (d *database) stormPull(ctx context.Context, client *http.Client, subject, since string) (p *stormPage, again time.Duration, err error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, d.gateway.base+"/sync/pull?since="+url.QueryEscape(since), nil)
	if err != nil {
		return nil, 0, err
	}
	request.Header.Set("Authorization", "Bearer "+token(subject))
	response, err := client.Do(request)
	if err != nil {
		if ended := d.gateway.alive(); ended != nil {
			return nil, 0, ended
		}
		return nil, 20 * time.Millisecond, ctx.Err() // not listening yet
	}
	defer response.Body.Close()
	switch response.StatusCode {
	case http.StatusOK:
	case http.StatusServiceUnavailable, http.StatusTooManyRequests:
		io.Copy(io.Discard, response.Body)
		seconds, _ := strconv.Atoi(response.Header.Get("Retry-After"))
		return nil, max(time.Duration(seconds)*time.Second, 100*time.Millisecond), nil
	default:
		text, _ := io.ReadAll(response.Body)
		return nil, 0, fmt.Errorf("pull: %s: %s", response.Status, text)
	}
	return readStormPage(response.Body)
}

// readStormPage looks at the page as it comes: five hundred of them aren't to fill this process.
func readStormPage(body io.Reader) (p *stormPage, again time.Duration, err error) {
	p = &stormPage{}
	buf, tail := make([]byte, 32<<10), []byte(nil)
	key := []byte(`"doc_id":`)
	for {
		n, err := body.Read(buf)
		p.bytes += n
		seen := append(tail, buf[:n]...)
		p.changes += bytes.Count(seen, key)
		if err == io.EOF {
			tail = seen
			break
		}
		if err != nil {
			return nil, 0, err
		}
		tail = bytes.Clone(seen[max(0, len(seen)-200):])
		p.changes -= bytes.Count(tail, key)
	}
	at := bytes.LastIndex(tail, []byte(`"last_seq":`))
	if at < 0 {
		return nil, 0, fmt.Errorf("a page without last_seq: %.300s", tail)
	}
	return p, 0, json.Unmarshal(append([]byte("{"), tail[at:]...), p)
}

package main

import (
	"bytes"
	"context"
	"crypto/md5"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"
)

// writable lets everybody who has the role write the columns that pushes name.
const writable = `    write: {roles: [editor], operations: [insert, update, delete], columns: [owner, title, body, done]}
`

// upsertOne is what a push of one change comes to, as the application would write it.
const upsertOne = `INSERT INTO items (id, owner, title, body) VALUES (md5(%[1]s::text)::uuid, %[1]s %% 1000, 'pushed ' || %[1]s, md5(%[1]s::text) || md5(%[1]s || 'b'))
	ON CONFLICT (id) DO UPDATE SET owner = excluded.owner, title = excluded.title, body = excluded.body`

// pushBatch is how many changes the larger pushes have.
const pushBatch = 50

// runPush measures clients that push, each answer with its echo from the feed, beside the same upserts by pgbench while
// walgate reads along: the commits themselves and what follows them cost the same there.
func runPush(ctx context.Context, b *bench) (results []result, err error) {
	d, err := b.newDatabase(ctx, writable)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	rows := b.of(500_000)
	if _, err := d.Exec(ctx, fmt.Sprintf(liveRowsSQL, rows)); err != nil {
		return nil, err
	}
	if err := d.dropSlot(ctx, d.bareSlot()); err != nil { // it would hold back all WAL
		return nil, err
	}
	if err := d.caughtUp(ctx); err != nil {
		return nil, err
	}
	load, err := b.newLoad(ctx, d, rows)
	if err != nil {
		return nil, err
	}
	count := b.of(60_000) / liveClients * liveClients
	bare, err := load.upserts(ctx, count)
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
	one := &pushes{d: d, rows: rows}
	alone, err := one.run(ctx, 1, max(200, count/200), 1)
	if err != nil {
		return nil, err
	}
	single, err := one.run(ctx, liveClients, count/liveClients, 1)
	if err != nil {
		return nil, err
	}
	aloneBatch, err := one.run(ctx, 1, max(50, count/800), pushBatch)
	if err != nil {
		return nil, err
	}
	batches, err := one.run(ctx, liveClients, max(20, b.of(200_000)/liveClients/pushBatch), pushBatch)
	if err != nil {
		return nil, err
	}
	note := fmt.Sprintf("%d by %d clients, each waiting for its answer; walgate took %.0f µs of CPU for each", count, liveClients, single.cpu)
	return []result{
		{name: "single changes", walgate: single.rate, bare: bare, unit: "/s", share: 0.5, note: note},
		{name: "one single change, p50", walgate: alone.p50, unit: "ms", less: true, wanted: 10, note: fmt.Sprintf("with its echo; p99 %.1f ms", alone.p99)},
		{name: "changes in pushes of 50", walgate: batches.rate, bare: bare, unit: "/s", wanted: 20_000, note: fmt.Sprintf("%d clients; walgate took %.0f µs of CPU for each change", liveClients, batches.cpu)},
		{name: "one push of 50, p50", walgate: aloneBatch.p50, unit: "ms", less: true, wanted: 50, note: fmt.Sprintf("with its echo; p99 %.1f ms", aloneBatch.p99)},
	}, nil
}

// upserts is the load with upserts in place of updates.
func (l *load) upserts(ctx context.Context, count int) (float64, error) {
	own := *l
	if l.pgbench == "" {
		return own.ownClients(ctx, count/liveClients, upsertOne)
	}
	own.script = filepath.Join(l.d.b.dir, "upsert.pgbench")
	text := fmt.Sprintf("\\set n random(1, %d)\n", l.rows) + fmt.Sprintf(upsertOne, ":n") + ";\n"
	if err := os.WriteFile(own.script, []byte(text), 0o644); err != nil {
		return 0, err
	}
	return own.run(ctx, count)
}

// pushes is a crowd of clients.
type pushes struct {
	d    *database
	rows int
}

type pushed struct{ rate, p50, p99, cpu float64 }

// run lets clients push, each so often, so many changes at a time.
func (p *pushes) run(ctx context.Context, clients, each, changes int) (out pushed, err error) {
	took := make([][]time.Duration, clients)
	before, began := p.d.gateway.cpu(), time.Now()
	g, ctx := errgroup.WithContext(ctx)
	for c := range clients {
		g.Go(func() error {
			client := &http.Client{Transport: &http.Transport{}}
			defer client.CloseIdleConnections()
			auth := "Bearer " + token(fmt.Sprint(c))
			for range each {
				start := time.Now()
				if err := p.push(ctx, client, auth, c, changes); err != nil {
					return err
				}
				took[c] = append(took[c], time.Since(start))
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return out, err
	}
	n := float64(clients * each * changes)
	all := slices.Concat(took...)
	slices.Sort(all)
	return pushed{rate: n / time.Since(began).Seconds(), p50: milliseconds(all[len(all)/2]), p99: milliseconds(all[len(all)*99/100]),
		cpu: float64((p.d.gateway.cpu() - before).Microseconds()) / n}, nil
}

// push sends changes of rows that exist, and wants every one accepted.
func (p *pushes) push(ctx context.Context, client *http.Client, auth string, who, changes int) error {
	b := fmt.Appendf(nil, `{"client_id":"bench-%d","changes":[`, who)
	for i := range changes {
		n := 1 + rand.IntN(p.rows)
		if i > 0 {
			b = append(b, ',')
		}
		b = fmt.Appendf(b, `{"collection":"items","operation":"upsert","doc_id":%q,"data":{"owner":%d,"title":"pushed %d","body":%q}}`,
			md5UUID(n), n%1000, n, md5Text(n)+md5Text(-n))
	}
	b = append(b, "]}"...)
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, p.d.gateway.base+"/sync/push", bytes.NewReader(b))
	if err != nil {
		return err
	}
	request.Header.Set("Authorization", auth)
	request.Header.Set("Content-Type", "application/json")
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		return err
	}
	var answer struct {
		Results []struct {
			Status     string  `json:"status"`
			NewVersion *string `json:"new_version"`
		} `json:"results"`
	}
	if err := json.Unmarshal(text, &answer); response.StatusCode != http.StatusOK || err != nil || len(answer.Results) != changes {
		return fmt.Errorf("POST /sync/push: %s: %.500s", response.Status, text)
	}
	for _, r := range answer.Results {
		if r.Status != "accepted" || r.NewVersion == nil {
			return fmt.Errorf("POST /sync/push: a change wasn't accepted, or has no version: %.500s", text)
		}
	}
	return nil
}

// md5UUID is md5(n::text)::uuid, and md5Text is md5(n::text).
func md5UUID(n int) string {
	t := md5Text(n)
	return t[:8] + "-" + t[8:12] + "-" + t[12:16] + "-" + t[16:20] + "-" + t[20:]
}

func md5Text(n int) string { return fmt.Sprintf("%x", md5.Sum([]byte(strconv.Itoa(n)))) }

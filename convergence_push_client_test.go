package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// pusher is a client that edits offline and pushes.
type pusher struct {
	*syncClient
	v       *pushConvergence
	rng     *rand.Rand
	queue   []*batch // edits that nobody has acknowledged
	old     []*batch // answered ones, to be sent again
	edits   int
	windows *pgx.Conn // looks at what is committed
}

// batch is one push, sent as often as it takes.
type batch struct {
	device  *pusher
	atomic  bool
	changes []pushChange
	seen    []string // what the device held of each document: its revision; empty: nothing
	history string   // of the device's cursor
	first   window   // when it was sent first
	sent    int
	answers []batchAnswer
}

// batchAnswer is an answer that arrived, and what was committed before it was asked for and when it had come.
type batchAnswer struct {
	before, after window
	got           pushAnswer
}

// run syncs, edits and pushes in random order until ctx ends.
func (p *pusher) run(ctx context.Context) {
	defer p.lookAway(ctx)
	for ; ctx.Err() == nil && !p.t.Failed(); pause(ctx, upTo(p.rng, 20*time.Millisecond)) {
		var err error
		switch n := p.rng.IntN(10); {
		case p.replica.cursor == "" || len(p.lost) > 0:
			err = p.resync(ctx)
		case n < 2:
			err = p.pullOn(ctx)
		case n == 2:
			watching, cancel := context.WithTimeout(ctx, upTo(p.rng, 400*time.Millisecond))
			err = p.follow(watching)
			cancel()
		case n == 3:
			pause(ctx, upTo(p.rng, 150*time.Millisecond))
		case n < 6 && len(p.queue) < 8:
			p.edit()
		case len(p.queue) > 0:
			limit := time.Duration(0)
			if p.rng.IntN(4) == 0 { // the answer is not waited for
				limit = time.Millisecond + upTo(p.rng, 60*time.Millisecond)
			}
			p.send(ctx, p.rng.IntN(len(p.queue)), limit)
		}
		if err != nil && ctx.Err() == nil && !errors.Is(err, errAway) {
			p.broken("%v", err)
		}
	}
}

// edit makes a batch out of what the device holds.
func (p *pusher) edit() {
	if p.replica.settles > p.replica.cursor {
		return // what it holds is newer than its cursor
	}
	b := &batch{device: p, atomic: p.rng.IntN(3) == 0, history: strings.Split(p.replica.cursor, "-")[2]}
	for range 1 + p.rng.IntN(4) {
		table := p.v.tables[p.rng.IntN(len(p.v.tables))]
		c := pushChange{Collection: table, DocID: fmt.Sprint("k", p.rng.IntN(pushDocuments)), Operation: "update"}
		if ids := slices.Sorted(maps.Keys(p.replica.documents[table])); len(ids) > 0 && p.rng.IntN(4) > 0 { // mostly one that it holds
			c.DocID = ids[p.rng.IntN(len(ids))]
		}
		if n := len(b.changes); n > 0 && p.rng.IntN(6) == 0 {
			c.Collection, c.DocID = b.changes[n-1].Collection, b.changes[n-1].DocID
		}
		p.edits++
		c.ChangeID = fmt.Sprint("c", p.edits)
		switch n := p.rng.IntN(20); {
		case n < 3:
			c.Operation = "delete"
		case n < 5 && p.replica.documents[c.Collection][c.DocID] == nil || n == 5:
			c.Operation = "insert"
		case n < 11:
			c.Operation = "upsert"
		}
		if c.Operation != "delete" {
			c.Data = map[string]any{[]string{"title", "body"}[p.rng.IntN(2)]: fmt.Sprintf("%s %s", p.device, c.ChangeID)}
			if p.rng.IntN(3) == 0 {
				c.Data["n"] = float64(p.rng.IntN(3))
			}
		}
		seen := ""
		if held, ok := p.replica.documents[c.Collection][c.DocID]; ok {
			var row struct {
				Title, Body any
				N           any
				Rev         json.Number
			}
			if err := json.Unmarshal(held, &row); err != nil {
				p.broken("a document is no JSON: %v", err)
			}
			seen = row.Rev.String()
			switch p.rng.IntN(3) {
			case 0:
				c.Base = map[string]any{"title": row.Title, "body": row.Body}
				if p.rng.IntN(2) == 0 {
					c.Base["n"] = row.N
				}
			case 1:
				c.ParentVersion = versionText(p.replica.cursor)
			}
		}
		b.changes, b.seen = append(b.changes, c), append(b.seen, seen)
	}
	p.queue = append(p.queue, b)
	p.v.ledger.add(b)
}

// send sends a batch of the queue, and says whether it was answered. At times one is sent again that had its answer.
func (p *pusher) send(ctx context.Context, i int, limit time.Duration) bool {
	b := p.queue[i]
	again := limit > 0 && len(p.old) > 0 && p.rng.IntN(3) == 0
	if again {
		b = p.old[p.rng.IntN(len(p.old))]
	}
	body, err := json.Marshal(map[string]any{"client_id": p.device, "atomic": b.atomic, "changes": b.changes})
	if err != nil {
		p.broken("%v", err)
		return false
	}
	before := p.look(ctx)
	if b.sent == 0 {
		b.first = before
	}
	b.sent++
	status, text, err := p.post(ctx, body, limit)
	if err != nil {
		p.counts["push without an answer"]++
		return false
	}
	a := batchAnswer{before: before}
	if a.got, err = parsePush(status, text); err != nil {
		p.broken("a push was answered %d %.300s: %v", status, text, err)
		return false
	}
	if status != http.StatusOK {
		if p.counts["push "+a.got.Code]++; !a.got.Retryable || a.got.Code == "internal" {
			p.broken("a push was answered %d %s", status, text)
		}
		return false
	}
	a.after = p.look(ctx)
	b.answers = append(b.answers, a)
	for _, r := range a.got.Results {
		p.counts["push "+r.String()]++
	}
	if !again {
		p.queue = slices.Delete(p.queue, i, i+1)
		p.old = append(p.old, b)
	}
	return true
}

// post sends a push and may give up waiting for its answer.
func (p *pusher) post(ctx context.Context, body []byte, limit time.Duration) (status int, text []byte, err error) {
	if limit > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, limit)
		defer cancel()
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, p.base+pushPath, bytes.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	r.Header.Set("Authorization", "Bearer "+p.token)
	r.Header.Set("Content-Type", "application/json")
	answer, err := p.http.Do(r)
	if err != nil {
		return 0, nil, err
	}
	defer answer.Body.Close()
	text, err = io.ReadAll(answer.Body)
	return answer.StatusCode, text, err
}

// window is what was committed at a time: a snapshot. The zero one is not known.
type window struct {
	known      bool
	xmin, xmax uint64
	running    []uint64
}

// look takes a window where the server is there.
func (p *pusher) look(ctx context.Context) (w window) {
	var err error
	if p.windows == nil || p.windows.IsClosed() {
		if p.windows, err = pgx.Connect(ctx, p.v.dsn); err != nil {
			p.windows = nil
			return w
		}
	}
	err = p.windows.QueryRow(ctx, `SELECT pg_snapshot_xmin(s)::text::int8, pg_snapshot_xmax(s)::text::int8, ARRAY(SELECT x::text::int8 FROM pg_snapshot_xip(s) x)
		FROM pg_current_snapshot() s`).Scan(&w.xmin, &w.xmax, &w.running)
	w.known = err == nil
	return w
}

func (p *pusher) lookAway(ctx context.Context) {
	if p.windows != nil {
		p.windows.Close(context.WithoutCancel(ctx))
		p.windows = nil
	}
}

// shows says whether a transaction that did commit had done so.
func (w window) shows(xid uint64) bool {
	return xid < w.xmax && !slices.Contains(w.running, xid)
}

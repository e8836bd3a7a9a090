package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"time"

	"github.com/walgate/walgate/changelog"
)

const (
	pullOwner   = "7"
	pullRepeats = 100
)

// pullLimit is the size of a page.
const pullLimit = 500

// bigLog is a database with a log of many rows, a thousandth of them each caller's. It is made once, for it takes long;
// its walgate runs only while something is measured.
type bigLog struct {
	*database
	rows  int
	since string // before the first of them
}

// bigLog makes the log through walgate, the only way to have it as it is.
func (b *bench) bigLog(ctx context.Context, rows int) (l *bigLog, err error) {
	if l := b.logs[rows]; l != nil {
		return l, nil
	}
	d, err := b.newDatabase(ctx, scoped)
	if err != nil {
		return nil, err
	}
	l = &bigLog{database: d, rows: rows}
	b.logs[rows] = l                                      // dropped at the end
	if err := d.dropSlot(ctx, d.bareSlot()); err != nil { // nobody reads it
		return nil, err
	}
	if err := d.caughtUp(ctx); err != nil {
		return nil, err
	}
	if l.since, err = d.gateway.anyonesPosition(ctx); err != nil {
		return nil, err
	}
	if err := d.load(ctx, 1, rows, owners); err != nil {
		return nil, err
	}
	target, err := d.mark(ctx)
	if err != nil {
		return nil, err
	}
	if _, err := d.gateway.logged(ctx, target); err != nil {
		return nil, err
	}
	return l, errors.Join(d.gateway.stop(), d.settle(ctx))
}

// runPull asks for a caller's first changes in a log where every thousandth is theirs, and in one ten times as long.
// The limit is the same rows by one prepared statement on the log's own table.
func runPull(ctx context.Context, b *bench) (results []result, err error) {
	for _, rows := range []int{b.of(500_000), 10 * b.of(500_000)} {
		l, err := b.bigLog(ctx, rows)
		if err != nil {
			return nil, err
		}
		r, err := l.measurePull(ctx, min(pullLimit, b.of(500_000)/owners))
		if err != nil {
			return nil, err
		}
		results = append(results, r...)
	}
	if first, last := results[0], results[len(results)-2]; first.walgate > 0 {
		results = append(results, result{name: "HTTP, ten times the log", walgate: last.walgate, bare: first.walgate, unit: "ms", less: true})
	}
	return results, nil
}

func (l *bigLog) measurePull(ctx context.Context, limit int) (results []result, err error) {
	if err := l.gateway.start(ctx); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, l.gateway.stop()) }()
	if err := l.gateway.ready(ctx); err != nil {
		return nil, err
	}
	scope, err := l.scope(ctx)
	if err != nil {
		return nil, err
	}
	bare, err := l.barePull(ctx, scope, limit)
	if err != nil {
		return nil, err
	}
	read, err := l.readLog(ctx, scope, limit)
	if err != nil {
		return nil, err
	}
	took, size, err := l.pull(ctx, l.since, limit)
	if err != nil {
		return nil, err
	}
	name := fmt.Sprintf("%d of a log of %d, ", limit, l.rows)
	return []result{
		{name: name + "HTTP", walgate: milliseconds(took), bare: milliseconds(bare), unit: "ms", less: true, wanted: 5, note: fmt.Sprintf("%d kB; median of %d", size/1000, pullRepeats)},
		{name: name + "the read alone", walgate: milliseconds(read), bare: milliseconds(bare), unit: "ms", less: true, note: "the log's package called without server"},
	}, nil
}

// readLog returns the median time of what walgate's server does to read the page.
func (d *database) readLog(ctx context.Context, scope [16]byte, limit int) (time.Duration, error) {
	log, err := changelog.Open(ctx, d.dsn, 2)
	if err != nil {
		return 0, err
	}
	defer log.Close()
	return medianTime(func() error {
		p, err := log.Read(ctx, changelog.Request{Scopes: [][16]byte{scope}, Limit: limit, MaxBytes: 8 << 20})
		if err == nil && len(p.Entries) != limit {
			err = fmt.Errorf("%d entries of the log instead of %d", len(p.Entries), limit)
		}
		return err
	})
}

// pull returns the median time of a page, and its size.
func (d *database) pull(ctx context.Context, since string, limit int) (took time.Duration, size int, err error) {
	path := fmt.Sprintf("/sync/pull?limit=%d&since=%s", limit, url.QueryEscape(since))
	took, err = medianTime(func() error {
		response, err := d.gateway.get(ctx, http.DefaultClient, path, pullOwner, "identity")
		if err != nil {
			return err
		}
		defer response.Body.Close()
		body, err := io.ReadAll(response.Body)
		if size = len(body); err == nil && bytes.Count(body, []byte(`"doc_id":`)) != limit {
			err = fmt.Errorf("a page of %d changes was expected: %.300s", limit, body)
		}
		return err
	})
	return took, size, err
}

// scope returns the caller's scope in the log.
func (d *database) scope(ctx context.Context) (scope [16]byte, err error) {
	err = d.QueryRow(ctx, `SELECT scope FROM walgate.changes WHERE data->>'owner' = '`+pullOwner+`' LIMIT 1`).Scan(&scope)
	return scope, err
}

// barePull returns the median time of reading the page's rows.
func (d *database) barePull(ctx context.Context, scope [16]byte, limit int) (time.Duration, error) {
	const page = `SELECT version, tx, op, doc_id, data FROM walgate.changes WHERE scope = $1 AND version > $2 ORDER BY version LIMIT $3`
	return medianTime(func() error {
		rows, err := d.Query(ctx, page, scope, 0, limit)
		if err != nil {
			return err
		}
		defer rows.Close()
		n := 0
		for ; rows.Next(); n++ {
			rows.RawValues()
		}
		if err := rows.Err(); err != nil {
			return err
		}
		if n != limit {
			return fmt.Errorf("%d rows of the log instead of %d", n, limit)
		}
		return nil
	})
}

func medianTime(do func() error) (time.Duration, error) {
	var took []time.Duration
	for range pullRepeats {
		began := time.Now()
		if err := do(); err != nil {
			return 0, err
		}
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	return took[len(took)/2], nil
}

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

	"github.com/jackc/pgx/v5/pgtype"
)

const (
	pullOwner   = "7"
	pullRepeats = 100
)

// runPull asks for a caller's first changes in a log where every thousandth is theirs, and in one ten times as long.
// The limit is the same rows by one prepared statement on the log's own table.
func runPull(ctx context.Context, b *bench) (results []result, err error) {
	d, err := b.newDatabase(ctx, scoped)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	if err := d.caughtUp(ctx); err != nil {
		return nil, err
	}
	since, err := d.gateway.position(ctx, pullOwner)
	if err != nil {
		return nil, err
	}
	limit := min(500, b.rows/owners)
	rows := 0
	for _, size := range []int{b.rows, 10 * b.rows} {
		if err := d.load(ctx, size-rows, owners); err != nil {
			return nil, err
		}
		rows = size
		target, err := d.mark(ctx)
		if err != nil {
			return nil, err
		}
		if _, err := d.gateway.logged(ctx, target); err != nil {
			return nil, err
		}
		if err := d.settle(ctx); err != nil {
			return nil, err
		}
		bare, err := d.barePull(ctx, limit)
		if err != nil {
			return nil, err
		}
		took, size, err := d.pull(ctx, since, limit)
		if err != nil {
			return nil, err
		}
		results = append(results, result{name: fmt.Sprintf("%d of a log of %d", limit, rows), walgate: milliseconds(took), bare: milliseconds(bare),
			unit: "ms", less: true, note: fmt.Sprintf("%d kB, over HTTP; median of %d", size/1000, pullRepeats)})
	}
	return results, nil
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

// barePull returns the median time of reading the page's rows.
func (d *database) barePull(ctx context.Context, limit int) (time.Duration, error) {
	var scope pgtype.UUID
	err := d.QueryRow(ctx, `SELECT scope FROM walgate.changes WHERE doc_id = (SELECT id::text FROM items WHERE owner = `+pullOwner+` LIMIT 1)`).Scan(&scope)
	if err != nil {
		return 0, err
	}
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

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/fasthttp/websocket"
)

// runHuge reports the memory that one transaction takes, made while walgate reads along.
func runHuge(ctx context.Context, b *bench) (results []result, err error) {
	d, err := b.newDatabase(ctx, scoped)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	if err := d.caughtUp(ctx); err != nil {
		return nil, err
	}
	count := b.of(2_000_000)
	began := time.Now()
	if err := d.insert(ctx, count); err != nil {
		return nil, err
	}
	committed := time.Now()
	target, err := d.mark(ctx)
	if err != nil {
		return nil, err
	}
	if _, err := d.gateway.logged(ctx, target); err != nil {
		return nil, err
	}
	return []result{{name: fmt.Sprintf("transaction of %d rows, peak memory", count), walgate: d.gateway.peakMemory(), unit: "MB", less: true, wanted: 150,
		note: fmt.Sprintf("logged %.1f s after its commit; writing it took %.1f s", time.Since(committed).Seconds(), committed.Sub(began).Seconds())}}, nil
}

const giantBytes = 50_000_000

// runGiant reports the memory that one giant row takes on each way. Each step begins with what the one before left.
func runGiant(ctx context.Context, b *bench) (results []result, err error) {
	d, since, err := b.servedDatabase(ctx, open)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	measure := func(name string, do func() error) error {
		d.gateway.forgetPeak()
		before, began := d.gateway.memory(), time.Now()
		if err := do(); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		results = append(results, result{name: name + ", peak memory", walgate: d.gateway.peakMemory(), unit: "MB", less: true,
			note: fmt.Sprintf("%.0f MB before; %.1f s", before, time.Since(began).Seconds())})
		return nil
	}
	logged := func(sql string) func() error {
		return func() error {
			if _, err := d.Exec(ctx, sql); err != nil {
				return err
			}
			target, err := d.mark(ctx)
			if err != nil {
				return err
			}
			_, err = d.gateway.logged(ctx, target)
			return err
		}
	}
	insert := fmt.Sprintf(`INSERT INTO items (owner, title, body) VALUES (1, 'giant', left(repeat(md5('a') || md5('b'), %d), %d))`, giantBytes/64+1, giantBytes)
	if err := measure("insert of 50 MB", logged(insert)); err != nil {
		return nil, err
	}
	if err := measure("update of 50 MB", logged(`UPDATE items SET done = NOT done WHERE title = 'giant'`)); err != nil {
		return nil, err
	}
	if err := measure("pull of 50 MB", func() error {
		return d.receiveGiant(ctx, "/sync/pull?since="+url.QueryEscape(since))
	}); err != nil {
		return nil, err
	}
	if err := measure("full resync of 50 MB", func() error { return d.receiveGiant(ctx, "/sync/full?limit=all") }); err != nil {
		return nil, err
	}
	if err := measure("stream of 50 MB, caught up", func() error { return d.streamGiant(ctx, since, 1, nil) }); err != nil {
		return nil, err
	}
	now, err := d.gateway.anyonesPosition(ctx)
	if err != nil {
		return nil, err
	}
	if err := measure("stream of 50 MB, live", func() error {
		return d.streamGiant(ctx, now, 1, func() error {
			_, err := d.Exec(ctx, `UPDATE items SET done = NOT done WHERE title = 'giant'`)
			return err
		})
	}); err != nil {
		return nil, err
	}
	return results, measure(fmt.Sprintf("stream of 50 MB to %d at once", giantReaders), func() error { return d.streamGiant(ctx, since, giantReaders, nil) })
}

const giantReaders = 10

// receiveGiant asks until the giant row has come.
func (d *database) receiveGiant(ctx context.Context, path string) error {
	response, err := d.gateway.get(ctx, http.DefaultClient, path, "1", "identity")
	if err != nil {
		return err
	}
	defer response.Body.Close()
	n, err := io.Copy(io.Discard, response.Body)
	if err == nil && n < giantBytes {
		err = fmt.Errorf("only %d bytes came", n)
	}
	return err
}

// streamGiant reads the giant row on so many streams, which begin with since; write makes it, if it isn't there already.
func (d *database) streamGiant(ctx context.Context, since string, readers int, write func() error) error {
	conns := make([]*websocket.Conn, readers)
	for i := range conns {
		conn, _, err := websocket.DefaultDialer.DialContext(ctx, "ws"+strings.TrimPrefix(d.gateway.base, "http")+"/sync/stream", http.Header{"Authorization": {"Bearer " + token("1")}})
		if err != nil {
			return err
		}
		defer conn.Close()
		if err := conn.WriteMessage(websocket.TextMessage, fmt.Appendf(nil, `{"type":"subscribe","since":%q}`, since)); err != nil {
			return err
		}
		conns[i] = conn
	}
	if write != nil {
		if err := untilReady(conns[0]); err != nil {
			return err
		}
		if err := write(); err != nil {
			return err
		}
	}
	done := make(chan error, readers)
	for _, conn := range conns {
		go func() { done <- readGiant(conn) }()
	}
	var err error
	for range conns {
		err = errors.Join(err, <-done)
	}
	return err
}

func untilReady(conn *websocket.Conn) error {
	for {
		_, text, err := conn.ReadMessage()
		if err != nil {
			return err
		}
		if strings.HasPrefix(string(text), `{"type":"ready"`) {
			return nil
		}
	}
}

func readGiant(conn *websocket.Conn) error {
	conn.SetReadDeadline(time.Now().Add(time.Minute))
	for {
		_, r, err := conn.NextReader()
		if err != nil {
			return err
		}
		n, err := io.Copy(io.Discard, r)
		if err != nil || n >= giantBytes {
			return err
		}
	}
}

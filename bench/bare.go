package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/jackc/pgx/v5/pgtype"
)

// bareBatch is what the bare reader's rows become: the bytes of a COPY BINARY and, where somebody listens, JSON lines.
type bareBatch struct {
	copy  []byte
	lines []byte
	rows  int
}

// barePipe is the least gateway: it reads pgoutput, writes JSON by hand, copies it into a log table with a primary key
// and one index, and then writes it to one TCP client, if there is one. It checks nothing and survives nothing.
type barePipe struct {
	dsn    string
	slot   string
	target pglogrepl.LSN // ends once it has passed; 0: when its context ends
	least  int           // rows that a COPY waits for
	client net.Conn

	mu      sync.Mutex
	changed sync.Cond
	next    *bareBatch
	done    bool

	began   time.Time
	columns []column
	rows    int
	version uint64
}

type column struct {
	key []byte // `"name":`
	raw bool   // its text is JSON already, nearly: f and t aside
	oid uint32
}

// bareLeast and bareMost are the rows that a COPY of a backlog has: more gain nothing, and reading must not wait for it.
const (
	bareLeast = 5000
	bareMost  = 20_000
)

var copyHeader = append([]byte("PGCOPY\n\xff\r\n\x00"), 0, 0, 0, 0, 0, 0, 0, 0)

// run reads until the target, and returns when everything is stored.
func (p *barePipe) run(ctx context.Context) error {
	store, err := pgx.Connect(ctx, p.dsn)
	if err != nil {
		return err
	}
	defer store.Close(context.WithoutCancel(ctx))
	_, err = store.Exec(ctx, `DROP TABLE IF EXISTS bare_log; CREATE TABLE bare_log (version bigint PRIMARY KEY, collection text NOT NULL,
		doc_id text NOT NULL, op text NOT NULL, data json); CREATE INDEX ON bare_log (collection, doc_id)`)
	if err != nil {
		return err
	}
	p.began = time.Now()
	config, err := pgconn.ParseConfig(p.dsn)
	if err != nil {
		return err
	}
	config.RuntimeParams["replication"] = "database"
	conn, err := pgconn.ConnectConfig(ctx, config)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	err = pglogrepl.StartReplication(ctx, conn, p.slot, 0, pglogrepl.StartReplicationOptions{PluginArgs: []string{"proto_version '1'", "publication_names 'bare'"}})
	if err != nil {
		return err
	}
	p.changed.L = &p.mu
	p.next = &bareBatch{}
	stored := make(chan error, 1)
	go func() { stored <- p.store(store) }()
	err = p.read(ctx, conn)
	p.mu.Lock()
	p.done = true
	p.changed.Broadcast()
	p.mu.Unlock()
	return errors.Join(err, <-stored)
}

// read takes the stream apart.
func (p *barePipe) read(ctx context.Context, conn *pgconn.PgConn) error {
	var end pglogrepl.LSN
	report := time.Now()
	for {
		if time.Since(report) > time.Second {
			report = time.Now()
			if err := pglogrepl.SendStandbyStatusUpdate(ctx, conn, pglogrepl.StandbyStatusUpdate{WALWritePosition: end}); err != nil {
				return err
			}
		}
		m, err := conn.ReceiveMessage(ctx)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		switch m := m.(type) {
		case *pgproto3.ErrorResponse:
			return pgconn.ErrorResponseToPgError(m)
		case *pgproto3.CopyData:
			if m.Data[0] != pglogrepl.XLogDataByteID {
				continue
			}
			b := m.Data[25:]
			switch b[0] {
			case 'R':
				p.describe(b)
			case 'I':
				p.row('u', b[6:])
			case 'U':
				b = b[5:]
				if b[0] != 'N' { // the old row
					b = skipTuple(b[1:])
				}
				p.row('u', b[1:])
			case 'C':
				if end = pglogrepl.LSN(binary.BigEndian.Uint64(b[10:])); p.target != 0 && end > p.target {
					return nil
				}
			}
		}
	}
}

// describe keeps the columns of the one table.
func (p *barePipe) describe(b []byte) {
	b = b[5:]
	for range 2 { // schema and table
		b = b[bytes.IndexByte(b, 0)+1:]
	}
	n := int(binary.BigEndian.Uint16(b[1:]))
	b = b[3:]
	p.columns = p.columns[:0]
	for range n {
		end := 1 + bytes.IndexByte(b[1:], 0)
		oid := binary.BigEndian.Uint32(b[end+1:])
		p.columns = append(p.columns, column{key: fmt.Appendf(nil, "%q:", b[1:end]), raw: oid == pgtype.Int4OID, oid: oid})
		b = b[end+9:]
	}
}

func skipTuple(b []byte) []byte {
	n := int(binary.BigEndian.Uint16(b))
	b = b[2:]
	for range n {
		if b[0] == 't' {
			b = b[4+binary.BigEndian.Uint32(b[1:]):]
		}
		b = b[1:]
	}
	return b
}

// row appends a row to the batch that the writer takes next.
func (p *barePipe) row(op byte, b []byte) {
	p.mu.Lock()
	for p.next.rows >= bareMost {
		p.changed.Wait()
	}
	p.rows++
	p.version++
	batch := p.next
	c := batch.copy
	if batch.rows == 0 {
		c = append(c[:0], copyHeader...)
	}
	c = append(c, 0, 5, 0, 0, 0, 8)
	c = binary.BigEndian.AppendUint64(c, p.version)
	c = append(c, 0, 0, 0, 5, 'i', 't', 'e', 'm', 's')
	id := b[7 : 7+binary.BigEndian.Uint32(b[3:])]
	c = binary.BigEndian.AppendUint32(c, uint32(len(id)))
	c = append(c, id...)
	c = append(c, 0, 0, 0, 1, op, 0, 0, 0, 0)
	at := len(c)
	c = p.document(c, b[2:])
	binary.BigEndian.PutUint32(c[at-4:], uint32(len(c)-at))
	batch.copy = c
	batch.rows++
	if p.client != nil {
		batch.lines = append(append(batch.lines, c[at:]...), '\n')
	}
	wake := batch.rows == p.least
	p.mu.Unlock()
	if wake {
		p.changed.Broadcast()
	}
}

// document appends a row as JSON.
func (p *barePipe) document(dst, b []byte) []byte {
	separator := byte('{')
	for i := range p.columns {
		col := &p.columns[i]
		dst = append(append(dst, separator), col.key...)
		separator = ','
		if b[0] != 't' {
			dst, b = append(dst, "null"...), b[1:]
			continue
		}
		n := binary.BigEndian.Uint32(b[1:])
		value := b[5 : 5+n]
		b = b[5+n:]
		switch {
		case col.raw:
			dst = append(dst, value...)
		case col.oid == pgtype.BoolOID && value[0] == 't':
			dst = append(dst, "true"...)
		case col.oid == pgtype.BoolOID:
			dst = append(dst, "false"...)
		default:
			dst = appendQuoted(dst, value)
		}
	}
	return append(dst, '}')
}

func appendQuoted(dst, s []byte) []byte {
	dst = append(dst, '"')
	from := 0
	for i, c := range s {
		if c >= ' ' && c != '"' && c != '\\' {
			continue
		}
		dst = append(dst, s[from:i]...)
		if c < ' ' {
			dst = fmt.Appendf(dst, `\u%04x`, c)
		} else {
			dst = append(dst, '\\', c)
		}
		from = i + 1
	}
	return append(append(dst, s[from:]...), '"')
}

// store copies what has come, a batch at a time, and passes it on to the client.
func (p *barePipe) store(conn *pgx.Conn) error {
	spare := &bareBatch{}
	for {
		p.mu.Lock()
		for p.next.rows < p.least && !p.done {
			p.changed.Wait()
		}
		batch := p.next
		p.next, spare = spare, batch
		p.mu.Unlock()
		p.changed.Broadcast()
		if batch.rows == 0 {
			return nil
		}
		batch.copy = append(batch.copy, 0xff, 0xff)
		// Not the pipe's context: what was read is stored.
		_, err := conn.PgConn().CopyFrom(context.Background(), bytes.NewReader(batch.copy), "COPY bare_log FROM STDIN BINARY")
		if err == nil && p.client != nil {
			_, err = p.client.Write(batch.lines)
		}
		if err != nil {
			return err
		}
		batch.copy, batch.lines, batch.rows = batch.copy[:0], batch.lines[:0], 0
	}
}

package replication

import (
	"encoding/binary"
	"encoding/hex"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/jackc/pglogrepl"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/schema"
)

var update = flag.Bool("update", false, "write the recorded stream and the golden files anew")

const recording = "testdata/pgoutput.hex"

// recordedSQL makes every kind of message that version 1 of the protocol has.
const recordedSQL = `CREATE TYPE mood AS ENUM ('sad', 'ok');
CREATE TABLE full_row (id int PRIMARY KEY, m mood, body text, "odd ""name" numeric(10,2));
ALTER TABLE full_row REPLICA IDENTITY FULL;
ALTER TABLE full_row ALTER body SET STORAGE EXTERNAL;
CREATE TABLE key_only (a int, b text, body text, PRIMARY KEY (a, b));
ALTER TABLE key_only ALTER body SET STORAGE EXTERNAL;
CREATE PUBLICATION p FOR TABLE full_row, key_only;
SELECT pg_create_logical_replication_slot($1, 'pgoutput');
SELECT pg_replication_origin_create($1);
SELECT pg_replication_origin_session_setup($1);
INSERT INTO full_row VALUES (1, 'ok', repeat('x', 3000), 1.50), (2, NULL, '', NULL);
UPDATE full_row SET m = 'sad' WHERE id = 1;
UPDATE full_row SET id = 3 WHERE id = 2;
DELETE FROM full_row WHERE id = 3;
INSERT INTO key_only VALUES (1, 'é', repeat('y', 3000));
UPDATE key_only SET a = 2;
UPDATE key_only SET body = 'short';
DELETE FROM key_only;
SELECT pg_logical_emit_message(true, 'walgate', 'transactional');
SELECT pg_logical_emit_message(false, 'other', 'not');
TRUNCATE full_row, key_only RESTART IDENTITY CASCADE;
SELECT pg_replication_origin_session_reset();
SELECT pg_replication_origin_drop($1)`

// record reads what PostgreSQL sends for recordedSQL.
func record(t testing.TB, s *source, slot string) [][]byte {
	t.Helper()
	for _, sql := range strings.Split(recordedSQL, ";\n") {
		s.exec(strings.ReplaceAll(sql, "$1", "'"+slot+"'"))
	}
	rows, err := s.conn.Query(t.Context(), `SELECT data FROM pg_logical_slot_get_binary_changes($1, NULL, NULL, 'proto_version', '1', 'publication_names', 'p', 'messages', 'true')`, slot)
	s.ok(err)
	var out [][]byte
	for rows.Next() {
		var b []byte
		s.ok(rows.Scan(&b))
		out = append(out, b)
	}
	s.ok(rows.Err())
	return out
}

// recorded returns the committed stream.
func recorded(t testing.TB) (out [][]byte) {
	t.Helper()
	for line := range strings.FieldsSeq(readFile(t, recording)) {
		b, err := hex.DecodeString(line)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, b)
	}
	return out
}

// show writes a decoded message as text, without what differs from run to run.
func show(m *message) string {
	row := func(r schema.Row) string {
		if r == nil {
			return "-"
		}
		out := []string{}
		for _, v := range r {
			switch {
			case v == nil:
				out = append(out, "null")
			case isUnchanged(v):
				out = append(out, "unchanged")
			case len(v) > 40:
				out = append(out, fmt.Sprintf("%q… %d bytes", v[:3], len(v)))
			default:
				out = append(out, fmt.Sprintf("%q", v))
			}
		}
		return "(" + strings.Join(out, ", ") + ")"
	}
	switch m.kind {
	case msgBegin:
		return fmt.Sprintf("begin at %v xid %v time %v", m.begins != 0, m.xid != 0, m.commit.Year())
	case msgCommit:
		return fmt.Sprintf("commit end %v", m.end != 0)
	case msgRelation:
		text := fmt.Sprintf("relation %s.%s identity %c", m.rel.schema, m.rel.name, m.rel.identity)
		for _, c := range m.rel.columns {
			typ := fmt.Sprint(c.typ)
			if c.typ >= 16384 {
				typ = "own"
			}
			text += fmt.Sprintf(" [%q %s %d %v]", c.name, typ, c.typmod, c.flagged)
		}
		return text
	case msgInsert, msgUpdate, msgDelete:
		kind := "none"
		if m.oldKind != 0 {
			kind = string(m.oldKind)
		}
		return fmt.Sprintf("%c old %s %s new %s", m.kind, kind, row(m.old), row(m.new))
	case msgTruncate:
		return fmt.Sprintf("truncate %d", len(m.relations))
	case msgMessage:
		return fmt.Sprintf("message %q", m.prefix)
	}
	return fmt.Sprintf("%c", m.kind)
}

// TestDecodeGolden decodes a recorded stream of a real server, which holds every kind of message.
func TestDecodeGolden(t *testing.T) {
	t.Parallel()
	if *update {
		s := newSourceConn(t, newDatabase(t))
		var lines strings.Builder
		for _, b := range record(t, s, fmt.Sprintf("record_%d", os.Getpid())) {
			fmt.Fprintf(&lines, "%x\n", b)
		}
		s.ok(os.MkdirAll(filepath.Dir(recording), 0o755))
		s.ok(os.WriteFile(recording, []byte(lines.String()), 0o644))
	}
	kinds := map[byte]bool{}
	var got strings.Builder
	var m message
	for _, b := range recorded(t) {
		if err := m.decode(b); err != nil {
			t.Fatalf("%x: %v", b, err)
		}
		kinds[m.kind] = true
		fmt.Fprintln(&got, show(&m))
	}
	for _, k := range "BCORYIUDTM" {
		if !kinds[byte(k)] {
			t.Errorf("the recording has no message %c", k)
		}
	}
	const golden = "testdata/pgoutput.golden"
	if *update {
		if err := os.WriteFile(golden, []byte(got.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if want := readFile(t, golden); got.String() != want {
		t.Errorf("decoded:\n%s\nwant:\n%s", got.String(), want)
	}
}

// TestDecodeCutShort: a message that ends anywhere too early is an error, never a panic and never half a row.
func TestDecodeCutShort(t *testing.T) {
	t.Parallel()
	var m message
	for _, b := range recorded(t) {
		if k := b[0]; k == msgOrigin || k == msgType {
			continue // nothing of them is read
		}
		for n := range b {
			if err := m.decode(b[:n]); err == nil && !(b[0] == msgMessage && n > 14) {
				t.Fatalf("%d of %d bytes of a message %c were accepted", n, len(b), b[0])
			}
		}
	}
}

// TestDecodeAgreesWithPglogrepl holds the decoder against the library's on a stream that this server sends now.
func TestDecodeAgreesWithPglogrepl(t *testing.T) {
	t.Parallel()
	s := newSourceConn(t, newDatabase(t))
	live := record(t, s, fmt.Sprintf("compare_%d", os.Getpid()))
	if len(live) < 30 {
		t.Fatalf("only %d messages", len(live))
	}
	var m message
	for _, b := range append(live, recorded(t)...) {
		theirs, err := pglogrepl.Parse(b)
		if err != nil {
			t.Fatal(err)
		}
		if err := m.decode(b); err != nil {
			t.Fatal(err)
		}
		compareMessages(t, &m, theirs)
	}
}

func compareMessages(t *testing.T, m *message, theirs pglogrepl.Message) {
	t.Helper()
	same := true
	switch x := theirs.(type) {
	case *pglogrepl.BeginMessage:
		same = m.begins == changelog.LSN(x.FinalLSN) && m.commit.Equal(x.CommitTime) && m.xid == x.Xid
	case *pglogrepl.CommitMessage:
		same = m.end == changelog.LSN(x.TransactionEndLSN)
	case *pglogrepl.RelationMessage:
		same = m.rel.oid == x.RelationID && m.rel.schema == x.Namespace && m.rel.name == x.RelationName && m.rel.identity == x.ReplicaIdentity && len(m.rel.columns) == len(x.Columns)
		for i, c := range x.Columns {
			o := m.rel.columns[i]
			same = same && o.name == c.Name && o.typ == c.DataType && o.typmod == c.TypeModifier && o.flagged == (c.Flags == 1)
		}
	case *pglogrepl.InsertMessage:
		same = m.relation == x.RelationID && sameRow(m.new, x.Tuple) && m.old == nil
	case *pglogrepl.UpdateMessage:
		same = m.relation == x.RelationID && sameRow(m.new, x.NewTuple) && sameRow(m.old, x.OldTuple) && m.oldKind == x.OldTupleType
	case *pglogrepl.DeleteMessage:
		same = m.relation == x.RelationID && sameRow(m.old, x.OldTuple) && m.oldKind == x.OldTupleType && m.new == nil
	case *pglogrepl.TruncateMessage:
		same = fmt.Sprint(m.relations) == fmt.Sprint(x.RelationIDs)
	case *pglogrepl.LogicalDecodingMessage:
		same = string(m.prefix) == x.Prefix
	}
	if !same {
		t.Errorf("decoded %s\nwhere pglogrepl has %+v", show(m), theirs)
	}
}

func sameRow(r schema.Row, t *pglogrepl.TupleData) bool {
	if t == nil || r == nil {
		return (t == nil) == (r == nil)
	}
	if len(r) != len(t.Columns) {
		return false
	}
	for i, c := range t.Columns {
		switch c.DataType {
		case 'n':
			if r[i] != nil {
				return false
			}
		case 'u':
			if !isUnchanged(r[i]) {
				return false
			}
		default:
			if r[i] == nil || isUnchanged(r[i]) || string(r[i]) != string(c.Data) {
				return false
			}
		}
	}
	return true
}

func FuzzDecode(f *testing.F) {
	for _, b := range recorded(f) {
		f.Add(b)
	}
	f.Add([]byte{})
	f.Add(binary.BigEndian.AppendUint32([]byte{'T'}, 1<<31))
	f.Fuzz(func(t *testing.T, b []byte) {
		var m message
		if m.decode(b) != nil {
			return
		}
		for _, r := range []schema.Row{m.old, m.new} {
			if len(r) > len(b) {
				t.Errorf("%d bytes became a row of %d columns", len(b), len(r))
			}
		}
		_ = show(&m)
	})
}

// FuzzHandle gives the stream whatever bytes a server might send; it must not panic, nor hand anything over.
func FuzzHandle(f *testing.F) {
	for _, b := range recorded(f) {
		f.Add(append([]byte{'w', 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0}, b...))
	}
	f.Add([]byte{'k', 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) == 18 && b[0] == 'k' {
			b[17] = 0 // a reply would need a server
		}
		s, _ := bareStream(nil)
		_ = s.handle(t.Context(), b)
		if s.queue.Len() > 0 {
			t.Error("one message without a synced relation was handed over")
		}
	})
}

func BenchmarkDecode(b *testing.B) {
	var messages [][]byte
	size := 0
	for _, m := range recorded(b) {
		if m[0] == msgInsert || m[0] == msgUpdate || m[0] == msgDelete {
			messages = append(messages, m)
			size += len(m)
		}
	}
	var m message
	b.ReportAllocs()
	b.SetBytes(int64(size / len(messages)))
	i := 0
	for b.Loop() {
		if err := m.decode(messages[i%len(messages)]); err != nil {
			b.Fatal(err)
		}
		i++
	}
}

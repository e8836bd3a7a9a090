package changelog

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"reflect"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func drawBytes(t *rapid.T, name string) []byte {
	if rapid.Bool().Draw(t, name+" is there") {
		return rapid.SliceOfN(rapid.Byte(), 0, 40).Draw(t, name)
	}
	return nil
}

func drawKey(t *rapid.T, name string) (k [16]byte) {
	copy(k[:], rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, name))
	return k
}

// many draws up to four of something; none is nil.
func many[T any](t *rapid.T, name string, one func() T) (out []T) {
	for range rapid.IntRange(0, 4).Draw(t, name) {
		out = append(out, one())
	}
	return out
}

func drawBatch(t *rapid.T) *Batch {
	version := func(name string) Version { return Version(rapid.Int64Range(0, 1<<53).Draw(t, name)) }
	text := func(name string) string { return rapid.String().Draw(t, name) }
	return &Batch{
		Claim: rapid.Int64().Draw(t, "claim"), History: text("history"), Prev: version("prev"), Last: version("last"),
		LSN: LSN(rapid.Uint64().Draw(t, "lsn")), Omitted: rapid.Bool().Draw(t, "omitted"),
		Entries: many(t, "entries", func() Entry {
			return Entry{Version: version("version"), Tx: version("tx"), Scope: drawKey(t, "scope"), Collection: rapid.Int32().Draw(t, "collection"),
				Op: rapid.Byte().Draw(t, "op"), DocID: drawBytes(t, "doc"), Data: drawBytes(t, "data"), Guard: drawBytes(t, "guard"), Changed: drawBytes(t, "changed")}
		}),
		Raises: many(t, "raises", func() Raise {
			return Raise{Collection: rapid.Int32().Draw(t, "collection"), Version: version("floor"), Reason: text("reason"), Shape: text("shape"),
				SetStopped: rapid.Bool().Draw(t, "set"), Stopped: text("stopped")}
		}),
		Pushes: many(t, "pushes", func() Pushed {
			return Pushed{Tx: version("tx"), Last: version("last"), Push: Push{ID: rapid.Int64().Draw(t, "id"), Subject: text("subject"), ClientID: text("client"),
				Locals: many(t, "locals", func() Local { return Local{Collection: text("c"), DocID: text("d"), LocalID: text("l")} })}}
		}),
		Operations: many(t, "operations", func() Operation {
			return Operation{Version: version("version"), Attachment: drawKey(t, "attachment"), Scope: drawKey(t, "scope"), ID: text("id"), Delete: rapid.Bool().Draw(t, "delete"),
				Missing: rapid.Bool().Draw(t, "missing"), Size: rapid.Int64Range(0, 1<<60).Draw(t, "size"), ContentType: text("type"), SHA256: drawBytes(t, "digest"),
				CreatedAt: time.UnixMicro(rapid.Int64Range(-1<<50, 1<<50).Draw(t, "created")).UTC()}
		}),
	}
}

// TestMessagesAreBatches: what one instance sends is what another one reads, whatever is in it, and no part of a message is taken
// for a whole one.
func TestMessagesAreBatches(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		sent, sender := drawBatch(t), rapid.Uint64().Draw(t, "sender")
		message := appendBatch(nil, sender, sent)
		got, from, err := parseBatch(message)
		if err != nil || from != sender || !reflect.DeepEqual(got, sent) {
			t.Fatalf("%v, sender %x of %x\ngot  %+v\nwant %+v", err, from, sender, got, sent)
		}
		cut := rapid.IntRange(0, len(message)-1).Draw(t, "cut")
		if _, _, err := parseBatch(message[:cut]); err == nil {
			t.Fatalf("the first %d of %d bytes are taken for a message", cut, len(message))
		}
	})
}

// TestMessagesOfOtherVersions: nothing is made of a format that isn't known, but that there was a message.
func TestMessagesOfOtherVersions(t *testing.T) {
	t.Parallel()
	message := appendBatch(nil, 7, &Batch{History: "a1b2"})
	message[0]++
	if _, sender, err := parseBatch(message); err == nil || sender != 0 {
		t.Errorf("sender %d, %v", sender, err)
	}
}

// TestBrokenMessagesAreRefused: one that ends early, goes on behind its end, is of another format or larger than any, or has
// numbers that its length belies.
func TestBrokenMessagesAreRefused(t *testing.T) {
	t.Parallel()
	good := appendBatch(nil, 7, &Batch{History: "a1b2", Prev: 1, Last: 9, LSN: 5, Entries: []Entry{{Version: 9, DocID: []byte("x"), Data: []byte("{}")}},
		Raises: []Raise{{Reason: "r"}}, Pushes: []Pushed{{Push: Push{Locals: []Local{{DocID: "d"}}}}}, Operations: []Operation{{ID: "a"}}})
	if _, _, err := parseBatch(good); err != nil {
		t.Fatal(err)
	}
	empty := appendBatch(nil, 7, &Batch{})
	broken := map[string][]byte{
		"one byte more":  append(bytes.Clone(good), 0),
		"another format": append([]byte{batchFormat + 1}, good[1:]...),
		"too large":      appendBatch(nil, 7, &Batch{Entries: []Entry{{Data: make([]byte, messageLimit)}}}),
	}
	for i := range good {
		broken[fmt.Sprintf("%d bytes of it", i)] = good[:i]
	}
	for i := range 4 { // its four lists, each empty
		at := len(empty) - 4 + i
		broken[fmt.Sprintf("list %d of very many", i)] = append(binary.AppendUvarint(bytes.Clone(empty[:at]), 1<<60), bytes.Repeat([]byte{0}, 100)...)
	}
	for name, message := range broken {
		if _, _, err := parseBatch(message); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

func FuzzMessage(f *testing.F) {
	f.Add(appendBatch(nil, 7, &Batch{History: "a1b2", Prev: 1, Last: 9, LSN: 5, Entries: []Entry{{Version: 9, DocID: []byte("x"), Data: []byte("{}")}}}))
	f.Add(appendBatch(nil, 7, &Batch{Omitted: true, Raises: []Raise{{Reason: "r"}}, Pushes: []Pushed{{Push: Push{Locals: []Local{{}}}}}, Operations: []Operation{{ID: "a"}}}))
	f.Add([]byte{batchFormat})
	f.Fuzz(func(t *testing.T, message []byte) {
		b, sender, err := parseBatch(message)
		if err != nil {
			return
		}
		again, from, err := parseBatch(appendBatch(nil, sender, b))
		if err != nil || from != sender || !reflect.DeepEqual(again, b) {
			t.Errorf("%v: %+v became %+v", err, b, again)
		}
	})
}

func BenchmarkMessage(b *testing.B) {
	batch := &Batch{History: "a1b2", Prev: 1, Last: 101}
	for i := range 100 {
		batch.Entries = append(batch.Entries, Entry{Version: Version(i), Tx: 1, Collection: 1, Op: 'u', DocID: []byte("0190a1b2-0000-7000-8000-000000000000"), Data: bytes.Repeat([]byte("x"), 300)})
	}
	message := appendBatch(nil, 7, batch)
	b.Run("append", func(b *testing.B) {
		b.ReportAllocs()
		b.SetBytes(int64(len(message)))
		for b.Loop() {
			message = appendBatch(message[:0], 7, batch)
		}
	})
	b.Run("parse", func(b *testing.B) {
		b.ReportAllocs()
		b.SetBytes(int64(len(message)))
		for b.Loop() {
			if _, _, err := parseBatch(message); err != nil {
				b.Fatal(err)
			}
		}
	})
}

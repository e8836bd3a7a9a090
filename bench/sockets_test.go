package main

import (
	"encoding/binary"
	"fmt"
	"strings"
	"testing"
	"time"
)

func textFrame(text string) []byte {
	switch n := len(text); {
	case n < 126:
		return append([]byte{0x81, byte(n)}, text...)
	case n < 1<<16:
		return append(binary.BigEndian.AppendUint16([]byte{0x81, 126}, uint16(n)), text...)
	default:
		return append(binary.BigEndian.AppendUint64([]byte{0x81, 127}, uint64(n)), text...)
	}
}

// TestFramesAreCountedHoweverTheyCome: frames of each length, cut into pieces of several sizes.
func TestFramesAreCountedHoweverTheyCome(t *testing.T) {
	t.Parallel()
	var stream []byte
	for _, size := range []int{0, 1, 100, 500, 1000, 70_000} {
		stream = append(stream, textFrame(fmt.Sprintf(`{"version":"%s"}`, strings.Repeat("x", size)))...)
		stream = append(stream, textFrame(`{"type":"checkpoint","last_seq":"1"}`)...)
	}
	stream = append(stream, textFrame(`{"type":"ready","last_seq":"1"}`)...)
	stream = append(stream, 0x89, 0) // a ping
	for _, piece := range []int{5, 7, 64, 125, 499, 4096, 100_000} {
		sizes := 0
		s := &sockets{bell: make(chan struct{}, 1), onChange: func(payload []byte, _ time.Time) { sizes += len(payload) }}
		one := &socket{fd: -1} // the pong goes nowhere
		for at := 0; at < len(stream); at += piece {
			if err := s.take(one, stream[at:min(at+piece, len(stream))]); err != nil {
				t.Fatalf("in pieces of %d bytes: %v", piece, err)
			}
		}
		if s.changes.Load() != 6 || s.ready.Load() != 1 || len(one.rest) != 0 || sizes != 71_601+6*len(`{"version":""}`) {
			t.Fatalf("in pieces of %d bytes: %d changes of %d bytes, %d ready, %d bytes left", piece, s.changes.Load(), sizes, s.ready.Load(), len(one.rest))
		}
	}
	s := &sockets{bell: make(chan struct{}, 1)}
	if err := s.take(&socket{}, textFrame(`{"type":"error","code":"x"}`)); err == nil {
		t.Error("an error frame was let through")
	}
}

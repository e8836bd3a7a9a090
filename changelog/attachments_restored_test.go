package changelog

import (
	"slices"
	"testing"
)

// TestFillOfARestoredSource: a source that was set back knows other files, and counts its events from an earlier number on. What
// it doesn't know is gone, wherever the log keeps it; what it knows under an old number is an upload like any.
func TestFillOfARestoredSource(t *testing.T) {
	t.Parallel()
	l, _ := newLog(t)
	a, c := restart(t, l, nil)
	v := c.Version
	first := upload(5, 1, v+3, scope(1), scope(2))
	appendNow(t, a, Piece{LSN: 100, Final: true, Version: v + 4, References: []Reference{refer(1, 1, 1, v+1), refer(1, 2, 2, v+1), refer(2, 1, 2, v+2)}, Files: []FileEvent{first, upload(6, 2, v+4)}})
	if got := operationsOf(t, l, 0, 2); !slices.Equal(got, []string{"download photo1"}) {
		t.Fatalf("told %v", got)
	}
	other := upload(5, 1, v+6, scope(1)) // by somebody who may not write in scope 2
	other.SHA256 = []byte{9}
	appendNow(t, a, Piece{LSN: 101, Final: true, Version: v + 5, Fills: []FillStep{{Fill: 1, Collection: 0, Version: v + 5, Start: true}}})
	appendNow(t, a, Piece{LSN: 102, Final: true, Version: v + 6, Files: []FileEvent{other}, Fills: []FillStep{{Fill: 1, Version: v + 6, Looked: 1, Done: true}}})
	if got := operationsOf(t, l, v+4, 1, 2); !slices.Equal(got, []string{"download photo1"}) {
		t.Errorf("told %v", got)
	}
	if got := operationsOf(t, l, v+4, 2); !slices.Equal(got, []string{"delete photo1"}) {
		t.Errorf("who may not read it is told %v", got)
	}
	appendNow(t, a, Piece{LSN: 103, Final: true, Version: v + 7, Fills: []FillStep{{Fill: 1, Version: v + 7, SweepFrom: 7, SweepTo: 8, Swept: true}}}) // photo2 lies before
	if got := operationsOf(t, l, v+6, 1); !slices.Equal(got, []string{"delete photo2"}) {
		t.Errorf("told %v", got)
	}
}

package changelog

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

func lsns(pieces []Piece) (out []LSN) {
	for i := range pieces {
		out = append(out, pieces[i].LSN)
	}
	return out
}

func part(n LSN, final bool, size int) Piece { return Piece{LSN: n, Final: final, Size: size} }

func TestQueueIsBoundedInBytes(t *testing.T) {
	t.Parallel()
	const limit = 100
	for size, want := range map[int]int{limit/2 - 1: 2, limit / 2: 2, limit/2 + 1: 1, limit - 1: 1, limit: 1, limit + 1: 1, 10 * limit: 1} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			q := NewQueue(limit)
			n := 0
			for n < 10 && q.TryPut(part(LSN(n+1), true, size)) {
				n++
			}
			if n != want || q.Len() != want*size {
				t.Errorf("%d pieces of %d bytes went in (%d bytes), want %d: the limit is %d, and the first piece always goes in", n, size, q.Len(), want, limit)
			}
			if _, err := q.Take(t.Context(), nil); err != nil || q.Len() != 0 {
				t.Errorf("after taking all, %d bytes are left (%v)", q.Len(), err)
			}
		})
	}
}

func TestQueueIsBoundedInPieces(t *testing.T) {
	t.Parallel()
	q := NewQueue(1 << 30)
	n := 0
	for q.TryPut(part(1, true, 0)) {
		n++
	}
	if n != maxQueuedPieces {
		t.Errorf("%d pieces went in, want %d", n, maxQueuedPieces)
	}
}

// TestQueueTakesWholeTransactions: what waits is taken up to the last complete transaction; pieces of an incomplete one
// are taken only where nothing complete waits before them.
func TestQueueTakesWholeTransactions(t *testing.T) {
	t.Parallel()
	q := NewQueue(1000)
	for _, p := range []Piece{part(1, true, 1), part(2, false, 1), part(3, true, 1), part(4, false, 1), part(5, false, 1)} {
		q.TryPut(p)
	}
	first, _ := q.Take(t.Context(), nil)
	second, _ := q.Take(t.Context(), nil)
	if !slices.Equal(lsns(first), []LSN{1, 2, 3}) || !slices.Equal(lsns(second), []LSN{4, 5}) {
		t.Errorf("took %v then %v", lsns(first), lsns(second))
	}
}

func TestQueueKeepsOrder(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		q := NewQueue(50)
		var in, out []LSN
		for i, put := range rapid.SliceOfN(rapid.Bool(), 1, 100).Draw(rt, "puts") {
			if put {
				if q.TryPut(part(LSN(i), rapid.Bool().Draw(rt, "final"), rapid.IntRange(0, 60).Draw(rt, "size"))) {
					in = append(in, LSN(i))
				}
			} else if len(in) > len(out) {
				got, err := q.Take(t.Context(), nil)
				if err != nil || len(got) == 0 {
					rt.Fatalf("took %v (%v) although something waits", got, err)
				}
				out = append(out, lsns(got)...)
			}
		}
		if !slices.Equal(in[:len(out)], out) {
			rt.Fatalf("in %v, out %v", in, out)
		}
	})
}

func TestQueueWakesBothSides(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		q := NewQueue(10)
		const all = 100
		began := time.Now()
		go func() {
			for i := range all {
				for p := part(LSN(i), i%7 != 0 || i == all-1, 8); !q.TryPut(p); {
					if err := q.WaitRoom(t.Context(), time.Hour); err != nil {
						t.Error(err)
						return
					}
				}
			}
		}()
		var got []Piece
		for len(got) < all {
			var err error
			if got, err = q.Take(t.Context(), got); err != nil {
				t.Fatal(err)
			}
		}
		if waited := time.Since(began); waited != 0 {
			t.Errorf("the two sides missed a wake-up and waited %s for a timer", waited)
		}
	})
}

func TestQueueWaitsEnd(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		q := NewQueue(1)
		began := time.Now()
		if err := q.WaitRoom(t.Context(), time.Second); err != nil || time.Since(began) != time.Second {
			t.Errorf("waiting for room ended after %s (%v), want one second", time.Since(began), err)
		}
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, context.Canceled)
		defer cancel()
		if _, err := q.Take(ctx, nil); err != context.Canceled {
			t.Errorf("Take of an ended context: %v, want its cause", err)
		}
		if err := q.WaitRoom(ctx, time.Hour); err != context.Canceled {
			t.Errorf("WaitRoom of an ended context: %v, want its cause", err)
		}
	})
}

package changelog

import (
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// filled is a log with a known content: transactions of 3 entries, turning over the scopes 1 to 3.
func filled(t testing.TB, transactions int) (*Log, string, []Entry, Version) {
	t.Helper()
	l, dsn := newLog(t)
	a, c := lead(t, l, testClaim())
	v := c.Version
	var pieces []Piece
	var all []Entry
	for i := range transactions {
		tx := v + 1
		var es []Entry
		for j := range 3 {
			v++
			es = append(es, upsert(v, tx, byte(1+(i+j)%3), fmt.Sprintf("%d.%d", i, j)))
		}
		v++ // versions that no row has
		pieces = append(pieces, transaction(LSN(100+i), es...))
		pieces[i].Version = v
		all = append(all, es...)
	}
	appendNow(t, a, pieces...)
	return l, dsn, all, c.Version
}

// TestReadIsTheCallersChanges reads random logs page by page and holds every page against a plain model.
func TestReadIsTheCallersChanges(t *testing.T) {
	t.Parallel()
	l, _, all, start := filled(t, 40)
	rapid.Check(t, func(rt *rapid.T) {
		r := Request{Limit: rapid.IntRange(1, 20).Draw(rt, "limit"), MaxBytes: rapid.OneOf(rapid.Just(1<<20), rapid.IntRange(1, 100)).Draw(rt, "bytes")}
		mine := rapid.SliceOfNDistinct(rapid.SampledFrom([]byte{1, 2, 3, 9}), 1, 4, func(b byte) byte { return b }).Draw(rt, "scopes")
		for _, s := range mine {
			r.Scopes = append(r.Scopes, scope(s))
		}
		r.Since = start + Version(rapid.IntRange(0, 170).Draw(rt, "since"))
		if rapid.Bool().Draw(rt, "bounded") {
			r.Until = r.Since + Version(rapid.IntRange(1, 80).Draw(rt, "until"))
		}
		var want, got []string
		for _, e := range all {
			if e.Version > r.Since && (r.Until == 0 || e.Version <= r.Until) && slices.Contains(mine, e.Scope[15]) {
				want = append(want, "u "+string(e.DocID))
			}
		}
		for {
			p := mustRead(t, l, r)
			checkPage(rt, r, p, all, mine)
			got = append(got, names(p)...)
			if !p.More {
				if end := min(p.Head.Version, cmpOr(r.Until, math.MaxInt64)); p.Last != max(end, r.Since) {
					rt.Fatalf("the last page ends at %d, want %d", p.Last, end)
				}
				break
			}
			r.Since = p.Last
		}
		if !slices.Equal(got, want) {
			rt.Fatalf("read %v\nwant %v", got, want)
		}
	})
}

func cmpOr(v, zero Version) Version {
	if v == 0 {
		return zero
	}
	return v
}

// checkPage holds one page against the rules of cutting.
func checkPage(rt *rapid.T, r Request, p *Page, all []Entry, mine []byte) {
	if p.More && p.Last <= r.Since {
		rt.Fatalf("there is more after %d but the page ends at %d: a client would never get on", r.Since, p.Last)
	}
	bytes := 0
	for _, e := range p.Entries {
		if e.Version > p.Last {
			rt.Fatalf("entry %d lies after the page's end %d", e.Version, p.Last)
		}
		bytes += len(e.Data)
	}
	if len(p.Entries) > 1 && (bytes > r.MaxBytes || len(p.Entries) > r.Limit && p.Entries[0].Tx != p.Entries[len(p.Entries)-1].Tx) {
		rt.Fatalf("%d entries of %d bytes, limit %d and %d bytes", len(p.Entries), bytes, r.Limit, r.MaxBytes)
	}
	if len(p.Entries) == 0 || !p.More {
		return
	}
	tx, rest := p.Entries[len(p.Entries)-1].Tx, false
	for _, e := range all {
		rest = rest || e.Tx == tx && e.Version > p.Last && (r.Until == 0 || e.Version <= r.Until) && slices.Contains(mine, e.Scope[15])
	}
	if rest != p.Partial {
		rt.Fatalf("the page ends at %d with partial %v, but more of its last transaction: %v", p.Last, p.Partial, rest)
	}
	if p.Partial && p.Entries[0].Tx != tx {
		rt.Fatalf("a page that could end between transactions ends within one")
	}
}

// TestPageNeverSplitsAVersion: one change in several scopes is one change, however small the limits.
func TestPageNeverSplitsAVersion(t *testing.T) {
	t.Parallel()
	l, _ := newLog(t)
	a, c := restart(t, l, nil)
	v := c.Version + 1
	one := []Entry{upsert(v, v, 1, "moved"), upsert(v, v, 2, "moved"), {Version: v, Tx: v, Scope: scope(3), Collection: 1, Op: 'l', DocID: []byte("moved")}}
	appendNow(t, a, transaction(100, append(one, upsert(v+1, v, 1, "next"))...))
	last := v + 4
	appendNow(t, a, transaction(101, upsert(v+2, v+2, 1, "x"), upsert(v+3, v+2, 1, "x"), upsert(last, v+2, 1, "x")))
	for name, limits := range map[string][2]int{"by entries": {2, 1 << 20}, "by bytes": {10, 1}, "by both": {1, 1}, "by one entry": {1, 1 << 20}} {
		limit, maxBytes := limits[0], limits[1]
		p := mustRead(t, l, Request{Scopes: [][16]byte{scope(1), scope(2), scope(3)}, Limit: limit, MaxBytes: maxBytes})
		if got := names(p); !wholeVersion(p, v) || len(got) > 3 { // "next" would be a second change
			t.Errorf("%s: the caller's page is %v up to %d (more %v, partial %v)", name, got, p.Last-v, p.More, p.Partial)
		}
		p, err := l.ReadAll(t.Context(), c.Version, last, limit, maxBytes)
		if err != nil {
			t.Fatal(err)
		}
		if got := names(p); !wholeVersion(p, v) {
			t.Errorf("%s: the hub's page is %v up to %d (more %v, partial %v): some subscribers would lose a change", name, got, p.Last-v, p.More, p.Partial)
		}
	}
}

// wholeVersion says whether p begins with all three entries of v, and names its end truthfully.
func wholeVersion(p *Page, v Version) bool {
	got := names(p)
	return len(got) >= 3 && slices.Equal(got[:3], []string{"u moved", "u moved", "l moved"}) && p.More && p.Partial == (p.Last == v) && len(got) == 3+int(p.Last-v)
}

func TestReadAheadOfTheLogIsForTheCallerToJudge(t *testing.T) {
	t.Parallel()
	l, _, _, _ := filled(t, 1)
	h := mustHead(t, l)
	p := mustRead(t, l, Request{Scopes: [][16]byte{scope(1)}, Since: h.Version + 10, Limit: 5, MaxBytes: 100})
	if len(p.Entries) != 0 || p.More || p.Last != h.Version+10 || p.Head.Version != h.Version {
		t.Errorf("page %+v", p)
	}
}

// explain returns the plan's text and how many buffers it touched.
func explain(t testing.TB, dsn string, args ...any) (string, float64) {
	t.Helper()
	text := scan[[]byte](t, session(t, dsn), `EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) `+pageSQL, args...)
	var plans []struct{ Plan map[string]any }
	if err := json.Unmarshal(text, &plans); err != nil {
		t.Fatal(err)
	}
	return string(text), plans[0].Plan["Shared Hit Blocks"].(float64) + plans[0].Plan["Shared Read Blocks"].(float64)
}

// TestGiantDocumentsAreWithheld: a page tells of documents that are larger than asked for, and doesn't fetch them.
func TestGiantDocumentsAreWithheld(t *testing.T) {
	t.Parallel()
	l, _, _, start := filled(t, 5)
	h := mustHead(t, l)
	all := Request{Scopes: [][16]byte{scope(1), scope(2), scope(3), scope(9)}, Since: start, Limit: 1000, MaxBytes: 1 << 20}
	whole := mustRead(t, l, all)
	small, large := 1<<30, 0
	for _, e := range whole.Entries {
		small, large = min(small, len(e.Data)), max(large, len(e.Data))
	}
	for _, limit := range []int{large, large - 1, small} {
		r := all
		r.Largest = limit
		p, above := mustRead(t, l, r), 0
		for _, e := range whole.Entries {
			if len(e.Data) > limit {
				above += len(e.Data)
			}
		}
		if p.Withheld != above || p.Head.Version != h.Version || limit < large == (above == 0) {
			t.Errorf("with documents of at most %d bytes %d bytes are withheld, want %d", limit, p.Withheld, above)
		}
		for _, e := range p.Entries {
			if len(e.Data) > limit {
				t.Errorf("a document of %d bytes came", len(e.Data))
			}
		}
	}
}

// TestReadCostsWhatItReturns: the plan goes by ranges of the scope index, and what others wrote isn't touched.
func TestReadCostsWhatItReturns(t *testing.T) {
	t.Parallel()
	l, dsn, _, start := filled(t, 30)
	conn := session(t, dsn)
	h := mustHead(t, l)
	args := []any{[][16]byte{scope(1), scope(2)}, int64(start), int64(maxVersion), 501, int64(8 << 20), int32(1 << 20)}
	var touched []float64
	others := 0
	for _, grow := range []int{0, 20000, 180000} {
		mustExec(t, conn, fmt.Sprintf(`INSERT INTO walgate.changes (version, tx, scope, collection, op, size, doc_id, data)
			SELECT %d + n %% 160, %d + n %% 160, md5((n / 7)::text)::uuid, 1, 'u', 100, n::text, '{}' FROM generate_series(1, %d) n`, start, start, grow),
			`VACUUM ANALYZE walgate.changes`)
		others += grow
		plan, buffers := explain(t, dsn, args...)
		if grow > 0 && !strings.Contains(plan, "scope_version_idx") {
			t.Errorf("with %d rows of others the plan is %s", others, plan)
		}
		touched = append(touched, buffers)
	}
	if touched[2] > touched[1]+40 || touched[2] > 300 {
		t.Errorf("buffers touched %v with 0, 20000, 200000 rows of others: the cost grows with what others write", touched)
	}
	p := mustRead(t, l, Request{Scopes: [][16]byte{scope(1), scope(2)}, Since: start, Limit: 500, MaxBytes: 8 << 20})
	if len(p.Entries) != 60 || p.Last != h.Version {
		t.Errorf("%d entries to %d, want the caller's own 60 to %d", len(p.Entries), p.Last, h.Version)
	}
}

func TestFirstInvisible(t *testing.T) {
	t.Parallel()
	l, _ := newLog(t)
	a, c := restart(t, l, nil)
	v := c.Version
	for i, xid := range []uint64{1 << 33, 1<<33 + 5, 1<<33 + 2, 1<<33 + 9} { // commit order isn't the order of ids
		tx := v + Version(10*(i+1))
		p := transaction(LSN(100+i), upsert(tx, tx, 1, "x"))
		p.Xid = xid
		appendNow(t, a, p)
	}
	const base = uint64(1) << 33
	for name, tc := range map[string]struct {
		xmax    uint64
		running []uint64
		first   Version
		shown   bool
	}{
		"all visible":           {base + 10, nil, 0, false},
		"the newest isn't":      {base + 9, nil, v + 40, false},
		"one in the middle":     {base + 10, []uint64{base + 5}, v + 20, true},
		"the first":             {base + 10, []uint64{base, base + 9}, v + 10, true},
		"none visible":          {base, nil, v + 10, false},
		"unknown running ones":  {base + 10, []uint64{base + 7, 3}, 0, false},
		"older ids don't count": {base + 10, []uint64{5}, 0, false},
	} {
		first, shown, h, err := l.FirstInvisible(t.Context(), tc.xmax, tc.running)
		if err != nil || first != tc.first || shown != tc.shown || h.Version != v+40 {
			t.Errorf("%s: %d, newer ones shown %v (%v), want %d, %v", name, first-v, shown, err, tc.first-v, tc.shown)
		}
	}
	// A new history: ids of before may be another server's.
	if _, again := restart(t, l, func(c *Claim) { c.SlotCreated = true }); again.NewHistory == "" {
		t.Fatal("the history goes on")
	}
	if first, _, _, err := l.FirstInvisible(t.Context(), base, nil); err != nil || first != 0 {
		t.Errorf("a transaction of the last history counts: %d (%v)", first-v, err)
	}
}

func BenchmarkRead(b *testing.B) {
	l, dsn, _, start := filled(b, 400)
	conn := session(b, dsn)
	mustExec(b, conn, fmt.Sprintf(`INSERT INTO walgate.changes (version, tx, scope, collection, op, size, doc_id, data)
		SELECT %d + n %% 1500, %d + n %% 1500, md5((n / 7)::text)::uuid, 1, 'u', 100, n::text, '{}' FROM generate_series(1, 100000) n`, start, start), `ANALYZE walgate.changes`)
	for _, limit := range []int{1, 50, 500} {
		b.Run(fmt.Sprintf("entries=%d", limit), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				p := mustRead(b, l, Request{Scopes: [][16]byte{scope(1), scope(2)}, Since: start, Limit: limit, MaxBytes: 8 << 20})
				if len(p.Entries) == 0 {
					b.Fatal("nothing read")
				}
			}
		})
	}
}

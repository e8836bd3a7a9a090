package policies

import (
	"bytes"
	"sync"
	"testing"

	"github.com/walgate/walgate/schema"
)

func guarded(t testing.TB) *Collection {
	return compileOne(t, everything(), Spec{Scope: []map[string]string{{"owner_id": "claims.sub"}}, SoftDelete: "archived",
		Where: "row.n4 <= claims.level && row.title != claims.hidden"})
}

func TestJudge(t *testing.T) {
	t.Parallel()
	c := guarded(t)
	b := bind(t, c)
	caller := callerOf(t, c, `{"sub":"A","level":5,"hidden":"x"}`)
	for _, tc := range []struct {
		name     string
		op       Op
		old, new string
		want     Op // 0: nothing
		err      bool
	}{
		{"insert", Upsert, "-", "n4=5 title=t", Upsert, false},
		{"insert above", Upsert, "-", "n4=6 title=t", 0, false},
		{"insert of NULL", Upsert, "-", "title=t", 0, true},
		{"empty text is not NULL", Upsert, "-", "n4=1 title=", Upsert, false},
		{"rises above", Upsert, "n4=5 title=t", "n4=6 title=t", Leave, false},
		{"falls below", Upsert, "n4=6 title=t", "n4=5 title=t", Upsert, false},
		{"stays above", Upsert, "n4=7 title=t", "n4=6 title=t", 0, false},
		{"becomes undecidable", Upsert, "n4=5 title=t", "title=t", Leave, true},
		{"was undecidable", Upsert, "title=t", "n4=9 title=t", 0, true},
		{"leaves the scope", Leave, "n4=5 title=t owner_id=A", "n4=5 title=t owner_id=B", Leave, false},
		{"leaves the scope unseen", Leave, "n4=6 title=t owner_id=A", "n4=5 title=t owner_id=B", 0, false},
		{"is deleted", Delete, "n4=5 title=t", "-", Delete, false},
		{"is deleted unseen", Delete, "n4=5 title=x", "-", 0, false},
		{"is soft-deleted", Delete, "n4=5 title=t archived=f", "n4=5 title=t archived=t", Delete, false},
	} {
		op, ok, err := c.Judge(tc.op, b.AppendGuard(nil, side(c.Table, tc.old), side(c.Table, tc.new)), caller)
		if ok != (tc.want != 0) || ok && op != tc.want || (err != nil) != tc.err {
			t.Errorf("%s: got %c %v, %v; want %q", tc.name, op, ok, err, tc.want)
		}
	}
}

func TestGuardHoldsOnlyWhatMatters(t *testing.T) {
	t.Parallel()
	c := guarded(t)
	b := bind(t, c)
	for _, tc := range []struct {
		old, new string
		sides    int // -1: no guard
	}{
		{"-", "n4=1", guardNew},
		{"n4=1 n2=1", "n4=1 n2=2", guardNew},
		{"n4=1", "n4=2", guardNew | guardOld},
		{"title=", "n2=1", guardNew | guardOld},
		{"owner_id=A", "owner_id=B", guardNew | guardOld},
		{"archived=t n4=1", "archived=f n4=2", guardNew},
		{"archived=f", "archived=t", guardOld},
		{"n4=1", "-", guardOld},
		{"archived=t", "archived=t n4=1", -1},
		{"archived=t", "-", -1},
	} {
		got := b.AppendGuard([]byte(">"), side(c.Table, tc.old), side(c.Table, tc.new))
		sides := -1
		if len(got) > 1 {
			sides = int(got[1])
		}
		if sides != tc.sides {
			t.Errorf("%s to %s: sides %d, want %d", tc.old, tc.new, sides, tc.sides)
		}
	}
	plain := compileOne(t, everything(), Spec{Where: "row.n4 > 0"})
	if plain.HasGuard() || len(bind(t, plain).AppendGuard(nil, nil, row(plain.Table, "n4=1"))) > 0 {
		t.Error("a filter that names no claims has a guard")
	}
	if op, ok, err := plain.Judge(Leave, nil, callerOf(t, plain, `{}`)); op != Leave || !ok || err != nil {
		t.Errorf("without guard: %c %v %v", op, ok, err)
	}
}

func TestJudgeRefusesStrangers(t *testing.T) {
	t.Parallel()
	c := compileOne(t, everything(), Spec{Where: "claims.level >= 0", Read: ReadSpec{Roles: []string{"r"}}})
	guard := bind(t, c).AppendGuard(nil, nil, row(c.Table, "id=1"))
	other := compileOne(t, everything(), c.Spec)
	for name, caller := range map[string]*Caller{
		"nobody":             nil,
		"without role":       callerOf(t, c, `{"level":1}`),
		"of another Set":     callerOf(t, other, `{"level":1}`, "r"),
		"without the claims": callerOf(t, c, `{}`, "r"),
	} {
		if _, ok, _ := c.Judge(Upsert, guard, caller); ok {
			t.Errorf("%s sees the row", name)
		}
		if ok, _ := bind(t, c).Sees(row(c.Table, "id=1"), caller); ok {
			t.Errorf("%s sees the row in a snapshot", name)
		}
	}
	if _, ok, err := c.Judge(Upsert, guard, callerOf(t, c, `{"level":1}`, "r")); !ok || err != nil {
		t.Errorf("a reader: %v %v", ok, err)
	}
}

func TestJudgeRefusesDamagedGuards(t *testing.T) {
	t.Parallel()
	c := guarded(t)
	caller := callerOf(t, c, `{"sub":"A","level":5,"hidden":"x"}`)
	good := bind(t, c).AppendGuard(nil, side(c.Table, "n4=1 title=t"), side(c.Table, "n4=2 title=u"))
	bad := [][]byte{nil, {}, {8}, append(bytes.Clone(good), 0), {guardNew, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01}}
	for i := range good {
		bad = append(bad, good[:i])
	}
	for _, guard := range bad {
		for _, op := range []Op{Upsert, Delete, Leave} {
			if _, ok, err := c.Judge(op, guard, caller); ok || err == nil {
				t.Errorf("%x: %v, %v; want an error", guard, ok, err)
			}
		}
	}
}

func TestJudgeIsSafeForConcurrentUse(t *testing.T) {
	t.Parallel()
	c := guarded(t)
	b := bind(t, c)
	set := setOf(c)
	guard := b.AppendGuard(nil, side(c.Table, "n4=3 title=t"), side(c.Table, "n4=7 title=u"))
	var wg sync.WaitGroup
	for level, want := range map[string]Op{`{"level":9,"hidden":""}`: Upsert, `{"level":5,"hidden":""}`: Leave, `{"level":9,"hidden":"u"}`: Leave} {
		caller, err := set.NewCaller("s", nil, claims(t, level))
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			for range 500 {
				if op, ok, err := c.Judge(Upsert, guard, caller); op != want || !ok || err != nil {
					t.Errorf("%s: got %c %v %v; want %c", level, op, ok, err, want)
					return
				}
			}
		})
	}
	wg.Wait()
}

func FuzzJudge(f *testing.F) {
	c := guarded(f)
	b := bind(f, c)
	caller := callerOf(f, c, `{"sub":"A","level":5,"hidden":"x"}`)
	f.Add([]byte{}, byte('u'))
	f.Add(b.AppendGuard(nil, side(c.Table, "n4=3 title=t"), side(c.Table, "n4=7 title=u")), byte('u'))
	f.Add(b.AppendGuard(nil, side(c.Table, "n4=3"), nil), byte('d'))
	f.Fuzz(func(t *testing.T, guard []byte, op byte) {
		got, ok, err := c.Judge(Op(op), guard, caller)
		if ok && got != Op(op) && !(Op(op) == Upsert && got == Leave) {
			t.Errorf("%c became %c", op, got)
		}
		j := c.filter.judgements.get(c.filter)
		sides, parseErr := j.parse(guard)
		if parseErr != nil {
			if ok || err == nil {
				t.Errorf("a damaged guard is judged: %v, %v", ok, err)
			}
			return
		}
		texts := 1
		for _, side := range []struct {
			bit byte
			row schema.Row
		}{{guardNew, j.new}, {guardOld, j.old}} {
			for _, text := range side.row {
				if sides&side.bit != 0 {
					texts += 1 + len(text)
				}
			}
		}
		if texts > len(guard) {
			t.Errorf("%x holds texts that it has no room for", guard)
		}
	})
}

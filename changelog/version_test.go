package changelog

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// versions draws versions over the whole range, with the edges of the counter often.
func versions() *rapid.Generator[Version] {
	return rapid.Custom(func(t *rapid.T) Version {
		ms := rapid.Int64Range(0, int64(maxVersion>>counterBits)).Draw(t, "ms")
		c := rapid.OneOf(rapid.SampledFrom([]int64{0, 1, 0xffe, 0xfff}), rapid.Int64Range(0, 0xfff)).Draw(t, "counter")
		return Version(ms<<counterBits | c)
	})
}

func TestVersionTextIsAsDocumented(t *testing.T) {
	t.Parallel()
	v := VersionAt(time.Date(2026, 5, 2, 15, 0, 0, 0, time.UTC)) | 5
	if got := v.Text("a1b2"); got != "20260502T150000.000Z-0005-a1b2" {
		t.Errorf("text %s", got)
	}
	if VersionAt(time.UnixMilli(epochMillis)) != 0 {
		t.Error("the first instant of 2020 isn't version 0")
	}
	if v := VersionAt(time.Date(2089, 1, 1, 0, 0, 0, 0, time.UTC)); v >= 1<<53 {
		t.Errorf("version %d of 2089 is not exact in JavaScript", v)
	}
}

func TestCursorRoundTrip(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		c := Cursor{Version: versions().Draw(t, "version"), History: rapid.StringMatching(`[0-9a-f]{4}`).Draw(t, "history")}
		if rapid.Bool().Draw(t, "hashed") {
			c.ScopeHash = rapid.StringMatching(`[0-9a-f]{8}`).Draw(t, "hash")
		}
		back, err := ParseCursor(c.String())
		if err != nil || back != c {
			t.Fatalf("%+v became %s became %+v (%v)", c, c, back, err)
		}
	})
}

func TestTextOrderIsVersionOrder(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		a, b := versions().Draw(t, "a"), versions().Draw(t, "b")
		if rapid.Bool().Draw(t, "near") {
			b = min(maxVersion, a+Version(rapid.Int64Range(0, 5000).Draw(t, "step")))
		}
		if (a < b) != (a.Text("a1b2") < b.Text("a1b2")) || (a == b) != (a.Text("a1b2") == b.Text("a1b2")) {
			t.Fatalf("%d %s and %d %s are ordered differently", a, a.Text("a1b2"), b, b.Text("a1b2"))
		}
	})
}

func TestParseCursorAcceptsOnlyCanonicalForms(t *testing.T) {
	t.Parallel()
	const good = "20260502T150000.000Z-0005-a1b2"
	for in, want := range map[string]Cursor{
		"0":                {},
		"7":                {Version: 7},
		"9007199254740991": {Version: 1<<53 - 1},
		good:               {History: "a1b2"},
		good + "-0123abcd": {History: "a1b2", ScopeHash: "0123abcd"},
	} {
		got, err := ParseCursor(in)
		if len(in) > 16 {
			want.Version = VersionAt(time.Date(2026, 5, 2, 15, 0, 0, 0, time.UTC)) | 5
		}
		if err != nil || got != want {
			t.Errorf("%s: %+v (%v), want %+v", in, got, err, want)
		}
	}
	for _, in := range []string{
		"", " ", "00", "01", "-1", "+1", "1e3", "0x10", "1 ", "９", "99999999999999999999", "9223372036854775807",
		good + "-", good + "-0123abc", good + "-0123ABCD", good + "-0123abcg", good + "-0123abcde", good + "x", good + " ",
		strings.ToUpper(good), strings.ToLower(good), "20260502T150000.000Z-0005", "20260502T150000.000Z-0005-A1B2",
		"20260502T150000.000Z-1005-a1b2", "20260502T150000.000Z-5-a1b2", "20260502T150000.000Z 0005-a1b2",
		"20260230T150000.000Z-0005-a1b2", "20260502T240000.000Z-0005-a1b2", "20260502T150060.000Z-0005-a1b2",
		"20260502T150000,000Z-0005-a1b2", "20191231T235959.999Z-0fff-a1b2", "20260502t150000.000Z-0005-a1b2",
		"20260502T150000.000Z-000G-a1b2", "20260502T150000.000Z-0005-a1b\x00", "null", "latest",
	} {
		if got, err := ParseCursor(in); err == nil {
			t.Errorf("%q was accepted as %+v", in, got)
		}
	}
}

func FuzzParseCursor(f *testing.F) {
	for _, s := range []string{"0", "42", "20260502T150000.000Z-0005-a1b2", "20260502T150000.000Z-0fff-a1b2-00ff00ff",
		"20191231T235959.999Z-0fff-a1b2", "99991231T235959.999Z-0fff-ffff", "9223372036854775807", "0000", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		c, err := ParseCursor(s)
		if err != nil {
			return
		}
		text := c.String()
		if c.History == "" {
			text = fmt.Sprint(int64(c.Version))
		}
		if text != s || c.Version < 0 || c.Version > maxVersion {
			t.Errorf("%q was accepted as %+v, whose text is %q", s, c, text)
		}
	})
}

func TestClockRisesWhateverTimeDoes(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		last := versions().Draw(t, "stored")
		now := last.Time().UnixMilli()
		c := NewClock(last)
		for _, jump := range rapid.SliceOfN(rapid.OneOf(rapid.Int64Range(-2, 2), rapid.Int64Range(-1<<40, 1<<33)), 1, 60).Draw(t, "jumps") {
			now += jump
			v := c.Next(now)
			if v <= last {
				t.Fatalf("version %d after %d", v, last)
			}
			if physical := Version((now - epochMillis) << counterBits); physical > last && v != physical {
				t.Fatalf("version %d, want the present time's %d", v, physical)
			}
			if c.Last() != v {
				t.Fatalf("Last is %d, want %d", c.Last(), v)
			}
			last = v
		}
	})
}

func TestClockCounterCarriesIntoMilliseconds(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 5, 2, 15, 0, 0, 999e6, time.UTC)
	c := NewClock(VersionAt(at) | 0xffe)
	if got := c.Next(at.UnixMilli()).Text("a1b2"); got != "20260502T150000.999Z-0fff-a1b2" {
		t.Errorf("last of its millisecond: %s", got)
	}
	if got := c.Next(at.UnixMilli()).Text("a1b2"); got != "20260502T150001.000Z-0000-a1b2" {
		t.Errorf("after the overflow: %s", got)
	}
	if got := c.Next(at.UnixMilli()).Text("a1b2"); got != "20260502T150001.000Z-0001-a1b2" {
		t.Errorf("one more: %s", got)
	}
}

func TestLSNText(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		l := LSN(rapid.Uint64().Draw(t, "lsn"))
		if back, err := ParseLSN(l.String()); err != nil || back != l {
			t.Fatalf("%d became %s became %d (%v)", l, l, back, err)
		}
	})
	for _, in := range []string{"", "16", "/", "G/1", "1/", "-1/2"} {
		if l, err := ParseLSN(in); err == nil {
			t.Errorf("%q was accepted as %s", in, l)
		}
	}
}

func BenchmarkParseCursor(b *testing.B) {
	text := Cursor{Version: VersionAt(time.Now()) | 7, History: "a1b2", ScopeHash: "00ff00ff"}.String()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ParseCursor(text); err != nil {
			b.Fatal(err)
		}
	}
}

// TestTimeTextIsThatOfPackageTime: every day up to the year 9999 at an odd time of day, and random moments.
func TestTimeTextIsThatOfPackageTime(t *testing.T) {
	t.Parallel()
	check := func(ms int64) {
		want := time.UnixMilli(ms).UTC().Format(timeLayout)
		if got := string(appendTime(nil, ms)); got != want {
			t.Fatalf("%d: %s, want %s", ms, got, want)
		}
	}
	for ms := int64(epochMillis); ms < 253402300800000; ms += 86_400_000 - 1 {
		check(ms)
	}
	rapid.Check(t, func(rt *rapid.T) { check(rapid.Int64Range(0, 253402300799999).Draw(rt, "ms")) })
}

func BenchmarkVersionText(b *testing.B) {
	v, buf := VersionAt(time.Date(2026, 5, 2, 15, 0, 0, 0, time.UTC)), make([]byte, 0, 64)
	for b.Loop() {
		buf = v.AppendText(buf[:0], "a1b2")
	}
}

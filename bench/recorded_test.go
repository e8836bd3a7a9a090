package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// series makes the line of a path's only result over several runs.
func series(r result, walgate ...float64) line {
	var all [][]result
	for _, v := range walgate {
		r.walgate = v
		all = append(all, []result{r})
	}
	return summarise("path", all)[0]
}

func TestRegressionsBeyondTheNoise(t *testing.T) {
	t.Parallel()
	rate := result{name: "rate", bare: 100, unit: "/s"}
	latency := result{name: "latency", bare: 1, unit: "ms", less: true}
	memory := result{name: "memory", unit: "MB", less: true}
	duration := result{name: "duration", unit: "ms", less: true}
	for _, c := range []struct {
		name string
		was  line
		now  line
		want bool
	}{
		{"as before", series(rate, 78, 80, 82), series(rate, 80), false},
		{"better", series(rate, 78, 80, 82), series(rate, 120), false},
		{"within the least noise, though beyond the runs", series(rate, 80, 80, 80), series(rate, 73), false},
		{"beyond the least noise", series(rate, 80, 80, 80), series(rate, 71), true},
		{"within the noise of wide runs", series(rate, 60, 80, 100), series(rate, 25), false},
		{"beyond the noise of wide runs", series(rate, 60, 80, 90), series(rate, 29), true},
		{"the median counts, not a run", series(rate, 80, 80, 80), series(rate, 10, 80, 81), false},
		{"a slower machine with the same ratio", series(rate, 80, 80, 80), series(result{name: "rate", bare: 10, unit: "/s"}, 8), false},
		{"latency: longer is worse", series(latency, 2, 2, 2), series(latency, 2.5), true},
		{"latency: shorter is better", series(latency, 2, 2, 2), series(latency, 1), false},
		{"memory: more is worse", series(memory, 100, 100, 100), series(memory, 115), true},
		{"memory: less is better", series(memory, 100, 100, 100), series(memory, 20), false},
		{"memory within the noise", series(memory, 90, 100, 110), series(memory, 125), false},
		{"a duration without a limit isn't compared", series(duration, 1, 1, 1), series(duration, 100), false},
	} {
		r := &record{Lines: map[string]spread{}}
		r.add(c.was)
		verdict, worse := r.judge(c.now)
		if worse != c.want || worse != strings.Contains(verdict, "REGRESSED") {
			t.Errorf("%s: recorded %+v, now %+v: worse is %v (%q), want %v", c.name, c.was.spread, c.now.spread, worse, verdict, c.want)
		}
	}
}

func TestRecordIsFoundAgain(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "recorded.json")
	all, err := readRecorded(file)
	if err != nil {
		t.Fatalf("a file that isn't there: %v", err)
	}
	if all.find(1, 100) != nil {
		t.Fatal("an empty file has a record")
	}
	first := &record{Machine: "m", Scale: 1, Sockets: 100, Lines: map[string]spread{"a": {1, 1, 1}, "b": {2, 2, 2}}}
	if err := all.write(file, first); err != nil {
		t.Fatal(err)
	}
	if err := all.write(file, &record{Machine: "m", Scale: 0.2, Sockets: 100, Lines: map[string]spread{"a": {3, 3, 3}}}); err != nil {
		t.Fatal(err)
	}
	if err := all.write(file, &record{Machine: "m", Scale: 1, Sockets: 100, Lines: map[string]spread{"a": {9, 9, 9}}}); err != nil {
		t.Fatal(err)
	}
	again, err := readRecorded(file)
	if err != nil {
		t.Fatal(err)
	}
	full, part := again.find(1, 100), again.find(0.2, 100)
	if full == nil || part == nil || again.find(1, 200) != nil || len(again.Records) != 2 {
		t.Fatalf("records by size of the work: %+v", again.Records)
	}
	if full.Lines["a"].Median != 9 || full.Lines["b"].Median != 2 || part.Lines["a"].Median != 3 {
		t.Errorf("measured lines are replaced, others kept: %+v, %+v", full.Lines, part.Lines)
	}
	if err := again.write(file, &record{Machine: "another", Scale: 1, Sockets: 100, Lines: map[string]spread{"a": {5, 5, 5}}}); err != nil {
		t.Fatal(err)
	}
	if _, kept := again.find(1, 100).Lines["b"]; kept {
		t.Error("a record mixes two machines")
	}
}

func TestMarks(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		line line
		want bool // missed
	}{
		{"a rate reached", series(result{wanted: 100}, 101), false},
		{"a rate missed", series(result{wanted: 100}, 99), true},
		{"a time kept", series(result{wanted: 5, less: true}, 4), false},
		{"a time missed", series(result{wanted: 5, less: true}, 6), true},
		{"a share missed", series(result{bare: 100, share: 0.9}, 89), true},
		{"a share reached", series(result{bare: 100, share: 0.9}, 91), false},
	} {
		if missed := strings.Contains(c.line.mark(), "MISSED"); missed != c.want {
			t.Errorf("%s: %q", c.name, c.line.mark())
		}
	}
}

func TestFiguresReplaceTheFormerOnes(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "figures.md")
	for _, c := range []struct{ was, want string }{
		{"above\n" + figuresBegin + "old\n" + figuresEnd + "below\n", "above\n" + figuresBegin + "new\n" + figuresEnd + "below\n"},
		{"no marks\n", ""},
		{"only one\n" + figuresBegin, ""},
	} {
		if err := os.WriteFile(file, []byte(c.was), 0o600); err != nil {
			t.Fatal(err)
		}
		err := putInto(file, []byte("new\n"))
		got, _ := os.ReadFile(file) // written above
		if c.want == "" {
			if err == nil || string(got) != c.was {
				t.Errorf("%q became %q, %v", c.was, got, err)
			}
			continue
		}
		if err != nil || string(got) != c.want {
			t.Errorf("%q became %q, %v", c.was, got, err)
		}
	}
}

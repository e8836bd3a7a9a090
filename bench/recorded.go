package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"runtime"
	"slices"
	"strings"
)

// record is what -record wrote of one series of runs.
type record struct {
	Machine string            `json:"machine"`
	Date    string            `json:"date"`
	Scale   float64           `json:"scale"`
	Sockets int               `json:"sockets"`
	Runs    int               `json:"runs"`
	Lines   map[string]spread `json:"lines"`
}

// spread is a score over several runs.
type spread struct {
	Median float64 `json:"median"`
	Low    float64 `json:"low"`
	High   float64 `json:"high"`
}

// records is the file: one record for each size of the work.
type records struct {
	Records []*record `json:"records"`
}

// leastNoise is the share by which a score may be worse than recorded whatever the recorded runs' spread: three runs in a
// row on a quiet machine agree better than runs of different days.
const leastNoise = 0.1

func spreadOf(scores []float64) spread {
	if len(scores) == 0 {
		return spread{}
	}
	s := slices.Sorted(slices.Values(scores))
	return spread{Median: thousandths(s[len(s)/2]), Low: thousandths(s[0]), High: thousandths(s[len(s)-1])}
}

// thousandths is what is worth writing down.
func thousandths(v float64) float64 { return math.Round(v*1000) / 1000 }

// bound is the worst score that is no regression: as far beyond the recorded runs' worst as they lie apart.
func (s spread) bound(less bool) float64 {
	if less {
		return max(s.High+(s.High-s.Low), s.Median*(1+leastNoise))
	}
	return min(s.Low-(s.High-s.Low), s.Median*(1-leastNoise))
}

// readRecorded reads the file; without one there is nothing to compare with.
func readRecorded(file string) (*records, error) {
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return &records{}, nil
	}
	if err != nil {
		return nil, err
	}
	r := &records{}
	if err := json.Unmarshal(text, r); err != nil {
		return nil, fmt.Errorf("%s can't be read: mend it, or write it anew with -record: %w", file, err)
	}
	return r, nil
}

// find returns the record of a size of the work, or nil.
func (r *records) find(scale float64, sockets int) *record {
	for _, one := range r.Records {
		if one.Scale == scale && one.Sockets == sockets {
			return one
		}
	}
	return nil
}

// judge says what was recorded of the line, and whether it is worse now by more than the noise.
func (r *record) judge(l line) (verdict string, worse bool) {
	_, less, ok := l.score()
	if r == nil || !ok {
		return "", false
	}
	was, known := r.Lines[l.key()]
	if !known {
		return "", false
	}
	bound := was.bound(less)
	verdict = number(was.Median)
	if less && l.spread.Median > bound || !less && l.spread.Median < bound {
		return fmt.Sprintf("%s **REGRESSED** beyond %s", verdict, number(bound)), true
	}
	return verdict, false
}

func (r *record) add(l line) {
	if _, _, ok := l.score(); ok {
		r.Lines[l.key()] = l.spread
	}
}

// write puts what was measured now into the file. Lines that were not measured keep what was recorded of them on the
// same machine.
func (r *records) write(file string, now *record) error {
	if old := r.find(now.Scale, now.Sockets); old != nil {
		for key, was := range old.Lines {
			if _, again := now.Lines[key]; !again && old.Machine == now.Machine {
				now.Lines[key] = was
			}
		}
		r.Records = slices.DeleteFunc(r.Records, func(one *record) bool { return one == old })
	}
	r.Records = append(r.Records, now)
	slices.SortFunc(r.Records, func(a, b *record) int { return strings.Compare(fmt.Sprint(a.Scale), fmt.Sprint(b.Scale)) })
	var text bytes.Buffer
	e := json.NewEncoder(&text)
	e.SetIndent("", "\t")
	if err := e.Encode(r); err != nil {
		return err
	}
	return os.WriteFile(file, text.Bytes(), 0o644)
}

// machine names the processor, as far as the system tells.
func machine() string {
	name := runtime.GOARCH
	text, _ := os.ReadFile("/proc/cpuinfo") // elsewhere the architecture must do
	for l := range strings.Lines(string(text)) {
		if key, value, ok := strings.Cut(l, ":"); ok && strings.TrimSpace(key) == "model name" {
			name = strings.TrimSpace(value)
			break
		}
	}
	return fmt.Sprintf("%d × %s", runtime.NumCPU(), name)
}

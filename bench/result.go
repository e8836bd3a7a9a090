package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// result is what one run says of one thing.
type result struct {
	name    string
	walgate float64
	bare    float64 // 0: there is nothing to compare with
	unit    string
	less    bool    // less is better
	wanted  float64 // what must be reached, 0: nothing in particular
	share   float64 // the ratio that must be reached, 0: none in particular
	note    string  // of the run that it came from
}

// ratio is how near walgate comes to the bare limit; 0 where there is none.
func (r result) ratio() float64 {
	switch {
	case r.bare <= 0 || r.walgate <= 0:
		return 0
	case r.less:
		return r.bare / r.walgate
	}
	return r.walgate / r.bare
}

// score is what later runs are compared by: the ratio, or memory as it is, which depends little on the machine's speed.
// less says that less of it is better.
func (r result) score() (value float64, less, ok bool) {
	if v := r.ratio(); v > 0 {
		return v, false, true
	}
	return r.walgate, true, r.walgate > 0 && (r.unit == "MB" || r.unit == "KB")
}

// line is one line of the table: the medians of a result over the runs, and how far its score spread.
type line struct {
	path string
	result
	median float64 // of the ratios; the medians of the two columns may come from different runs
	spread spread
}

func (l line) key() string { return l.path + ": " + l.name }

// summarise makes a line of each result, whose runs are all[run][result]. The note is that of walgate's median.
func summarise(path string, all [][]result) []line {
	var lines []line
	for i := range all[0] {
		runs := make([]result, len(all))
		var ratios, scores, bares []float64
		for n := range all {
			r := all[n][i]
			runs[n] = r
			bares, ratios = append(bares, r.bare), append(ratios, r.ratio())
			if v, _, ok := r.score(); ok {
				scores = append(scores, v)
			}
		}
		slices.SortFunc(runs, func(a, b result) int { return cmp.Compare(a.walgate, b.walgate) })
		l := line{path: path, result: runs[len(runs)/2], median: median(ratios), spread: spreadOf(scores)}
		l.bare = median(bares)
		lines = append(lines, l)
	}
	return lines
}

func median(values []float64) float64 {
	if len(values) == 0 {
		return 0
	}
	slices.Sort(values)
	return values[len(values)/2]
}

// row prints the line for a Markdown table.
func (l line) row(recorded string) string {
	bare, ratio := "", ""
	if l.median > 0 {
		bare, ratio = number(l.bare), fmt.Sprintf("%.2f", l.median)
	}
	return fmt.Sprintf("| %s | %s | %s | %s | %s | %s | %s | %s |", l.key(), number(l.walgate), bare, l.unit, ratio, recorded, l.mark(), l.note)
}

// mark says what is wanted and whether it was reached.
func (l line) mark() string {
	var parts []string
	missed := false
	if l.wanted > 0 && l.less {
		parts = append(parts, "≤ "+number(l.wanted))
		missed = l.walgate > l.wanted
	} else if l.wanted > 0 {
		parts = append(parts, "≥ "+number(l.wanted))
		missed = l.walgate < l.wanted
	}
	if l.share > 0 {
		parts = append(parts, fmt.Sprintf("ratio ≥ %.2f", l.share))
		missed = missed || l.median < l.share
	}
	if missed {
		parts = append(parts, "**MISSED**")
	}
	return strings.Join(parts, ", ")
}

// number prints three digits or so.
func number(v float64) string {
	switch {
	case v >= 10_000:
		return fmt.Sprintf("%.0fk", v/1000)
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

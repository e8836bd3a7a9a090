// Command bench measures walgate's main paths on a private PostgreSQL, each beside its bare limit: the least program
// that does the physical part of the same work on the same machine in the same run.
//
// The walgate that is measured is the real binary, built from this tree and run as a process of its own with a
// configuration file. A ratio of 1.00 stands at the limit, lower is further from it, for rates and latencies alike.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// result is one line of the table.
type result struct {
	name    string
	walgate float64
	bare    float64 // 0: there is nothing to compare with
	unit    string
	less    bool   // less is better
	note    string // of the run that it came from
}

// path is one of the things to measure; run measures it once.
type path struct {
	name string
	what string
	run  func(ctx context.Context, b *bench) ([]result, error)
}

var paths = []path{
	{"drain", "a backlog of inserts, 1000 a transaction, into the log", runDrain},
	{"updates", "a backlog of one-row transactions into the log", runUpdates},
	{"large", "one transaction of all rows into the log", runLarge},
	{"latency", "from sending COMMIT to the client's frame", runLatency},
	{"full", "a full resync over HTTP", runFull},
	{"pull", "a page of the few changes that a caller may see", runPull},
	{"fanout", "one change to many sockets", runFanOut},
}

func main() {
	if len(os.Args) > 1 && os.Args[1] == bareFanOutCommand { // The limit of fan-out needs a process of its own too.
		if err := serveBareFanOut(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	var o options
	flag.IntVar(&o.rows, "rows", 200_000, "rows of a run; updates uses a fifth of them, pull up to ten times as many")
	flag.IntVar(&o.runs, "runs", 1, "runs of each path; the table shows the medians")
	flag.IntVar(&o.major, "pg", 0, "PostgreSQL's major version; 0: the newest on this machine")
	flag.StringVar(&o.binary, "binary", "", "walgate binary to measure; empty: build this tree's")
	only := flag.String("run", "", "paths to measure, with commas; empty: all of "+names())
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o, *only); err != nil {
		stop()
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func names() string {
	var all []string
	for _, p := range paths {
		all = append(all, p.name)
	}
	return strings.Join(all, ",")
}

func run(ctx context.Context, o options, only string) (err error) {
	chosen := paths
	if only != "" {
		want := strings.Split(only, ",")
		chosen = slices.DeleteFunc(slices.Clone(paths), func(p path) bool { return !slices.Contains(want, p.name) })
		if len(chosen) != len(want) {
			return fmt.Errorf("-run %s names a path that doesn't exist: there are %s", only, names())
		}
	}
	if o.rows < 1000 || o.runs < 1 {
		return errors.New("-rows must be 1000 or more, -runs 1 or more")
	}
	began := time.Now()
	b, err := newBench(ctx, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	fmt.Printf("PostgreSQL %s, %s, %s/%s, %d CPUs, %d rows, %d run(s)\n\n",
		b.version, runtime.Version(), runtime.GOOS, runtime.GOARCH, runtime.NumCPU(), o.rows, o.runs)
	fmt.Println("| path | walgate | bare limit | unit | ratio | |\n|---|---:|---:|---|---:|---|")
	for _, p := range chosen {
		results, err := measure(ctx, b, p)
		if err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
		for _, r := range results {
			fmt.Println(r.row(p.name))
		}
	}
	fmt.Printf("\n%s in all\n", time.Since(began).Round(time.Second))
	return nil
}

// measure runs a path as often as asked and returns the run whose ratio is the median, line by line.
func measure(ctx context.Context, b *bench, p path) ([]result, error) {
	var lines [][]result
	for n := range b.runs {
		fmt.Fprintf(os.Stderr, "%s: %s, run %d\n", p.name, p.what, n+1)
		results, err := p.run(ctx, b)
		if err != nil {
			return nil, err
		}
		for i, r := range results {
			if n == 0 {
				lines = append(lines, nil)
			}
			lines[i] = append(lines[i], r)
		}
	}
	var medians []result
	for _, line := range lines {
		medians = append(medians, medianOf(line))
	}
	return medians, nil
}

// medianOf takes the medians of both columns on their own; the note is that of walgate's.
func medianOf(line []result) result {
	slices.SortFunc(line, func(a, b result) int { return compare(a.bare, b.bare) })
	bare := line[len(line)/2].bare
	slices.SortFunc(line, func(a, b result) int { return compare(a.walgate, b.walgate) })
	m := line[len(line)/2]
	m.bare = bare
	return m
}

func compare(a, b float64) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

func (r result) row(path string) string {
	bare, ratio := "", ""
	if r.bare > 0 && r.walgate > 0 {
		share := r.walgate / r.bare
		if r.less {
			share = r.bare / r.walgate
		}
		bare, ratio = number(r.bare), fmt.Sprintf("%.2f", share)
	}
	return fmt.Sprintf("| %s: %s | %s | %s | %s | %s | %s |", path, r.name, number(r.walgate), bare, r.unit, ratio, r.note)
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

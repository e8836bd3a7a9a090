// Command bench measures walgate's main paths on a private PostgreSQL, each beside its bare limit: the least program
// that does the physical part of the same work on the same machine in the same run.
//
// The walgate that is measured is the real binary, built from this tree and run as a process of its own with a
// configuration file. A ratio of 1.00 stands at the limit, lower is further from it, for rates and latencies alike.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// path is one of the things to measure; run measures it once.
type path struct {
	name string
	what string
	run  func(ctx context.Context, b *bench) ([]result, error)
	logs bool // it uses the big logs, which are kept until a path comes that doesn't
}

var paths = []path{
	{"drain", "a backlog of inserts, 1000 a transaction, into the log", runDrain, false},
	{"updates", "a backlog of one-row transactions into the log", runUpdates, false},
	{"live", "one-row transactions by eight clients, under way", runLive, false},
	{"large", "one transaction of all rows into the log", runLarge, false},
	{"latency", "from sending COMMIT to the client's frame", runLatency, false},
	{"full", "a full resync over HTTP", runFull, false},
	{"pull", "a page of the few changes that a caller may see", runPull, true},
	{"start", "from the start of the process to /readyz", runStart, true},
	{"storm", "memory: many clients pull at once after a restart", runStorm, true},
	{"fanout", "one change to many sockets, and what idle sockets hold", runFanOut, false},
	{"one", "a change for one of few and of many sockets", runOne, false},
	{"push", "clients that push, and wait for their versions", runPush, false},
	{"references", "a backlog of inserts and one of updates, with a reference in each row", runReferences, false},
	{"files", "uploads and downloads beside a bare copy over HTTP", runFiles, false},
	{"manifest", "a manifest of the few operations that are new", runManifest, false},
	{"huge", "memory: one transaction of twice as many rows", runHuge, false},
	{"giant", "memory: a row of 50 MB on every way", runGiant, false},
	{"slow", "memory: sockets that don't read for a while", runSlow, false},
	{"remote", "from COMMIT to the frame on another instance, over Redis", runRemote, false},
	{"fleet", "one change to the sockets of three instances", runFleet, false},
	{"bus", "what telling another instance costs the tail", runBus, false},
	{"standing", "what one more idle instance costs", runStanding, false},
	{"isolation", "what others' latency makes of one that misbehaves", runIsolation, false},
}

// fullScale is the scale of the figures in docs/performance.md.
const fullScale = 1

func main() {
	if len(os.Args) > 1 && os.Args[1] == bareFanOutCommand { // The limit of fan-out needs a process of its own too.
		if err := serveBareFanOut(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if len(os.Args) > 2 && os.Args[1] == bareFilesCommand {
		if err := serveBareFiles(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	var o options
	flag.Float64Var(&o.scale, "scale", 0.2, "size of the work: 1 is a backlog of 500,000 rows, a log of 5 million, a resync of a million")
	full := flag.Bool("full", false, "the same as -scale 1")
	flag.IntVar(&o.sockets, "sockets", 10_000, "WebSockets of the largest fan-out")
	flag.IntVar(&o.runs, "runs", 1, "runs of each path; the table shows the medians")
	flag.IntVar(&o.major, "pg", 0, "PostgreSQL's major version; 0: the newest on this machine")
	flag.StringVar(&o.binary, "binary", "", "walgate binary to measure; empty: build this tree's")
	flag.StringVar(&o.recorded, "recorded", "bench/recorded.json", "file with the ratios to compare with")
	flag.BoolVar(&o.record, "record", false, "write the ratios into that file; needs -runs 3 or more, for their spread is the noise")
	flag.StringVar(&o.into, "into", "", "document to put the table into, such as docs/performance.md, between its lines \"figures: begin\" and \"figures: end\"")
	flag.BoolVar(&o.strict, "strict", false, "exit with 1 where a ratio is worse than the recorded one by more than its noise")
	only := flag.String("run", "", "paths to measure, with commas; empty: all of "+names())
	flag.Parse()
	if *full {
		o.scale = fullScale
	}
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

func choose(only string) ([]path, error) {
	if only == "" {
		return paths, nil
	}
	want := strings.Split(only, ",")
	chosen := slices.DeleteFunc(slices.Clone(paths), func(p path) bool { return !slices.Contains(want, p.name) })
	if len(chosen) != len(want) {
		return nil, fmt.Errorf("-run %s names a path that doesn't exist, or one twice: there are %s", only, names())
	}
	return chosen, nil
}

func run(ctx context.Context, o options, only string) (err error) {
	chosen, err := choose(only)
	if err != nil {
		return err
	}
	if o.scale < 0.001 || o.runs < 1 || o.sockets < 100 {
		return errors.New("-scale must be 0.001 or more, -sockets 100 or more, -runs 1 or more")
	}
	if o.record && o.runs < 3 {
		return errors.New("-record needs -runs 3 or more: the spread of the runs is the noise that later runs are allowed")
	}
	recorded, err := readRecorded(o.recorded)
	if err != nil {
		return err
	}
	began := time.Now()
	b, err := newBench(ctx, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	var figures bytes.Buffer
	out := io.MultiWriter(os.Stdout, &figures)
	fmt.Fprintf(out, "%s: PostgreSQL %s, %s, %s/%s, %s, scale %g, %d sockets, %d run(s).\n\n",
		time.Now().UTC().Format(time.DateOnly), b.version, runtime.Version(), runtime.GOOS, runtime.GOARCH, machine(), o.scale, o.sockets, o.runs)
	before := recorded.find(o.scale, o.sockets)
	if before != nil {
		fmt.Fprintf(out, "Recorded on %s: %s, %d runs.\n\n", before.Date, before.Machine, before.Runs)
	}
	fmt.Fprintln(out, "| path | walgate | bare limit | unit | ratio | recorded | wanted | |\n|---|---:|---:|---|---:|---:|---|---|")
	now := &record{Machine: machine(), Date: time.Now().UTC().Format(time.DateOnly), Scale: o.scale, Sockets: o.sockets, Runs: o.runs, Lines: map[string]spread{}}
	regressed := 0
	for _, p := range chosen {
		if !p.logs { // their slots would hold back the WAL of all that follows
			if err := b.dropLogs(ctx); err != nil {
				return err
			}
		}
		lines, err := measure(ctx, b, p)
		if err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
		for _, l := range lines {
			verdict, worse := before.judge(l)
			if worse {
				regressed++
			}
			fmt.Fprintln(out, l.row(verdict))
			now.add(l)
		}
	}
	fmt.Printf("\n%s in all\n", time.Since(began).Round(time.Second))
	if o.into != "" {
		if err := putInto(o.into, figures.Bytes()); err != nil {
			return err
		}
	}
	if o.record {
		return recorded.write(o.recorded, now)
	}
	if regressed > 0 {
		fmt.Printf("\n%d line(s) REGRESSED by more than the noise of the recorded runs\n", regressed)
		if o.strict {
			return fmt.Errorf("%d line(s) regressed", regressed)
		}
	}
	return nil
}

const figuresBegin, figuresEnd = "<!-- figures: begin -->\n", "<!-- figures: end -->\n"

// putInto replaces what a document has between its two marks.
func putInto(file string, figures []byte) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	before, rest, begins := bytes.Cut(text, []byte(figuresBegin))
	_, after, ends := bytes.Cut(rest, []byte(figuresEnd))
	if !begins || !ends {
		return fmt.Errorf("%s lacks the lines %q and %q, between which the table goes", file, strings.TrimSpace(figuresBegin), strings.TrimSpace(figuresEnd))
	}
	return os.WriteFile(file, slices.Concat(before, []byte(figuresBegin), figures, []byte(figuresEnd), after), 0o644)
}

// measure runs a path as often as asked.
func measure(ctx context.Context, b *bench, p path) ([]line, error) {
	var all [][]result
	for n := range b.runs {
		fmt.Fprintf(os.Stderr, "%s: %s, run %d\n", p.name, p.what, n+1)
		results, err := p.run(ctx, b)
		if err != nil {
			return nil, err
		}
		all = append(all, results)
	}
	return summarise(p.name, all), nil
}

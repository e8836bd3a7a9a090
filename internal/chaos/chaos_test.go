package chaos

import (
	"flag"
	"os"
	"strconv"
	"testing"

	"github.com/walgate/walgate/internal/built"
	"github.com/walgate/walgate/internal/pgserver"
	"github.com/walgate/walgate/internal/redisserver"
)

var (
	chaosSeed     = flag.Uint64("seed", 1, "first seed of TestChaos")
	chaosRuns     = flag.Int("runs", 0, "runs of TestChaos, one a seed; 0: three, or with -seed one, or as many as begin within -duration")
	chaosDuration = flag.Duration("duration", 0, "TestChaos begins no run later than this")
	chaosRounds   = flag.Int("rounds", 0, "rounds of each run of TestChaos; 0: two")
	chaosClients  = flag.Int("clients", 0, "clients of each run of TestChaos; 0: six")
	chaosWriters  = flag.Int("writers", 0, "writers of each run of TestChaos; 0: four")
	chaosEvents   = flag.Bool("events", false, "TestChaos tells all that happens, as it happens")
	chaosReports  = flag.String("reports", "", "file to which TestChaos appends a line of JSON for each run")
)

// TestChaos runs the fleet under the faults of some seeds: go test ./internal/chaos -run Chaos -seed 7, or -runs 1000, or
// -duration 1h; -parallel says how many run at the same time.
func TestChaos(t *testing.T) {
	o := options(t)
	o.Seed, o.Runs, o.Duration = *chaosSeed, *chaosRuns, *chaosDuration
	o.Rounds, o.Clients, o.Writers = *chaosRounds, *chaosClients, *chaosWriters
	o.Replay = replay()
	if seeded := isSet("seed"); o.Runs == 0 && o.Duration == 0 && !seeded {
		o.Runs = 3
	}
	o.Parallel = 2
	if isSet("test.parallel") {
		n, err := strconv.Atoi(flag.Lookup("test.parallel").Value.String())
		if err != nil {
			t.Fatal(err)
		}
		o.Parallel = n
	}
	if *chaosEvents {
		o.Event = func(what string) { t.Log(what) }
	}
	o.Report = func(r Report) {
		t.Logf("%s", r)
		if *chaosReports != "" {
			report(t, *chaosReports, r)
		}
		if !r.OK {
			t.Errorf("seed %d: %s\n%s", r.Seed, r.Error, r.Story)
		}
	}
	if _, err := Run(t.Context(), o); err != nil {
		t.Fatal(err)
	}
}

// replay is the command that runs a seed as this test was told to.
func replay() string {
	var major, also string
	if v := os.Getenv("WALGATE_TEST_PG"); v != "" {
		major = "WALGATE_TEST_PG=" + v + " "
	}
	for _, name := range []string{"rounds", "clients", "writers"} {
		if isSet(name) {
			also += " -" + name + " " + flag.Lookup(name).Value.String()
		}
	}
	return major + "go test ./internal/chaos -run Chaos -seed %d" + also
}

func isSet(name string) (set bool) {
	flag.Visit(func(f *flag.Flag) { set = set || f.Name == name })
	return set
}

// report appends a line.
func report(t *testing.T, path string, r Report) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err == nil {
		_, err = f.WriteString(r.String() + "\n")
	}
	if err == nil {
		err = f.Close()
	}
	if err != nil {
		t.Error(err)
	}
}

// options are those of the built-in world on this machine.
func options(t *testing.T) Options {
	t.Helper()
	binary, err := built.Gateway()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := redisserver.Find(); err != nil {
		t.Fatal(err)
	}
	install, err := pgserver.TestInstall(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	specs, err := BuiltinSpecs()
	if err != nil {
		t.Fatal(err)
	}
	return Options{Binary: binary, Failpoints: true, Install: install, Redis: true, FakeTime: FindFakeTime(), Schema: BuiltinSchema, Collections: specs}
}

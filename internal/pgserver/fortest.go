package pgserver

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// TestMajorEnv names the environment variable that chooses the PostgreSQL major version of the tests.
const TestMajorEnv = "WALGATE_TEST_PG"

const (
	defaultTestMajor = 15
	cleanupLimit     = 30 * time.Second
)

// shared is the one server of this test binary, started by the first test that asks for it.
var shared struct {
	sync.Mutex
	server *Server
	err    error
}

// Main runs a package's tests, stops the server that they shared, and then fails if a goroutine was left behind. Every
// package whose tests use a server calls it from TestMain: os.Exit(pgserver.Main(m)).
func Main(m *testing.M, ignore ...goleak.Option) int { return MainThen(m, func() {}, ignore...) }

// MainThen is Main of a package whose tests share other servers too: stop ends them after the tests.
func MainThen(m *testing.M, stop func(), ignore ...goleak.Option) int {
	code := m.Run()
	stop()
	if err := closeShared(); err != nil {
		fmt.Fprintln(os.Stderr, "stop the tests' PostgreSQL:", err)
		code = max(code, 1)
	}
	if code != 0 {
		return code // A failed test may well leave goroutines; its own message is the one to read.
	}
	if err := goleak.Find(ignore...); err != nil {
		fmt.Fprintln(os.Stderr, "goroutines left behind by the tests:", err)
		return 1
	}
	return 0
}

func closeShared() error {
	shared.Lock()
	defer shared.Unlock()
	if shared.server == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), cleanupLimit)
	defer cancel()
	server := shared.server
	shared.server = nil
	return server.Close(ctx)
}

// ForTest returns the server that all tests of this binary share; stopping or crashing it would fail the others, see
// StartForTest. WALGATE_TEST_PG chooses the major version; the default is 15, or the lowest that is found. Without any
// PostgreSQL the test fails: a skipped test would look like a passed one.
func ForTest(t testing.TB) *Server {
	t.Helper()
	shared.Lock()
	defer shared.Unlock()
	if shared.server == nil && shared.err == nil {
		shared.server, shared.err = startShared(t.Context())
	}
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.server
}

// startShared starts the shared server. It must outlive the test that happens to be first, hence WithoutCancel.
func startShared(ctx context.Context) (*Server, error) {
	ctx = context.WithoutCancel(ctx)
	install, err := TestInstall(ctx)
	if err != nil {
		return nil, err
	}
	return Start(ctx, Options{Install: install, Fast: true})
}

// StartForTest starts a server for this test alone, to be stopped and crashed at will, and closes it at cleanup. It is
// Fast, and without Install or Major of the tests' version.
func StartForTest(t testing.TB, o Options) *Server {
	t.Helper()
	o.Fast = true
	if o.Install.Bin == "" && o.Major == 0 {
		install, err := TestInstall(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		o.Install = install
	}
	server, err := Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), cleanupLimit)
		defer cancel()
		if err := server.Close(ctx); err != nil {
			t.Errorf("close the test's PostgreSQL: %v", err)
		}
	})
	return server
}

// TestInstall chooses the binaries that the tests run on, as ForTest says.
func TestInstall(ctx context.Context) (Install, error) {
	installs, err := Find(ctx)
	if err != nil {
		return Install{}, err
	}
	if text := os.Getenv(TestMajorEnv); text != "" {
		major, err := strconv.Atoi(text)
		if err != nil {
			return Install{}, fmt.Errorf("%s is %q: it must be a major version such as 15", TestMajorEnv, text)
		}
		return pick(installs, major)
	}
	if install, err := pick(installs, defaultTestMajor); err == nil {
		return install, nil
	}
	return slices.MinFunc(installs, func(a, b Install) int { return a.Major - b.Major }), nil
}

// Database creates an empty database for this test alone and returns its connection string. Cleanup drops it with
// its replication slots and whatever is still connected to it.
func (s *Server) Database(t testing.TB) string {
	t.Helper()
	name := databaseName(t.Name())
	if err := s.CreateDatabase(t.Context(), name); err != nil {
		t.Fatalf("create the test's database: %v", err)
	}
	t.Cleanup(func() {
		if err := s.DropDatabase(context.Background(), name); err != nil {
			t.Errorf("drop the test's database %s: %v", name, err)
		}
	})
	return s.DSN(name)
}

// databaseName makes a unique name that still shows in the server's log which test it belongs to.
func databaseName(test string) string {
	readable := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return '_'
	}, strings.ToLower(test))
	const longest = 40 // Names are cut at 63 bytes.
	if len(readable) > longest {
		readable = readable[:longest]
	}
	return readable + "_" + strings.ToLower(rand.Text()[:12])
}

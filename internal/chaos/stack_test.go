package chaos

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/walgate/walgate/policies"
)

// TestPlanFollowsFromSeed: what happens, when and on what follows from the seed alone; seeds differ; and within some hundred
// seeds every fault is dealt, on every kind of setup.
func TestPlanFollowsFromSeed(t *testing.T) {
	t.Parallel()
	o := Options{Redis: true, FakeTime: "there", Failpoints: true}.withDefaults()
	o.Install.Major = 17
	text := func(seed uint64) string {
		w := choose(o, seed)
		out := w.String()
		for _, round := range schedule(o, seed, w) {
			for _, s := range round {
				out += fmt.Sprintf("; %s %s %d", s.at, s.fault.name, s.rng().Uint64())
			}
		}
		return out
	}
	dealt, setups := map[string]bool{}, map[string]bool{}
	for seed := range uint64(600) {
		if a, b := text(seed), text(seed); a != b {
			t.Fatalf("seed %d twice:\n%s\n%s", seed, a, b)
		}
		if text(seed) == text(seed+1) {
			t.Errorf("seeds %d and %d do the same", seed, seed+1)
		}
		w := choose(o, seed)
		for _, part := range strings.Split(w.String(), ", ") {
			setups[part] = true
		}
		for _, round := range schedule(o, seed, w) {
			for _, s := range round {
				dealt[s.fault.name] = true
				if s.fault.needs != nil && !s.fault.needs(o, w) {
					t.Errorf("seed %d deals %q, which %s can't do", seed, s.fault.name, w)
				}
			}
		}
	}
	for _, f := range faults {
		if !dealt[f.name] {
			t.Errorf("%q is never dealt", f.name)
		}
	}
	if len(setups) != 9 {
		t.Errorf("setups have %v", setups)
	}
}

// TestFaultsAreDocumented: docs/chaos.md names every fault.
func TestFaultsAreDocumented(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile(filepath.Join("..", "..", "docs", "chaos.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range faults {
		for _, word := range strings.FieldsFunc(f.name, func(r rune) bool { return r == ' ' || r == ',' }) {
			if !strings.Contains(string(text), word) {
				t.Errorf("docs/chaos.md doesn't have %q of the fault %q", word, f.name)
			}
		}
	}
}

// TestBalancer: requests go round all that are ready and to nobody else, each to another.
func TestBalancer(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	ready := map[string]bool{"1": true, "2": true, "3": false}
	seen := map[string]int{}
	var fronts []string
	for _, name := range []string{"1", "2", "3"} {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			mu.Lock()
			defer mu.Unlock()
			if r.URL.Path == "/readyz" && !ready[name] {
				w.WriteHeader(http.StatusServiceUnavailable)
			} else if r.URL.Path != "/readyz" {
				seen[name]++
			}
		}))
		t.Cleanup(s.Close)
		fronts = append(fronts, strings.TrimPrefix(s.URL, "http://"))
	}
	b, err := startBalancer(fronts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	get := func() int {
		res, err := direct.Get(b.base + "/x")
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		return res.StatusCode
	}
	until := func(what string, done func() bool) {
		t.Helper()
		for end := time.Now().Add(10 * time.Second); !done(); {
			if !sleep(t.Context(), 10*time.Millisecond) || time.Now().After(end) {
				t.Fatalf("not within 10 s: %s", what)
			}
		}
	}
	until("two are ready", func() bool { return b.backends[0].ready.Load() && b.backends[1].ready.Load() })
	for range 10 {
		if code := get(); code != http.StatusOK {
			t.Errorf("answered %d", code)
		}
	}
	mu.Lock()
	if seen["1"] < 3 || seen["2"] < 3 || seen["3"] != 0 {
		t.Errorf("requests went to %v", seen)
	}
	ready["1"], ready["2"] = false, false
	mu.Unlock()
	until("nobody is ready any more", func() bool { return get() == http.StatusServiceUnavailable })
}

// TestHarnessFindsWhatGatewaysDo: an end that nobody asked for, a start that is refused, and a bad word in the log.
func TestHarnessFindsWhatGatewaysDo(t *testing.T) {
	t.Parallel()
	for name, v := range map[string]struct {
		script string
		want   string // of what was found
		starts int    // at least so many
	}{
		"ends by itself once it served": {"echo msg=serving listen=x; exit 1", "ended by itself", 1},
		"refuses to start":              {"echo no; exit 1", "", 3},
		"writes of a race":              {"echo WARNING: DATA RACE; sleep 60", "DATA RACE", 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			binary := filepath.Join(dir, "gateway")
			if err := os.WriteFile(binary, []byte("#!/bin/sh\necho start\n"+v.script+"\n"), 0o700); err != nil {
				t.Fatal(err)
			}
			found := make(chan string, 10)
			i := &instance{name: "gateway 1", binary: binary, log: filepath.Join(dir, "log"), hold: newToken(),
				broken: func(format string, a ...any) { found <- fmt.Sprintf(format, a...) }}
			i.start("")
			for end := time.Now().Add(10 * time.Second); ; {
				text, err := os.ReadFile(i.log)
				if err == nil && strings.Count(string(text), "start\n") >= v.starts && (v.want != "DATA RACE" || i.faultsInLog() != nil) {
					break
				}
				if !sleep(t.Context(), 10*time.Millisecond) || time.Now().After(end) {
					t.Fatalf("the log has %q", text)
				}
			}
			if v.want == "ended by itself" {
				select {
				case what := <-found:
					if !strings.Contains(what, v.want) {
						t.Errorf("found %q", what)
					}
				case <-time.After(10 * time.Second):
					t.Error("found nothing")
				}
			}
			if err := i.end(os.Kill); err != nil {
				t.Error(err)
			}
			if err := i.faultsInLog(); (err != nil) != (v.want == "DATA RACE") {
				t.Errorf("found in the log: %v", err)
			}
			if len(found) > 0 {
				t.Errorf("found %q", <-found)
			}
		})
	}
}

// TestCollectionsAreSaidAsConfiguration: nothing of a policy is lost on its way into the gateways' configuration.
func TestCollectionsAreSaidAsConfiguration(t *testing.T) {
	t.Parallel()
	full := policies.Spec{Table: "public.x", Columns: policies.ColumnsSpec{Exclude: []string{"a"}}, Scope: []map[string]string{{"b": "claims.b"}}, Where: "row.c < 1",
		Read: policies.ReadSpec{Roles: []string{"r"}}, SoftDelete: "d", Lossless: true, ReplicaIdentity: "full", Retention: time.Hour,
		Write:    &policies.WriteSpec{Roles: []string{"w"}, Operations: []string{"insert"}, Columns: []string{"e"}, Set: map[string]string{"b": "claims.b"}, Check: "true"},
		Conflict: policies.Function, ConflictFunction: "public.f", OnDeleted: "delete_wins",
		Attachments: []policies.AttachmentSpec{{Column: "g", Path: "$.h"}, {Column: "i", Pattern: "x+"}}}
	i := &instance{config: filepath.Join(t.TempDir(), "config.yaml")}
	if err := i.writeConfig(baseConfig(map[string]policies.Spec{"x": full}, "/blobs")); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(i.config)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"exclude"`, `"b": "claims.b"`, `"where": "row.c < 1"`, `"soft_delete"`, `"lossless": true`, `"replica_identity": "full"`, `"retention": "1h0m0s"`,
		`"operations"`, `"check": "true"`, `"function": "public.f"`, `"on_deleted": "delete_wins"`, `"path": "$.h"`, `"pattern": "x+"`} {
		if !strings.Contains(string(text), want) {
			t.Errorf("the configuration lacks %s:\n%s", want, text)
		}
	}
}

package redisserver

import (
	"os"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	code := m.Run()
	CloseShared()
	if err := goleak.Find(); code == 0 && err != nil {
		println(err.Error())
		code = 1
	}
	os.Exit(code)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestServer(t *testing.T) {
	t.Parallel()
	s := StartForTest(t, Options{Settings: []string{"maxclients 100"}})
	do := func(want string, args ...string) {
		t.Helper()
		if got, err := s.Do(t.Context(), args...); err != nil || got != want {
			t.Fatalf("%v: got %q, %v, want %q", args, got, err, want)
		}
	}
	do("OK", "SET", "a", "1\r\n2")
	do("1\r\n2", "GET", "a")
	do("1", "INCR", "n")
	do("maxclients\n100", "CONFIG", "GET", "maxclients")
	if _, err := s.Do(t.Context(), "NOSUCH"); err == nil {
		t.Error("an error answer is no error")
	}
	must(t, s.Kill())
	if _, err := s.Do(t.Context(), "PING"); err == nil {
		t.Error("a killed server answers")
	}
	must(t, s.Restart(t.Context()))
	do("", "GET", "a")
	must(t, s.Pause())
	must(t, s.Resume())
	do("PONG", "PING")
}

func TestShared(t *testing.T) {
	t.Parallel()
	if a, b := ForTest(t), ForTest(t); a != b {
		t.Error("two shared servers")
	}
}

func TestFaults(t *testing.T) {
	t.Parallel()
	if _, err := Start(t.Context(), Options{Settings: []string{"nosuchsetting 1"}}); err == nil {
		t.Error("a server with a setting that doesn't exist started")
	}
}

package redisserver

import (
	"sync"
	"testing"
)

// shared is the one server of this test binary.
var shared struct {
	sync.Mutex
	server *Server
	err    error
}

// ForTest returns the server that all tests of this binary share; they keep apart by the names of their keys. It ends with
// the process, or with CloseShared. Without redis-server the test fails: a skipped test would look like a passed one.
func ForTest(t testing.TB) *Server {
	t.Helper()
	shared.Lock()
	defer shared.Unlock()
	if shared.server == nil && shared.err == nil {
		shared.server, shared.err = Start(t.Context(), Options{})
	}
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.server
}

// CloseShared ends the server of ForTest, if there is one: before a TestMain looks for goroutines that were left behind.
func CloseShared() {
	shared.Lock()
	defer shared.Unlock()
	if shared.server != nil {
		_ = shared.server.Close() // it dies with this process anyway
		shared.server = nil
	}
}

// StartForTest starts a server for this test alone, to be stopped and paused at will, and closes it at cleanup.
func StartForTest(t testing.TB, o Options) *Server {
	t.Helper()
	s, err := Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close the test's redis-server: %v", err)
		}
	})
	return s
}

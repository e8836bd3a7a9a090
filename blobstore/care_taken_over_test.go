package blobstore

import (
	"context"
	"errors"
	"testing"
	"time"
)

// TestCareIsTakenOver: when the instance that looks after the store is lost in the middle of a round, its lock goes with its
// connection: another one takes over and brings the round to its end, and the lost one, should it live, does nothing more.
func TestCareIsTakenOver(t *testing.T) {
	t.Parallel()
	c := newCaring(t)
	c.file("photo", "bytes")
	key := c.key("photo")
	c.round(RoundOptions{})
	c.age()
	inside, done := make(chan struct{}), make(chan struct{})
	c.names.passes, c.names.onPass = 0, func(n int) {
		if n == 1 {
			close(inside)
			<-done
		}
	}
	first := make(chan error, 1)
	go func() {
		_, err := c.care.Round(context.WithoutCancel(t.Context()), RoundOptions{})
		first <- err
	}()
	<-inside
	other := caringOf(t, c.fixture)
	if _, err := other.care.Round(t.Context(), RoundOptions{}); !errors.Is(err, ErrCareBusy) {
		t.Errorf("a second round beside the first: %v", err)
	}
	var ended bool
	if err := c.pool.QueryRow(t.Context(), `SELECT bool_and(pg_terminate_backend(pid)) FROM pg_locks WHERE locktype = 'advisory'
		AND classid::bigint << 32 | objid::bigint = $1 AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`, int64(careLock)).Scan(&ended); err != nil || !ended {
		t.Fatalf("the lock has no holder: %v", err)
	}
	deadline := time.Now().Add(time.Minute)
	for {
		_, err := other.care.Round(t.Context(), RoundOptions{})
		if err == nil {
			break
		}
		if !errors.Is(err, ErrCareBusy) || time.Now().After(deadline) {
			t.Fatalf("the other instance: %v", err)
		}
	}
	c.expect("photo", "d noted", "ud")
	close(done)
	if err := <-first; err == nil {
		t.Error("the lost round went on without its lock")
	}
	c.expect("photo", "d noted", "ud")
	if !c.there(key) || c.used() != 5 {
		t.Errorf("bytes there: %t, used %d", c.there(key), c.used())
	}
	other.round(RoundOptions{})
	c.expect("photo", "d gone noted", "ud")
	c.settled()
}

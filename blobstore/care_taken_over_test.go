package blobstore

import (
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
	first, other, done := c.heldRound()
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

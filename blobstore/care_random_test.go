package blobstore

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

const randomFiles, randomSteps = 12, 150

// TestCareUnderEverything lets clients upload, delete and name files, rows be written past them, objects be lost and uploads be
// cut off, while rounds of care run beside them and are cut off at random calls. A file that was named as pushes name files is
// never swept. At the end the store holds exactly the objects of the files that rows name, or that are young, and quotas add up.
func TestCareUnderEverything(t *testing.T) {
	t.Parallel()
	seeds := 4
	if text := os.Getenv("WALGATE_TEST_SEEDS"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil {
			t.Fatalf("WALGATE_TEST_SEEDS: %v", err)
		}
		seeds = n
	}
	for seed := range seeds {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			t.Parallel()
			c := newCaring(t)
			u := &users{caring: c, r: rand.New(rand.NewPCG(uint64(seed), 7)), text: map[string]string{}, firm: map[string]bool{}, lost: map[string]bool{}}
			u.care.now = func() time.Time { return time.Now().Add(48 * time.Hour) } // so that only a record keeps an object
			stop, ended := make(chan struct{}), make(chan struct{})
			go func() {
				defer close(ended)
				u.rounds(rand.New(rand.NewPCG(uint64(seed), 8)), stop)
			}()
			end := sync.OnceFunc(func() { close(stop); <-ended })
			defer end() // also where a step fails
			for range randomSteps {
				u.step()
				u.check()
			}
			end()
			u.settle()
		})
	}
}

// users is what the test knows of what clients and the application did.
type users struct {
	*caring
	r    *rand.Rand
	text map[string]string // by id: what was published last
	firm map[string]bool   // named as a push names a file, since when it must not be swept
	lost map[string]bool   // the store lost its object
}

func (u *users) step() {
	u.t.Helper()
	id := fmt.Sprint("file", u.r.IntN(randomFiles))
	switch u.r.IntN(12) {
	case 0, 1, 2, 3:
		u.send(id, true)
	case 4: // the gateway dies between bytes and record
		p := u.upload("ana", id, fmt.Sprint("half ", u.r.IntN(3)))
		u.exec(`UPDATE walgate.uploads SET expires_at = now() - interval '1 s' WHERE id = $1::text::uuid`, p.Upload.ID)
	case 5, 6:
		u.name(id)
	case 7: // past the gateway
		u.names.set(id, u.r.IntN(2) == 0)
		delete(u.firm, id)
	case 8:
		u.names.set(id, false)
		delete(u.firm, id)
	case 9:
		u.remove(id)
	case 10:
		u.age()
	case 11:
		if _, ok := u.text[id]; ok && u.r.IntN(3) == 0 {
			u.lose(id)
		}
	}
}

// send uploads a text of three, replacing sometimes.
func (u *users) send(id string, mayReplace bool) {
	u.t.Helper()
	subject, text := []string{"ana", "bob"}[u.r.IntN(2)], fmt.Sprint("text ", u.r.IntN(3))
	p := u.upload(subject, id, text)
	if old, err := u.Find(u.t.Context(), id); err == nil && mayReplace && u.r.IntN(2) == 0 {
		p.IfMatch = old.SHA256
	}
	done, err := u.Publish(u.t.Context(), p)
	if err != nil {
		u.t.Fatal(err)
	}
	if done.Outcome == Created || done.Outcome == Replaced {
		u.text[id] = text
		delete(u.lost, id)
	}
	if u.r.IntN(4) > 0 { // else it dies before it has cleared up
		if err := u.Release(u.t.Context(), u.store, p.Upload); err != nil {
			u.t.Fatal(err)
		}
		return
	}
	u.exec(`UPDATE walgate.uploads SET expires_at = now() - interval '1 s' WHERE id = $1::text::uuid`, p.Upload.ID)
}

// name adds a row that names a file, as a push does: under the id's shared lock, if the file is there.
func (u *users) name(id string) {
	u.t.Helper()
	tx, err := u.pool.Begin(u.t.Context())
	if err != nil {
		u.t.Fatal(err)
	}
	defer tx.Rollback(context.WithoutCancel(u.t.Context()))
	var there bool
	if _, err := tx.Exec(u.t.Context(), `SELECT pg_advisory_xact_lock_shared($1)`, LockKey(id)); err != nil {
		u.t.Fatal(err)
	}
	if err := tx.QueryRow(u.t.Context(), `SELECT EXISTS (SELECT FROM walgate.files WHERE attachment_id = $1 AND state <> 'd')`, id).Scan(&there); err != nil {
		u.t.Fatal(err)
	}
	if there {
		u.names.set(id, true)
		u.firm[id] = true
	}
	if err := tx.Commit(u.t.Context()); err != nil {
		u.t.Fatal(err)
	}
}

func (u *users) remove(id string) {
	u.t.Helper()
	f, err := u.Find(u.t.Context(), id)
	if errors.Is(err, ErrNotFound) {
		return
	}
	if err != nil {
		u.t.Fatal(err)
	}
	_, err = u.Remove(u.t.Context(), Removal{AttachmentID: id, EventID: f.EventID, Subject: "ana"})
	if err != nil && !errors.Is(err, ErrNotFound) && !errors.Is(err, ErrChanged) {
		u.t.Fatal(err)
	}
	if err == nil {
		delete(u.text, id)
		delete(u.firm, id)
		delete(u.lost, id)
	}
}

func (u *users) lose(id string) {
	u.t.Helper()
	if err := u.store.Delete(u.t.Context(), u.key(id)); err != nil {
		u.t.Fatal(err)
	}
	u.lost[id] = true
}

// check holds that what was named is there.
func (u *users) check() {
	u.t.Helper()
	for id := range u.firm {
		switch state := u.state(id); {
		case state[0] == 'd':
			u.t.Fatalf("%s, which a row names, is %s with events %s", id, state, u.events(id))
		case u.lost[id]:
		case u.text[id] != u.fixture.text(id):
			u.t.Fatalf("%s holds %q, want %q", id, u.fixture.text(id), u.text[id])
		}
	}
}

// rounds looks after the files until told to stop, and has most rounds cut off: at a call to the store or to the log, by an
// error or by the end of its context.
func (u *users) rounds(r *rand.Rand, stop <-chan struct{}) {
	cut := errors.New("cut off")
	for {
		select {
		case <-stop:
			return
		default:
		}
		ctx, cancel := context.WithCancel(u.t.Context())
		var left atomic.Int64
		left.Store(r.Int64N(80))
		call := func() error {
			n := left.Add(-1)
			if n > 0 {
				return nil
			}
			if n%2 == 0 {
				cancel()
			}
			return cut
		}
		u.names.onPass = func(int) { _ = call() }
		each := func(string) error { return call() }
		u.care.store = &faulty{objects: u.store, onList: func(int) error { return call() }, onSize: each, onDelete: each}
		_, err := u.care.Round(ctx, RoundOptions{Reconcile: true, Force: true})
		if err != nil && !errors.Is(err, cut) && !errors.Is(err, ErrCareBusy) && ctx.Err() == nil {
			u.t.Errorf("a round: %v", err)
		}
		cancel()
		u.awaitLock() // which the server gives back when it notices that the connection has gone
	}
}

func (u *users) awaitLock() {
	err := u.pool.AcquireFunc(u.t.Context(), func(conn *pgxpool.Conn) error {
		_, err := conn.Exec(u.t.Context(), `SELECT pg_advisory_lock($1), pg_advisory_unlock($1)`, int64(careLock))
		return err
	})
	if err != nil {
		u.t.Error(err)
	}
}

// settle lets care come to an end, and holds the store against what rows name.
func (u *users) settle() {
	u.t.Helper()
	u.care.store, u.names.onPass = u.store, nil
	force := RoundOptions{Reconcile: true, Force: true}
	for range 2 { // noted, and deleted
		u.round(force)
		u.age()
	}
	u.round(force)
	u.file("young", "young")
	u.round(force) // returned, or freed
	u.check()
	for id := range u.text {
		state, named := u.state(id)[0], u.names.ids[id]
		if state != 'd' && !named || state == 'u' && u.lost[id] || state == 'm' && !u.lost[id] {
			u.t.Errorf("%s is %s with events %s; a row names it: %t; it was lost: %t", id, u.state(id), u.events(id), named, u.lost[id])
		}
	}
	if n := ask[int](u.fixture, `SELECT count(*) FROM walgate.files WHERE state = 'd' AND NOT bytes_gone`); n > 0 {
		u.t.Errorf("the bytes of %d deleted files are kept", n)
	}
	if n := ask[int](u.fixture, `SELECT count(*) FROM walgate.uploads`); n > 0 {
		u.t.Errorf("%d uploads are left", n)
	}
	var want []string
	for _, id := range append(u.named(), "young") {
		want = append(want, u.key(id))
	}
	slices.Sort(want)
	if got := keys(u.t, u.store, ""); !slices.Equal(got, want) {
		u.t.Errorf("the store holds %v, want %v", got, want)
	}
	for id := range u.lost { // sent again by who has them
		if u.state(id)[0] == 'm' {
			u.publish(u.upload("bob", id, u.text[id]), Created)
		}
	}
	u.settled()
}

// named returns the files that rows name and whose bytes are there.
func (u *users) named() (ids []string) {
	for id := range u.text {
		if u.state(id) == "u" {
			ids = append(ids, id)
		}
	}
	return ids
}

package gateway

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"
)

// TestFleetManifestIsNewest: what one instance has answered for is in the next manifest, whichever instance is asked, also where
// that one has heard nothing of it; and nothing is told twice.
func TestFleetManifestIsNewest(t *testing.T) {
	t.Parallel()
	e := newFileEnv(t, setup{})
	buses := []*farBus{{}, {}}
	f := fleet{e, e.another(t, buses[0].alone()), e.another(t, buses[1].alone())}
	a := tokenFor(t, "a", nil)
	e.exec(t, `INSERT INTO photos (id, owner, file) SELECT i, 'a', i || '.jpg' FROM generate_series(0, 11) i`)
	e.sync(t)
	at := e.manifest(t, a, "c", 0, 0).Current
	for i := range 12 {
		for j, b := range buses { // now they hear where the log is, and then nothing more
			b.set(false, false)
			f[1+j].sync(t)
			b.set(false, true)
		}
		to := f[1+i%2]
		if at = to.manifest(t, a, "c", at, 0).Current; at == 0 {
			t.Fatal("no position")
		}
		id := fmt.Sprint(i, ".jpg")
		e.upload(t, id, "", 1, "a", "")
		e.sync(t) // as the answer to a PUT has waited
		m := to.manifest(t, a, "c", at, 0)
		if want := "download " + id; m.brief() != want {
			t.Fatalf("upload %d: %q, want %q", i, m.brief(), want)
		}
		at = m.Current
		for j := range f {
			if m := f.at(i+j).manifest(t, a, "c", at, 0); m.brief() != "" || m.Current < at {
				t.Fatalf("told twice, or back at %d of %d: %s", m.Current, at, m.brief())
			}
		}
	}
}

// TestFleetManifestPages: a client whose scopes have changed lists everything anew, a page at each instance in turn: no page is
// refused, skipped or told twice, and whoever comes back with the former scopes is told so by each.
func TestFleetManifestPages(t *testing.T) {
	t.Parallel()
	e := newFileEnv(t, setup{})
	f := fleet{e, e.another(t, deaf), e.another(t, deaf)}
	one, two := tokenFor(t, "a", map[string]any{"teams": []int{1}}), tokenFor(t, "a", map[string]any{"teams": []int{2}})
	for i := range 24 {
		e.exec(t, `INSERT INTO photos (id, team, file) VALUES ($1, $2, $3)`, i, i%2+1, fmt.Sprintf("%02d", i))
		e.upload(t, fmt.Sprintf("%02d", i), "", 1, "z", "")
	}
	e.sync(t)
	for i := range f {
		at := f.at(i).manifest(t, one, "c", 0, 0)
		for j := range f { // each remembers what it can
			if m := f.at(j).manifest(t, one, "c", at.Current, 0); m.brief() != "" {
				t.Fatalf("the first scopes at %d: %s", j, m.brief())
			}
		}
		since := int64(0)
		for page := range 12 {
			m := f.at(i+page).manifest(t, two, "c", since, 1)
			if want := fmt.Sprintf("download %02d", 2*page+1); m.brief() != want {
				t.Fatalf("page %d of the listing that began at %d: %s, want %s", page, i, m.brief(), want)
			}
			if again := f.at(i+page+1).manifest(t, two, "c", since, 1); since != 0 && again.brief() != m.brief() {
				t.Fatalf("page %d again: %s", page, again.brief())
			}
			since = m.Current
		}
		for j := range f {
			if m := f.at(i+j).manifest(t, one, "c", since, 0); m.brief() != "full_resync_required scopes_changed" {
				t.Fatalf("back with the first scopes, at %d: %s", i+j, m.brief())
			}
		}
	}
}

// TestFleetManifestFollows: while rows and files are written at random, clients go from instance to instance, which the bus serves
// late, badly or not at all; each client ends with what it gets that begins anew.
func TestFleetManifestFollows(t *testing.T) {
	t.Parallel()
	e := newFileEnv(t, setup{})
	late, bad := &farBus{delay: 20 * time.Millisecond}, &farBus{}
	f := fleet{e, e.another(t, late.alone()), e.another(t, bad.with(50*time.Millisecond))}
	seed := uint64(time.Now().UnixNano())
	w := &fileWriter{e: e, rng: rand.New(rand.NewPCG(seed, 1))}
	stop := make(chan struct{})
	var clients sync.WaitGroup
	for i, subject := range []string{"a", "b", "c"} {
		clients.Go(func() {
			token, client := tokenFor(t, subject, map[string]any{"teams": []int{1}}), fmt.Sprint("client ", i)
			held, since := files{}, int64(0)
			for n, last := 0, false; !last; {
				select {
				case <-stop:
					last = true
				default:
				}
				for more := true; more; n++ {
					m := f.at(i+n).manifest(t, token, client, since, 1+i)
					if m.Resync || m.Current < since {
						t.Errorf("seed %d: client %d is at %d and gets %s, up to %d", seed, i, since, m.brief(), m.Current)
						return
					}
					for _, o := range m.Operations {
						held.take(o)
					}
					since, more = m.Current, m.More
				}
			}
			anew := files{}
			f.at(i).follow(t, anew, token, client, 0, 0)
			if fmt.Sprint(held) != fmt.Sprint(anew) {
				t.Errorf("seed %d: client %d holds %v, and anew %v", seed, i, held, anew)
			}
		})
	}
	for i := 0; i < 150 || bad.losses() == 0 && i < 3000; i++ {
		bad.set(i%3 == 0, i%3 == 1)
		w.step(t)
	}
	e.sync(t)
	close(stop)
	clients.Wait()
	if bad.losses() == 0 {
		t.Error("no message was lost")
	}
}

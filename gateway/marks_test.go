package gateway

import (
	"context"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/policies"
)

// push commits statements as a client's push does and waits for its echo. locals is JSON, or empty.
func (e *env) push(t testing.TB, subject, client, locals, sql string) changelog.Pushed {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	tx, err := e.db.Begin(ctx)
	ok(t, err)
	defer tx.Rollback(context.Background())
	var id int64
	ok(t, tx.QueryRow(ctx, `INSERT INTO walgate.pushes (subject, client_id) VALUES ($1, $2) RETURNING id`, subject, client).Scan(&id))
	_, err = tx.Exec(ctx, sql)
	ok(t, err)
	if locals != "" {
		_, err = tx.Exec(ctx, `INSERT INTO walgate.pushes (subject, client_id, locals) VALUES ($1, $2, $3)`, subject, client, locals)
		ok(t, err)
	}
	done, forget := e.g.hub.awaitPush(id)
	defer forget()
	ok(t, tx.Commit(ctx))
	select {
	case p := <-done:
		if p.ID != id || p.Tx == 0 || p.Last < p.Tx {
			t.Errorf("the echo of push %d is %+v", id, p)
		}
		return p.Pushed
	case <-ctx.Done():
		t.Fatalf("push %d has no echo", id)
	}
	panic("unreachable")
}

// TestPushesAreMarkedForTheirClient: live, caught up and pulled, whatever the bus does with its messages: the client that
// pushed, and nobody else, is shown its marks; all else of the frames is the same for everybody.
func TestPushesAreMarkedForTheirClient(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"", "lost", "late", "stripped"} {
		t.Run("bus "+mode, func(t *testing.T) {
			t.Parallel()
			e := newEnv(t, setup{gateway: func(g *Gateway) { g.hub.every = 20 * time.Millisecond }, bus: func(b changelog.Bus) changelog.Bus {
				return &faultyBus{Bus: b, mode: mode, rng: rand.New(rand.NewPCG(1, 2)), count: map[string]int{}}
			}})
			a, b := tokenFor(t, "a", nil), tokenFor(t, "b", nil)
			since := e.here(t, a)
			mine := e.live(t, a, `,"client_id":"phone \"1\""`)
			others := []*stream{e.live(t, a, ""), e.live(t, a, `,"client_id":"tablet"`), e.live(t, b, `,"client_id":"phone \"1\""`)}
			e.push(t, "a", `phone "1"`, `[{"collection":"news","doc_id":"7","local_id":"ä\"7"},{"collection":"todos","doc_id":"8","local_id":"no"}]`,
				`INSERT INTO news VALUES (7, 'x'), (8, 'y'); DELETE FROM news WHERE id = 8`)
			e.push(t, "a", `phone "1"`, "", `DELETE FROM news WHERE id = -1`) // changes nothing
			e.exec(t, `UPDATE news SET headline = 'by the application' WHERE id = 7`)
			const mark = `,"client_id":"phone \"1\""`
			marks := []string{mark + `,"local_id":"ä\"7"}`, mark + `}`, mark + `}`, ""}
			var plain, marked []string
			for i := range marks {
				f := mine.nextChange(t)
				marked = append(marked, f)
				for _, o := range others {
					got := o.nextChange(t)
					if want := strings.TrimSuffix(f, marks[i]) + map[bool]string{true: "}"}[marks[i] != ""]; got != want || !strings.HasSuffix(f, marks[i]) {
						t.Fatalf("change %d: the client is told %s\nsomebody else   %s\nwant            %s", i, f, got, want)
					}
					plain = append(plain, got)
				}
			}
			e.sync(t)
			again := e.subscribe(t, a, since, `,"client_id":"phone \"1\""`)
			foreign := e.subscribe(t, b, "0", `,"client_id":"phone \"1\"","collections":["news"]`)
			for i := range marks {
				if got := again.nextChange(t); got != marked[i] {
					t.Errorf("live %s\ncaught up %s", marked[i], got)
				}
				if got := foreign.nextChange(t); got != plain[3*i] {
					t.Errorf("another subject caught up with %s\nwant %s", got, plain[3*i])
				}
			}
			page := string(e.get(t, "/sync/pull?"+query("since", since, "client_id", `phone "1"`), a).body)
			// Of 7 only the application's change is left; what the client calls it is not lost with the other.
			if want := strings.TrimSuffix(marked[3], "}") + `,"local_id":"ä\"7"}`; !strings.Contains(page, want) || !strings.Contains(page, marked[2]) || strings.Count(page, `"version"`) != 2 {
				t.Errorf("pulled %s\nwant %s and %s", page, marked[2], want)
			}
			if page := string(e.get(t, "/sync/pull?"+query("since", "0", "collections", "news", "client_id", `phone "1"`), b).body); !strings.Contains(page, `"doc_id":"7"`) || strings.Contains(page, "client_id") || strings.Contains(page, "local_id") {
				t.Errorf("another subject pulled %s", page)
			}
			for _, limit := range []string{"1", "2"} {
				if page := string(e.get(t, "/sync/pull?"+query("since", since, "client_id", `phone "1"`, "limit", limit), a).body); !strings.Contains(page, marked[0]) {
					t.Errorf("a part of the transaction was pulled as %s\nwant %s", page, marked[0])
				}
			}
		})
	}
}

// TestEchoesWithoutStreams: a hub that serves nobody live doesn't pass over what a push waits for.
func TestEchoesWithoutStreams(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{gateway: func(g *Gateway) { g.hub.every = 20 * time.Millisecond }, bus: func(b changelog.Bus) changelog.Bus {
		return &faultyBus{Bus: b, mode: "lost", count: map[string]int{}}
	}})
	first := e.push(t, "a", "phone", "", `INSERT INTO news VALUES (1)`)
	if second := e.push(t, "a", "phone", "", ``); second.Tx <= first.Last {
		t.Errorf("%+v comes after %+v", second, first)
	}
}

// nextChange returns the next frame of a change, as it came.
func (s *stream) nextChange(t testing.TB) string {
	t.Helper()
	for {
		if f := s.next(t); f.Type == "" {
			return string(f.raw)
		}
	}
}

func TestClientIDIsChecked(t *testing.T) {
	t.Parallel()
	e := newEnv(t, setup{})
	a := tokenFor(t, "a", nil)
	for _, id := range []string{strings.Repeat("ä", 256), "a\x00", "\xff"} {
		e.get(t, "/sync/pull?"+query("since", "0", "client_id", id), a).problem(t, InvalidRequest)
	}
	if got := e.get(t, "/sync/pull?"+query("since", "0", "client_id", strings.Repeat("ä", 255)), a); got.status != http.StatusOK {
		t.Errorf("a client_id of 255 characters: %d %s", got.status, got.body)
	}
}

// TestEchoes: a push is told to who waits for it, once, also from a batch that the hub can't take, and nothing after forget.
func TestEchoes(t *testing.T) {
	t.Parallel()
	h := newTestHub()
	pushed := func(id int64) changelog.Pushed {
		return changelog.Pushed{Tx: 105, Last: 106, Push: changelog.Push{ID: id, Subject: "a", ClientID: "phone"}}
	}
	done, forget := h.awaitPush(7)
	lost, forgetLost := h.awaitPush(8)
	forgetLost()
	gap := testBatch(104, []int{1})
	gap.Pushes = []changelog.Pushed{pushed(6), pushed(7), pushed(8)}
	foreign := *gap
	foreign.History = "ffff"
	if h.apply(t.Context(), &foreign) || len(done) != 0 {
		t.Error("the echo of another history counts")
	}
	if h.apply(t.Context(), gap) {
		t.Error("a gap was taken")
	}
	h.apply(t.Context(), gap)
	if p := <-done; p.ID != 7 || p.Last != 106 {
		t.Errorf("told %+v", p)
	}
	forget()
	if len(done) != 0 || len(lost) != 0 || len(h.echoes) != 0 {
		t.Errorf("told again, or after forget; %d wait", len(h.echoes))
	}
}

// TestMarkedFramesAreEncodedTwice: once for everybody and once for the client whose push it is, however many get them.
func TestMarkedFramesAreEncodedTwice(t *testing.T) {
	t.Parallel()
	h := newTestHub()
	var subs []*subscriber
	for i := range 6 {
		s := newTestSub(1<<20, 1)
		if i%2 == 0 {
			s.client = client{"a", "phone"}
		}
		h.join(s, 100)
		subs = append(subs, s)
	}
	b := testBatch(100, []int{1}, []int{1})
	b.Pushes = []changelog.Pushed{{Tx: 101, Last: 102, Push: changelog.Push{ID: 1, Subject: "a", ClientID: "phone"}}}
	b.Entries[1].Op = byte(policies.Delete)
	if !h.apply(t.Context(), b) || !h.apply(t.Context(), testBatch(102, []int{1})) {
		t.Fatal("not taken")
	}
	encodings := map[*byte]int{}
	for i, s := range subs {
		frames, _, _, _ := s.take(nil)
		changes := slices.DeleteFunc(slices.Clone(frames), func(f frame) bool { return f.kind != frameChange })
		for j, f := range changes {
			encodings[&f.data[0]]++
			if marked := strings.HasSuffix(string(f.data), `,"client_id":"phone"}`); marked != (i%2 == 0 && j < 2) {
				t.Errorf("subscriber %d, change %d: %s", i, j, f.data)
			}
		}
		releaseAll(frames)
	}
	if len(encodings) != 5 {
		t.Errorf("%d encodings, want 2 of each change of the push and 1 of the other", len(encodings))
	}
	if n := h.memory.held.Load(); n != 0 {
		t.Errorf("%d bytes are held", n)
	}
}

package gateway

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/walgate/walgate/changelog"
)

// operation reads a frame's operation.
func (f *wireFrame) operation(t testing.TB) wireOperation {
	t.Helper()
	var o struct {
		wireOperation
		Version string `json:"version"`
	}
	ok(t, json.Unmarshal(f.raw, &o))
	return o.wireOperation
}

// wantFrames expects these frames and then a checkpoint at the last of them: changes by their brief form, operations such
// as "download a.jpg".
func (s *stream) wantFrames(t testing.TB, want ...string) (checkpoint string) {
	t.Helper()
	last := ""
	for _, w := range want {
		f := s.next(t)
		got := f.brief()
		if f.Type == "attachment" {
			o := f.operation(t)
			got = o.Operation + " " + o.ID
		}
		if got != w || f.Version < last {
			t.Fatalf("want %q after %s, got %s", w, last, f.raw)
		}
		last = f.Version
	}
	f := s.want(t, "checkpoint")
	if !strings.HasPrefix(f.LastSeq, last) {
		t.Fatalf("the checkpoint %s is not at the last frame %s", f.LastSeq, last)
	}
	return f.LastSeq
}

// TestStreamOfAttachments: operations come in their transactions' places to whom they concern and who asked, live and by
// catching up alike, and a deletion only to who holds the attachment by no other scope.
func TestStreamOfAttachments(t *testing.T) {
	t.Parallel()
	e := newFileEnv(t, setup{})
	a := tokenFor(t, "a", map[string]any{"teams": []int{1, 2}})
	since := e.here(t, a)
	s := e.live(t, a, `,"attachments":true,"client_id":"phone"`)
	tablet, plain := e.live(t, a, `,"attachments":true,"collections":["news"]`), e.live(t, a, "")
	batched := e.live(t, a, `,"attachments":true,"batch":true`)

	e.upload(t, "own.jpg", "1", 5, "a", "phone")
	s.wantFrames(t, "download own.jpg")
	e.upload(t, "x.jpg", "2", 7, "z", "")
	e.exec(t, `INSERT INTO photos VALUES (1, NULL, 1, 'x.jpg'), (2, NULL, 2, 'x.jpg')`)
	s.wantFrames(t, "upsert photos/1", "download x.jpg", "upsert photos/2", "download x.jpg")
	tablet.wantFrames(t, "download x.jpg", "download x.jpg")
	if cs := batched.want(t, "changes").Changes; briefs(cs) != "upsert photos/1, upsert photos/2" {
		t.Errorf("in one frame: %s", briefs(cs))
	}
	batched.wantFrames(t, "download x.jpg", "download x.jpg")
	plain.wantChanges(t, "upsert photos/1", "upsert photos/2")

	e.exec(t, `DELETE FROM photos WHERE id = 1`) // team 2 still holds it
	s.wantFrames(t, "delete photos/1")
	e.exec(t, `UPDATE photos SET file = NULL, team = 1 WHERE id = 2; INSERT INTO news VALUES (1, '')`)
	s.wantFrames(t, "upsert photos/2", "delete x.jpg", "upsert news/1")
	tablet.wantFrames(t, "delete x.jpg", "upsert news/1")
	e.unload(t, "own.jpg", "a")
	last := s.wantFrames(t, "delete own.jpg")
	e.exec(t, `INSERT INTO news VALUES (2, '')`)
	tablet.wantFrames(t, "upsert news/2")
	plain.wantChanges(t, "delete photos/1")
	plain.wantChanges(t, "upsert photos/2", "upsert news/1")
	plain.wantChanges(t, "upsert news/2")

	late := e.subscribe(t, a, since, `,"attachments":true,"client_id":"phone"`)
	late.wantFrames(t, "upsert photos/1", "upsert photos/2")
	late.wantFrames(t, "delete photos/1")
	late.wantFrames(t, "upsert photos/2", "delete x.jpg", "upsert news/1")
	if at := late.wantFrames(t, "delete own.jpg"); at != last {
		t.Errorf("checkpoint %s, live it was %s", at, last)
	}
	late.wantFrames(t, "upsert news/2")
	late.want(t, "ready")
}

// TestStreamOfAttachmentsScopes: who comes with, or renews to, other scopes has other files, also where no collection
// that it names is scoped.
func TestStreamOfAttachmentsScopes(t *testing.T) {
	t.Parallel()
	e := newFileEnv(t, setup{})
	one, two := tokenFor(t, "a", map[string]any{"teams": []int{1}}), tokenFor(t, "a", map[string]any{"teams": []int{2}})
	const onlyNews = `,"collections":["news"]`
	resync := func(s *stream, files bool) {
		t.Helper()
		f := s.want(t, "full_resync_required")
		if strings.Contains(string(f.raw), `"attachments":true`) != files || len(f.Collections) != 0 {
			t.Errorf("%s", f.raw)
		}
		s.wantClose(t, 4410)
	}
	e.subscribe(t, two, e.here(t, one), onlyNews).want(t, "ready") // what it reads is the same
	resync(e.subscribe(t, two, e.here(t, one), onlyNews+`,"attachments":true`), true)
	s := e.live(t, one, onlyNews+`,"attachments":true`)
	s.send(t, `{"type":"auth","token":"`+one+`"}`)
	s.send(t, `{"type":"auth","token":"`+two+`"}`)
	resync(s, true)
	plain := e.live(t, one, onlyNews)
	plain.send(t, `{"type":"auth","token":"`+two+`"}`)
	e.exec(t, `INSERT INTO news VALUES (1, '')`)
	plain.wantChanges(t, "upsert news/1")
	// Forgotten deletions.
	at := e.here(t, one)
	e.exec(t, `INSERT INTO news VALUES (2, '')`)
	e.sync(t)
	e.exec(t, `UPDATE walgate.checkpoint SET attachments_floor = version`)
	resync(e.subscribe(t, one, at, onlyNews+`,"attachments":true`), true)
}

// TestReplicasOfFiles: whatever is written, and whatever the bus and the connections do, a client that takes the
// manifest once and then frames holds what a manifest from 0 lists.
func TestReplicasOfFiles(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"", "any"} {
		t.Run("bus "+mode, func(t *testing.T) {
			t.Parallel()
			seed := uint64(time.Now().UnixNano())
			e := newFileEnv(t, setup{gateway: func(g *Gateway) { g.hub.every, g.limits.queue = 20*time.Millisecond, 4<<10 },
				bus: func(b changelog.Bus) changelog.Bus {
					return &faultyBus{Bus: b, mode: mode, rng: rand.New(rand.NewPCG(seed, 0)), count: map[string]int{}}
				}})
			w := &fileWriter{e: e, rng: rand.New(rand.NewPCG(seed, 1))}
			var clients sync.WaitGroup
			var replicas []*fileReplica
			for i, subject := range []string{"a", "a", "b", "c"} {
				r := &fileReplica{e: e, held: files{}, token: tokenFor(t, subject, map[string]any{"teams": []int{1}}), client: fmt.Sprint("client ", i),
					rng: rand.New(rand.NewPCG(seed, uint64(2+i))), batch: i%2 == 1}
				replicas = append(replicas, r)
				clients.Go(func() { r.run(t) })
			}
			for range 150 {
				w.step(t)
			}
			e.exec(t, `INSERT INTO news VALUES (1000000, 'the end')`)
			clients.Wait()
			for i, r := range replicas {
				anew := files{}
				e.follow(t, anew, r.token, r.client, 0, 100)
				if !maps.Equal(r.held, anew) {
					t.Errorf("seed %d, %s: by frames %v, anew %v", seed, r.client, r.held, anew)
				}
				e.holdsVisible(t, r.held, []string{"a", "a", "b", "c"}[i])
			}
			if t.Failed() {
				t.Logf("seed %d wrote:\n%s", seed, strings.Join(w.done, "\n"))
			}
		})
	}
}

// fileReplica is a client that follows the stream and is cut off now and then.
type fileReplica struct {
	e             *env
	held          files
	token, client string
	rng           *rand.Rand
	batch         bool
}

func (r *fileReplica) run(t testing.TB) {
	since := r.e.here(t, r.token)
	c, err := changelog.ParseCursor(since)
	ok(t, err)
	m := r.e.manifest(t, r.token, r.client, 0, 0)
	for _, o := range m.Operations {
		r.held.take(o)
	}
	if m.More || m.Current < int64(c.Version) {
		t.Errorf("the manifest is at %d, the log was at %d", m.Current, c.Version)
	}
	for {
		s := r.e.subscribe(t, r.token, since, fmt.Sprintf(`,"attachments":true,"client_id":%q,"batch":%v`, r.client, r.batch))
		end := false
		for cut := r.rng.IntN(30); cut > 0 || end; cut-- {
			f := s.next(t)
			switch f.Type {
			case "attachment":
				r.held.take(f.operation(t))
			case "checkpoint":
				if since = f.LastSeq; end {
					s.conn.Close()
					return
				}
			case "":
				end = end || f.DocID == "1000000"
			case "changes":
				for i := range f.Changes {
					end = end || f.Changes[i].DocID == "1000000"
				}
			}
		}
		s.conn.Close()
	}
}

// TestStreamOfAttachmentsBetweenRows: what another row of a transaction says of files comes between the rows that the client
// reads, and no checkpoint with it.
func TestStreamOfAttachmentsBetweenRows(t *testing.T) {
	t.Parallel()
	e := newFileEnv(t, setup{})
	a := tokenFor(t, "a", map[string]any{"teams": []int{1}})
	e.upload(t, "y.jpg", "1", 1, "z", "")
	since := e.here(t, a)
	s := e.live(t, a, `,"attachments":true,"collections":["photos"]`)
	e.exec(t, `INSERT INTO photos VALUES (1, 'a'); INSERT INTO posters VALUES (1, 'y.jpg'); INSERT INTO photos VALUES (2, 'a')`)
	s.wantFrames(t, "upsert photos/1", "download y.jpg", "upsert photos/2")
	e.exec(t, `INSERT INTO photos VALUES (3, 'a', 1, 'y.jpg')`) // for the owner and the team at once
	s.wantFrames(t, "upsert photos/3", "download y.jpg")
	e.upload(t, "y.jpg", "2", 2, "z", "") // for everybody as well
	s.wantFrames(t, "download y.jpg")
	e.exec(t, `INSERT INTO photos VALUES (4, 'a'); DELETE FROM posters; DELETE FROM photos WHERE id = 3; INSERT INTO photos VALUES (5, 'a')`)
	s.wantFrames(t, "upsert photos/4", "delete y.jpg", "delete photos/3", "delete y.jpg", "upsert photos/5") // of each scope
	e.upload(t, "z.jpg", "3", 1, "z", "")
	e.upload(t, "w.jpg", "4", 1, "z", "")
	e.exec(t, `INSERT INTO photos VALUES (6, 'a'); INSERT INTO posters VALUES (2, 'z.jpg'); INSERT INTO photos VALUES (7, 'a', NULL, 'w.jpg')`)
	s.wantFrames(t, "upsert photos/6", "download z.jpg", "upsert photos/7", "download w.jpg")
	late := e.subscribe(t, a, since, `,"attachments":true,"collections":["photos"]`)
	late.wantFrames(t, "upsert photos/1", "upsert photos/2")
	late.wantFrames(t, "upsert photos/3")
	late.wantFrames(t, "upsert photos/4", "delete photos/3", "delete y.jpg", "upsert photos/5")
	late.wantFrames(t, "upsert photos/6", "download z.jpg", "upsert photos/7", "download w.jpg")
	late.want(t, "ready")
}

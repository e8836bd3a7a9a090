package main

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/internal/pgserver"
)

const filesSQL = `
CREATE TABLE notes (id bigint PRIMARY KEY, team text NOT NULL, title text, photo text, extra jsonb, hidden boolean NOT NULL DEFAULT false);
CREATE TABLE plans (id bigint PRIMARY KEY, team text NOT NULL, drawing uuid, pages text[]);
`

const filesCollections = `
  notes: {table: public.notes, scope: {team: claims.teams}, where: "!row.hidden", write: {roles: [editor], operations: [insert, update, delete]},
    attachments: [{column: photo}, {column: extra, path: "$.files[*].id"}]}
  plans: {table: public.plans, scope: {team: claims.teams}, write: {roles: [editor]}, attachments: [{column: drawing}, {column: pages}]}
`

// filesPair is an application's database, a gateway and two devices: Ana's writes, Ben's of the same team reads.
type filesPair struct {
	t        *testing.T
	dir      string // of the store
	gateway  *gatewayProcess
	app      *pgx.Conn
	ana, ben *fileDevice
	other    *fileDevice // of another team
}

func startFilesPair(t *testing.T, collections string) *filesPair {
	t.Helper()
	p := &filesPair{t: t, dir: t.TempDir()}
	dsn := pgserver.ForTest(t).Database(t)
	p.app = connect(t, dsn)
	resyncExec(t, p.app, filesSQL)
	var cfg *Config
	p.gateway, cfg = newGatewayProcess(t, fmt.Sprintf("database: {url: %q}\nreplication: {slot: %q}\nblobs: {url: %q}\n", dsn, "files_"+fmt.Sprint(time.Now().UnixNano()), fileURL(p.dir))+filesConfig+collections)
	must(t, p.gateway.start(t.Context()))
	teams := map[string]any{"teams": []any{"blue"}}
	p.ana = newFileDevice(t, cfg, p.gateway.base, "ana", "anas-phone", []string{"editor"}, teams)
	p.ben = newFileDevice(t, cfg, p.gateway.base, "ben", "bens-tablet", nil, teams)
	p.other = newFileDevice(t, cfg, p.gateway.base, "eve", "eves-phone", []string{"editor"}, map[string]any{"teams": []any{"red"}})
	return p
}

const filesConfig = `
auto_init: true
catalog: {poll_interval: 200ms}
http: {listen: "127.0.0.1:%[1]d", public_url: "http://127.0.0.1:%[1]d"}
limits: {drain: 3s, requests_per_second: 100000, burst: 100000}
auth: {jwt: {secret: %[2]q}}
log: {format: text}
attachments: {grace: 1s}
collections:`

func (p *filesPair) sql(text string, args ...any) {
	p.t.Helper()
	if _, err := p.app.Exec(p.t.Context(), text, args...); err != nil {
		p.t.Fatal(err)
	}
}

// put uploads as Ana.
func (p *filesPair) put(id string) {
	p.t.Helper()
	status, answer, err := p.ana.put(p.t.Context(), id, "")
	if err != nil || status != http.StatusCreated {
		p.t.Fatalf("PUT %s: %d %s %v", id, status, answer, err)
	}
}

// holds waits until a device, which follows its manifests, has exactly these files.
func (p *filesPair) holds(d *fileDevice, ids ...string) {
	p.t.Helper()
	slices.Sort(ids)
	ctx, cancel := context.WithTimeout(p.t.Context(), 20*time.Second)
	defer cancel()
	for {
		err := d.sync(ctx)
		if err == nil && slices.Equal(d.has(), ids) {
			return
		}
		if ctx.Err() != nil || err != nil && err != errAway {
			p.t.Fatalf("%s has %v (%v), want %v", d.sub, d.has(), err, ids)
		}
		pause(ctx, 20*time.Millisecond)
	}
}

// both waits until both devices of the team have exactly these files, and the other team's has none.
func (p *filesPair) both(ids ...string) {
	p.t.Helper()
	p.holds(p.ana, ids...)
	p.holds(p.ben, ids...)
	p.holds(p.other)
}

// gone waits until nothing is stored, and says what a client is told of the id then.
func (p *filesPair) gone(id string) {
	p.t.Helper()
	resyncEventually(p.t, "the bytes are gone after grace", func() bool { return len(storedObjects(p.t, p.dir)) == 0 })
	if status, _, err := p.ben.do(p.t.Context(), http.MethodGet, "/attachments/"+id, nil); err != nil || status == http.StatusOK {
		p.t.Fatalf("GET %s after it is gone: %d %v", id, status, err)
	}
}

// swept waits until so many rounds of care have ended that began more than grace after now.
func (p *filesPair) swept(rounds int) {
	p.t.Helper()
	var last time.Time
	resyncScan(p.t, p.app, []any{&last}, `SELECT clock_timestamp() + interval '1 second'`)
	resyncEventually(p.t, "a round of care ends", func() bool {
		var at *time.Time
		resyncScan(p.t, p.app, []any{&at}, `SELECT swept_at FROM walgate.care`)
		if at != nil && at.After(last) {
			last, rounds = *at, rounds-1
		}
		return rounds == 0
	})
}

// TestTwoDevices is the main job of attachments from end to end: one device uploads a file and a row that names it, the other
// learns of it, downloads it, and is told to delete it when the application, which knows nothing of walgate, lets go of it.
func TestTwoDevices(t *testing.T) {
	t.Parallel()
	p := startFilesPair(t, filesCollections)
	p.put("photo-1.jpg")
	p.holds(p.ana, "photo-1.jpg") // her own
	p.holds(p.ben)                // nothing refers to it yet
	result, err := p.ana.push(t.Context(), pushChange{Collection: "notes", Operation: "insert", DocID: "1", Data: map[string]any{"team": "blue", "title": "with a photo", "photo": "photo-1.jpg"}})
	if err != nil || result.Status != "accepted" {
		t.Fatalf("push: %s %v", result, err)
	}
	p.both("photo-1.jpg")
	if p.ben.counts["download"] != 1 {
		t.Errorf("Ben's device downloaded %d times", p.ben.counts["download"])
	}
	p.sql(`UPDATE notes SET photo = NULL`)
	p.both()
	p.gone("photo-1.jpg")
}

// TestFilesFollowRows goes through the ways in which an application's rows take up files and let go of them.
func TestFilesFollowRows(t *testing.T) {
	t.Parallel()
	const drawing = "7b0c1f3e-52f5-4f1e-9b3a-0123456789ab"
	const row = `INSERT INTO notes (id, team, photo) VALUES (1, 'blue', 'a.jpg')`
	for _, c := range []struct {
		name  string
		steps func(p *filesPair)
	}{
		{"reference long before the upload", func(p *filesPair) {
			p.sql(row)
			p.both()
			p.put("a.jpg")
			p.both("a.jpg")
			p.sql(`DELETE FROM notes`)
		}},
		{"reference long after the upload", func(p *filesPair) {
			p.put("a.jpg")
			p.holds(p.ana, "a.jpg")
			p.sql(row)
			p.both("a.jpg")
			p.sql(`DELETE FROM notes`)
		}},
		{"scope moves", func(p *filesPair) {
			p.sql(row)
			p.put("a.jpg")
			p.both("a.jpg")
			p.sql(`UPDATE notes SET team = 'red'`)
			p.holds(p.other, "a.jpg")
			p.holds(p.ana)
			p.holds(p.ben)
			p.sql(`UPDATE notes SET team = 'blue'`)
			p.both("a.jpg")
			p.sql(`DELETE FROM notes`)
		}},
		{"hidden for longer than grace", func(p *filesPair) {
			p.sql(row)
			p.put("a.jpg")
			p.both("a.jpg")
			p.sql(`UPDATE notes SET hidden = true`)
			p.both()
			p.swept(2)
			p.sql(`UPDATE notes SET hidden = false`)
			p.both("a.jpg")
			p.sql(`DELETE FROM notes`)
		}},
		{"two rows share it", func(p *filesPair) {
			p.put("a.jpg")
			p.sql(row)
			p.sql(`INSERT INTO notes (id, team, extra) VALUES (2, 'blue', '{"files": [{"id": "a.jpg"}, {"id": 7}, {"id": "../x"}]}')`)
			p.both("a.jpg")
			p.sql(`DELETE FROM notes WHERE id = 1`)
			p.sql(`INSERT INTO notes (id, team) VALUES (3, 'blue')`)
			p.both("a.jpg")
			p.sql(`UPDATE notes SET extra = '{"files": []}'`)
		}},
		{"moved between rows", func(p *filesPair) {
			p.put("a.jpg")
			p.sql(row)
			p.both("a.jpg")
			before := p.ben.counts["delete"] + p.ben.counts["kept"] + p.ben.counts["download"]
			p.sql(`BEGIN; UPDATE notes SET photo = NULL; INSERT INTO notes (id, team, extra) VALUES (2, 'blue', '{"files": [{"id": "a.jpg"}]}'); COMMIT`)
			p.sql(`INSERT INTO plans (id, team, drawing) VALUES (1, 'blue', '` + drawing + `')`)
			p.put(drawing)
			p.both("a.jpg", drawing)
			if after := p.ben.counts["delete"] + p.ben.counts["kept"] + p.ben.counts["download"]; after != before+1 {
				p.t.Errorf("Ben's device was told %d operations, want that of %s alone", after-before, drawing)
			}
			p.sql(`DELETE FROM notes; DELETE FROM plans`)
		}},
		{"truncate", func(p *filesPair) {
			p.sql(row)
			p.put("a.jpg")
			p.put(drawing)
			p.sql(`INSERT INTO plans (id, team, pages) VALUES (1, 'blue', ARRAY['a.jpg', NULL, '` + drawing + `'])`)
			p.both("a.jpg", drawing)
			p.sql(`TRUNCATE plans`)
			p.both("a.jpg")
			p.sql(`TRUNCATE notes`)
		}},
		{"deleted by a client", func(p *filesPair) {
			p.sql(row)
			p.put("a.jpg")
			p.both("a.jpg")
			status, answer, err := p.ana.do(p.t.Context(), http.MethodDelete, "/attachments/a.jpg", nil)
			if err != nil || status != http.StatusNoContent {
				p.t.Fatalf("DELETE: %d %s %v", status, answer, err)
			}
			p.both()
			if status, _, _ := p.ben.do(p.t.Context(), http.MethodGet, "/attachments/a.jpg", nil); status != http.StatusGone {
				p.t.Errorf("GET of what was deleted: %d", status)
			}
			p.put("a.jpg") // anew
			p.both("a.jpg")
			p.sql(`DELETE FROM notes`)
		}},
		{"a policy that changes", func(p *filesPair) {
			p.sql(row)
			p.sql(`INSERT INTO notes (id, team, title) VALUES (2, 'blue', 'see b.jpg')`)
			p.put("a.jpg")
			p.both("a.jpg")
			must(p.t, p.gateway.end(syscall.SIGTERM))
			p.gateway.rewrite(`attachments: [{column: photo}, {column: extra, path: "$.files[*].id"}]`, `attachments: [{column: title, pattern: "[a-z]+[.]jpg"}]`)
			must(p.t, p.gateway.start(p.t.Context()))
			p.put("b.jpg")
			p.both("b.jpg")
			p.sql(`DELETE FROM notes`)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			p := startFilesPair(t, filesCollections)
			c.steps(p)
			p.both()
			p.gone("a.jpg")
		})
	}
}

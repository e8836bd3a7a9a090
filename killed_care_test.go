package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/blobstore"
	"github.com/walgate/walgate/internal/failpoint"
	"github.com/walgate/walgate/internal/pgserver"
)

const killedCareConfig = `
auto_init: true
database: {url: %q}
replication: {slot: %q}
blobs: {url: %q}
attachments: {grace: 1s, upload_ttl: 1s}
http: {listen: "127.0.0.1:%%[1]d"}
auth: {jwt: {secret: %%[2]q}}
log: {format: text}
collections:
  docs: {table: public.docs, scope: {owner_id: claims.sub}, attachments: [{column: photo}], write: {set: {owner_id: claims.sub}}}
`

// caredFor is a gateway with a blob store of files, which looks after them every second.
type caredFor struct {
	t     *testing.T
	conn  *pgx.Conn
	p     *gatewayProcess
	dir   string
	token string
}

func newCaredFor(t *testing.T, slot string) *caredFor {
	dsn := pgserver.ForTest(t).Database(t)
	c := &caredFor{t: t, conn: connect(t, dsn), dir: filepath.Join(t.TempDir(), "blobs")}
	resyncExec(t, c.conn, `CREATE TABLE docs (id bigint PRIMARY KEY, owner_id text NOT NULL, photo text)`)
	var cfg *Config
	c.p, cfg = newGatewayProcess(t, fmt.Sprintf(killedCareConfig, dsn, slot, "file://"+c.dir))
	var err error
	c.token, err = signToken(cfg, "u0", nil, nil, time.Hour)
	must(t, err)
	return c
}

// put uploads a text; without an answer there is an error.
func (c *caredFor) put(id, text string) error {
	r, err := http.NewRequestWithContext(c.t.Context(), http.MethodPut, c.p.base+"/attachments/"+id, strings.NewReader(text))
	must(c.t, err)
	r.Header.Set("Authorization", "Bearer "+c.token)
	r.Header.Set("Content-Type", "text/plain")
	a, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(r)
	if err != nil {
		return err
	}
	defer a.Body.Close()
	answer, err := io.ReadAll(a.Body)
	if err == nil && a.StatusCode/100 != 2 {
		c.t.Fatalf("PUT %s: %s: %s", id, a.Status, answer)
	}
	return err
}

// objects are what the store holds, relative to its root.
func (c *caredFor) objects() (keys []string) {
	err := filepath.WalkDir(filepath.Join(c.dir, "walgate"), func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			var key string
			key, err = filepath.Rel(c.dir, path)
			keys = append(keys, filepath.ToSlash(key))
		}
		if errors.Is(err, fs.ErrNotExist) { // it went meanwhile
			return nil
		}
		return err
	})
	must(c.t, err)
	slices.Sort(keys)
	return keys
}

func (c *caredFor) text(sql string, args ...any) (s string) {
	c.t.Helper()
	resyncScan(c.t, c.conn, []any{&s}, `SELECT coalesce((`+sql+`)::text, '')`, args...)
	return s
}

func (c *caredFor) state(id string) string {
	return c.text(`SELECT state::text || CASE WHEN bytes_gone THEN ' gone' ELSE '' END FROM walgate.files WHERE attachment_id = $1`, id)
}

// die starts a gateway that ends itself at a point, does something meanwhile and waits for its end.
func (c *caredFor) die(at failpoint.Point, meanwhile func()) {
	c.t.Helper()
	must(c.t, c.p.launchToDie(at, 1))
	if meanwhile != nil {
		must(c.t, c.p.awaitReady(c.t.Context()))
		meanwhile()
	}
	resyncEventually(c.t, "the gateway is dead at "+at.String(), func() bool {
		dead, err := c.p.killedItself()
		must(c.t, err)
		return dead
	})
}

// TestCareKilledAtEveryStep kills the gateway at every step of an upload and of the care of files, with the references of real
// rows. What rows name is there all along; at the end the store holds that and nothing else, and the quota counts that.
func TestCareKilledAtEveryStep(t *testing.T) {
	t.Parallel()
	c := newCaredFor(t, "killed_care")
	must(t, c.p.start(t.Context()))
	for _, id := range []string{"kept", "lost", "again", "lonely"} {
		if id != "lonely" {
			resyncExec(t, c.conn, fmt.Sprintf(`INSERT INTO docs SELECT count(*) + 1, 'u0', '%s' FROM docs`, id))
		}
		must(t, c.put(id, "bytes of "+id))
	}
	must(t, c.p.end(syscall.SIGTERM))
	c.die(failpoint.BytesWritten, func() {
		if err := c.put("half", "bytes of half"); err == nil {
			t.Fatal("the upload was answered by a gateway that was to die")
		}
	})
	if n := len(c.objects()); n != 5 || c.state("half") != "" {
		t.Fatalf("after the death within an upload there are %d objects, and half is %q", n, c.state("half"))
	}
	resyncExec(t, c.conn, `DELETE FROM docs WHERE photo = 'again'`)
	c.die(failpoint.FileDeleting, nil)
	if s := c.state("lonely"); s != "u" {
		t.Errorf("before the commit it is %s", s)
	}
	c.die(failpoint.FileDeleted, nil)
	if s := c.state("lonely") + c.state("again"); s != "dd" {
		t.Errorf("after the commit they are %s", s)
	}
	resyncExec(t, c.conn, `INSERT INTO docs VALUES (7, 'u0', 'again')`)
	for _, at := range []failpoint.Point{failpoint.BytesDeleting, failpoint.BytesDeleted} {
		c.die(at, nil)
		if s := c.state("lonely"); s != "d" {
			t.Errorf("at %s it is %s", at, s)
		}
	}
	must(t, c.p.start(t.Context()))
	resyncEventually(t, "lonely is gone, again has returned", func() bool { return c.state("lonely") == "d gone" && c.state("again") == "u" })
	must(t, c.p.end(syscall.SIGTERM))
	key := blobstore.NewKey()
	orphan, lost := filepath.Join(c.dir, key), filepath.Join(c.dir, c.text(`SELECT storage_key FROM walgate.files WHERE attachment_id = 'lost'`))
	must(t, errors.Join(os.MkdirAll(filepath.Dir(orphan), 0o700), os.WriteFile(orphan, nil, 0o600), os.Chtimes(orphan, time.Time{}, time.Now().Add(-time.Hour)), os.Remove(lost)))
	for _, at := range []failpoint.Point{failpoint.OrphansDeleted, failpoint.MissingTold} {
		resyncExec(t, c.conn, `UPDATE walgate.care SET reconciled_at = NULL`)
		c.die(at, nil)
	}
	must(t, c.p.start(t.Context()))
	resyncEventually(t, "lost is missing", func() bool { return c.state("lost") == "m" && c.text(`SELECT reconciled_at FROM walgate.care`) != "" })
	must(t, os.WriteFile(lost, []byte("bytes of lost"), 0o600))
	resyncExec(t, c.conn, `UPDATE walgate.care SET reconciled_at = NULL`)
	resyncEventually(t, "lost is back", func() bool { return c.state("lost") == "u" })
	var want []string
	for _, id := range []string{"kept", "lost", "again"} {
		want = append(want, c.text(`SELECT storage_key FROM walgate.files WHERE attachment_id = $1`, id))
	}
	slices.Sort(want)
	resyncEventually(t, "the store holds what rows name", func() bool { return slices.Equal(c.objects(), want) })
	if used, size := c.text(`SELECT string_agg(used || ' ' || reserved, ',') FROM walgate.quotas`), c.text(`SELECT sum(size) || ' 0' FROM walgate.files WHERE NOT bytes_gone`); used != size {
		t.Errorf("the quota counts %s, want %s", used, size)
	}
	if events := c.text(`SELECT string_agg(attachment_id || ' ' || e, ', ' ORDER BY attachment_id) FROM (SELECT attachment_id, string_agg(event::text, '' ORDER BY id) AS e FROM walgate.attachments GROUP BY 1) s`); events != "again udr, kept u, lonely ud, lost umr" {
		t.Errorf("the stream was told: %s", events)
	}
	for _, line := range []string{`walgate_attachment_files{state="uploaded"} 3`, `walgate_attachment_guard_tripped 0`, "walgate_attachment_rounds_total "} {
		resyncEventually(t, "the metrics say "+line, func() bool { return strings.Contains(c.metrics(), line) })
	}
}

func (c *caredFor) metrics() string {
	r, err := http.NewRequestWithContext(c.t.Context(), http.MethodGet, c.p.base+"/metrics", nil)
	must(c.t, err)
	a, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(r)
	must(c.t, err)
	defer a.Body.Close()
	text, err := io.ReadAll(a.Body)
	must(c.t, err)
	return string(text)
}

// gc runs the command until no round of the gateway's is in its way.
func (c *caredFor) gc(args ...string) (out string, err error) {
	for err = blobstore.ErrCareBusy; errors.Is(err, blobstore.ErrCareBusy); {
		out, err = walgate(c.t, append([]string{"attachments", "gc", "--config", c.p.config}, args...)...)
	}
	return out, err
}

// TestGarbageCommand holds what an operator reads, and the exit.
func TestGarbageCommand(t *testing.T) {
	t.Parallel()
	c := newCaredFor(t, "garbage")
	must(t, c.p.start(t.Context()))
	must(t, c.put("photo", "bytes"))
	resyncEventually(t, "photo is swept", func() bool { return c.state("photo") == "d gone" })
	must(t, c.put("photo", "bytes"))
	resyncExec(t, c.conn, `INSERT INTO docs VALUES (1, 'u0', 'photo')`)
	resyncExec(t, c.conn, `INSERT INTO walgate.files (attachment_id, event_id, state, storage_key, size, content_type, sha256, subject, unreferenced_since)
		SELECT 'bulk' || i, i, 'u', format('walgate/%s/%s', left(h, 2), h), 1000000, 'text/plain', '', 'ana', now() - interval '1 d' FROM (SELECT i, md5(i::text) AS h FROM generate_series(1, 80) i) s`)
	for _, args := range [][]string{{"--dry-run"}, nil} {
		out, err := c.gc(args...)
		for _, want := range []string{"81    80.0 MB  files that aren't deleted", "80    80.0 MB  no row has named them for 1s", "Not done: no file was deleted: they are suspiciously many", "80 of 81 files", "gc --force"} {
			if !strings.Contains(out, want) {
				t.Errorf("gc %v says\n%s\nwhich lacks %q", args, out, want)
			}
		}
		if err == nil || strings.HasPrefix(out, "Dry run") != (args != nil) {
			t.Errorf("gc %v says %v\n%s", args, err, out)
		}
	}
	resyncEventually(t, "the metric says so", func() bool { return strings.Contains(c.metrics(), "walgate_attachment_guard_tripped 1") })
	if out, err := c.gc("--force"); err != nil || !strings.Contains(out, "were deleted; their bytes go with the next round") {
		t.Errorf("gc --force: %v\n%s", err, out)
	}
	resyncEventually(t, "all is swept but what a row names", func() bool { return c.text(`SELECT count(*) FROM walgate.files WHERE bytes_gone`) == "80" })
	if out, err := c.gc(); err != nil || !strings.Contains(out, "1        5 B  files that aren't deleted") {
		t.Errorf("gc: %v\n%s", err, out)
	}
	must(t, c.p.end(syscall.SIGTERM))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	command := newCommand()
	command.SetArgs([]string{"attachments", "gc", "--config", c.p.config})
	if err := command.ExecuteContext(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted: %v", err)
	}
	if _, err := walgate(t, "attachments", "gc", "everything"); err == nil {
		t.Error("an argument was taken")
	}
}

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os/exec"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/internal/badlink"
	"github.com/walgate/walgate/internal/pgserver"
)

// TestConvergenceFiles is the convergence test of attachments. The application names files in columns, arrays and JSON, moves
// rows between teams, truncates; devices upload, delete and follow their manifests; the gateway and the databases die. At the
// end every device holds exactly the files that its visible rows name and that are there, with the right bytes; what was
// acknowledged is there unless it was deleted or swept; and the store holds nothing else.
//
// Seeds are chosen as in TestConvergence.
func TestConvergenceFiles(t *testing.T) {
	t.Parallel()
	first, last := seedsToRun(t)
	for seed := first; seed <= last; seed++ {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			t.Parallel()
			convergeFiles(t, seed)
		})
	}
}

const (
	filesNamed = 30 // ids that rows may name
	filesRows  = 12 // keys of each table
)

// filesCommonConfig is the configuration of a run but for the databases and the store.
const filesCommonConfig = `
auto_init: true
catalog: {poll_interval: 300ms}
http: {listen: "127.0.0.1:%[1]d", public_url: "http://127.0.0.1:%[1]d"}
limits: {drain: 3s, requests_per_second: 100000, burst: 100000}
auth: {jwt: {secret: %[2]q}}
log: {format: text}
attachments: {grace: 2s, upload_ttl: 2s, sweep_guard: 100}
collections:` + filesCollections

// filesConvergence is one seed's run.
type filesConvergence struct {
	*convergence
	dir     string
	devices []*uploader
}

// uploader is a device that uploads ids of its own, and deletes some. Only it does, so that it knows what should be there.
type uploader struct {
	*fileDevice
	v     *filesConvergence
	rng   *rand.Rand
	named []string          // ids that only this device uploads
	last  map[string]string // what was last acknowledged of an id, "" where the last answer was lost
	late  map[string]bool   // ids with an upload that was not answered: it may be recorded after what followed it
}

func convergeFiles(t *testing.T, seed uint64) {
	began := time.Now()
	v := &filesConvergence{convergence: &convergence{t: t, seed: seed, faults: map[string]int{}}}
	defer func() { v.report(began) }()
	defer func() {
		for _, d := range v.devices {
			t.Logf("%s: %v", d.id, d.counts)
		}
	}()
	v.begin(t)
	cards := deck(v.rng(0), faults, deadlyFaults, deadlyFaults)
	for round := range uint64(convergenceRounds) {
		ctx, cancel := context.WithTimeout(t.Context(), convergenceRound)
		rng := v.rng(round + 1)
		var all sync.WaitGroup
		for range 2 {
			w := &writer{t: v.t, dsn: v.dsn, rng: rand.New(rand.NewPCG(rng.Uint64(), 0)), commits: &v.commits}
			all.Go(func() { v.write(ctx, w) })
		}
		for _, d := range v.devices {
			all.Go(func() { d.run(ctx) })
		}
		all.Go(func() { cards = v.chaos(ctx, rng, cards, 400*time.Millisecond) })
		all.Wait()
		cancel()
		if !t.Failed() {
			v.settle(fmt.Sprintf("round %d", round))
		}
		if t.Failed() {
			return
		}
	}
	v.audit()
}

func (v *filesConvergence) begin(t *testing.T) {
	v.server = pgserver.StartForTest(t, pgserver.Options{Settings: map[string]string{"deadlock_timeout": "50ms"}})
	v.dsn, v.dir = v.server.Database(t), t.TempDir()
	v.storage = v.dsn
	switch v.seed % 3 {
	case 1:
		v.storage = v.server.Database(t)
	case 2:
		v.store = pgserver.StartForTest(t, pgserver.Options{})
		v.storage = v.store.Database(t)
	}
	must(t, v.ask(t.Context(), nil, filesSQL))
	// Rows that are there before the gateway is: their references are filled in.
	must(t, v.ask(t.Context(), nil, fmt.Sprintf(`INSERT INTO notes (id, team, photo) SELECT g, 't' || g %% 3, 'f' || g FROM generate_series(1, %d, 2) g`, filesRows)))
	replication, log, source := badlink.To(t, v.dsn), badlink.To(t, v.storage), badlink.To(t, v.dsn)
	v.links = []*badlink.Link{replication, log, source, source}
	var cfg *Config
	v.gateway, cfg = newGatewayProcess(t, fmt.Sprintf("database: {url: %q, replication_url: %q}\nstorage: {url: %q}\nblobs: {url: %q}\n",
		source.DSN(t, v.dsn), replication.DSN(t, v.dsn), log.DSN(t, v.storage), fileURL(v.dir))+filesCommonConfig)
	every := []any{"t0", "t1", "t2"}
	for i, teams := range [][]any{every, every, {"t0"}, {"t1", "t2"}} {
		name := fmt.Sprintf("device-%d", i)
		d := &uploader{fileDevice: newFileDevice(t, cfg, v.gateway.base, fmt.Sprint("u", i), name, []string{"editor"}, map[string]any{"teams": teams}), v: v, rng: v.rng(1000 + uint64(i)), last: map[string]string{}, late: map[string]bool{}}
		if len(teams) == len(every) {
			for n := i; n < filesNamed; n += 2 {
				d.named = append(d.named, fmt.Sprint("f", n))
			}
		}
		v.devices = append(v.devices, d)
	}
	must(t, v.gateway.start(t.Context()))
}

// write is the application.
func (v *filesConvergence) write(ctx context.Context, w *writer) {
	defer func() {
		if w.conn != nil {
			w.conn.Close(context.WithoutCancel(ctx))
		}
	}()
	for ; ctx.Err() == nil; pause(ctx, upTo(w.rng, 20*time.Millisecond)) {
		if w.connect(ctx) != nil {
			continue // the server is down
		}
		if err := v.transaction(ctx, w); err != nil && ctx.Err() == nil && !expectedOfWriter(err) {
			v.t.Errorf("the application's statement failed: %v", err)
			return
		}
	}
}

func (v *filesConvergence) transaction(ctx context.Context, w *writer) error {
	tx, err := w.conn.Begin(ctx)
	if err != nil {
		return err
	}
	defer tx.Rollback(context.WithoutCancel(ctx))
	file := func() string { return fmt.Sprint("f", w.rng.IntN(filesNamed)) }
	for range 1 + w.rng.IntN(3) {
		id, team := 1+w.rng.IntN(filesRows), fmt.Sprint("t", w.rng.IntN(3))
		s := one(`INSERT INTO notes (id, team, photo) VALUES ($1, $2, $3) ON CONFLICT (id) DO UPDATE SET photo = excluded.photo`, id, team, file())
		switch w.rng.IntN(12) {
		case 0:
			s = one(`DELETE FROM notes WHERE id = $1`, id)
		case 1:
			s = one(`UPDATE notes SET team = $2 WHERE id = $1`, id, team)
		case 2:
			s = one(`UPDATE notes SET photo = NULL WHERE id = $1`, id)
		case 3:
			s = one(`UPDATE notes SET hidden = NOT hidden WHERE id = $1`, id)
		case 4, 5:
			s = one(`INSERT INTO plans (id, team, pages) VALUES ($1, $2, $3) ON CONFLICT (id) DO UPDATE SET pages = excluded.pages, team = excluded.team`, id, team, []string{file(), file()})
		case 6:
			s = one(`DELETE FROM plans WHERE id = $1`, id)
		case 7: // out of line, and then an update of another column, which doesn't send it
			s = one(`UPDATE notes SET extra = jsonb_build_object('files', jsonb_build_array(jsonb_build_object('id', $2::text)), 'pad', (SELECT string_agg(md5(g::text), '') FROM generate_series(1, 200) g)) WHERE id = $1`, id, file())
		case 8:
			s = one(`UPDATE notes SET title = $2 WHERE id = $1`, id, w.word())
		case 9:
			s = one(`UPDATE notes SET id = id + 100 - 200 * (id > 100)::int WHERE id = $1 OR id = $1 + 100`, id)
		case 10: // from one row to another
			s = one(`WITH was AS (SELECT photo FROM notes WHERE id = $1), gone AS (UPDATE notes SET photo = NULL WHERE id = $1) UPDATE notes SET photo = was.photo FROM was WHERE id = $2`, id, 1+id%filesRows)
		}
		if w.rng.IntN(150) == 0 {
			s = one(`TRUNCATE plans`)
		}
		if _, err := tx.Exec(ctx, s[0].sql, s[0].args...); err != nil {
			return err
		}
	}
	if err := tx.Commit(ctx); err != nil {
		return err
	}
	w.commits.Add(1)
	return nil
}

// run uploads, deletes and syncs in random order until ctx ends.
func (d *uploader) run(ctx context.Context) {
	for ; ctx.Err() == nil && !d.t.Failed(); pause(ctx, upTo(d.rng, 30*time.Millisecond)) {
		d.limit = []int{0, 1, 2, 10}[d.rng.IntN(4)]
		var err error
		switch n := d.rng.IntN(10); {
		case n < 4 && len(d.named) > 0:
			err = d.upload(ctx)
		case n == 4 && len(d.named) > 0:
			err = d.remove(ctx)
		default:
			err = d.sync(ctx)
		}
		if err != nil && !errors.Is(err, errAway) && ctx.Err() == nil {
			d.t.Errorf("%s: %v", d.id, err)
		}
	}
}

func (d *uploader) upload(ctx context.Context) error {
	id := d.named[d.rng.IntN(len(d.named))]
	d.last[id] = ""
	asking := ctx
	if d.rng.IntN(5) == 0 { // cut in mid-body, or before the answer comes
		var cancel context.CancelFunc
		asking, cancel = context.WithTimeout(ctx, upTo(d.rng, 20*time.Millisecond))
		defer cancel()
	}
	status, answer, err := d.put(asking, id, "")
	switch {
	case err != nil:
		d.late[id] = true
		return err
	case status == http.StatusCreated, status == http.StatusOK:
		d.last[id] = "put"
		d.counts[fmt.Sprint("put ", status)]++
		return nil
	}
	return fmt.Errorf("PUT %s: %d %s", id, status, answer)
}

func (d *uploader) remove(ctx context.Context) error {
	id := d.named[d.rng.IntN(len(d.named))]
	status, answer, err := d.do(ctx, http.MethodDelete, "/attachments/"+id, nil)
	switch {
	case err != nil:
		d.last[id] = ""
		return err
	case status == http.StatusNoContent:
		d.last[id] = "delete"
		d.counts["deleted"]++
		return nil
	case status == http.StatusForbidden: // rows of no team that it knows of can't be: they are named in hidden rows
		d.counts["delete forbidden"]++
		return nil
	}
	return fmt.Errorf("DELETE %s: %d %s", id, status, answer)
}

// namedSQL are the ids that rows of the teams name, as a client may see them.
const namedSQL = `SELECT team, id FROM (
	SELECT team, photo AS id FROM notes WHERE NOT hidden
	UNION SELECT team, f->>'id' FROM notes, jsonb_path_query(extra, '$.files[*]') f WHERE NOT hidden
	UNION SELECT team, drawing::text FROM plans
	UNION SELECT team, unnest(pages) FROM plans) r
	WHERE id IN (SELECT attachment_id FROM walgate.files WHERE state = 'u')`

// settle waits until every device holds what its rows name, and the store nothing that no row names.
func (v *filesConvergence) settle(when string) {
	ctx, cancel := context.WithTimeout(v.t.Context(), convergenceLimit)
	defer cancel()
	var all sync.WaitGroup
	for _, d := range v.devices {
		d.limit = 0
		all.Go(func() {
			for last := error(nil); !v.t.Failed(); pause(ctx, 50*time.Millisecond) {
				err := d.sync(ctx)
				if err == nil {
					if err = v.compare(ctx, d); err == nil {
						return
					}
				}
				if ctx.Err() != nil || !errors.Is(err, errAway) && !errors.Is(err, errDiffers) {
					v.t.Errorf("%s: %s: no convergence: %v, before %v", when, d.id, err, last)
					return
				}
				last = err
			}
		})
	}
	all.Wait()
}

func (v *filesConvergence) compare(ctx context.Context, d *uploader) error {
	conn, err := pgx.Connect(ctx, v.dsn)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	rows, err := conn.Query(ctx, `SELECT DISTINCT id FROM (`+namedSQL+`) n WHERE team = ANY ($1) ORDER BY id`, d.teams())
	if err != nil {
		return err
	}
	want, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	slices.Sort(want)
	if have := d.has(); !slices.Equal(have, want) {
		return fmt.Errorf("%w: it has %v, want %v", errDiffers, have, want)
	}
	for id, digest := range d.files {
		if digest == "gone" {
			return fmt.Errorf("%w: %s was named and could not be fetched", errDiffers, id)
		}
	}
	return nil
}

// teams are the device's, by its number.
func (d *uploader) teams() []string {
	switch d.id {
	case "device-2":
		return []string{"t0"}
	case "device-3":
		return []string{"t1", "t2"}
	}
	return []string{"t0", "t1", "t2"}
}

// audit looks at what is left once nothing happens any more: files that rows name, hidden ones too, and nothing else.
func (v *filesConvergence) audit() {
	ctx := v.t.Context()
	type record struct {
		ID, State string
		Swept     bool
		Key       string
	}
	var records []record
	var objects []string
	defer func() {
		if v.t.Failed() {
			v.t.Logf("stored: %q\nrecords: %+v", objects, records)
		}
	}()
	resyncEventually(v.t, "the store holds what rows name, and nothing else", func() bool {
		if out, err := exec.CommandContext(ctx, v.gateway.binary, "attachments", "gc", "--config", v.gateway.config).CombinedOutput(); err != nil {
			v.t.Logf("gc: %v\n%s", err, out)
		}
		conn, err := pgx.Connect(ctx, v.dsn)
		must(v.t, err)
		defer conn.Close(ctx)
		rows, err := conn.Query(ctx, `SELECT attachment_id, state::text, unreferenced_since IS NOT NULL, storage_key FROM walgate.files
			UNION ALL SELECT attachment_id, 'upload ' || kind, false, storage_key FROM walgate.uploads`)
		must(v.t, err)
		records, err = pgx.CollectRows(rows, pgx.RowToStructByPos[record])
		must(v.t, err)
		there := 0
		for _, r := range records {
			if r.State == "u" {
				there++
			}
		}
		objects = storedObjects(v.t, v.dir)
		return len(objects) == there
	})
	states := map[string]record{}
	for _, r := range records {
		if len(r.State) == 1 {
			states[r.ID] = r
		}
	}
	for _, d := range v.devices {
		for id, last := range d.last {
			switch r := states[id]; {
			case last == "put" && r.State != "u" && !(r.State == "d" && r.Swept):
				v.t.Errorf("%s was uploaded and acknowledged, and is now %+v", id, r)
			case last == "delete" && r.State == "u" && !d.late[id]:
				v.t.Errorf("%s was deleted and acknowledged, and is there", id)
			}
		}
	}
}

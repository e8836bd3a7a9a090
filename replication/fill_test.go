package replication

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/policies"
)

// fillSeeds returns the seeds to run: WALGATE_TEST_SEEDS=50 or 20..29.
func fillSeeds(t *testing.T) (seeds []int) {
	t.Helper()
	from, to := 0, 3
	if v := os.Getenv("WALGATE_TEST_SEEDS"); v != "" {
		if n, err := fmt.Sscanf(v, "%d..%d", &from, &to); n == 2 && err == nil {
			to++
		} else if _, err := fmt.Sscanf(v, "%d", &to); err != nil {
			t.Fatalf("WALGATE_TEST_SEEDS=%q", v)
		}
	}
	for i := from; i < to; i++ {
		seeds = append(seeds, i)
	}
	return seeds
}

// TestFillUnderWriters: rows that existed before are looked through while writers change, move, hide and delete them, files
// are uploaded and deleted, and leaders are killed in the middle. In the end the log's references and operations are exactly
// those of the tables, as SQL of its own reads them.
func TestFillUnderWriters(t *testing.T) {
	t.Parallel()
	for _, seed := range fillSeeds(t) {
		t.Run("seed="+strconv.Itoa(seed), func(t *testing.T) {
			t.Parallel()
			fillUnderWriters(t, rand.New(rand.NewPCG(uint64(seed), 5)))
		})
	}
}

func fillUnderWriters(t *testing.T, rng *rand.Rand) {
	const rows = 400
	s := newSource(t, setup{specs: thingsSpec(), fillRows: 20 + rng.IntN(80), before: thingsTable + `
		INSERT INTO things (a, b, owner, hidden, photo, tags) SELECT n, b, CASE n % 4 WHEN 0 THEN 'ana' WHEN 1 THEN 'bob' WHEN 2 THEN 'eve' END, n % 10 = 0, 'f' || n % 60, ARRAY['f' || n % 7]
			FROM generate_series(0, 399) n, unnest(ARRAY['x', 'y']) b;
		INSERT INTO cards SELECT n, gen_random_uuid() FROM generate_series(0, 299) n;`})
	done := make(chan struct{})
	var wg sync.WaitGroup
	for range 3 {
		w := &writer{conn: s.connect(), rng: rand.New(rand.NewPCG(rng.Uint64(), 1))}
		wg.Go(func() {
			if err := w.run(t.Context(), done, rows); err != nil {
				t.Error(err)
			}
		})
	}
	for range 3 + rng.IntN(3) {
		what, limit := rng.IntN(5), int64(rng.IntN(700))
		switch what {
		case 0:
			s.exec(`TRUNCATE cards`)
		case 1:
			s.exec(`ALTER TABLE things ALTER body TYPE varchar(` + strconv.Itoa(300+rng.IntN(300)) + `), ALTER photo TYPE text USING photo || ''`)
			s.ok(s.watcher.Reload(t.Context()))
		}
		s.await("the leader is in the middle of a fill", func() bool {
			p := s.stats.Fills()["things"]
			return p.Rows >= limit || p.Done
		})
		if what > 1 {
			s.stop()
			s.start()
		}
	}
	close(done)
	wg.Wait()
	s.sameHeld()
	if n := query[int](s, `SELECT count(*) FROM things WHERE extra IS NOT NULL AND pg_column_size(extra) > 2000`); n == 0 {
		t.Error("no row has a value out of line: nothing was tested of those")
	}
}

// oneThing is a table with few rows, and its collection's specification.
const oneThing = thingsTable + `INSERT INTO things (a, b, owner, photo) VALUES (1, 'x', 'ana', 'f1'), (2, 'x', 'bob', 'f2');
	INSERT INTO cards VALUES (1, '11111111-1111-1111-1111-111111111111');`

// TestFillBeginsAnew: whatever makes clients resynchronise makes the references be read anew, and takes away those that no
// longer hold.
func TestFillBeginsAnew(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		before, sql string
		restart     bool
		lost        bool // the slot
	}{
		"truncate":                   {sql: `TRUNCATE things`},
		"truncate and insert":        {sql: `BEGIN; TRUNCATE things; INSERT INTO things (a, b, owner, photo) VALUES (1, 'x', 'bob', 'f3'); COMMIT`},
		"rewritten":                  {sql: `ALTER TABLE things ALTER photo TYPE varchar(40) USING 'f' || a + 4`},
		"rewritten while nobody led": {sql: `ALTER TABLE things ALTER photo TYPE varchar(40) USING 'f' || a + 5`, restart: true},
		"the slot was lost":          {sql: `UPDATE things SET photo = CASE a WHEN 1 THEN 'f5' ELSE 'f9' END; DELETE FROM cards`, restart: true, lost: true},
		"partition attached": {before: `CREATE TABLE more (a int, b text, owner text, hidden boolean NOT NULL DEFAULT false, gone timestamptz, photo text, extra jsonb, tags text[], body text, PRIMARY KEY (a, b));
			INSERT INTO more (a, b, owner, photo) VALUES (200, 'x', 'ana', 'f7');`, sql: `ALTER TABLE things ATTACH PARTITION more FOR VALUES FROM (100) TO (300)`},
		"partition detached": {sql: `ALTER TABLE things DETACH PARTITION things_1`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			table := oneThing
			if strings.HasPrefix(name, "partition") {
				table = strings.Replace(strings.Replace(table, "PRIMARY KEY (a, b));", "PRIMARY KEY (a, b)) PARTITION BY RANGE (a); CREATE TABLE things_0 PARTITION OF things FOR VALUES FROM (0) TO (2); CREATE TABLE things_1 PARTITION OF things FOR VALUES FROM (2) TO (9);", 1),
					"ALTER TABLE things ALTER extra SET STORAGE EXTERNAL;", "", 1)
			}
			s := newSource(t, setup{specs: thingsSpec(), before: table + tc.before, autoInit: true, every: 30 * time.Millisecond})
			for _, id := range []string{"f1", "f2", "f3", "f6", "f7", "f9"} {
				s.upload(id, "u")
			}
			s.sameHeld()
			before, floor := s.haveHeld(), s.collection("things").Floor
			if tc.restart {
				s.stop()
			}
			if tc.lost {
				s.await("the slot is free", func() bool {
					return query[bool](s, `SELECT NOT active FROM pg_replication_slots WHERE slot_name = $1`, s.slot)
				})
				s.exec(`SELECT pg_drop_replication_slot($1)`, s.slot)
				s.upload("f9", "d")
				s.upload("f5", "u")
			}
			s.exec(tc.sql)
			if tc.restart {
				s.start()
			} else {
				s.awaitRaise("things", floor)
			}
			s.await("the references are read anew", func() bool {
				s.filled()
				return fmt.Sprint(s.wantHeld()) == fmt.Sprint(s.haveHeld())
			})
			s.sameHeld()
			if fmt.Sprint(before) == fmt.Sprint(s.haveHeld()) {
				t.Error("nothing changed: the case tests nothing")
			}
		})
	}
}

// TestFillOfAnotherPolicy: another path, and later no attachments at all.
func TestFillOfAnotherPolicy(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{specs: thingsSpec(), before: oneThing})
	s.exec(`UPDATE things SET extra = '{"photos": [{"id": "f3"}], "other": "f4"}'`)
	for _, id := range []string{"f1", "f3", "f4"} {
		s.upload(id, "u")
	}
	s.sameHeld()
	specs := thingsSpec()
	things := specs["things"]
	things.Attachments = []policies.AttachmentSpec{{Column: "extra", Path: "$.other"}}
	specs["things"] = things
	s.respec(specs)
	for id, want := range map[string]int{"f1": 0, "f3": 0, "f4": 2} {
		if n := len(s.documentsHeld(id)); n != want {
			t.Errorf("%d documents hold %s, want %d", n, id, want)
		}
	}
	things.Attachments = nil
	specs["things"] = things
	s.respec(specs)
	s.await("nothing of it is left", func() bool { return len(s.documentsHeld("f4")) == 0 })
	delete(specs, "cards")
	specs["things"] = thingsSpec()["things"]
	s.respec(specs)
	s.await("nothing is left of a collection that is gone", func() bool { return len(s.documentsHeld("11111111-1111-1111-1111-111111111111")) == 0 })
	if n := len(s.documentsHeld("f3")); n != 2 {
		t.Errorf("%d documents hold f3, want 2", n)
	}
	s.stop()
	s.start()
	s.filled()
	if n := query[int](s, `SELECT count(*) FROM walgate.attachment_fills`); n != 2 {
		t.Errorf("%d fills are remembered, want that of the files and that of things", n)
	}
}

// TestFillOlderThanTheStream holds the log up while a step's rows are read, and changes them meanwhile: what the stream says
// of them afterwards is newer, also where nobody sees the change.
func TestFillOlderThanTheStream(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{specs: thingsSpec(), before: oneThing})
	s.exec(`INSERT INTO things (a, b, owner, photo, hidden) SELECT n, 'y', 'ana', 'f' || n, n > 5 FROM generate_series(3, 9) n`)
	s.sameHeld()
	floor := s.collection("things").Floor
	lock := s.connect()
	_, err := lock.Exec(t.Context(), `BEGIN; LOCK TABLE walgate.checkpoint IN SHARE MODE`)
	s.ok(err)
	s.exec(`ALTER TABLE things ALTER body TYPE varchar(50)`)
	s.ok(s.watcher.Reload(t.Context()))
	s.await("a snapshot waits for the log", func() bool {
		return query[bool](s, `SELECT EXISTS (SELECT FROM pg_locks l JOIN pg_stat_activity a USING (pid)
			WHERE l.relation = 'things'::regclass AND l.mode = 'AccessShareLock' AND a.state = 'idle in transaction' AND a.query LIKE 'FETCH%')`)
	})
	s.exec(`UPDATE things SET photo = 'f20' WHERE a IN (3, 7)`)                // 7 is hidden
	s.exec(`DELETE FROM things WHERE a IN (4, 8)`)                             // so is 8
	s.exec(`UPDATE things SET owner = 'eve', photo = 'f21' WHERE a IN (5, 9)`) // and 9
	_, err = lock.Exec(t.Context(), `COMMIT`)
	s.ok(err)
	s.awaitRaise("things", floor)
	s.sameHeld()
}

// TestFillResumes: another leader goes on where the last one was killed, and doesn't begin again.
func TestFillResumes(t *testing.T) {
	t.Parallel()
	const rows = 3000
	s := newSource(t, setup{specs: thingsSpec(), fillRows: 10, before: thingsTable + fmt.Sprintf(`
		INSERT INTO things (a, b, owner, photo) SELECT n, 'x', 'ana', 'f' || n FROM generate_series(1, %d) n`, rows)})
	s.await("some rows were looked at", func() bool { return s.stats.Fills()["things"].Rows >= 100 })
	for range 3 {
		s.stop()
		before := s.fillOf("things")
		if before.Done {
			t.Fatal("the fill was done before the leader was killed: make it longer")
		}
		s.start()
		s.await("it goes on", func() bool { return s.stats.Fills()["things"].Rows >= before.Rows+50 })
		if now := s.fillOf("things"); now.Fill != before.Fill {
			t.Fatalf("fill %d took the place of fill %d, which had looked at %d rows", now.Fill, before.Fill, before.Rows)
		}
	}
	s.sameHeld()
	if f := s.fillOf("things"); f.Rows != rows {
		t.Errorf("%d rows were looked at, want %d", f.Rows, rows)
	}
	if p := s.stats.Fills()["things"]; p.Rows != rows || !p.Done || !p.Swept {
		t.Errorf("the statistics say %+v", p)
	}
}

// fillOf returns the newest fill of a collection.
func (s *source) fillOf(name string) (out changelog.Fill) {
	s.t.Helper()
	fills, err := s.log.Fills(s.t.Context())
	s.ok(err)
	for _, f := range fills {
		if f.Collection == s.collection(name).ID && f.Fill > out.Fill {
			out = f
		}
	}
	return out
}

// TestFillOfAStoppedCollection: rows that can't be read now hold nothing else up.
func TestFillOfAStoppedCollection(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{specs: thingsSpec(), before: oneThing, every: 30 * time.Millisecond})
	s.sameHeld()
	s.exec(`ALTER TABLE things RENAME photo TO picture`)
	s.await("the collection is stopped", func() bool { return s.collection("things").Stopped != "" })
	s.exec(`UPDATE things SET picture = 'f8'`)
	s.exec(`TRUNCATE cards`)
	s.await("cards are read anew", func() bool { return len(s.documentsHeldNow("11111111-1111-1111-1111-111111111111")) == 0 })
	s.exec(`ALTER TABLE things RENAME picture TO photo`)
	s.await("the collection goes on", func() bool { return s.collection("things").Stopped == "" })
	s.sameHeld()
}

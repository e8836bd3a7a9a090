package schema

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"strconv"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
)

const writeTables = `
CREATE EXTENSION IF NOT EXISTS citext SCHEMA public;
CREATE DOMAIN public.filled AS text NOT NULL CHECK (VALUE <> 'bad');
CREATE TABLE public.plain (id int PRIMARY KEY, n numeric(10,2), f float8, j json, b jsonb, c char(5), t text DEFAULT 'dflt', d public.filled DEFAULT 'x',
	ts timestamptz(0), box box, a int[], g int GENERATED ALWAYS AS (id + 1) STORED, ci public.citext, coll text COLLATE "C");
CREATE TABLE public."Mixed ""q" ("Ä k" text COLLATE "C", n numeric(6,2), v int, PRIMARY KEY (n, "Ä k"));
CREATE TABLE public.ci (id public.citext PRIMARY KEY, v int);
CREATE TABLE public.always (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v text);
CREATE TABLE public.parts (id int, r int, v text, PRIMARY KEY (id, r)) PARTITION BY RANGE (r);
CREATE TABLE public.parts_a PARTITION OF public.parts FOR VALUES FROM (0) TO (10);
CREATE TABLE public.parts_b (v text, r int NOT NULL, id int NOT NULL);
ALTER TABLE public.parts ATTACH PARTITION public.parts_b FOR VALUES FROM (10) TO (20);
CREATE TABLE public.shy (id int PRIMARY KEY, v text);
CREATE FUNCTION public.hide() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
	IF coalesce(NEW.v, OLD.v) = 'drop' THEN RETURN NULL; END IF;
	IF NEW.v = 'say' THEN RAISE 'told by the application'; END IF;
	IF NEW.v = 'own' THEN RAISE 'hidden' USING ERRCODE = 'XY123'; END IF;
	IF NEW.v = 'other' THEN NEW.id = NEW.id + 1000; END IF;
	IF TG_OP = 'DELETE' THEN RETURN OLD; END IF; RETURN NEW; END $$;
CREATE TRIGGER hide BEFORE INSERT OR UPDATE OR DELETE ON public.shy FOR EACH ROW EXECUTE FUNCTION public.hide();`

func TestLockRowsCompares(t *testing.T) {
	t.Parallel()
	dsn, _ := database(t, writeTables, `INSERT INTO public.plain (id, n, f, j, b, c, ts, box, a, ci, coll)
		VALUES (7, 1.5, 'NaN', '{"a": [1, 2.0]}', '{"b": null}', 'ab', '2020-01-01 00:00:01+00', '(2,2),(0,0)', '{1,NULL}', 'Ab', 'é')`)
	pool := sourcePool(t, dsn)
	table := loadTable(t, pool, "public.plain")
	for _, c := range []struct{ column, equal, differs string }{
		{"n", `1.50`, `1.51`}, {"n", `"1.501"`, `null`}, {"f", `"NaN"`, `0`}, {"j", `{ "a":[1,2]}`, `{"a":[2,1]}`},
		{"b", `{"b":null}`, `{}`}, {"c", `"ab"`, `"a"`}, {"t", `"dflt"`, `"Dflt"`}, {"d", `"x"`, `"bad"`},
		{"ts", `"2020-01-01T01:00:00.7+01:00"`, `"2020-01-01T00:00:01+01:00"`},
		{"box", `"(2,2),(0,0)"`, `"(4,1),(0,0)"`}, // of the same area
		{"a", `[1, null]`, `[1]`}, {"g", `8`, `9`}, {"ci", `"Ab"`, `"b"`}, {"coll", `"é"`, `"e"`},
	} {
		same, other := []byte(fmt.Sprintf(`{%q:%s}`, c.column, c.equal)), []byte(fmt.Sprintf(`{%q:%s}`, c.column, c.differs))
		found, err := lock(t, pool, table, Ask{Key: []string{"007"}, Base: same, Data: other}, Ask{Key: []string{"8"}, Base: same, Data: same},
			Ask{Key: []string{"7"}, Base: other, Data: same}, Ask{Key: []string{"7"}})
		if err != nil {
			t.Errorf("%s: %v", c.column, err)
			continue
		}
		want := []Found{{Key: []string{"7"}, Row: found[3].Row}, {Key: []string{"8"}},
			{Key: []string{"7"}, Row: found[3].Row, BaseDiffers: []string{c.column}, DataEquals: []string{c.column}}, {Key: []string{"7"}, Row: found[3].Row}}
		if !reflect.DeepEqual(found, want) || string(found[3].Row[0]) != "7" {
			t.Errorf("%s:\n got %q\nwant %q", c.column, found, want)
		}
	}
}

// TestKeysOfEveryForm locks, inserts, updates and deletes rows whose keys are composite, quoted, of an extension's type or
// spread over partitions.
func TestKeysOfEveryForm(t *testing.T) {
	t.Parallel()
	dsn, _ := database(t, writeTables)
	pool := sourcePool(t, dsn)
	for _, c := range []struct {
		table, id, canonical, value, inserted, updated string
	}{
		{`public.Mixed "q`, `["1.5","it's \"ü\\ 😀"]`, `["1.50","it's \"ü\\ 😀"]`, "v", `{"Ä k":"it's \"ü\\ 😀","n":1.50,"v":1}`, `{"Ä k":"it's \"ü\\ 😀","n":1.50,"v":2}`},
		{`public.Mixed "q`, `["-0",""]`, `["0.00",""]`, "v", `{"Ä k":"","n":0.00,"v":1}`, `{"Ä k":"","n":0.00,"v":2}`},
		{"public.ci", "Key", "Key", "v", `{"id":"Key","v":1}`, `{"id":"Key","v":2}`},
		{"public.parts", `["1","5"]`, `["1","5"]`, "v", `{"id":1,"r":5,"v":"1"}`, `{"id":1,"r":5,"v":"2"}`},
		{"public.parts", `[ "01", "15" ]`, `["1","15"]`, "v", `{"id":1,"r":15,"v":"1"}`, `{"id":1,"r":15,"v":"2"}`},
	} {
		table := loadTable(t, pool, c.table)
		key, err := ParseDocID(table, c.id)
		if err != nil {
			t.Fatal(err)
		}
		found, err := lock(t, pool, table, Ask{Key: key})
		if err != nil || found[0].Row != nil || string(AppendDocID(nil, found[0].Key)) != c.canonical {
			t.Fatalf("%s: %q %v", c.id, found, err)
		}
		for _, w := range []struct {
			kind WriteKind
			data string
			want string
		}{{Insert, `{"v":1}`, c.inserted}, {Update, `{"v":2}`, c.updated}, {Delete, "", c.updated}, {Delete, "", "none"}, {Update, `{"v":2}`, "none"}} {
			rows, err := write(t, pool, Write{Table: table, Kind: w.kind, Key: key, Data: []byte(w.data), Columns: []string{c.value}})
			if err != nil {
				t.Fatalf("%s %c: %v", c.id, w.kind, err)
			}
			if got := document(t, table, rows[0], false); got != w.want {
				t.Errorf("%s %c: %s, want %s", c.id, w.kind, got, w.want)
			}
			if found, err = lock(t, pool, table, Ask{Key: key}); err != nil {
				t.Fatal(err)
			}
			if got := document(t, table, found[0].Row, false); w.kind != Delete && w.want != "none" && got != w.want {
				t.Errorf("%s %c: found %s, want %s", c.id, w.kind, got, w.want)
			}
		}
	}
}

// TestExtensionKeysCompareTheirWay finds a citext key in other letters: the operator is beyond the session's search path.
func TestExtensionKeysCompareTheirWay(t *testing.T) {
	t.Parallel()
	dsn, _ := database(t, writeTables, `INSERT INTO public.ci VALUES ('Key', 1)`)
	pool := sourcePool(t, dsn)
	table := loadTable(t, pool, "public.ci")
	found, err := lock(t, pool, table, Ask{Key: []string{"KEY"}})
	if err != nil || document(t, table, found[0].Row, false) != `{"id":"Key","v":1}` {
		t.Errorf("%q %v", found, err)
	}
	rows, err := write(t, pool, Write{Table: table, Kind: Update, Key: []string{"KEY"}, Data: []byte(`{"v":2}`), Columns: []string{"v"}})
	if err != nil || document(t, table, rows[0], false) != `{"id":"Key","v":2}` {
		t.Errorf("%q %v", rows, err)
	}
}

// TestRowLevelSecurityOfTheRole writes as a role whose rows are limited, with the application's search path.
func TestRowLevelSecurityOfTheRole(t *testing.T) {
	t.Parallel()
	role := "writer_" + strconv.FormatUint(rand.Uint64(), 36)
	dsn, _ := database(t, writeTables, `CREATE ROLE `+role+`; GRANT USAGE ON SCHEMA public TO `+role+`; GRANT SELECT, INSERT, UPDATE, DELETE ON public.ci TO `+role+`;
		ALTER TABLE public.ci ENABLE ROW LEVEL SECURITY; CREATE POLICY low ON public.ci USING (v < 10); INSERT INTO public.ci VALUES ('a', 1), ('b', 20)`)
	pool := sourcePool(t, dsn)
	table := loadTable(t, pool, "public.ci")
	as := func(writes ...Write) (rows []Row, err error) {
		err = inTx(t, pool, func(tx pgx.Tx) error {
			if _, err := tx.Exec(t.Context(), `SET LOCAL ROLE `+role+`; SET LOCAL row_security = on; SET LOCAL search_path = public`); err != nil {
				return err
			}
			rows, err = ExecWrites(t.Context(), tx, writes)
			return err
		})
		return rows, err
	}
	update := func(key, v string) Write {
		return Write{Table: table, Kind: Update, Key: []string{key}, Data: []byte(`{"v":` + v + `}`), Columns: []string{"v"}}
	}
	rows, err := as(update("a", "2"), update("b", "3"), Write{Table: table, Kind: Delete, Key: []string{"b"}})
	if err != nil || rows[0] == nil || rows[1] != nil || rows[2] != nil {
		t.Errorf("%q %v", rows, err)
	}
	if _, err := as(update("a", "11")); Classify(err).Code != CodePermission {
		t.Errorf("a row beyond the policy: %v", err)
	}
	if t.Failed() {
		return
	}
	if _, err := pool.Exec(t.Context(), `DROP OWNED BY `+role+`; DROP ROLE `+role); err != nil {
		t.Error(err)
	}
}

// TestWritesInOneBatch mixes tables and kinds, with defaults, assigned keys, the same document twice, and rows that a trigger
// withholds.
func TestWritesInOneBatch(t *testing.T) {
	t.Parallel()
	dsn, _ := database(t, writeTables)
	pool := sourcePool(t, dsn)
	plain, always, shy := loadTable(t, pool, "public.plain"), loadTable(t, pool, "public.always"), loadTable(t, pool, "public.shy")
	insertShy := func(id int, v string) Write {
		return Write{Table: shy, Kind: Insert, Key: []string{strconv.Itoa(id)}, Data: []byte(`{"v":"` + v + `"}`), Columns: []string{"v"}}
	}
	rows, err := write(t, pool,
		Write{Table: always, Kind: Insert, Data: []byte(`{"v":"one"}`), Columns: []string{"v"}},
		Write{Table: always, Kind: Insert, Data: []byte(`{"v":"two"}`), Columns: []string{"v"}},
		Write{Table: always, Kind: Insert},
		Write{Table: plain, Kind: Insert, Key: []string{"1"}, Data: []byte(`{"f":1,"ignored":2}`), Columns: []string{"f"}},
		Write{Table: plain, Kind: Update, Key: []string{"1"}, Data: []byte(`{"f":2}`), Columns: []string{"f"}},
		Write{Table: plain, Kind: Update, Key: []string{"1"}, Data: []byte(`{"f":3,"t":null}`), Columns: []string{"f", "t"}},
		Write{Table: plain, Kind: Update, Key: []string{"1"}, Data: []byte(`{"f":4,"t":"u"}`), Columns: []string{"t", "f"}},
		insertShy(1, "a"), insertShy(2, "drop"), insertShy(3, "c"),
		Write{Table: shy, Kind: Delete, Key: []string{"3"}}, Write{Table: shy, Kind: Delete, Key: []string{"4"}}, Write{Table: shy, Kind: Delete, Key: []string{"1"}},
		insertShy(4, "other"))
	if err != nil {
		t.Fatal(err)
	}
	at := []*Table{always, always, always, plain, plain, plain, plain, shy, shy, shy, shy, shy, shy, shy}
	const rest = `"n":null,"f":%d,"j":null,"b":null,"c":null,"t":%s,"d":"x","ts":null,"box":null,"a":null,"ci":null,"coll":null}`
	for i, want := range []string{`{"id":1,"v":"one"}`, `{"id":2,"v":"two"}`, `{"id":3,"v":null}`,
		fmt.Sprintf(`{"id":1,`+rest, 1, `"dflt"`), fmt.Sprintf(`{"id":1,`+rest, 2, `"dflt"`), fmt.Sprintf(`{"id":1,`+rest, 3, `null`), fmt.Sprintf(`{"id":1,`+rest, 4, `"u"`),
		`{"id":1,"v":"a"}`, "none", `{"id":3,"v":"c"}`, `{"id":3,"v":"c"}`, "none", `{"id":1,"v":"a"}`, `{"id":1004,"v":"other"}`} {
		if got := document(t, at[i], rows[i], false); got != want {
			t.Errorf("write %d: %s, want %s", i, got, want)
		}
	}
	if _, err := write(t, pool, insertShy(10, "drop"), insertShy(11, "other")); !errors.Is(err, ErrUnmatched) {
		t.Errorf("nothing tells the rows apart, but: %v", err)
	}
}

// TestWritesKeepStatementsFew holds 50 updates of one kind to one statement, and their text to its form, not its number.
func TestWritesKeepStatementsFew(t *testing.T) {
	t.Parallel()
	dsn, _ := database(t, writeTables)
	table := loadTable(t, sourcePool(t, dsn), "public.shy")
	runs := func(n int, columns ...string) []*run {
		var writes []Write
		for i := range n {
			writes = append(writes, Write{Table: table, Kind: Update, Key: []string{strconv.Itoa(i)}, Data: []byte(`{"v":"x","id":1}`), Columns: columns})
		}
		r, err := newRuns(writes)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	a, b := runs(50, "v", "id"), runs(7, "id", "v")
	if len(a) != 1 || len(b) != 1 || a[0].sql() != b[0].sql() {
		t.Errorf("%d and %d statements:\n%s\n%s", len(a), len(b), a[0].sql(), b[0].sql())
	}
}

// TestLocksNeverDeadlock lets many transactions lock and write the same rows, each in an order of its own.
func TestLocksNeverDeadlock(t *testing.T) {
	t.Parallel()
	dsn, _ := database(t, `CREATE TABLE public.counters (id int PRIMARY KEY, n int NOT NULL)`, `INSERT INTO public.counters SELECT i, 0 FROM generate_series(1, 10) i`)
	pool, err := OpenPool(t.Context(), dsn, 20)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	table := loadTable(t, pool, "public.counters")
	const writers = 200
	var group sync.WaitGroup
	for range writers {
		group.Go(func() {
			order := rand.Perm(10)
			err := inTx(t, pool, func(tx pgx.Tx) error {
				var asks []Ask
				for _, i := range order {
					asks = append(asks, Ask{Key: []string{strconv.Itoa(i + 1)}})
				}
				found, err := LockRows(context.Background(), tx, table, asks)
				if err != nil {
					return err
				}
				var writes []Write
				for _, f := range found {
					n, err := strconv.Atoi(string(f.Row[1]))
					if err != nil {
						return err
					}
					writes = append(writes, Write{Table: table, Kind: Update, Key: f.Key, Data: fmt.Appendf(nil, `{"n":%d}`, n+1), Columns: []string{"n"}})
				}
				_, err = ExecWrites(context.Background(), tx, writes)
				return err
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	var low, high int
	if err := pool.QueryRow(t.Context(), "SELECT min(n), max(n) FROM public.counters").Scan(&low, &high); err != nil || low != writers || high != writers {
		t.Errorf("counted %d to %d, want %d: an update was lost (%v)", low, high, writers, err)
	}
}

package schema

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/walgate/walgate/internal/pgserver"
)

// seedEnv names the environment variable that replays a run of the random tests.
const seedEnv = "WALGATE_TEST_SEED"

// randomRows is how many random rows each family gets besides its edge values.
const randomRows = 40

// TestCodecEqualsPostgres writes every family of types to a real server, alone, in arrays and in composites, and holds
// the codec's JSON against row_to_json: once from a SELECT and once from the change stream.
func TestCodecEqualsPostgres(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dsn := pgserver.ForTest(t).Database(t)
	conn := connectPinned(t, dsn)
	mustExec(t, conn, "CREATE PUBLICATION p FOR ALL TABLES", differentialTypes)
	extensions := installExtensions(t, conn)
	r := seededRand(t)

	families := allFamilies(extensions, supportsXML(ctx, conn), conn.PgConn().ParameterStatus("server_version"))
	for i, f := range families {
		f.create(t, conn, i)
	}
	slot := "codec_" + strconv.FormatUint(r.Uint64(), 36)
	mustExec(t, conn, fmt.Sprintf("SELECT pg_create_logical_replication_slot('%s', 'pgoutput')", slot))
	for i, f := range families {
		f.fill(t, conn, i, r)
	}

	var types Types
	tables := readDifferentialTables(t, conn, &types)
	if len(tables) != len(families) {
		t.Fatalf("%d tables for %d families", len(tables), len(families))
	}
	want := map[uint32][]string{}
	for oid, table := range tables {
		for row, pair := range selectRows(t, conn, table) {
			checkRow(t, "SELECT", table, row, pair.values, pair.json)
			want[oid] = append(want[oid], pair.json)
		}
	}

	// From here on every new session of this database starts with other settings, so that one missing from
	// SessionSettings shows as a difference between the two paths.
	mustExec(t, conn, hostileSettings)
	walked := map[uint32]int{}
	for _, change := range readInserts(t, connectPinned(t, dsn), slot) {
		row := walked[change.relation]
		walked[change.relation]++
		checkRow(t, "WAL", tables[change.relation], row, change.values, want[change.relation][row])
	}
	t.Logf("%d families, %d rows, PostgreSQL %s", len(families), total(walked), conn.PgConn().ParameterStatus("server_version"))
	for oid, rows := range want {
		if walked[oid] != len(rows) {
			t.Errorf("%s: %d rows in the change stream, %d in the table", tables[oid].family, walked[oid], len(rows))
		}
	}
}

// hostileSettings gives the current database other defaults than SessionSettings, each of which changes some text.
const hostileSettings = `DO $$
DECLARE s text;
BEGIN
	FOREACH s IN ARRAY ARRAY[
		'DateStyle = ''German, DMY''', 'IntervalStyle = ''iso_8601''', 'TimeZone = ''Asia/Kathmandu''',
		'extra_float_digits = -5', 'bytea_output = ''escape''', 'quote_all_identifiers = on',
		'search_path = nowhere', 'client_encoding = ''LATIN1''']
	LOOP
		EXECUTE format('ALTER DATABASE %I SET %s', current_database(), s);
	END LOOP;
END $$`

func seededRand(t *testing.T) *rand.Rand {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv(seedEnv); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatalf("%s is %q: it must be a number that an earlier run printed", seedEnv, text)
		}
	}
	t.Logf("replay with %s=%d", seedEnv, seed)
	return rand.New(rand.NewPCG(seed, seed))
}

// connectPinned opens a session with SessionSettings.
func connectPinned(t *testing.T, dsn string) *pgx.Conn {
	t.Helper()
	config, err := pgx.ParseConfig(dsn)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range SessionSettings {
		config.RuntimeParams[s.Name] = s.Value
	}
	conn, err := pgx.ConnectConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

func mustExec(t *testing.T, conn *pgx.Conn, statements ...string) {
	t.Helper()
	for _, sql := range statements {
		if _, err := conn.PgConn().Exec(t.Context(), sql).ReadAll(); err != nil {
			t.Fatalf("%v, in:\n%.2000s", err, sql)
		}
	}
}

// installExtensions creates those of the wanted extensions that this server's build brings along.
func installExtensions(t *testing.T, conn *pgx.Conn) map[string]bool {
	t.Helper()
	rows, err := conn.Query(t.Context(), `SELECT name FROM pg_available_extensions
		WHERE name IN ('hstore', 'citext', 'ltree')`)
	if err != nil {
		t.Fatal(err)
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	present := map[string]bool{}
	for _, name := range names {
		mustExec(t, conn, "CREATE EXTENSION "+name+" SCHEMA public")
		present[name] = true
	}
	return present
}

// supportsXML is false for builds of PostgreSQL without libxml.
func supportsXML(ctx context.Context, conn *pgx.Conn) bool {
	_, err := conn.PgConn().Exec(ctx, "SELECT xml '<a/>'").ReadAll()
	return err == nil
}

// differentialTable is the table of one family as the test reads it.
type differentialTable struct {
	family  string // the type's name, for messages
	name    string
	columns []Field
}

func readDifferentialTables(t *testing.T, conn *pgx.Conn, types *Types) map[uint32]*differentialTable {
	t.Helper()
	type column struct {
		Table     uint32
		TableName string
		Family    string
		Name      string
		Type      uint32
	}
	rows, err := conn.Query(t.Context(), `SELECT c.oid, c.relname, obj_description(c.oid), a.attname, a.atttypid
		FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
		WHERE c.relkind = 'r' AND c.relname LIKE 'family\_%' ORDER BY c.oid, a.attnum`)
	if err != nil {
		t.Fatal(err)
	}
	columns, err := pgx.CollectRows(rows, pgx.RowToStructByPos[column])
	if err != nil {
		t.Fatal(err)
	}
	var oids []uint32
	for _, c := range columns {
		oids = append(oids, c.Type)
	}
	if err := types.Load(t.Context(), conn, oids...); err != nil {
		t.Fatal(err)
	}
	tables := map[uint32]*differentialTable{}
	for _, c := range columns {
		if tables[c.Table] == nil {
			tables[c.Table] = &differentialTable{family: c.Family, name: c.TableName}
		}
		found := types.Lookup(c.Type)
		if found == nil {
			t.Fatalf("type %d of %s is not loaded", c.Type, c.Family)
		}
		tables[c.Table].columns = append(tables[c.Table].columns, Field{Name: c.Name, Type: found})
	}
	return tables
}

// textAndJSON is one row twice: the columns' text, and what PostgreSQL makes of it.
type textAndJSON struct {
	values [][]byte
	json   string
}

func selectRows(t *testing.T, conn *pgx.Conn, table *differentialTable) []textAndJSON {
	t.Helper()
	sql := "SELECT f.*, row_to_json(f) FROM public." + table.name + " f ORDER BY id"
	results, err := conn.PgConn().Exec(t.Context(), sql).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	lineBreaks := strings.NewReplacer("\n", " ", "\r", " ")
	var pairs []textAndJSON
	for _, row := range results[0].Rows {
		last := len(row) - 1
		pairs = append(pairs, textAndJSON{row[:last], lineBreaks.Replace(string(row[last]))})
	}
	return pairs
}

// checkRow builds a document from the columns' text and compares it with row_to_json's.
func checkRow(t *testing.T, path string, table *differentialTable, row int, values [][]byte, want string) {
	t.Helper()
	got := []byte{'{'}
	for i, column := range table.columns {
		if i > 0 {
			got = append(got, ',')
		}
		got = AppendString(got, []byte(column.Name))
		got = append(got, ':')
		if values[i] == nil {
			got = append(got, "null"...)
			continue
		}
		var err error
		if got, err = AppendValue(got, column.Type, values[i], false); err != nil {
			t.Errorf("%s of %s, row %d, column %s: %v\ntext %q", path, table.family, row, column.Name, err, values[i])
			return
		}
	}
	got = append(got, '}')
	if string(got) != want {
		t.Errorf("%s of %s, row %d:\n got %s\nwant %s\ntext %q", path, table.family, row, got, want, values)
	}
}

// insert is one Insert message of the change stream.
type insert struct {
	relation uint32
	values   [][]byte
}

func readInserts(t *testing.T, conn *pgx.Conn, slot string) []insert {
	t.Helper()
	result := conn.PgConn().ExecParams(t.Context(), `SELECT data FROM pg_logical_slot_get_binary_changes($1, NULL, NULL,
		'proto_version', '1', 'publication_names', 'p')`, [][]byte{[]byte(slot)}, nil, nil, []int16{1})
	return decodeInserts(t, result)
}

func decodeInserts(t *testing.T, result *pgconn.ResultReader) []insert {
	t.Helper()
	var inserts []insert
	for result.NextRow() {
		data := result.Values()[0]
		if data[0] != 'I' {
			continue
		}
		message := insert{relation: binary.BigEndian.Uint32(data[1:])}
		columns := int(binary.BigEndian.Uint16(data[6:]))
		data = data[8:]
		for range columns {
			switch data[0] {
			case 'n':
				message.values = append(message.values, nil)
				data = data[1:]
			case 't':
				end := 5 + binary.BigEndian.Uint32(data[1:])
				message.values = append(message.values, append([]byte{}, data[5:end]...))
				data = data[end:]
			default:
				t.Fatalf("column of kind %q in an insert", data[0])
			}
		}
		inserts = append(inserts, message)
	}
	if _, err := result.Close(); err != nil {
		t.Fatal(err)
	}
	return inserts
}

func total(counts map[uint32]int) (sum int) {
	for _, n := range counts {
		sum += n
	}
	return sum
}

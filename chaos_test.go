package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/walgate/walgate/internal/built"
	"github.com/walgate/walgate/internal/chaos"
)

const chaosTestConfig = `
database: {url: "postgres://somebody@db.example.com/live"}
auth: {jwt: {jwks_url: "${JWKS_OF_PRODUCTION}"}}
collections:
  todos:
    table: public.todos
    scope: [{owner_id: claims.sub}, {team_id: claims.teams}]
    write: {columns: [title, done], set: {owner_id: claims.sub}}
`

const chaosTestSQL = `\restrict x
CREATE TABLE public.todos (id uuid PRIMARY KEY, owner_id text, team_id int, title text, done bool);
ALTER TABLE public.todos OWNER TO somebody_else;
`

// chaosFiles writes an operator's configuration and SQL.
func chaosFiles(t *testing.T, config, sql string) chaosFlags {
	t.Helper()
	dir := t.TempDir()
	f := chaosFlags{config: filepath.Join(dir, "config.yaml"), schema: filepath.Join(dir, "schema.sql"), keep: dir, seed: 1, runs: 1, parallel: 1}
	for path, text := range map[string]string{f.config: config, f.schema: sql} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

// TestChaosCommandSaysWhatIsWrong: an operator learns of each mistake in the words that lead out of it, and the exit status
// is that of wrong usage.
func TestChaosCommandSaysWhatIsWrong(t *testing.T) {
	t.Parallel()
	for name, v := range map[string]struct {
		config, sql string
		change      func(*chaosFlags)
		want        string
	}{
		"no schema":           {chaosTestConfig, "", func(f *chaosFlags) { f.schema = "" }, "pg_dump --schema-only"},
		"no such schema":      {chaosTestConfig, "", func(f *chaosFlags) { f.schema += ".gone" }, "no such file"},
		"no such config":      {chaosTestConfig, "", func(f *chaosFlags) { f.config += ".gone" }, "there is no file"},
		"broken config":       {"collections: {a: {}}", "", nil, "the table to sync"},
		"no collections":      {"collections: {}", "", nil, "has no collections"},
		"broken SQL":          {chaosTestConfig, "\n\nCREATE TABLE x (;", nil, "line 3: ERROR: syntax error"},
		"an extension":        {chaosTestConfig, "CREATE EXTENSION nobody_has_this;", nil, "an extension that this machine's PostgreSQL lacks"},
		"a table isn't there": {chaosTestConfig, "CREATE TABLE todo (id int PRIMARY KEY);", nil, "collections.todos.table"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := chaosFiles(t, v.config, v.sql)
			if v.change != nil {
				v.change(&f)
			}
			var out, say bytes.Buffer
			err := runChaos(t.Context(), f, &out, &say)
			var usage *usageError
			var faults *ConfigError
			if err == nil || !strings.Contains(err.Error(), v.want) || !errors.As(err, &usage) && !errors.As(err, &faults) {
				t.Errorf("said %v, want a mistake of usage with %q", err, v.want)
			}
			if out.Len() > 0 {
				t.Errorf("something ran: %s", &out)
			}
		})
	}
}

// TestChaosCommand runs one seed on an operator's tables. Their database and keys need not be there, and neither must the
// roles that own the tables.
func TestChaosCommand(t *testing.T) {
	t.Parallel()
	f := chaosFiles(t, chaosTestConfig, chaosTestSQL)
	var err error
	if f.binary, err = built.Gateway(); err != nil {
		t.Fatal(err)
	}
	var out, say bytes.Buffer
	if err := runChaos(t.Context(), f, &out, &say); err != nil {
		t.Fatalf("%v\n%s", err, &say)
	}
	var r chaos.Report
	if err := json.Unmarshal(out.Bytes(), &r); err != nil || !r.OK || r.Seed != 1 || len(r.Faults) == 0 || r.Counts["application: commits"] == 0 {
		t.Errorf("reported %s (%v)", &out, err)
	}
	if !strings.Contains(say.String(), "1 runs, no violation") {
		t.Errorf("said %s", &say)
	}
}

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml/ast"

	"github.com/walgate/walgate/policies"
)

var update = flag.Bool("update", false, "write the golden files anew")

// testEnv is the environment that the corpus is read in.
var testEnv = environ{
	"DATABASE_URL":    "postgres://app:hunter2hunter2@db:5432/app",
	"JWT_SECRET":      strings.Repeat("s", 32),
	"POOL":            "32",
	"EMPTY":           "",
	"MANY_CONNECTION": "many",
}

type environ map[string]string

func (e environ) get(name string) (string, bool) { v, ok := e[name]; return v, ok }

func (e environ) with(pairs ...string) environ {
	merged := environ{}
	for k, v := range e {
		merged[k] = v
	}
	for i := 0; i < len(pairs); i += 2 {
		merged[pairs[i]] = pairs[i+1]
	}
	return merged
}

// TestConfigFileIsTheDefaults holds the annotated file equal to the defaults in code, key by key.
func TestConfigFileIsTheDefaults(t *testing.T) {
	t.Parallel()
	env := environ{"DATABASE_URL": defaultDatabaseURL}
	c := defaultConfig()
	zero(configKeys(c))
	d := &decoder{path: "config.yaml", env: env.get, positions: map[string]mark{}}
	d.file([]byte(annotatedConfig), withoutChecks(configKeys(c)), c)
	if len(d.faults) > 0 {
		t.Fatal(&ConfigError{Faults: d.faults})
	}
	want := defaultConfig()
	for i, k := range configKeys(c) {
		if _, ok := d.positions[k.path]; !ok {
			t.Errorf("config.yaml lacks the key %s", k.path)
		}
		if got, want := fmt.Sprint(value(k)), fmt.Sprint(value(configKeys(want)[i])); got != want {
			t.Errorf("%s: config.yaml says %s, the default in code is %s", k.path, got, want)
		}
	}
	if len(c.Collections) > 0 {
		t.Errorf("config.yaml names collections: %v", c.Collections)
	}
}

func zero(keys []key) {
	for _, k := range keys {
		reflect.ValueOf(k.into).Elem().SetZero()
	}
}

// withoutChecks lets the empty values of required keys pass.
func withoutChecks(keys []key) []key {
	for i := range keys {
		keys[i].check = nil
	}
	return keys
}

func value(k key) any { return reflect.ValueOf(k.into).Elem().Interface() }

// TestEveryFieldHasAKey finds fields of Config that no key reaches.
func TestEveryFieldHasAKey(t *testing.T) {
	t.Parallel()
	c := defaultConfig()
	reached := map[any]string{}
	for _, k := range configKeys(c) {
		if other, twice := reached[k.into]; twice {
			t.Errorf("%s and %s set the same field", k.path, other)
		}
		reached[k.into] = k.path
	}
	var walk func(v reflect.Value, name string)
	walk = func(v reflect.Value, name string) {
		for i := range v.NumField() {
			f := v.Type().Field(i)
			switch {
			case !f.IsExported() || f.Name == "Collections":
			case f.Type.Kind() == reflect.Struct:
				walk(v.Field(i), name+"."+f.Name)
			default:
				if _, ok := reached[v.Field(i).Addr().Interface()]; !ok {
					t.Errorf("no key sets %s.%s", name, f.Name)
				}
			}
		}
	}
	walk(reflect.ValueOf(c).Elem(), "Config")
}

func TestTwinsAreDistinct(t *testing.T) {
	t.Parallel()
	seen := map[string]string{"WALGATE_CONFIG": "--config"}
	for _, k := range configKeys(defaultConfig()) {
		if other, twice := seen[twin(k.path)]; twice {
			t.Errorf("%s and %s share the variable %s", k.path, other, twin(k.path))
		}
		seen[twin(k.path)] = k.path
	}
}

// TestExampleInConfigFile loads the commented example at the end of config.yaml.
func TestExampleInConfigFile(t *testing.T) {
	t.Parallel()
	head, example, found := strings.Cut(annotatedConfig, "collections: {}")
	if !found {
		t.Fatal("config.yaml has no collections: {}")
	}
	_, example, _ = strings.Cut(example, "# collections:")
	example = "collections:" + strings.ReplaceAll(example, "\n# ", "\n")
	c, err := parseConfig("config.yaml", []byte(head+example), testEnv.with("WALGATE_AUTH_JWT_SECRET", testEnv["JWT_SECRET"]).get)
	if err != nil {
		t.Fatal(err)
	}
	want := policies.Spec{
		Table:           "public.tasks",
		Columns:         policies.ColumnsSpec{Exclude: []string{"internal_notes"}},
		Scope:           []map[string]string{{"owner_id": "claims.sub"}},
		Where:           "!row.archived",
		Read:            policies.ReadSpec{Roles: []string{"reader", "editor"}},
		SoftDelete:      "deleted_at",
		ReplicaIdentity: "full",
		Retention:       30 * 24 * time.Hour,
		Write: &policies.WriteSpec{Roles: []string{"editor"}, Operations: []string{"insert", "update", "delete"}, Columns: []string{"title", "done"},
			Set: map[string]string{"owner_id": "claims.sub"}, Check: "size(row.title) < 200"},
		Conflict:    "merge",
		OnDeleted:   "resurrect_on_update",
		Attachments: []policies.AttachmentSpec{{Column: "photo_id"}, {Column: "extra", Path: "$.photos[*].id"}, {Column: "notes", Pattern: "img_[0-9a-f]{32}"}},
	}
	if got := c.Collections["tasks"]; !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	for _, k := range append(specKeys("collections.tasks", &policies.Spec{}), writeKeys("collections.tasks.write", &policies.WriteSpec{})...) {
		if _, ok := c.positions[k.path]; !ok {
			t.Errorf("the example lacks %s", k.path)
		}
	}
}

// TestBadConfigs compares the faults of each bad file with its golden messages.
func TestBadConfigs(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("testdata/config/*.bad.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no bad files: %v", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			t.Parallel()
			_, err := Load(file, testEnv.get)
			var broken *ConfigError
			if !errors.As(err, &broken) {
				t.Fatalf("got %v, want a *ConfigError", err)
			}
			got := strings.ReplaceAll(err.Error(), "testdata/config/", "") + "\n"
			if strings.Contains(got, "hunter2") {
				t.Errorf("a password is in the message:\n%s", got)
			}
			golden := strings.TrimSuffix(file, ".yaml") + ".golden"
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
		})
	}
}

func TestFullConfig(t *testing.T) {
	t.Parallel()
	c, err := Load("testdata/config/full.good.yaml", testEnv.get)
	if err != nil {
		t.Fatal(err)
	}
	for _, check := range []struct {
		name      string
		got, want any
	}{
		{"revision", c.Revision, int64(7)},
		{"auto_init", c.AutoInit, true},
		{"url", string(c.Database.URL), testEnv["DATABASE_URL"]},
		{"pool from a variable", c.Database.PoolSize, 32},
		{"escape", c.Auth.JWT.Issuer, "https://issuer.example/${realm}"},
		{"secret", string(c.Auth.JWT.Secret), testEnv["JWT_SECRET"]},
		{"size", c.Limits.MaxSlotLag, Size(2 << 40)},
		{"origins", c.HTTP.AllowedOrigins, []string{"https://app.example.com", "http://localhost:5173"}},
		{"default kept", c.Replication.Publication, "walgate"},
		{"scope", c.Collections["notes"].Scope, []map[string]string{{"owner_id": "claims.sub"}, {"team_id": "claims.teams", "kind": "claims.kind"}}},
		{"where", c.Collections["notes"].Where, "row.kind != 'draft' &&\n!row.hidden\n"},
		{"lossless", c.Collections["notes"].Lossless, true},
		{"push role", c.Push.Role, "app_writer"},
		{"push body", c.Limits.PushBody, Size(4 << 20)},
		{"echo timeout", c.Push.EchoTimeout, 500 * time.Millisecond},
		{"write", c.Collections["notes"].Write, &policies.WriteSpec{Set: map[string]string{"owner_id": "claims.sub"}}},
		{"resolver", c.Collections["notes"].Conflict + " " + c.Collections["notes"].ConflictFunction, "function app.resolve"},
		{"on_deleted", c.Collections["notes"].OnDeleted, "delete_wins"},
		{"attachments", c.Collections["photos"].Attachments, []policies.AttachmentSpec{{Column: "id"}, {Column: "extra", Path: "$.photos[*].id"}, {Column: "notes", Pattern: `img_\d+`}}},
		{"blobs", c.Blobs.URL, "s3://bucket?region=eu-central-1"},
		{"types", c.Attachments.Types, []string{"image/*", "application/pdf"}},
		{"delete roles", c.Attachments.DeleteRoles, []string{"keeper"}},
		{"sweep guard", c.Attachments.SweepGuard, 0},
		{"grace", c.Attachments.Grace, 90 * 24 * time.Hour},
		{"no write", c.Collections["countries"].Write == nil, true},
		{"no scope", c.Collections["countries"].Scope == nil, true},
	} {
		if !reflect.DeepEqual(check.got, check.want) {
			t.Errorf("%s: got %v, want %v", check.name, check.got, check.want)
		}
	}
}

func TestPosition(t *testing.T) {
	t.Parallel()
	c, err := Load("testdata/config/full.good.yaml", testEnv.get)
	if err != nil {
		t.Fatal(err)
	}
	const file = "testdata/config/full.good.yaml"
	data, _ := os.ReadFile(file)
	for key, text := range map[string]string{
		"collections.notes":                    "  notes:",
		"collections.notes.scope.0.owner_id":   "- owner_id:",
		"collections.notes.scope.1.kind":       "kind: claims.kind",
		"collections.notes.scope.1.missing":    "- team_id:",
		"collections.notes.table.deeper":       "table: notes",
		"collections.notes.columns.exclude.1":  "[secret_a, secret_b]",
		"collections.countries.scope.owner_id": "  countries:",
	} {
		line := 1 + strings.Count(string(data[:bytes.Index(data, []byte(text))]), "\n")
		if got, want := c.Position(key), fmt.Sprintf("%s:%d", file, line); got != want {
			t.Errorf("%s: got %s, want %s", key, got, want)
		}
	}
	one := "auth: {jwt: {secret: \"${JWT_SECRET}\"}}\ncollections:\n  a:\n    table: a\n    scope:\n      - x: claims.sub\n"
	if c, err := parseConfig("one.yaml", []byte(one), testEnv.with("WALGATE_LOG_LEVEL", "warn").get); err != nil ||
		c.Position("collections.a.scope.x") != "one.yaml:6" || c.Position("log.level") != "environment variable WALGATE_LOG_LEVEL" {
		t.Errorf("got %v, %v", c, err)
	}
	if got := c.Position("nowhere.at.all"); got != file {
		t.Errorf("unknown key: got %s", got)
	}
	err = FaultsError(c, []policies.Fault{{Path: "collections.notes.table", Got: `"notes"`, Want: "a table", Hint: `did you mean "note"?`}})
	if want := `: collections.notes.table: found "notes", expected a table; did you mean "note"?`; err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v", err)
	}
	if err := FaultsError(c, nil); err != nil {
		t.Errorf("no faults, but %v", err)
	}
}

func TestEnvironmentTwins(t *testing.T) {
	t.Parallel()
	env := environ{
		"WALGATE_DATABASE_URL":             "host=/var/run/postgresql dbname=app",
		"WALGATE_AUTH_JWT_JWKS_URL":        "https://issuer.example/jwks",
		"WALGATE_HTTP_ALLOWED_ORIGINS":     "https://a.example, https://b.example",
		"WALGATE_LIMITS_FRAME":             "64KB",
		"WALGATE_AUTO_INIT":                "true",
		"WALGATE_CONFIG_REVISION":          "3",
		"WALGATE_CATALOG_POLL_INTERVAL":    "250ms",
		"WALGATE_REPLICATION_SLOT":         "other",
		"WALGATE_AUTH_CLAIMS_ROLES":        "realm_access.roles",
		"WALGATE_LIMITS_FULL_CONCURRENCY":  "2",
		"WALGATE_DATABASE_REPLICATION_URL": "",
	}
	c, err := parseConfig("x.yaml", []byte("http: {listen: \":1\"}\ndatabase: {url: \"${UNSET}\"}\n"), env.get)
	if err != nil {
		t.Fatal(err)
	}
	if c.HTTP.Listen != ":1" || string(c.Database.URL) != env["WALGATE_DATABASE_URL"] || c.Limits.Frame != 64<<10 || !c.AutoInit ||
		c.Revision != 3 || c.Catalog.PollInterval != 250*time.Millisecond || c.Replication.Slot != "other" || len(c.HTTP.AllowedOrigins) != 2 {
		t.Errorf("got %v", c)
	}
	env = env.with("WALGATE_LIMITS_FRAME", "big", "WALGATE_AUTO_INIT", "yes", "WALGATE_DATABASE_URL", "mysql://u:hunter2@h/db")
	_, err = parseConfig("x.yaml", nil, env.get)
	for _, want := range []string{
		`environment variable WALGATE_LIMITS_FRAME: limits.frame: found "big", expected a size`,
		`environment variable WALGATE_AUTO_INIT: auto_init: found "yes", expected true or false`,
		`environment variable WALGATE_DATABASE_URL: database.url: found a value (not shown), expected a PostgreSQL connection string`,
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v\nwant %s", err, want)
		}
	}
	if err != nil && strings.Contains(err.Error(), "hunter2") {
		t.Errorf("the password is in %v", err)
	}
	for _, unset := range []environ{{}, {"DATABASE_URL": ""}} {
		_, err = parseConfig("x.yaml", nil, unset.get)
		if err == nil || !strings.Contains(err.Error(), "database.url: found nothing") || !strings.Contains(err.Error(), "WALGATE_DATABASE_URL") {
			t.Errorf("%v: got %v", unset, err)
		}
	}
}

func TestLoadFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if _, err := Load(filepath.Join(dir, "none.yaml"), testEnv.get); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "--config") {
		t.Errorf("missing file: %v", err)
	}
	if _, err := Load(dir, testEnv.get); err == nil {
		t.Error("a directory was taken for a configuration")
	}
	large := filepath.Join(dir, "large.yaml")
	if err := os.WriteFile(large, bytes.Repeat([]byte("#"), maxConfigSize+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(large, testEnv.get); err == nil || !strings.Contains(err.Error(), "more than") {
		t.Errorf("large file: %v", err)
	}
}

func TestSecretsAreNotPrinted(t *testing.T) {
	t.Parallel()
	const word = "hunter2"
	for _, dsn := range []string{
		"postgres://u:hunter2@h/db", "postgres://u@h/db?password=hunter2", "postgres://u:hunter2%zz@h/db",
		"host=h password=hunter2 user=u", "password = 'hunter2 \\' hunter2' host=h", "PASSWORD=a\\ hunter2", "sslpassword=hunter2",
		"postgres://u:a/hunter2@h/db",
	} {
		c := defaultConfig()
		c.Database.URL, c.Storage.URL, c.Auth.JWT.Secret = DSN(dsn), DSN(dsn), word
		var out bytes.Buffer
		fmt.Fprintf(&out, "%v %+v %#v %+v %v", *c, c, c, c.Database, c.Auth.JWT)
		slog.New(slog.NewJSONHandler(&out, nil)).Info("x", "config", c, "url", c.Database.URL, "secret", c.Auth.JWT.Secret)
		if err := json.NewEncoder(&out).Encode(c); err != nil {
			t.Fatal(err)
		}
		if strings.Contains(out.String(), word) {
			t.Errorf("%s: printed as %s", dsn, out.String())
		}
	}
	if got := DSN("postgres://u:p@h/db").String(); got != "postgres://u:xxxxx@h/db" {
		t.Errorf("got %s", got)
	}
}

func TestSizesAndDurations(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]int64{"0B": 0, "64kB": 64 << 10, "8GB": 8 << 30, "8 GB": 8 << 30, "1TB": 1 << 40} {
		if got, ok := parseSize(text); !ok || got != want {
			t.Errorf("%s: got %d, %v", text, got, ok)
		}
	}
	for _, text := range []string{"", "8", "-1GB", "1.5GB", "8gb", "9999999999TB", "8388608TB", "GB"} {
		if got, ok := parseSize(text); ok {
			t.Errorf("%s: got %d", text, got)
		}
	}
	for text, want := range map[string]time.Duration{"30d": 720 * time.Hour, "0": 0, "1h30m": 90 * time.Minute, "500ms": 500 * time.Millisecond} {
		if got, ok := parseDuration(text); !ok || got != int64(want) {
			t.Errorf("%s: got %d, %v", text, got, ok)
		}
	}
	for _, text := range []string{"", "30", "-1d", "1.5d", "99999d", "d", "30 s"} {
		if got, ok := parseDuration(text); ok {
			t.Errorf("%s: got %d", text, got)
		}
	}
	for n, want := range map[time.Duration]string{720 * time.Hour: "30d", time.Minute: "1m", 90 * time.Minute: "1h30m", time.Second: "1s", 0: "0s"} {
		if got := formatDuration(int64(n), 10); got != want {
			t.Errorf("%d: got %s, want %s", n, got, want)
		}
	}
	if got := formatSize(8<<30, 10) + formatSize(1000, 10); got != "8GB1000B" {
		t.Errorf("got %s", got)
	}
}

func TestNearest(t *testing.T) {
	t.Parallel()
	known := []string{"listen", "public_url", "tls"}
	for name, want := range map[string]string{"lisen": "listen", "Listen": "listen", "lsiten": "listen", "publicurl": "public_url", "xyz": "", "": "", strings.Repeat("a", 100): ""} {
		if got := nearest(name, known); got != want {
			t.Errorf("%q: got %q, want %q", name, got, want)
		}
	}
}

// FuzzLoad holds the decoder to three promises: it returns, it names a place for every fault, and what it accepts obeys
// the rules.
func FuzzLoad(f *testing.F) {
	files, err := filepath.Glob("testdata/config/*.yaml")
	if err != nil || len(files) == 0 {
		f.Fatalf("no seed files: %v", err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte(annotatedConfig))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 1<<12 {
			return // the YAML reader takes quadratic time on deep nesting, and the file is the operator's own
		}
		c, err := parseConfig("f.yaml", data, testEnv.get)
		var broken *ConfigError
		switch {
		case errors.As(err, &broken):
			for _, fault := range broken.Faults {
				if fault.At == "" || fault.Got == "" {
					t.Errorf("an empty fault: %+v", fault)
				}
			}
		case err != nil:
			t.Errorf("not a *ConfigError: %v", err)
		case c.Database.URL == "" || c.Catalog.PollInterval > 5*time.Second:
			t.Errorf("accepted %v", c)
		default:
			for name, spec := range c.Collections {
				if spec.Table == "" || spec.Scope != nil && len(spec.Scope) == 0 {
					t.Errorf("accepted collection %s: %+v", name, spec)
				}
			}
		}
	})
}

// TestNilNodes makes sure that a missing node is described and not followed.
func TestNilNodes(t *testing.T) {
	t.Parallel()
	var none ast.Node
	if got := describe(none); got != "nothing" || nodeMark(none) != (mark{}) {
		t.Errorf("got %q", got)
	}
}

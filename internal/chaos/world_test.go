package chaos

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/internal/built"
	"github.com/walgate/walgate/internal/pgserver"
	"github.com/walgate/walgate/internal/ports"
)

const testSecret = "0123456789abcdef0123456789abcdef"

// testToken signs as a gateway with testSecret wants it.
func testToken(subject string, roles []string, claims map[string]any) string {
	all := map[string]any{"exp": time.Now().Add(time.Hour).Unix()}
	for name, v := range claims {
		all[name] = v
	}
	all["sub"] = subject
	if len(roles) > 0 {
		all["roles"] = roles
	}
	payload, _ := json.Marshal(all) // texts, numbers and lists
	text := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"HS256","typ":"JWT"}`)) + "." + base64.RawURLEncoding.EncodeToString(payload)
	sign := hmac.New(sha256.New, []byte(testSecret))
	sign.Write([]byte(text))
	return text + "." + base64.RawURLEncoding.EncodeToString(sign.Sum(nil))
}

// startGateway serves the built-in world's application from one process, until the test ends.
func startGateway(t *testing.T, dsn string) (base string) {
	t.Helper()
	binary, err := built.Gateway()
	must(t, err)
	port, release, err := ports.Reserve()
	must(t, err)
	t.Cleanup(release)
	dir := t.TempDir()
	config := filepath.Join(dir, "config.yaml")
	must(t, os.WriteFile(config, fmt.Appendf(nil, `auto_init: true
database: {url: %q}
replication: {slot: %q}
catalog: {poll_interval: 300ms}
http: {listen: "127.0.0.1:%d", public_url: "http://127.0.0.1:%d"}
limits: {drain: 3s, requests_per_second: 100000, burst: 100000}
auth: {jwt: {secret: %q}}
blobs: {url: "file://%s"}
attachments: {grace: 2s, sweep_guard: 100}
log: {format: text, level: warn}
collections: %s`, dsn, fmt.Sprint("world_", port), port, port, testSecret, filepath.ToSlash(filepath.Join(dir, "blobs")), BuiltinCollections), 0o600))
	var log bytes.Buffer
	gateway := exec.Command(binary, "serve", "--config", config)
	gateway.Stdout, gateway.Stderr = &log, &log
	must(t, gateway.Start())
	t.Cleanup(func() {
		must(t, gateway.Process.Signal(syscall.SIGTERM))
		if err := gateway.Wait(); err != nil || t.Failed() {
			t.Logf("the gateway ended: %v\n%s", err, log.Bytes())
		}
	})
	base = fmt.Sprintf("http://127.0.0.1:%d", port)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for ; ; pause(ctx, 20*time.Millisecond) {
		if res, err := client.Get(base + "/readyz"); err == nil {
			res.Body.Close()
			if res.StatusCode == http.StatusOK {
				return base
			}
		}
		if ctx.Err() != nil {
			t.Fatalf("the gateway isn't ready: %s", log.Bytes())
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// testWorld is the built-in world over an application's database.
func testWorld(t *testing.T, dsn, gateway string, seed uint64) *World {
	t.Helper()
	specs, err := BuiltinSpecs()
	must(t, err)
	w, err := NewWorld(t.Context(), WorldOptions{Seed: seed, App: dsn, Oracle: func() string { return dsn }, Gateway: gateway, Token: testToken,
		Config: "the built-in world", Collections: specs, Clients: 6, Writers: 2, Logf: t.Logf})
	must(t, err)
	return w
}

func testApplication(t *testing.T) (dsn string) {
	t.Helper()
	dsn = pgserver.ForTest(t).Database(t)
	conn, err := pgx.Connect(t.Context(), dsn)
	must(t, err)
	defer conn.Close(t.Context())
	_, err = conn.Exec(t.Context(), BuiltinSchema)
	must(t, err)
	return dsn
}

// TestWorldWithoutFaults runs the built-in world against one gateway to which nothing happens. What it settles on is then
// damaged in each way that only the tables can tell, which must be noticed.
func TestWorldWithoutFaults(t *testing.T) {
	t.Parallel()
	dsn := testApplication(t)
	w := testWorld(t, dsn, startGateway(t, dsn), 1)
	settle := func(limit time.Duration) error {
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		defer cancel()
		return w.Settle(ctx)
	}
	const well = 20 * time.Second
	for range 2 {
		ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
		w.Run(ctx)
		cancel()
		began := time.Now()
		must(t, settle(well))
		t.Logf("settled in %s", time.Since(began).Round(time.Millisecond))
	}
	counts, err := json.MarshalIndent(w.Counts(), "", " ")
	must(t, err)
	t.Logf("%s", counts)
	for _, name := range []string{"application: commits", "clients: streams", "clients: pages", "pushes: accepted", "pushes: promises", "files: manifests", "ledger: documents of one client"} {
		if w.Counts()[name] == 0 {
			t.Errorf("%s: 0: the run shows nothing", name)
		}
	}
	noticed := func(what, want string, limit time.Duration) {
		t.Helper()
		switch err := settle(limit); {
		case err == nil:
			t.Errorf("%s isn't noticed", what)
		case !strings.Contains(err.Error(), want):
			t.Errorf("%s: the error doesn't say %q:\n%v", what, want, err)
		}
	}
	const soon = 1500 * time.Millisecond

	c := w.clients[0]
	goods := c.documents["goods"]
	id := slices.Sorted(maps.Keys(goods))[0]
	doc := goods[id]
	delete(goods, id)
	noticed("a lost document", "goods/"+id+" is missing", soon)
	goods[id] = rawJSON(strings.Replace(string(doc), "{", "{ ", 1))
	noticed("a document that differs by one space", "goods/"+id+" differs", soon)
	goods[id] = doc
	goods["-1"] = doc
	noticed("a document too many", "goods/-1 should not be there", soon)
	delete(goods, "-1")
	c.files.kept["nobodys.jpg"] = "00"
	noticed("a file too many", "nobodys.jpg is kept", soon)
	delete(c.files.kept, "nobodys.jpg")
	must(t, settle(well))

	conn, err := pgx.Connect(t.Context(), dsn)
	must(t, err)
	defer conn.Close(t.Context())
	prices := w.table("prices")
	key := fmt.Sprint(2_000_000_000)
	d := &ownDocument{client: c, table: prices, key: []string{key}, id: key, there: true, values: map[string]rawJSON{}}
	w.ledger.own(d)
	noticed("a push that is lost", "it is not there", well)
	_, err = conn.Exec(t.Context(), `INSERT INTO prices (id, org, big) VALUES (2000000000, 1, 7)`)
	must(t, err)
	d = &ownDocument{client: c, table: prices, key: []string{key}, id: key, there: true, values: map[string]rawJSON{"big": rawJSON(`"8"`)}}
	w.ledger.own(d)
	noticed("a push whose value is lost", "big is 7, and should be", well)
	d = &ownDocument{client: c, table: prices, key: []string{key}, id: key, values: map[string]rawJSON{}}
	w.ledger.own(d)
	noticed("a deletion that is lost", "it is there", well)
	must(t, settle(well))
}

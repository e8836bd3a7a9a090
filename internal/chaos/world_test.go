package chaos

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/internal/pgserver"
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
	binary, err := builtGateway()
	must(t, err)
	port, err := pgserver.FreePort()
	must(t, err)
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

// TestWorldWithoutFaults runs the built-in world against one gateway to which nothing happens.
func TestWorldWithoutFaults(t *testing.T) {
	t.Parallel()
	dsn := testApplication(t)
	w := testWorld(t, dsn, startGateway(t, dsn), 1)
	for range 2 {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		w.Run(ctx)
		cancel()
		began := time.Now()
		settling, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		err := w.Settle(settling)
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("settled in %s", time.Since(began).Round(time.Millisecond))
	}
	counts, err := json.MarshalIndent(w.Counts(), "", " ")
	must(t, err)
	t.Logf("%s", counts)
}

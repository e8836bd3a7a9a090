package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/internal/ports"
)

const secret = "a secret of the benchmark that signs its own tokens"

// gateway is a walgate process and its configuration file.
type gateway struct {
	binary  string
	config  string
	logPath string
	base    string
	db      *database

	process *exec.Cmd
	started time.Time
	log     *os.File
	exited  chan error
}

// newGateway writes the configuration; an empty redis is none.
func newGateway(b *bench, d *database, policy, redis string) (*gateway, error) {
	port, _, err := ports.Reserve()
	if err != nil {
		return nil, err
	}
	name := fmt.Sprintf("%s_%d", d.name, port) // several may serve one database
	g := &gateway{binary: b.binary, db: d, base: fmt.Sprintf("http://127.0.0.1:%d", port),
		config: filepath.Join(b.dir, name+".yaml"), logPath: filepath.Join(b.dir, name+".log")}
	text := fmt.Sprintf(`database: {url: %q}
replication: {slot: %s}
redis: {url: %q}
http: {listen: "127.0.0.1:%d"}
limits: {requests_per_second: 1000000, burst: 1000000, stream_connections: 20000, stream_connections_per_subject: 20000, attachment: 10GB, quota: 1000GB}
blobs: {url: "file://%s"}
auth: {jwt: {secret: %q}}
log: {level: warn}
collections:
  items:
    table: public.items
%s`, d.dsn, d.name, redis, port, filepath.ToSlash(filepath.Join(b.dir, d.name+".blobs")), secret, policy)
	return g, os.WriteFile(g.config, []byte(text), 0o600)
}

func (g *gateway) init(ctx context.Context) error {
	out, err := exec.CommandContext(ctx, g.binary, "init", "--config", g.config).CombinedOutput()
	if err != nil {
		return fmt.Errorf("walgate init: %w\n%s", err, out)
	}
	return nil
}

// start starts walgate serve; ready waits for it.
func (g *gateway) start(ctx context.Context) (err error) {
	if g.log, err = os.Create(g.logPath); err != nil {
		return err
	}
	g.started = time.Now()
	g.process = exec.CommandContext(ctx, g.binary, "serve", "--config", g.config)
	g.process.Stderr = g.log
	g.process.Cancel = func() error { return g.process.Process.Signal(syscall.SIGTERM) }
	g.process.WaitDelay = 10 * time.Second
	if err := g.process.Start(); err != nil {
		return err
	}
	g.exited = make(chan error, 1)
	go func() { g.exited <- g.process.Wait() }()
	return nil
}

func (g *gateway) stop() error {
	if g.process == nil {
		return nil
	}
	g.process.Process.Signal(syscall.SIGTERM)
	err := <-g.exited
	g.process = nil
	return errors.Join(err, g.log.Close())
}

// alive fails once the process has ended by itself.
func (g *gateway) alive() error {
	select {
	case err := <-g.exited:
		g.exited <- err
		text, _ := os.ReadFile(g.logPath)
		return fmt.Errorf("walgate ended: %v\n%s", err, bytes.TrimSpace(text))
	default:
		return nil
	}
}

// ready waits until clients can be served.
func (g *gateway) ready(ctx context.Context) error {
	return until(ctx, func() (bool, error) {
		if err := g.alive(); err != nil {
			return false, err
		}
		response, err := http.Get(g.base + "/readyz")
		if err != nil {
			return false, nil // not listening yet
		}
		response.Body.Close()
		return response.StatusCode == http.StatusOK, nil
	})
}

// logged waits until walgate has made durable all commits before lsn, and returns when it wrote the batch that did.
func (g *gateway) logged(ctx context.Context, lsn string) (at time.Time, err error) {
	err = until(ctx, func() (bool, error) {
		if err := g.alive(); err != nil {
			return false, err
		}
		var done bool
		err := g.db.QueryRow(ctx, "SELECT lsn >= $1::text::pg_lsn, written_at FROM walgate.checkpoint", lsn).Scan(&done, &at)
		if errors.Is(err, pgx.ErrNoRows) {
			return false, nil
		}
		return done, err
	})
	return at, err
}

// streamingSince returns when walgate's walsender was started, by the clock that logged reports in.
func (g *gateway) streamingSince(ctx context.Context) (at time.Time, err error) {
	err = until(ctx, func() (bool, error) {
		if err := g.alive(); err != nil {
			return false, err
		}
		err := g.db.QueryRow(ctx, `SELECT a.backend_start FROM pg_replication_slots s JOIN pg_stat_activity a ON a.pid = s.active_pid
			WHERE s.slot_name = $1`, g.db.name).Scan(&at)
		if errors.Is(err, pgx.ErrNoRows) {
			return false, nil
		}
		return err == nil, err
	})
	return at, err
}

// peakMemory returns the most megabytes that the process has held so far; 0 where the system doesn't tell.
func (g *gateway) peakMemory() float64 {
	return processMemory(g.process.Process.Pid, "VmHWM:")
}

func processMemory(pid int, key string) float64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	_, rest, _ := bytes.Cut(text, []byte(key))
	fields := bytes.Fields(rest)
	if len(fields) == 0 {
		return 0
	}
	kb, _ := strconv.ParseFloat(string(fields[0]), 64) // the kernel writes a number
	return kb / 1024
}

// forgetPeak makes peakMemory begin anew with what is held now.
func (g *gateway) forgetPeak() {
	os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", g.process.Process.Pid), []byte("5"), 0) // where it fails, the peak is that of the whole process
}

// memory returns the megabytes that the process holds.
func (g *gateway) memory() float64 {
	return processMemory(g.process.Process.Pid, "VmRSS:")
}

// cpu returns the processor time that the process has taken.
func (g *gateway) cpu() time.Duration { return processCPU(g.process.Process.Pid) }

// processCPU returns a process's time in steps of 10 ms; 0 where the system doesn't tell.
func processCPU(pid int) time.Duration {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	_, rest, _ := bytes.Cut(text, []byte(") ")) // behind the program's name
	fields := bytes.Fields(rest)
	if len(fields) < 13 {
		return 0
	}
	user, _ := strconv.Atoi(string(fields[11])) // the kernel writes numbers
	system, _ := strconv.Atoi(string(fields[12]))
	return time.Duration(user+system) * 10 * time.Millisecond
}

// token signs in a subject.
func token(subject string) string {
	t := jwt.NewWithClaims(jwt.SigningMethodHS256, jwt.MapClaims{"sub": subject, "roles": []string{"editor"}, "exp": time.Now().Add(time.Hour).Unix()})
	text, _ := t.SignedString([]byte(secret)) // HMAC can't fail
	return text
}

// get asks for an address as a subject, whose answer must be 200.
func (g *gateway) get(ctx context.Context, client *http.Client, path, subject, encoding string) (*http.Response, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, g.base+path, nil)
	if err != nil {
		return nil, err
	}
	request.Header.Set("Authorization", "Bearer "+token(subject))
	request.Header.Set("Accept-Encoding", encoding) // set by hand, so that the client leaves the body as it is
	response, err := client.Do(request)
	if err != nil {
		return nil, err
	}
	if response.StatusCode != http.StatusOK {
		var text bytes.Buffer
		text.ReadFrom(response.Body)
		response.Body.Close()
		return nil, fmt.Errorf("GET %s: %s: %s", path, response.Status, text.Bytes())
	}
	return response, nil
}

// position returns the cursor from which a client that holds everything now goes on.
func (g *gateway) position(ctx context.Context, subject string) (string, error) {
	response, err := g.get(ctx, http.DefaultClient, "/sync/full?limit=1", subject, "identity")
	if err != nil {
		return "", err
	}
	response.Body.Close()
	return response.Header.Get("X-Sync-LastSeq"), nil
}

// anyonesPosition returns a position that is bound to no caller's scopes: the version alone.
func (g *gateway) anyonesPosition(ctx context.Context) (string, error) {
	cursor, err := g.position(ctx, "1")
	if err != nil {
		return "", err
	}
	parts := strings.Split(cursor, "-")
	return strings.Join(parts[:len(parts)-1], "-"), nil
}

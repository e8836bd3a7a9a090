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
	"syscall"
	"testing"
	"time"

	"github.com/walgate/walgate/internal/built"
	"github.com/walgate/walgate/internal/failpoint"
	"github.com/walgate/walgate/internal/ports"
)

// gatewayProcess is the gateway as a process of its own, to be stopped and killed.
type gatewayProcess struct {
	t      *testing.T
	binary string
	config string
	log    string
	base   string
	cmd    *exec.Cmd
	exited chan struct{} // closed when the process is gone
	err    error         // of Wait, once exited is closed
}

// newGatewayProcess writes the configuration, which may use the verbs %[1]d for the port and %[2]q for the secret, and
// returns a gateway that is yet to be started, and its configuration as read. Cleanup ends it.
func newGatewayProcess(t *testing.T, config string) (*gatewayProcess, *Config) {
	t.Helper()
	binary, err := built.Gateway()
	if err != nil {
		t.Fatal(err)
	}
	port, release, err := ports.Reserve()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(release)
	dir := t.TempDir()
	p := &gatewayProcess{t: t, binary: binary, config: filepath.Join(dir, "config.yaml"), log: filepath.Join(dir, "gateway.log"),
		base: fmt.Sprintf("http://127.0.0.1:%d", port)}
	if err := os.WriteFile(p.config, fmt.Appendf(nil, config, port, convergenceSecret), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := Load(p.config, func(string) (string, bool) { return "", false })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.release)
	return p, cfg
}

// start runs the gateway and waits until it serves.
func (p *gatewayProcess) start(ctx context.Context) error {
	if err := p.launch(); err != nil {
		return err
	}
	return p.awaitReady(ctx)
}

// launch runs the gateway.
func (p *gatewayProcess) launch(env ...string) error {
	out, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	p.cmd = exec.Command(p.binary, "serve", "--config", p.config)
	p.cmd.Stdout, p.cmd.Stderr = out, out
	p.cmd.Env = append(append(os.Environ(), "GORACE=halt_on_error=1"), env...)
	if err := p.cmd.Start(); err != nil {
		return err
	}
	p.exited = make(chan struct{})
	go func(cmd *exec.Cmd, exited chan struct{}) {
		p.err = cmd.Wait()
		close(exited)
	}(p.cmd, p.exited)
	return nil
}

// launchToDie runs a gateway that ends itself with SIGKILL at the n-th hit of a point.
func (p *gatewayProcess) launchToDie(at failpoint.Point, n int) error {
	return p.launch(fmt.Sprintf("%s=%s:%d", failpoint.Env, at, n))
}

// killedItself says whether the process is gone by SIGKILL; any other end is an error.
func (p *gatewayProcess) killedItself() (bool, error) {
	select {
	case <-p.exited:
	default:
		return false, nil
	}
	var exit *exec.ExitError
	if errors.As(p.err, &exit) {
		if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signal() == syscall.SIGKILL {
			return true, nil
		}
	}
	return false, fmt.Errorf("the gateway ended by itself: %v", p.err)
}

func (p *gatewayProcess) awaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	retry := time.NewTicker(20 * time.Millisecond)
	defer retry.Stop()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.base+"/readyz", nil)
		if err != nil {
			return err
		}
		res, err := client.Do(req)
		if err == nil {
			res.Body.Close()
			if res.StatusCode == http.StatusOK {
				return nil
			}
		}
		select {
		case <-p.exited:
			return fmt.Errorf("the gateway ended while starting: %v", p.err)
		case <-ctx.Done():
			return fmt.Errorf("the gateway is not ready: %v", err)
		case <-retry.C:
		}
	}
}

// end sends a signal and waits. A gateway that ended by itself, or that a SIGTERM doesn't end well, is a failure.
func (p *gatewayProcess) end(signal os.Signal) error {
	select {
	case <-p.exited:
		return fmt.Errorf("the gateway had ended by itself: %v", p.err)
	default:
	}
	if err := p.cmd.Process.Signal(signal); err != nil {
		return err
	}
	limit := time.NewTimer(20 * time.Second)
	defer limit.Stop()
	select {
	case <-p.exited:
		if p.err != nil && signal == syscall.SIGTERM {
			return fmt.Errorf("the gateway did not stop well: %w", p.err)
		}
		return nil
	case <-limit.C:
		_ = p.cmd.Process.Kill()
		<-p.exited
		return errors.New("the gateway did not stop within 20 s of its signal")
	}
}

// says counts the lines of the gateway's log that hold a text.
func (p *gatewayProcess) says(text string) (n int) {
	p.t.Helper()
	all, err := os.ReadFile(p.log)
	if err != nil {
		p.t.Fatal(err)
	}
	return bytes.Count(all, []byte(text))
}

// release ends whatever runs and shows the log of a failed run.
func (p *gatewayProcess) release() {
	if p.cmd == nil {
		return
	}
	_ = p.cmd.Process.Kill() // it may have ended
	<-p.exited
	text, err := os.ReadFile(p.log)
	if err != nil {
		p.t.Error(err)
	}
	for _, bad := range []string{"DATA RACE", "panic:", "goroutine 1 ["} {
		if bytes.Contains(text, []byte(bad)) {
			p.t.Errorf("the gateway's log holds %q", bad)
		}
	}
	if p.t.Failed() {
		const most = 8000
		var telling []byte
		for line := range bytes.Lines(text) {
			if bytes.Contains(line, []byte("panic")) || !bytes.Contains(line, []byte(`msg="request failed"`)) && !bytes.Contains(line, []byte(`msg="a row is visible to nobody`)) {
				telling = append(telling, line...)
			}
		}
		p.t.Logf("the gateway's log, without failed requests and policies, ends with:\n%s", telling[max(0, len(telling)-most):])
	}
}

// rewrite replaces a part of the configuration, for the next start.
func (p *gatewayProcess) rewrite(old, new string) {
	p.t.Helper()
	text, err := os.ReadFile(p.config)
	if err == nil && !bytes.Contains(text, []byte(old)) {
		err = fmt.Errorf("%s doesn't have %s", p.config, old)
	}
	if err == nil {
		err = os.WriteFile(p.config, bytes.Replace(text, []byte(old), []byte(new), 1), 0o600)
	}
	if err != nil {
		p.t.Fatal(err)
	}
}

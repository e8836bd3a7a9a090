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
	"sync"
	"syscall"
	"testing"
	"time"
)

// builtGateway builds the command once for all seeds.
var builtGateway = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "walgate-convergence-")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "walgate")
	args := append(append([]string{"build"}, buildFlags...), "-o", path, ".")
	if out, err := exec.Command("go", args...).CombinedOutput(); err != nil {
		return "", errors.Join(fmt.Errorf("go build: %w\n%s", err, out), os.RemoveAll(dir))
	}
	return path, nil
})

// removeBuiltGateway undoes builtGateway.
func removeBuiltGateway(t *testing.T) {
	path, err := builtGateway()
	if err == nil {
		err = os.RemoveAll(filepath.Dir(path))
	}
	if err != nil {
		t.Error(err)
	}
}

// gatewayProcess is the gateway as a process of its own, to be stopped and killed.
type gatewayProcess struct {
	t      *testing.T
	binary string
	config string
	log    string
	base   string
	cmd    *exec.Cmd
	exited chan error
}

// start runs the gateway and waits until it serves.
func (p *gatewayProcess) start(ctx context.Context) error {
	out, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	p.cmd = exec.Command(p.binary, "serve", "--config", p.config)
	p.cmd.Stdout, p.cmd.Stderr = out, out
	p.cmd.Env = append(os.Environ(), "GORACE=halt_on_error=1")
	if err := p.cmd.Start(); err != nil {
		return err
	}
	exited := make(chan error, 1)
	p.exited = exited
	go func(cmd *exec.Cmd) { exited <- cmd.Wait() }(p.cmd)
	return p.awaitReady(ctx)
}

func (p *gatewayProcess) awaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	retry := time.NewTicker(20 * time.Millisecond)
	defer retry.Stop()
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.base+"/readyz", nil)
		if err != nil {
			return err
		}
		res, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
		if err == nil {
			res.Body.Close()
			if res.StatusCode == http.StatusOK {
				return nil
			}
		}
		select {
		case err := <-p.exited:
			p.exited <- err
			return fmt.Errorf("the gateway ended while starting: %v", err)
		case <-ctx.Done():
			return fmt.Errorf("the gateway is not ready: %v", err)
		case <-retry.C:
		}
	}
}

// end sends a signal and waits. A gateway that ended by itself, or that a SIGTERM doesn't end well, is a failure.
func (p *gatewayProcess) end(signal os.Signal) error {
	select {
	case err := <-p.exited:
		p.exited <- err
		return fmt.Errorf("the gateway had ended by itself: %v", err)
	default:
	}
	if err := p.cmd.Process.Signal(signal); err != nil {
		return err
	}
	limit := time.NewTimer(20 * time.Second)
	defer limit.Stop()
	select {
	case err := <-p.exited:
		p.exited <- err
		if err != nil && signal == syscall.SIGTERM {
			return fmt.Errorf("the gateway did not stop well: %w", err)
		}
		return nil
	case <-limit.C:
		_ = p.cmd.Process.Kill()
		p.exited <- <-p.exited
		return errors.New("the gateway did not stop within 20 s of its signal")
	}
}

// release ends whatever runs and shows the log of a failed run.
func (p *gatewayProcess) release() {
	if p.cmd != nil && p.cmd.Process != nil {
		_ = p.cmd.Process.Kill() // it may have ended
		<-p.exited
	}
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
		const most = 6000
		p.t.Logf("the gateway's log ends with:\n%s", text[max(0, len(text)-most):])
	}
}

package chaos

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/walgate/walgate/internal/badlink"
	"github.com/walgate/walgate/internal/failpoint"
)

const (
	stopLimit  = 20 * time.Second // of a gateway's orderly end
	readyLimit = 30 * time.Second // of a gateway's start once all is well
)

// instance is one gateway of the fleet: a process of its own that is started again as a supervisor would, and a relay to
// each of the servers that it uses.
type instance struct {
	name     string // "gateway 1"
	binary   string
	config   string // path of its configuration
	log      string // path of what it writes to stdout and stderr
	base     string // URL past the relay
	port     int
	release  func() // gives the port back
	revision int    // config_revision

	source, replication, storage, redis *badlink.Link // redis is nil where the run has none
	front                               *badlink.Link // from the load balancer

	hold   token                         // held by the fault that ends or stops the process
	broken func(format string, a ...any) // says that the product failed

	mu      sync.Mutex
	wanted  bool // false once it is told to end
	cmd     *exec.Cmd
	exited  chan struct{} // closed when the process is gone
	kept    chan struct{} // closed when nobody starts it again
	logged  int           // size of the log before the last launch
	refused int           // starts that ended before serving
	died    string        // the step at which it last killed itself
	cpu     time.Duration // of all its processes that have ended
}

// links are all the relays of the instance.
func (i *instance) links() []*badlink.Link {
	all := []*badlink.Link{i.source, i.replication, i.storage, i.front}
	if i.redis != nil {
		all = append(all, i.redis)
	}
	return all
}

// start launches the gateway and keeps it running until end. dieAt, if not empty, is what failpoint.Env gets at the first
// launch.
func (i *instance) start(dieAt string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.wanted, i.died = true, ""
	i.kept = make(chan struct{})
	launched := make(chan struct{})
	go i.keep(dieAt, i.kept, launched)
	<-launched
}

// keep runs the process again whenever it refused to start, as a supervisor does: what it needs may be away. The goroutine
// keeps its thread, whose end would end the child.
func (i *instance) keep(dieAt string, kept, launched chan struct{}) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer close(kept)
	for first := true; ; first = false {
		cmd, exited, err := i.launch(dieAt)
		if first { // start holds the lock
			i.cmd, i.exited = cmd, exited
			close(launched)
		}
		if err != nil {
			i.broken("%s can't be launched: %v", i.name, err)
			return
		}
		if !first && !i.adopt(cmd, exited) {
			_ = cmd.Process.Kill()
		}
		err = cmd.Wait()
		close(exited)
		if !i.again(cmd, err, dieAt) {
			return
		}
		dieAt = ""
		time.Sleep(100 * time.Millisecond) // a supervisor's pause
	}
}

func (i *instance) launch(dieAt string) (*exec.Cmd, chan struct{}, error) {
	exited := make(chan struct{})
	out, err := os.OpenFile(i.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, exited, err
	}
	defer out.Close()
	if info, err := out.Stat(); err == nil {
		i.logged = int(info.Size())
	}
	cmd := exec.Command(i.binary, "serve", "--config", i.config)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + os.Getenv("HOME"), "TMPDIR=" + os.TempDir(), "GORACE=halt_on_error=1", "GOMAXPROCS=2"}
	if dieAt != "" {
		cmd.Env = append(cmd.Env, failpoint.Env+"="+dieAt)
	}
	cmd.SysProcAttr = childAttributes()
	return cmd, exited, cmd.Start()
}

// adopt makes a process launched anew the present one; false: nobody wants it any more.
func (i *instance) adopt(cmd *exec.Cmd, exited chan struct{}) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.cmd, i.exited = cmd, exited
	return i.wanted
}

// again judges how a process ended, and says whether to start it again.
func (i *instance) again(cmd *exec.Cmd, err error, dieAt string) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.cpu += cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	if !i.wanted {
		return false
	}
	if dieAt != "" && killed(err) {
		i.died = dieAt
		return true
	}
	if served, readErr := i.servedLocked(); readErr != nil || served {
		i.broken("%s ended by itself: %v", i.name, errors.Join(err, readErr))
		return false
	}
	i.refused++
	return true
}

// killed says whether a process ended by SIGKILL.
func killed(err error) bool {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return false
	}
	status, ok := exit.Sys().(syscall.WaitStatus)
	return ok && status.Signal() == syscall.SIGKILL
}

// servedLocked says whether the last process had come to serve clients.
func (i *instance) servedLocked() (bool, error) {
	text, err := os.ReadFile(i.log)
	return bytes.Contains(text[min(i.logged, len(text)):], []byte("msg=serving ")), err
}

// signal sends one to the running process.
func (i *instance) signal(s os.Signal) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if err := i.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

// end sends the signal, waits for the end of the process, and starts no other. One that SIGTERM doesn't end well is a
// failure of the product.
func (i *instance) end(signal os.Signal) error {
	i.mu.Lock()
	i.wanted = false
	cmd, exited, kept := i.cmd, i.exited, i.kept
	i.mu.Unlock()
	if cmd == nil || cmd.Process == nil {
		return nil
	}
	running := true
	select {
	case <-exited:
		running = false
	default:
		if err := cmd.Process.Signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return err
		}
	}
	limit := time.NewTimer(stopLimit)
	defer limit.Stop()
	select {
	case <-kept:
	case <-limit.C:
		_ = cmd.Process.Signal(syscall.SIGQUIT) // its goroutines, for the log
		time.Sleep(200 * time.Millisecond)
		_ = cmd.Process.Kill()
		<-kept
		i.broken("%s did not stop within %s of %s", i.name, stopLimit, signal)
		return nil
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if armed := slices.ContainsFunc(cmd.Env, func(s string) bool { return strings.HasPrefix(s, failpoint.Env+"=") }); armed && signal == syscall.SIGTERM && !cmd.ProcessState.Exited() {
		return nil // it came to the step at which it was to die on its way out
	}
	if served, err := i.servedLocked(); running && signal == syscall.SIGTERM && !cmd.ProcessState.Success() && served {
		i.broken("%s did not stop well: %v", i.name, errors.Join(errors.New(cmd.ProcessState.String()), err))
	}
	return nil
}

// state is what /readyz says.
type state struct {
	Status   string            `json:"status"`
	Leading  bool              `json:"leading"`
	Problems map[string]string `json:"problems"`
}

// ask reads /readyz, past the relays.
func (i *instance) ask(ctx context.Context) (s state, ready bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, i.base+"/readyz", nil)
	if err != nil {
		return s, false, err
	}
	res, err := direct.Do(req)
	if err != nil {
		return s, false, err
	}
	defer res.Body.Close()
	return s, res.StatusCode == http.StatusOK, json.NewDecoder(res.Body).Decode(&s)
}

// direct has no connections that outlive a request.
var direct = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}

// awaitReady waits until the gateway says that clients may be sent to it.
func (i *instance) awaitReady(ctx context.Context, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		s, ready, err := i.ask(ctx)
		if ready {
			return nil
		}
		if !sleep(ctx, 20*time.Millisecond) {
			return fmt.Errorf("%s is not ready within %s: %s %v (%v)", i.name, limit, s.Status, s.Problems, err)
		}
	}
}

// faultsInLog are lines that a gateway must never write.
func (i *instance) faultsInLog() error {
	text, err := os.ReadFile(i.log)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	for _, bad := range []string{"DATA RACE", "panic:", "goroutine 1 ["} {
		if bytes.Contains(text, []byte(bad)) {
			err = errors.Join(err, fmt.Errorf("the log of %s, %s, holds %q", i.name, filepath.Base(i.log), bad))
		}
	}
	return err
}

// sleep waits, and says whether it did so to the end.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// token is a lock that is waited for no longer than a context lasts.
type token chan struct{}

func newToken() token { return make(token, 1) }

// take says whether it is held now.
func (t token) take(ctx context.Context) bool {
	select {
	case t <- struct{}{}:
		return true
	case <-ctx.Done():
		return false
	}
}

func (t token) release() { <-t }

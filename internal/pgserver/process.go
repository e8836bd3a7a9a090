package pgserver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"runtime"
	"strconv"
	"sync"
)

// account is the user that the server runs as in place of root.
type account struct {
	name     string
	uid, gid uint32
}

// runAs returns the user that PostgreSQL must be dropped to, or nil when this process isn't root. PostgreSQL refuses
// to run as root. Without any such user the account stays nil and initdb says so in its own words.
var runAs = sync.OnceValue(func() *account {
	if os.Geteuid() != 0 {
		return nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		entry, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, uidErr := strconv.ParseUint(entry.Uid, 10, 32)
		gid, gidErr := strconv.ParseUint(entry.Gid, 10, 32)
		if errors.Join(uidErr, gidErr) == nil {
			return &account{name: name, uid: uint32(uid), gid: uint32(gid)}
		}
	}
	return nil
})

// process is one run of the postgres executable.
type process struct {
	cmd    *exec.Cmd
	exited chan struct{} // Closed when the process has been waited for; err is set before.
	err    error
}

// startProcess starts cmd and waits for it in a goroutine of its own. The goroutine stays locked to its thread until
// the process has ended: the kernel sends the parent-death signal when the *thread* that started the child ends, and
// Go ends idle threads at will.
func startProcess(cmd *exec.Cmd) (*process, error) {
	p := &process{cmd: cmd, exited: make(chan struct{})}
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		p.err = cmd.Wait()
		close(p.exited)
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return p, nil
}

// running says whether the process has not ended yet.
func (p *process) running() bool {
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

// end sends the signal and waits for the process; false says that ctx ended first.
func (p *process) end(ctx context.Context, signal os.Signal) bool {
	if err := p.cmd.Process.Signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return false
	}
	select {
	case <-p.exited:
		return true
	case <-ctx.Done():
		return false
	}
}

// runTool runs a tool such as initdb to its end, as the server's user.
func runTool(ctx context.Context, dir, name string, args ...string) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = serverEnv()
	cmd.SysProcAttr = processAttributes(runAs())
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s failed: %w: %s", name, err, out)
	}
	return nil
}

// serverEnv is the environment of PostgreSQL's processes: little of ours, so that PGDATA, PGPORT, locale and the like
// can't change what the server does.
func serverEnv() []string {
	return []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C", "TZ=UTC"}
}

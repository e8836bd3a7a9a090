package chaos

import "syscall"

// childAttributes put a gateway in a process group of its own, so that Ctrl-C reaches only us and it is ended in order, and
// have the kernel kill it when this process dies.
func childAttributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}

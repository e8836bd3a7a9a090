package redisserver

import "syscall"

// attributes put the child in a process group of its own, so that Ctrl-C reaches only us, and have the kernel kill it when
// this process dies.
func attributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}

//go:build unix && !linux

package chaos

import "syscall"

// childAttributes put a gateway in a process group of its own, so that Ctrl-C reaches only us and it is ended in order.
func childAttributes() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }

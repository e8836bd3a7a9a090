//go:build unix && !linux

package redisserver

import "syscall"

// attributes put the child in a process group of its own, so that Ctrl-C reaches only us.
func attributes() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }

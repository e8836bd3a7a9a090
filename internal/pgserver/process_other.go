//go:build unix && !linux

package pgserver

import "syscall"

// processAttributes puts a child in a process group of its own, so that Ctrl-C in the terminal reaches only us and we
// stop it in order, and drops it to another user. Only Linux can tie its life to ours.
func processAttributes(user *account) *syscall.SysProcAttr {
	attributes := &syscall.SysProcAttr{Setpgid: true}
	if user != nil {
		attributes.Credential = &syscall.Credential{Uid: user.uid, Gid: user.gid}
	}
	return attributes
}

package pgserver

import "syscall"

// processAttributes puts a child in a process group of its own, so that Ctrl-C in the terminal reaches only us and we
// stop it in order; drops it to another user; and has the kernel stop it at once when this process dies.
func processAttributes(user *account) *syscall.SysProcAttr {
	attributes := &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGQUIT}
	if user != nil {
		attributes.Credential = &syscall.Credential{Uid: user.uid, Gid: user.gid}
	}
	return attributes
}

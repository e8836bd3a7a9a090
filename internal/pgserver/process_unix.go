//go:build unix

package pgserver

import (
	"errors"
	"io/fs"
	"os"
	"syscall"
)

// The signals by which a postmaster is told how to shut down.
var (
	fastShutdown      os.Signal = syscall.SIGINT  // Disconnects clients, writes a checkpoint, sends walsenders the rest.
	immediateShutdown os.Signal = syscall.SIGQUIT // Ends every backend at once; the next start recovers from the WAL.
)

// killGroup ends a process group by force.
func killGroup(pid int) error {
	if err := syscall.Kill(-pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return err
	}
	return nil
}

// ownerOf returns the user id that owns a file.
func ownerOf(info fs.FileInfo) int {
	if stat, ok := info.Sys().(*syscall.Stat_t); ok {
		return int(stat.Uid)
	}
	return -1
}

// lockFile locks an open file for this process alone, or fails at once where another has it.
func lockFile(file *os.File) error {
	return syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
}

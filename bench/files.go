package main

import (
	"fmt"
	"syscall"
)

// allowFiles raises how many files this process and those that it starts may have open.
func allowFiles(want uint64) error {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	raised := limit
	raised.Cur = max(limit.Cur, want)
	raised.Max = max(limit.Max, raised.Cur) // only root may raise it
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &raised); err != nil {
		return fmt.Errorf("%d sockets need %d open files, and %d are allowed: raise ulimit -n, or use -sockets: %w", want-1000, want, limit.Max, err)
	}
	return nil
}

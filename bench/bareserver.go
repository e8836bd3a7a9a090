package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
)

// bareServer is this program as a server that is a limit, in a process of its own.
type bareServer struct {
	base string // its address
	pid  int
	stop func() error
}

// startBareServer starts it with arguments that say which. It prints its address and ends with its input.
func startBareServer(ctx context.Context, args ...string) (*bareServer, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	server := exec.CommandContext(ctx, self, args...)
	server.Stderr = os.Stderr
	stdin, err := server.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := server.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := server.Start(); err != nil {
		return nil, err
	}
	stop := func() error {
		stdin.Close()
		return server.Wait()
	}
	text := make([]byte, 100)
	length, err := stdout.Read(text)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("the bare server did not start: %w", err), stop())
	}
	return &bareServer{strings.TrimSpace(string(text[:length])), server.Process.Pid, stop}, nil
}

// Command walgate makes an existing PostgreSQL application offline-first: it tails logical replication into an ordered,
// durable change log and serves each client the changes that it may see.
//
// A change passes replication/stream.go → replication/sequence.go → changelog/append.go → gateway/hub.go →
// gateway/session.go. run.go shows how the parts are started and stopped.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

// version is set by the linker for releases.
var version = "0.1.0-dev"

// Exit statuses.
const (
	exitFailed = 1
	exitUsage  = 2 // wrong usage or configuration
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	go func() { // the first signal drains, a second one doesn't wait
		<-ctx.Done()
		stop()
	}()
	err := newCommand().ExecuteContext(ctx)
	stop()
	if err == nil {
		return
	}
	fmt.Fprintln(os.Stderr, "walgate:", err)
	var config *ConfigError
	var usage *usageError
	if errors.As(err, &config) || errors.As(err, &usage) {
		os.Exit(exitUsage)
	}
	os.Exit(exitFailed)
}

package main

import (
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/walgate/walgate/internal/built"
	"github.com/walgate/walgate/internal/pgserver"
)

// TestMain overlooks what the HTTP server's library never ends.
func TestMain(m *testing.M) {
	code := pgserver.Main(m,
		goleak.IgnoreAnyFunction("github.com/valyala/fasthttp.(*workerPool).Start.func2"),
		goleak.IgnoreAnyFunction("github.com/valyala/fasthttp.updateServerDate.func1"))
	os.Exit(built.Remove(code))
}

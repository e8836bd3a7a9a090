package main

import (
	"fmt"
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/walgate/walgate/internal/pgserver"
)

// TestMain overlooks what the HTTP server's library never ends.
func TestMain(m *testing.M) {
	code := pgserver.Main(m,
		goleak.IgnoreAnyFunction("github.com/valyala/fasthttp.(*workerPool).Start.func2"),
		goleak.IgnoreAnyFunction("github.com/valyala/fasthttp.updateServerDate.func1"))
	if err := os.RemoveAll(builtGatewayDir); err != nil {
		fmt.Fprintln(os.Stderr, "remove the gateway that the tests built:", err)
		code = max(code, 1)
	}
	os.Exit(code)
}

package chaos

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/walgate/walgate/internal/pgserver"
)

// builtGatewayDir is removed by TestMain.
var builtGatewayDir string

// builtGateway builds the command once for all tests, with the points at which it can be told to die.
var builtGateway = sync.OnceValues(func() (path string, err error) {
	if builtGatewayDir, err = os.MkdirTemp("", "walgate-built-"); err != nil {
		return "", err
	}
	path = filepath.Join(builtGatewayDir, "walgate")
	build := exec.Command("go", append(append([]string{"build"}, buildFlags...), "-o", path, ".")...)
	build.Dir = filepath.Join("..", "..")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return path, nil
})

func TestMain(m *testing.M) {
	code := pgserver.Main(m)
	if err := os.RemoveAll(builtGatewayDir); err != nil {
		fmt.Fprintln(os.Stderr, "remove the gateway that the tests built:", err)
		code = max(code, 1)
	}
	os.Exit(code)
}

// Package built makes the walgate command once for all tests of a binary that run it as a process of its own.
package built

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
)

var dir string // set by Gateway

// Gateway is the path of the command, built with the points at which it can be told to die, and looking for races where
// the test does. The caller runs in the module. Safe for concurrent use; Remove ends it.
var Gateway = sync.OnceValues(func() (path string, err error) {
	if dir, err = os.MkdirTemp("", "walgate-built-"); err != nil {
		return "", err
	}
	path = filepath.Join(dir, "walgate")
	args := append(append([]string{"build"}, flags...), "-o", path, "github.com/walgate/walgate")
	if out, err := exec.Command("go", args...).CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return path, nil
})

// Remove removes what Gateway made, if it made anything. It returns the exit code of tests that ended with code.
func Remove(code int) int {
	if err := os.RemoveAll(dir); err != nil {
		fmt.Fprintln(os.Stderr, "remove the gateway that the tests built:", err)
		return max(code, 1)
	}
	return code
}

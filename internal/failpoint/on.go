//go:build failpoints

package failpoint

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
)

var (
	chosen Point        = -1
	left   atomic.Int64 // hits until the end
)

func init() {
	text := os.Getenv(Env)
	if text == "" {
		return
	}
	name, count, _ := strings.Cut(text, ":")
	n, err := strconv.ParseInt(count, 10, 64)
	for p, known := range names {
		if known == name {
			chosen = Point(p)
		}
	}
	if chosen < 0 || err != nil || n < 1 {
		panic(fmt.Sprintf("%s is %q: want the name of a point and a number, such as received:1", Env, text))
	}
	left.Store(n)
}

// Here is where the process may be told to die.
func Here(p Point) {
	if p != chosen || left.Add(-1) != 0 {
		return
	}
	if err := syscall.Kill(os.Getpid(), syscall.SIGKILL); err != nil {
		panic(err)
	}
	select {} // the signal ends every thread; this one goes no step further
}

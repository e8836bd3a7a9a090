// Package ports gives out TCP ports on 127.0.0.1, each to one at a time: a server that is down for a moment, because a test
// killed it, finds nobody else on its port when it comes back, and its clients meet no stranger there meanwhile.
package ports

import (
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"strconv"
	"sync"
)

// The ports lie below those that systems give to outgoing connections, so that none of these takes one while it is free.
const (
	lowest = 10000
	count  = 22000
)

var (
	mu    sync.Mutex
	given = map[int]io.Closer{} // kept here, for a listener that nobody refers to would be closed some day
)

// Reserve returns a port that nothing listens on and that no other caller gets before release, on Linux not in another
// process either. The end of the process releases it too; releasing it twice does nothing. Safe for concurrent use.
func Reserve() (port int, release func(), err error) {
	for range 200 {
		port = lowest + rand.IntN(count)
		if release := reserve(port); release != nil {
			l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
			if err == nil {
				err = l.Close()
			}
			if err == nil {
				return port, release, nil
			}
			release()
		}
	}
	return 0, nil, errors.New("no free TCP port between 10000 and 32000 on 127.0.0.1")
}

// reserve returns nil if somebody else has the port.
func reserve(port int) (release func()) {
	mu.Lock()
	defer mu.Unlock()
	if _, is := given[port]; is {
		return nil
	}
	var claim io.Closer = io.NopCloser(nil)
	if runtime.GOOS == "linux" { // an abstract socket: one process has its name, until it ends
		l, err := net.Listen("unix", "@walgate-port-"+strconv.Itoa(port))
		if err != nil {
			return nil
		}
		claim = l
	}
	given[port] = claim
	return sync.OnceFunc(func() {
		mu.Lock()
		defer mu.Unlock()
		delete(given, port)
		_ = claim.Close()
	})
}

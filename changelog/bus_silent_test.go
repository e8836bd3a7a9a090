package changelog

import (
	"bufio"
	"fmt"
	"net"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/walgate/walgate/internal/redisserver"
)

// fakeRedis answers subscriptions and nothing else, hands each one's connection on, by its number, and tells when it ends.
func fakeRedis(t *testing.T, subscribed func(n int, conn net.Conn, channel string)) (url string, ended <-chan int) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	ends := make(chan int, 100)
	var count atomic.Int64
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				in, n := bufio.NewReader(conn), -1
				for {
					args, err := readCommand(in)
					if err != nil {
						ends <- n
						return
					}
					switch strings.ToLower(args[0]) {
					case "subscribe":
						n = int(count.Add(1)) - 1
						fmt.Fprintf(conn, "*3\r\n$9\r\nsubscribe\r\n$%d\r\n%s\r\n:1\r\n", len(args[1]), args[1])
						subscribed(n, conn, args[1])
					case "ping", "unsubscribe":
					default:
						fmt.Fprint(conn, "-ERR unknown command\r\n")
					}
				}
			}()
		}
	}()
	return "redis://" + l.Addr().String(), ends
}

// readCommand reads what a client sends: an array of texts.
func readCommand(in *bufio.Reader) (args []string, err error) {
	var n, size int
	if _, err = fmt.Fscanf(in, "*%d\r\n", &n); err != nil {
		return nil, err
	}
	for range n {
		if _, err = fmt.Fscanf(in, "$%d\r\n", &size); err != nil {
			return nil, err
		}
		var text string
		if text, err = in.ReadString('\n'); err != nil {
			return nil, err
		}
		args = append(args, strings.TrimSpace(text))
	}
	return args, nil
}

// TestRedisBusAfterASilentMessage: a connection that falls silent within a message is given up. The message's rest, which a
// client may have written, is no answer of Redis.
func TestRedisBusAfterASilentMessage(t *testing.T) {
	t.Parallel()
	url, ended := fakeRedis(t, func(n int, conn net.Conn, channel string) {
		if n == 0 { // nothing follows the first half
			fmt.Fprintf(conn, "*3\r\n$7\r\nmessage\r\n$%d\r\n%s\r\n$2000\r\n%s", len(channel), channel, strings.Repeat("x", 1000))
		}
	})
	b := openBus(t, url)
	for n := -1; n != 0; {
		select {
		case n = <-ended:
		case <-time.After(time.Minute):
			t.Fatal("the connection is still open")
		}
	}
	awaitThat(t, "it subscribes again", func() bool { return b.stats.Subscribed.Load() > 1 })
}

// TestRedisBusOfNoRedis: whatever answers there must not end the process.
func TestRedisBusOfNoRedis(t *testing.T) {
	t.Parallel()
	url, _ := fakeRedis(t, func(n int, conn net.Conn, _ string) {
		if n < 3 {
			fmt.Fprint(conn, []string{"*0\r\n", "*1\r\n*0\r\n", ":7\r\n"}[n])
		}
	})
	b := openBus(t, url)
	awaitThat(t, "it subscribes again each time", func() bool { return b.stats.Subscribed.Load() > 3 })
}

// TestRedisBusPublishesAgain: an instance that publishes nothing more still notices that it could.
func TestRedisBusPublishesAgain(t *testing.T) {
	t.Parallel()
	server := redisserver.StartForTest(t, redisserver.Options{})
	b := openBus(t, server.URL())
	awaitWell(t, b, true)
	subscribed := b.stats.Subscribed.Load()
	if _, err := server.Do(t.Context(), "ACL", "SETUSER", "default", "-publish"); err != nil {
		t.Fatal(err)
	}
	b.Publish(&Batch{Claim: 1, Prev: 1, Last: 2})
	awaitWell(t, b, false)
	if _, err := server.Do(t.Context(), "ACL", "SETUSER", "default", "+publish"); err != nil {
		t.Fatal(err)
	}
	awaitWell(t, b, true)
	if b.stats.Subscribed.Load() != subscribed {
		t.Error("it subscribed again")
	}
}

// TestRedisBusLooksAroundSubscribing: the log is looked at again and again until there is a subscription, and once more then,
// for what was announced shortly before.
func TestRedisBusLooksAroundSubscribing(t *testing.T) {
	t.Parallel()
	for name, answers := range map[string]bool{"answered": true, "never answered": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			asked, listening, ended := make(chan struct{}), make(chan struct{}), make(chan struct{})
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			go func() {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				defer close(ended)
				defer conn.Close()
				in := bufio.NewReader(conn)
				for {
					args, err := readCommand(in)
					switch {
					case err != nil:
						return
					case !strings.EqualFold(args[0], "subscribe"):
						fmt.Fprint(conn, "-ERR unknown command\r\n")
						continue
					}
					close(asked)
					if <-listening; answers {
						fmt.Fprintf(conn, "*3\r\n$9\r\nsubscribe\r\n$%d\r\n%s\r\n:1\r\n", len(args[1]), args[1])
					}
				}
			}()
			b := openBus(t, "redis://"+l.Addr().String())
			sub := b.Subscribe(t.Context())
			<-asked
			for len(sub) > 0 {
				<-sub
			}
			hints := 5
			if close(listening); answers {
				hints = 1
			}
			awaitHints(t, sub, hints)
			select {
			case <-ended: // for its silence
				t.Error("the log wasn't looked at before the subscription was given up")
			default:
			}
		})
	}
}

// TestQuietSubscriptionStays: where nothing is announced for long, the subscription isn't silent: Redis is asked for life.
func TestQuietSubscriptionStays(t *testing.T) {
	t.Parallel()
	server := redisserver.StartForTest(t, redisserver.Options{})
	awaitWell(t, openBus(t, "redis://"+server.Addr()), true)
	age := regexp.MustCompile(` age=([0-9]+) `)
	awaitThat(t, "the subscription is older than silence may last", func() bool {
		clients, err := server.Do(t.Context(), "CLIENT", "LIST", "TYPE", "pubsub")
		if err != nil {
			return false
		}
		m := age.FindStringSubmatch(clients)
		if m == nil {
			return false
		}
		seconds, err := strconv.Atoi(m[1])
		return err == nil && time.Duration(seconds)*time.Second > silenceMost+time.Second
	})
}

package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"

	"github.com/gofiber/contrib/websocket"
	"github.com/gofiber/fiber/v2"
)

// bareFanOutCommand is the argument that makes this program the bare broadcast's server.
const bareFanOutCommand = "bare-fanout"

// broadcaster is the least fan-out on the library that walgate uses: a goroutine and a queue for each connection, with
// no one signed in, nothing filtered, nothing bounded by bytes.
type broadcaster struct {
	mu     sync.Mutex
	queues map[chan []byte]struct{}
}

// serveBareFanOut prints its address and serves until its standard input ends.
func serveBareFanOut() error {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	b := &broadcaster{queues: map[chan []byte]struct{}{}}
	app := fiber.New(fiber.Config{DisableStartupMessage: true})
	app.Get("/broadcast", b.broadcast)
	app.Get("/stream", websocket.New(b.serve, websocket.Config{ReadBufferSize: 1024, WriteBufferSize: 1024}))
	fmt.Printf("http://%s\n", listener.Addr())
	go func() {
		io.Copy(io.Discard, os.Stdin)
		listener.Close()
	}()
	if err := app.Listener(listener); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// serve writes what is queued for one connection until it ends.
func (b *broadcaster) serve(c *websocket.Conn) {
	queue := make(chan []byte, 2*fanOutBurst)
	b.mu.Lock()
	b.queues[queue] = struct{}{}
	b.mu.Unlock()
	defer func() {
		b.mu.Lock()
		delete(b.queues, queue)
		b.mu.Unlock()
	}()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			if _, _, err := c.ReadMessage(); err != nil {
				return
			}
		}
	}()
	for {
		select {
		case text := <-queue:
			if c.WriteMessage(websocket.TextMessage, text) != nil {
				return
			}
		case <-ended:
			return
		}
	}
}

// broadcast queues a frame of a change's usual size for every connection, once they are as many as expected.
func (b *broadcaster) broadcast(c *fiber.Ctx) error {
	frame := []byte(`{"version":"` + strings.Repeat("x", 480) + `"}`)
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.queues) != c.QueryInt("sockets") {
		return fiber.NewError(fiber.StatusConflict, fmt.Sprintf("%d sockets are open", len(b.queues)))
	}
	for range c.QueryInt("changes") {
		for queue := range b.queues {
			queue <- frame
		}
	}
	return c.SendStatus(fiber.StatusNoContent)
}

package gateway

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/walgate/walgate/internal/badlink"
)

// tusClient is a process that drives tus-js-client, as it is published.
type tusClient struct {
	in  io.Writer
	out *bufio.Scanner
}

// tusResult is what became of a command.
type tusResult struct {
	URL        string   `json:"url"`
	Error      string   `json:"error"`
	Status     int      `json:"status"`
	Requests   []string `json:"requests"` // methods and the statuses that they brought
	Retries    int      `json:"retries"`
	Aborted    bool     `json:"aborted"`
	Terminated bool     `json:"terminated"`
}

// newTusClient starts node; without node or the package the test fails.
func newTusClient(t *testing.T, endpoint, token string) *tusClient {
	t.Helper()
	node, err := exec.LookPath("node")
	if err != nil {
		t.Fatalf("node, which drives a client of tus here, isn't installed: %v", err)
	}
	modules, err := filepath.Abs("../.ci/node_modules")
	ok(t, err)
	if extra := os.Getenv("WALGATE_NODE_MODULES"); extra != "" {
		modules = extra
	}
	if _, err := os.Stat(filepath.Join(modules, "tus-js-client")); err != nil {
		t.Fatalf("the package tus-js-client isn't installed: run (cd .ci && npm ci --ignore-scripts), or say where it is with WALGATE_NODE_MODULES: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, node, "testdata/tus/client.js")
	cmd.Env = append(os.Environ(), "NODE_PATH="+modules, "ENDPOINT="+endpoint, "TOKEN="+token)
	var faults bytes.Buffer
	cmd.Stderr = &faults
	in, err := cmd.StdinPipe()
	ok(t, err)
	out, err := cmd.StdoutPipe()
	ok(t, err)
	ok(t, cmd.Start())
	t.Cleanup(func() {
		cancel()
		_ = cmd.Wait() // it was killed
		if t.Failed() && faults.Len() > 0 {
			t.Logf("the client said: %s", faults.String())
		}
	})
	return &tusClient{in, bufio.NewScanner(out)}
}

// start begins a command; its result comes on the channel.
func (c *tusClient) start(t *testing.T, command map[string]any) <-chan *tusResult {
	t.Helper()
	c.tell(t, command)
	done := make(chan *tusResult, 1)
	go func() {
		defer close(done)
		if r := (&tusResult{}); c.out.Scan() && json.Unmarshal(c.out.Bytes(), r) == nil {
			done <- r
		}
	}()
	return done
}

// tell sends a command.
func (c *tusClient) tell(t *testing.T, command map[string]any) {
	t.Helper()
	line, err := json.Marshal(command)
	ok(t, err)
	_, err = c.in.Write(append(line, '\n'))
	ok(t, err)
}

// do waits for a command's result.
func (c *tusClient) do(t *testing.T, command map[string]any) *tusResult {
	t.Helper()
	return finished(t, c.start(t, command))
}

func finished(t *testing.T, done <-chan *tusResult) *tusResult {
	t.Helper()
	if r := <-done; r != nil {
		return r
	}
	t.Fatal("the client has ended")
	return nil
}

func (r *tusResult) want(t *testing.T, requests ...string) *tusResult {
	t.Helper()
	if r.Error != "" || !slices.Equal(r.Requests, requests) {
		t.Fatalf("%q %v, want %v", r.Error, r.Requests, requests)
	}
	return r
}

// TestTusClient drives tus-js-client through uploads, cuts, resumption, retry, termination and deletion.
func TestTusClient(t *testing.T) {
	t.Parallel()
	const size = 20 << 20
	e := newBytesEnv(t, "file://"+t.TempDir(), setup{})
	ana := editor(t, "ana")
	link := badlink.New(t, strings.TrimPrefix(e.base, "http://"))
	client := newTusClient(t, "http://"+link.Addr()+"/uploads", ana)
	content := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(content)
	file := filepath.Join(t.TempDir(), "photo.jpg")
	ok(t, os.WriteFile(file, content, 0o600))
	upload := func(id string, more ...any) map[string]any {
		c := map[string]any{"command": "upload", "file": file, "metadata": map[string]string{"attachment_id": id, "filename": "photo.jpg", "filetype": "image/jpeg"}}
		for i := 0; i+1 < len(more); i += 2 {
			c[more[i].(string)] = more[i+1]
		}
		return c
	}
	received := func() int64 {
		return int64(testutil.ToFloat64(e.g.metrics.attachmentBytes.WithLabelValues("received")))
	}
	same := func(id string) {
		t.Helper()
		a := e.get(t, "/attachments/"+id, ana)
		if a.status != 200 || !bytes.Equal(a.body, content) || a.header.Get("Content-Type") != "image/jpeg" || a.header.Get("Etag") != etag(sha(string(content))) {
			t.Errorf("%s: %d, %d bytes, %v", id, a.status, len(a.body), a.header)
		}
	}

	aborted := func(id string, terminate bool) *tusResult {
		t.Helper()
		link.Slow(8 << 20)
		defer link.Slow(0)
		done := client.start(t, upload(id))
		eventually(t, "a third has come", func() bool { return e.receiving() > size/3 })
		client.tell(t, map[string]any{"command": "abort", "terminate": terminate})
		return finished(t, done)
	}

	// In chunks; asked for again once it is there, it is.
	r := client.do(t, upload("chunks", "chunk", 6<<20)).want(t, "POST 201", "PATCH 204", "PATCH 204", "PATCH 204", "PATCH 204")
	same("chunks")
	client.do(t, upload("chunks", "resume", r.URL)).want(t, "HEAD 200")

	// The connection is cut in the middle: the client goes on by itself, and nothing that came is sent twice.
	link.Slow(8 << 20)
	before := received()
	done := client.start(t, upload("cut", "retryDelays", []int{0, 50, 500}))
	eventually(t, "a third has come", func() bool { return e.receiving() > size/3 })
	if link.Cut() == 0 {
		t.Error("there was no connection to cut")
	}
	link.Slow(0)
	finished(t, done).want(t, "POST 201", "HEAD 200", "PATCH 204")
	same("cut")
	if sent := received() - before; sent != size {
		t.Errorf("%d bytes came for %d", sent, size)
	}

	// The app is closed in the middle and goes on later.
	if r = aborted("closed", false); r.Error != "" || !r.Aborted {
		t.Fatalf("%+v", r)
	}
	client.do(t, upload("closed", "resume", r.URL)).want(t, "HEAD 200", "PATCH 204")
	same("closed")

	// The bytes come with the creation, or without a length.
	client.do(t, upload("whole", "withCreation", true)).want(t, "POST 201")
	same("whole")
	if r = client.do(t, upload("deferred", "deferred", true, "chunk", 8<<20)); r.Error != "" {
		t.Errorf("without a length: %s %v", r.Error, r.Requests)
	}
	same("deferred")

	// Given up, it leaves nothing.
	if r = aborted("given-up", true); r.Error != "" || !r.Aborted {
		t.Errorf("terminated: %+v", r)
	}
	if n := e.one(t, `SELECT count(*)::text FROM walgate.uploads`); n != "0" {
		t.Errorf("%s uploads are left", n)
	}
	e.get(t, "/attachments/given-up", ana).problem(t, NotFound)
	if r = client.do(t, map[string]any{"command": "terminate", "at": "http://" + link.Addr() + "/uploads/0"}); !strings.Contains(r.Error, "410") {
		t.Errorf("terminated what isn't there: %+v", r)
	}

	if a := e.do(t, "DELETE", "/attachments/cut", ana); a.status != 204 {
		t.Errorf("delete: %d %s", a.status, a.body)
	}
	e.get(t, "/attachments/cut", ana).problem(t, AttachmentDeleted)
	if r = client.do(t, upload("cut", "chunk", size)); r.Error != "" {
		t.Errorf("a deleted id: %s", r.Error)
	}
	same("cut")
}

// receiving is how many bytes have come of the upload under way.
func (e *env) receiving() (n int64) {
	e.g.turns.mu.Lock()
	defer e.g.turns.mu.Unlock()
	for _, turn := range e.g.turns.held {
		n = max(n, turn.body.came.Load())
	}
	return n
}

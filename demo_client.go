package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/fasthttp/websocket"
)

const (
	demoCollections = "teams,lists,todos,comments"
	demoRetry       = time.Second
	demoPoll        = 50 * time.Millisecond
	demoAnswerLimit = 30 * time.Second // Of one answer's header, and of a WebSocket's handshake.
)

// errDemoResync says that the gateway can't go on from where the client stands.
var errDemoResync = errors.New("full resync required")

// demoFrame is any line of a full resync or frame of the stream.
type demoFrame struct {
	Type       string         `json:"type"`
	Version    string         `json:"version"`
	Collection string         `json:"collection"`
	DocID      string         `json:"doc_id"`
	Operation  string         `json:"operation"`
	Reason     string         `json:"reason"`
	Data       map[string]any `json:"data"`
	LastSeq    string         `json:"last_seq"`
	End        bool           `json:"end"`
	Detail     string         `json:"detail"`

	AttachmentID string `json:"attachment_id"`
}

// watch is Ana's client: everything once, then every change, printed with its latency. It goes on where it was after a
// lost connection, and from the start when told to.
func (d *demo) watch(ctx context.Context, base string) error {
	since := ""
	for {
		err := d.watchOnce(ctx, base, &since)
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, errDemoResync) {
			since = ""
		}
		fmt.Fprintf(d.out, "Ana's client connects again: %v\n", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(demoRetry):
		}
	}
}

// watchOnce runs until the connection ends. since is where the client stands, empty for nowhere.
func (d *demo) watchOnce(ctx context.Context, base string, since *string) error {
	token, err := d.anasToken()
	if err != nil {
		return err
	}
	count := 0
	if *since == "" {
		if *since, count, err = demoFull(ctx, base, token); err != nil {
			return err
		}
	}
	select {
	case <-d.guided:
	default:
		if err := d.printGuide(base, *since); err != nil {
			return err
		}
		close(d.guided)
	}
	if count > 0 {
		fmt.Fprintf(d.out, "Ana starts with %d documents.\n", count)
	}
	return d.follow(ctx, base, token, since)
}

// demoReady waits until the gateway serves: it listens a moment before its log is open. That ctx ended is no error.
func demoReady(ctx context.Context, base string) error {
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: demoAnswerLimit}
	for {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, base+"/readyz", nil)
		if err != nil {
			return err
		}
		if response, err := client.Do(request); err == nil {
			response.Body.Close()
			if response.StatusCode == http.StatusOK {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(demoPoll):
		}
	}
}

// demoFull asks for everything and returns the position from which the changes continue it, and the number of documents.
func demoFull(ctx context.Context, base, token string) (since string, count int, err error) {
	url := base + "/sync/full?limit=all&collections=" + demoCollections
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", 0, err
	}
	request.Header.Set("Authorization", "Bearer "+token)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, ResponseHeaderTimeout: demoAnswerLimit}}
	response, err := client.Do(request)
	if err != nil {
		return "", 0, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		const most = 1000
		text, _ := io.ReadAll(io.LimitReader(response.Body, most)) // Half a problem is better than none.
		return "", 0, fmt.Errorf("GET %s: %s: %s", url, response.Status, text)
	}
	for lines := json.NewDecoder(response.Body); ; count++ {
		var line demoFrame
		if err := lines.Decode(&line); err != nil {
			return "", 0, fmt.Errorf("GET %s ended without its last line: %w", url, err)
		}
		if line.End {
			return line.LastSeq, count, nil
		}
	}
}

// demoSubscribe is the frame that subscribes to everything after since.
func demoSubscribe(since string) string {
	text, _ := json.Marshal(struct { // Strings alone: can't fail.
		Type        string   `json:"type"`
		Since       string   `json:"since"`
		Collections []string `json:"collections"`
		Attachments bool     `json:"attachments"`
	}{"subscribe", since, strings.Split(demoCollections, ","), true})
	return string(text)
}

// follow prints the changes after since, and moves since, until the connection ends.
func (d *demo) follow(ctx context.Context, base, token string, since *string) error {
	dialer := websocket.Dialer{HandshakeTimeout: demoAnswerLimit}
	header := http.Header{"Authorization": {"Bearer " + token}}
	conn, response, err := dialer.DialContext(ctx, "ws"+strings.TrimPrefix(base, "http")+"/sync/stream", header)
	if err != nil {
		if response != nil {
			err = fmt.Errorf("%w: %s", err, response.Status)
		}
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() }) // Ends the read below.
	defer stop()
	defer conn.Close()
	if err := conn.WriteMessage(websocket.TextMessage, []byte(demoSubscribe(*since))); err != nil {
		return err
	}
	for {
		_, text, err := conn.ReadMessage()
		if err != nil {
			return err
		}
		arrived := time.Now()
		var frame demoFrame
		if err := json.Unmarshal(text, &frame); err != nil {
			return fmt.Errorf("a frame that is no JSON: %w", err)
		}
		if frame.Type == "attachment" {
			d.showFile(ctx, base, token, frame, arrived)
			continue
		}
		if err := d.show(frame, arrived); err != nil {
			return err
		}
		*since = cmp.Or(frame.LastSeq, *since)
	}
}

// show prints a change, and turns the frames that end a stream into errors.
func (d *demo) show(frame demoFrame, arrived time.Time) error {
	switch {
	case frame.Operation != "":
		_, err := fmt.Fprintln(d.out, demoLine(frame, arrived))
		return err
	case frame.Type == "full_resync_required":
		return errDemoResync
	case frame.Type == "error":
		return fmt.Errorf("the gateway reports: %s", frame.Detail)
	}
	return nil
}

// demoLine is one change for the terminal.
func demoLine(frame demoFrame, arrived time.Time) string {
	operation := frame.Operation
	if frame.Reason == "left" {
		operation = "left" // Still there, but no longer Ana's.
	}
	line := fmt.Sprintf("%s  %-6s  %-8s  %.8s  %s",
		arrived.Format("15:04:05.000"), operation, frame.Collection, frame.DocID, demoSummary(frame.Data))
	committed, err := demoCommitTime(frame.Version)
	if err != nil {
		return line
	}
	return fmt.Sprintf("%-90s %4d ms", line, arrived.Sub(committed).Milliseconds())
}

// demoSummary says in a few words what a document is.
func demoSummary(data map[string]any) string {
	for _, column := range []string{"title", "name", "body"} {
		text, ok := data[column].(string)
		if !ok {
			continue
		}
		if data["done"] == true {
			return text + " (done)"
		}
		return text
	}
	return ""
}

// demoCommitTime reads the commit's time from a version, which begins with it.
func demoCommitTime(version string) (time.Time, error) {
	stamp, _, _ := strings.Cut(version, "-")
	return time.Parse("20060102T150405.000Z", stamp)
}

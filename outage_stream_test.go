package main

import (
	"encoding/json"
	"net/http"
	"strings"
	"time"

	"github.com/fasthttp/websocket"
)

// steadyStream subscribes at the end of the log and stays. The returned function waits until everything that the
// application has committed since then has arrived, and fails unless it did so once, in order, on that one connection.
func (o *outage) steadyStream() (arrived func(*ledger)) {
	o.t.Helper()
	began := len(o.app.committed)
	var page struct {
		LastSeq string `json:"last_seq"`
		HasMore bool   `json:"has_more"`
	}
	for page.HasMore, page.LastSeq = true, "0"; page.HasMore; {
		req, err := http.NewRequestWithContext(o.t.Context(), http.MethodGet, o.gateway.base+"/sync/pull?collections=docs&since="+page.LastSeq, nil)
		if err != nil {
			o.t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+o.client.token)
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			o.t.Fatal(err)
		}
		page.HasMore = false
		err = json.NewDecoder(res.Body).Decode(&page)
		res.Body.Close()
		if err != nil || res.StatusCode != http.StatusOK || page.LastSeq == "" {
			o.t.Fatalf("pull: %d %v", res.StatusCode, err)
		}
	}
	conn, res, err := websocket.DefaultDialer.DialContext(o.t.Context(), "ws"+strings.TrimPrefix(o.gateway.base, "http")+"/sync/stream", http.Header{"Authorization": {"Bearer " + o.client.token}})
	if err != nil {
		o.t.Fatalf("%v %v", err, res)
	}
	o.t.Cleanup(func() { conn.Close() })
	if err := conn.WriteJSON(map[string]any{"type": "subscribe", "since": page.LastSeq, "collections": []string{"docs"}}); err != nil {
		o.t.Fatal(err)
	}
	return func(app *ledger) {
		o.t.Helper()
		var want []string
		for _, tx := range app.committed[began:] {
			want = append(want, tx.changes...)
		}
		var got []string
		last := ""
		if err := conn.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
			o.t.Fatal(err)
		}
		for len(got) < len(want) {
			var f syncChange
			if err := conn.ReadJSON(&f); err != nil {
				o.t.Fatalf("the stream ended after %d of %d changes: %v", len(got), len(want), err)
			}
			switch {
			case f.Type == "" && f.Version <= last:
				o.t.Fatalf("%s comes after %s", f.Version, last)
			case f.Type == "":
				last = f.Version
				got = append(got, f.Operation[:1]+" "+f.DocID)
			case f.Type != "ready" && f.Type != "checkpoint" && f.Type != "heartbeat":
				o.t.Fatalf("the stream was told: %+v", f)
			}
		}
		if !equalLists(got, want) {
			for i := range got {
				if got[i] != want[i] {
					o.t.Fatalf("change %d of %d is %s, want %s", i, len(want), got[i], want[i])
				}
			}
		}
	}
}

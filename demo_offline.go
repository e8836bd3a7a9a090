package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

const (
	demoTablet   = "bens-tablet" // The client_id of Ben's tablet.
	demoPatience = 20 * time.Second
	demoLogoList = "10000000-0000-4000-8000-000000000003"
)

// demoChange is one offline edit.
type demoChange struct {
	ChangeID   string         `json:"change_id"`
	Collection string         `json:"collection"`
	Operation  string         `json:"operation"`
	DocID      string         `json:"doc_id,omitempty"`
	LocalID    string         `json:"local_id,omitempty"`
	Data       map[string]any `json:"data"`
	Base       map[string]any `json:"base,omitempty"`
}

// demoAnswer is what a push is answered with.
type demoAnswer struct {
	Results []struct {
		DocID      string         `json:"doc_id"`
		Status     string         `json:"status"`
		NewVersion string         `json:"new_version"`
		Policy     string         `json:"policy"`
		Columns    []string       `json:"columns"`
		Code       string         `json:"code"`
		Error      string         `json:"error"`
		Document   map[string]any `json:"document"`
	} `json:"results"`
	VisibleAt string `json:"visible_at"`
}

// tabletReturns lets Ben's tablet be offline once, when there is something to see. What it can't do is told, and stops
// nothing else.
func (d *demo) tabletReturns(ctx context.Context, base string) error {
	select {
	case <-ctx.Done():
		return nil
	case <-d.guided: // so that its lines don't come between those of the guide
	}
	if err := d.offline(ctx, base); err != nil && ctx.Err() == nil {
		d.tell("Ben's tablet: %v", err)
	}
	return nil
}

// offline is Ben's tablet: it reads everything, loses the network, goes on working, and returns to a list that others have
// changed meanwhile.
func (d *demo) offline(ctx context.Context, base string) error {
	token, err := d.bensToken()
	if err != nil {
		return err
	}
	app, err := pgx.Connect(ctx, d.database)
	if err != nil {
		return err
	}
	defer app.Close(context.WithoutCancel(ctx))
	var todo string
	err = app.QueryRow(ctx, `INSERT INTO todos (list_id, owner_id, team_id, title) SELECT id, owner_id, team_id, 'Choose the paper' FROM lists WHERE id = $1 RETURNING id`, demoLogoList).Scan(&todo)
	if err != nil {
		return err
	}
	since, _, err := demoFull(ctx, base, token)
	if err != nil {
		return err
	}
	d.tell("Ben's tablet has read everything and loses the network.")
	edits := demoEdits(todo)
	for _, e := range edits {
		d.tell("  offline:  %s", e.said)
	}
	if _, err := app.Exec(ctx, `UPDATE todos SET title = 'Choose thick paper' WHERE id = $1`, todo); err != nil {
		return err
	}
	d.tell(`  meanwhile a colleague, online, renames "Choose the paper" to "Choose thick paper"`)
	var changes []demoChange
	for _, e := range edits {
		changes = append(changes, e.change)
	}
	answer, err := demoPush(ctx, base, token, changes)
	if err != nil {
		return err
	}
	d.tell("Ben's tablet is back, and pushes its %d edits:", len(edits))
	for i, r := range answer.Results {
		d.tell("  %s", demoOutcome(edits[min(i, len(edits)-1)].said, r.Status, r.Policy, r.Columns, r.Code, r.Error))
	}
	own, err := demoReadBack(ctx, base, token, since, answer.VisibleAt)
	if err != nil {
		return err
	}
	d.tell("It pulls until it has passed %s: the feed has its edits, in %d rows marked as its own.\n", answer.VisibleAt, own)
	return nil
}

// demoEdit is a change and how a user would say it.
type demoEdit struct {
	said   string
	change demoChange
}

// demoEdits are what Ben does while he is offline: one edit that nobody disputes, one that meets another's, one new row
// whose key the database will choose.
func demoEdits(todo string) []demoEdit {
	return []demoEdit{
		{`ticks "Choose the paper" off`, demoChange{ChangeID: "1", Collection: "todos", Operation: "update", DocID: todo,
			Data: map[string]any{"done": true}, Base: map[string]any{"done": false}}},
		{`renames it to "Choose glossy paper"`, demoChange{ChangeID: "2", Collection: "todos", Operation: "update", DocID: todo,
			Data: map[string]any{"title": "Choose glossy paper"}, Base: map[string]any{"title": "Choose the paper"}}},
		{`adds "Print the first hundred"`, demoChange{ChangeID: "3", Collection: "todos", Operation: "insert", LocalID: "tablet-1",
			Data: map[string]any{"list_id": demoLogoList, "team_id": demoDesign, "title": "Print the first hundred"}}},
	}
}

func (d *demo) tell(format string, args ...any) { fmt.Fprintf(d.out, format+"\n", args...) }

// demoOutcome is a result for the terminal.
func demoOutcome(said, status, policy string, columns []string, code, problem string) string {
	line := fmt.Sprintf("%-37s %s", said, status)
	if len(columns) > 0 {
		line += fmt.Sprintf(" by %s: %s stays as the colleague left it", policy, strings.Join(columns, ", "))
	}
	if code != "" {
		line += fmt.Sprintf(" (%s: %s)", code, problem)
	}
	return line
}

// demoPush sends changes that stand alone each; repeated after a lost answer, they would not be applied twice.
func demoPush(ctx context.Context, base, token string, changes []demoChange) (answer demoAnswer, err error) {
	body, err := json.Marshal(map[string]any{"client_id": demoTablet, "atomic": false, "changes": changes})
	if err != nil {
		return answer, err
	}
	return answer, demoCall(ctx, http.MethodPost, base+"/sync/push", token, body, &answer)
}

// demoReadBack pulls until the position has passed visibleAt, and counts the changes that carry the tablet's mark.
func demoReadBack(ctx context.Context, base, token, since, visibleAt string) (own int, err error) {
	ctx, cancel := context.WithTimeout(ctx, demoPatience)
	defer cancel()
	for since < visibleAt { // the text's order is the order
		var page struct {
			Changes []struct {
				ClientID string `json:"client_id"`
			} `json:"changes"`
			LastSeq string `json:"last_seq"`
			Resync  bool   `json:"full_resync_required"`
		}
		q := url.Values{"since": {since}, "client_id": {demoTablet}, "wait": {"5s"}}
		if err := demoCall(ctx, http.MethodGet, base+"/sync/pull?"+q.Encode(), token, nil, &page); err != nil {
			return own, err
		}
		if page.Resync {
			return own, errDemoResync
		}
		for _, c := range page.Changes {
			if c.ClientID == demoTablet {
				own++
			}
		}
		since = page.LastSeq
	}
	return own, nil
}

// demoCall makes one request and decodes its answer.
func demoCall(ctx context.Context, method, address, token string, body []byte, into any) error {
	request, err := http.NewRequestWithContext(ctx, method, address, bytes.NewReader(body))
	if err != nil {
		return err
	}
	request.Header.Set("Authorization", "Bearer "+token)
	if body != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: demoAnswerLimit}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	const most = 1 << 20
	text, err := io.ReadAll(io.LimitReader(response.Body, most))
	if err != nil {
		return err
	}
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("%s %s: %s: %.1000s", method, address, response.Status, text)
	}
	return json.Unmarshal(text, into)
}

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/internal/pgserver"
)

const devicesTables = `
CREATE TABLE lists (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, owner text NOT NULL, title text NOT NULL, created timestamptz);
CREATE TABLE items (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, owner text NOT NULL, title text NOT NULL, created timestamptz, list_id bigint NOT NULL REFERENCES lists);
`

const devicesConfig = `
auto_init: true
http: {listen: "127.0.0.1:%[1]d"}
limits: {requests_per_second: 100000, burst: 100000}
auth: {jwt: {secret: %[2]q}}
log: {format: text}
collections:
  lists: {table: public.lists, scope: {owner: claims.sub}, write: {roles: [editor], set: {owner: claims.sub}}}
  items: {table: public.items, scope: {owner: claims.sub}, write: {roles: [editor], set: {owner: claims.sub}}}
`

// record is a row that a device has made offline.
type record struct {
	collection, local, title string
	parent                   string // of an item: the local id of its list, or its key
}

// device keeps nothing but its rows, what it has not seen arrive, and the newest version that it has received: no cursor.
// Its clock is years off.
type device struct {
	t        *testing.T
	gateway  *gatewayProcess
	token    string
	id       string
	clock    time.Time
	rng      *rand.Rand
	client   *http.Client
	rows     map[string]string // by collection and key, as JSON
	pending  []record
	made     []record          // all of them
	keys     map[string]string // by collection and local id, as pushes answered
	again    int               // rows whose push was repeated
	newest   string
	lastSync string
	before   func() // is called before each request: others write
	fault    func(step string, send func(context.Context) ([]byte, error)) ([]byte, error)
}

// errFault is a failure that a test has made: the device knows only that it has no answer.
var errFault = errors.New("no answer came")

// create makes a list and two items offline: one in the new list, one in a list that the device has from the server.
func (d *device) create() {
	n := len(d.made)
	list := record{"lists", fmt.Sprintf("%s-list-%d", d.id, n), fmt.Sprintf("list %d of %s", n, d.id), ""}
	fresh := []record{list, {"items", fmt.Sprintf("%s-item-%d", d.id, n), fmt.Sprintf("item %d of %s", n, d.id), list.local}}
	for _, key := range slices.Sorted(maps.Keys(d.rows)) {
		if id, ok := strings.CutPrefix(key, "lists/"); ok && !strings.Contains(d.rows[key], "application") {
			fresh = append(fresh, record{"items", fmt.Sprintf("%s-item-%d-b", d.id, n), fmt.Sprintf("second item %d of %s", n, d.id), id})
			break
		}
	}
	d.pending, d.made = append(d.pending, fresh...), append(d.made, fresh...)
}

// call sends a request; step names it for the fault.
func (d *device) call(step, method, path string, body any) (map[string]json.RawMessage, error) {
	d.before()
	send := func(ctx context.Context) ([]byte, error) {
		text, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		req, err := http.NewRequestWithContext(ctx, method, d.gateway.base+path, bytes.NewReader(text))
		if err != nil {
			return nil, err
		}
		req.Header.Set("Authorization", "Bearer "+d.token)
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set("Date", d.clock.UTC().Format(http.TimeFormat))
		res, err := d.client.Do(req)
		if err != nil {
			return nil, err
		}
		defer res.Body.Close()
		text, err = io.ReadAll(res.Body)
		switch {
		case err != nil:
			return nil, err
		case res.StatusCode == http.StatusServiceUnavailable || res.StatusCode == http.StatusNotFound && bytes.Contains(text, []byte(`"unknown_session"`)):
			return nil, fmt.Errorf("%w: %d", errFault, res.StatusCode)
		case res.StatusCode != http.StatusOK:
			return nil, fmt.Errorf("%s: %d %s", step, res.StatusCode, text)
		}
		if last := res.Header.Get("X-Sync-LastSeq"); last != "" { // of a full resync
			rows := bytes.Split(bytes.TrimSpace(text), []byte("\n"))
			return fmt.Appendf(nil, `{"last":%q,"rows":[%s]}`, last, bytes.Join(rows, []byte(","))), nil
		}
		return text, nil
	}
	text, err := d.fault(step, send)
	if err != nil {
		return nil, err
	}
	var answer map[string]json.RawMessage
	if err := json.Unmarshal(text, &answer); err != nil {
		d.t.Fatalf("%s: %s: %v", step, text, err)
	}
	return answer, nil
}

// textOf reads a member that is a text or null.
func (d *device) textOf(answer map[string]json.RawMessage, name string) string {
	var text *string
	if err := json.Unmarshal(answer[name], &text); err != nil {
		d.t.Fatalf("%s is %s: %v", name, answer[name], err)
	}
	if text == nil {
		return ""
	}
	return *text
}

// session goes once through all steps. hasty completes before it has pulled, as a device may that was cut off after the
// last session's pull.
func (d *device) session(hasty bool) error {
	answer, err := d.call("open", http.MethodPost, "/sync/sessions", map[string]string{"device_uuid": d.id})
	if err != nil {
		return err
	}
	id, checkin := d.textOf(answer, "sync_uuid"), d.textOf(answer, "max_checkin")
	if last := d.textOf(answer, "last_sync"); last < d.lastSync || last > checkin {
		d.t.Fatalf("last_sync is %q, max_checkin %s; it was %s before", last, checkin, d.lastSync)
	}
	if hasty && d.newest != "" {
		if err := d.complete(id, checkin, d.newest); err != nil {
			return err
		}
	}
	if err := d.push(); err != nil {
		return err
	}
	last, err := d.pull(id)
	if err != nil {
		return err
	}
	if d.rng.IntN(2) == 0 && d.newest != "" {
		last = d.newest
	}
	return d.complete(id, checkin, last)
}

func (d *device) complete(id, checkin, last string) error {
	answer, err := d.call("complete", http.MethodPost, "/sync/sessions/"+id+"/complete", map[string]string{"last_update": last})
	if err != nil {
		return err
	}
	now := d.textOf(answer, "last_sync")
	if now < d.lastSync || now > checkin {
		d.t.Fatalf("completed with %s, last_sync is %s; it was %s, and max_checkin is %s", last, now, d.lastSync, checkin)
	}
	d.lastSync = now
	return nil
}

// push sends everything that the device has not seen arrive, children with their parents.
func (d *device) push() error {
	if len(d.pending) == 0 {
		return nil
	}
	var changes []map[string]any
	for _, r := range d.pending {
		data := map[string]any{"title": r.title, "created": d.clock.UTC().Format(time.RFC3339)}
		if r.collection == "items" {
			data["list_id"] = r.parent
			if _, err := fmt.Sscanf(r.parent, "%d", new(int)); err == nil {
				data["list_id"] = json.Number(r.parent)
			}
		}
		changes = append(changes, map[string]any{"collection": r.collection, "operation": "upsert", "local_id": r.local, "data": data})
	}
	answer, err := d.call("push", http.MethodPost, "/sync/push", map[string]any{"client_id": d.id, "changes": changes})
	if err != nil {
		return err
	}
	var results []struct {
		Status, Code string
		DocID        string `json:"doc_id"`
		LocalID      string `json:"local_id"`
		NewVersion   string `json:"new_version"`
	}
	if err := json.Unmarshal(answer["results"], &results); err != nil || len(results) != len(changes) {
		d.t.Fatalf("push: %s (%v)", answer["results"], err)
	}
	for i, r := range results {
		if r.Status != "accepted" {
			d.t.Fatalf("%v: %+v", changes[i], r)
		}
		key := fmt.Sprint(changes[i]["collection"], "/", r.LocalID)
		if before := d.keys[key]; r.DocID == "" || r.LocalID != changes[i]["local_id"] || before != "" && before != r.DocID {
			d.t.Fatalf("%v became %+v, and was %q", changes[i], r, before)
		} else if before != "" {
			d.again++
		}
		d.keys[key] = r.DocID
		d.newest = max(d.newest, r.NewVersion)
	}
	return nil
}

// pull applies the session's pages, after a full resync where it needs one, and returns the last last_seq.
func (d *device) pull(id string) (since string, err error) {
	for {
		params := url.Values{"session": {id}, "limit": {"20"}}
		if since != "" {
			params.Set("since", since)
		}
		page, err := d.call("pull", http.MethodGet, "/sync/pull?"+params.Encode(), nil)
		if err != nil {
			return "", err
		}
		if page["full_resync_required"] != nil {
			full, err := d.call("pull", http.MethodGet, "/sync/full?limit=1000", nil)
			if err != nil {
				return "", err
			}
			d.rows = map[string]string{}
			d.apply(full["rows"])
			since = d.textOf(full, "last")
			continue
		}
		d.apply(page["changes"])
		since = d.textOf(page, "last_seq")
		if string(page["has_more"]) != "true" {
			return since, nil
		}
	}
}

func (d *device) apply(list json.RawMessage) {
	var changes []struct {
		Collection, Operation, Version string
		DocID                          string `json:"doc_id"`
		ClientID                       string `json:"client_id"`
		LocalID                        string `json:"local_id"`
		Data                           json.RawMessage
	}
	if err := json.Unmarshal(list, &changes); err != nil {
		d.t.Fatalf("%s: %v", list, err)
	}
	for _, c := range changes {
		key := c.Collection + "/" + c.DocID
		if made := d.keys[c.Collection+"/"+c.LocalID]; c.LocalID != "" && made != "" && made != c.DocID {
			d.t.Fatalf("the feed says that %s became %s, the push said %s", c.LocalID, c.DocID, made)
		}
		if c.Operation == "delete" {
			delete(d.rows, key)
		} else {
			d.rows[key] = string(c.Data)
		}
		d.newest = max(d.newest, c.Version)
		d.pending = slices.DeleteFunc(d.pending, func(r record) bool { return c.LocalID != "" && r.collection == c.Collection && r.local == c.LocalID })
	}
}

// others is the application: it writes between all requests, and each of its transactions begins before one request and
// commits after another.
type others struct {
	t    *testing.T
	conn *pgx.Conn
	tx   pgx.Tx
	rng  *rand.Rand
	n    int
}

func (o *others) write() {
	o.t.Helper()
	ctx := o.t.Context()
	o.commit()
	_, err := o.conn.Exec(ctx, `UPDATE lists SET created = clock_timestamp() WHERE id = (SELECT id FROM lists ORDER BY md5(id::text || $1::int) LIMIT 1)`, o.n)
	must(o.t, err)
	o.tx, err = o.conn.Begin(ctx) // of rows that no device waits for: it is open while the next request is
	must(o.t, err)
	for _, owner := range []string{"ana", "bob"} {
		o.n++
		_, err = o.tx.Exec(ctx, `INSERT INTO lists (owner, title, created) VALUES ($1, $2, now())`, owner, fmt.Sprintf("list %d of the application", o.n))
		must(o.t, err)
		_, err = o.tx.Exec(ctx, `UPDATE lists SET created = clock_timestamp() WHERE id = (SELECT id FROM lists WHERE owner = $1 AND title LIKE '%application' ORDER BY md5(id::text || $2::int) LIMIT 1)`, owner, o.n)
		must(o.t, err)
	}
	if o.n%6 == 0 {
		_, err = o.tx.Exec(ctx, `DELETE FROM lists l WHERE title LIKE '%application' AND NOT EXISTS (SELECT FROM items WHERE list_id = l.id) AND id = (SELECT min(id) + 3 FROM lists)`)
		must(o.t, err)
	}
}

func (o *others) commit() {
	if o.tx != nil {
		must(o.t, o.tx.Commit(o.t.Context()))
		o.tx = nil
	}
}

// TestDevicesThroughFailures: devices without cursors keep in step through sessions, whatever fails at whichever step: the
// answer is lost, the gateway is killed while it works on the request, or right after. Others commit between any two
// requests, and the devices' clocks are years off. In the end each device holds what SELECT returns, every row that a
// device made is there once, with its parent, and last_sync never went back or past max_checkin.
func TestDevicesThroughFailures(t *testing.T) {
	t.Parallel()
	dsn := pgserver.ForTest(t).Database(t)
	conn := connect(t, dsn)
	resyncExec(t, conn, devicesTables)
	gateway, cfg := newGatewayProcess(t, fmt.Sprintf("database: {url: %q}\nreplication: {slot: devices}\n", dsn)+devicesConfig)
	must(t, gateway.start(t.Context()))
	rng := rand.New(rand.NewPCG(4, 4))
	app := &others{t: t, conn: connect(t, dsn), rng: rng}
	plain := func(_ string, send func(context.Context) ([]byte, error)) ([]byte, error) { return send(t.Context()) }
	newDevice := func(subject, id string, clock time.Time) *device {
		token, err := signToken(cfg, subject, []string{"editor"}, nil, time.Hour)
		must(t, err)
		return &device{t: t, gateway: gateway, token: token, id: id, clock: clock, rng: rng, before: app.write, fault: plain,
			client: &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}, rows: map[string]string{}, keys: map[string]string{}}
	}
	phone := newDevice("ana", "phone", time.Date(2008, 10, 27, 4, 41, 1, 0, time.UTC))
	all := []*device{phone, newDevice("ana", "tablet", time.Date(2093, 1, 1, 0, 0, 0, 0, time.UTC)), newDevice("bob", "phone", time.Date(1970, 1, 1, 0, 0, 0, 0, time.UTC))}

	failed := map[string]int{}
	for _, step := range []string{"open", "push", "pull", "complete"} {
		for how, fail := range map[string]func(func(context.Context) ([]byte, error)) error{
			"the answer is lost": func(send func(context.Context) ([]byte, error)) error { _, err := send(t.Context()); return err },
			"killed at work":     func(send func(context.Context) ([]byte, error)) error { return killAtWork(gateway, send) },
			"killed afterwards": func(send func(context.Context) ([]byte, error)) error {
				if _, err := send(t.Context()); err != nil {
					return err
				}
				return restart(gateway)
			},
		} {
			left := 1
			if step == "pull" {
				left += rng.IntN(3) // of its pages
			}
			phone.fault = func(at string, send func(context.Context) ([]byte, error)) ([]byte, error) {
				if at != step {
					return send(t.Context())
				}
				if left--; left != 0 {
					return send(t.Context())
				}
				failed[step+", "+how]++
				if err := fail(send); err != nil {
					return nil, err
				}
				return nil, errFault
			}
			for _, d := range all {
				d.create()
				for attempt := 0; ; attempt++ {
					err := d.session(attempt%2 == 1)
					if err == nil {
						break
					}
					if attempt == 20 {
						t.Fatalf("%s: %s: %v", step, how, err)
					}
				}
				if len(d.pending) > 0 {
					t.Fatalf("%s, %s: after a whole session the device hasn't seen arrive %v", step, how, d.pending)
				}
			}
		}
	}
	t.Logf("faults: %v", failed)
	app.commit()
	for _, d := range all {
		d.fault, d.before = plain, func() {}
		for range 2 { // what was committed while the first was open comes with the second
			must(t, d.session(false))
		}
		d.compare(conn)
	}
	if phone.again == 0 {
		t.Error("no push was repeated")
	}
	for _, how := range []string{"the answer is lost", "killed at work", "killed afterwards"} {
		for _, step := range []string{"open", "push", "pull", "complete"} {
			if failed[step+", "+how] == 0 {
				t.Errorf("%s: %s: it never came to that", step, how)
			}
		}
	}
}

// killAtWork kills the gateway when it has the request, and starts it again.
func killAtWork(p *gatewayProcess, send func(context.Context) ([]byte, error)) error {
	sent, answered := make(chan struct{}), make(chan struct{})
	ctx := httptrace.WithClientTrace(p.t.Context(), &httptrace.ClientTrace{WroteRequest: func(httptrace.WroteRequestInfo) { close(sent) }})
	go func() {
		defer close(answered)
		_, _ = send(ctx) // it may be quicker than the kill
	}()
	select {
	case <-sent:
	case <-answered:
	}
	err := restart(p)
	<-answered
	return err
}

func restart(p *gatewayProcess) error {
	if err := p.end(syscall.SIGKILL); err != nil {
		return err
	}
	return p.start(p.t.Context())
}

// compare holds the device's rows against the tables, and what it made against what is there.
func (d *device) compare(conn *pgx.Conn) {
	d.t.Helper()
	subject := map[bool]string{true: "bob", false: "ana"}[d.clock.Year() == 1970]
	rows, err := conn.Query(d.t.Context(), `SELECT 'lists/' || id, row_to_json(l)::text FROM lists l WHERE owner = $1 UNION ALL SELECT 'items/' || id, row_to_json(i)::text FROM items i WHERE owner = $1`, subject)
	must(d.t, err)
	want := map[string]any{}
	var key, text string
	_, err = pgx.ForEachRow(rows, []any{&key, &text}, func() error {
		var v map[string]any
		err := json.Unmarshal([]byte(text), &v)
		delete(v, "created") // compared below: SQL writes it in the session's zone
		want[key] = v
		return err
	})
	must(d.t, err)
	got := map[string]any{}
	for key, text := range d.rows {
		var v map[string]any
		must(d.t, json.Unmarshal([]byte(text), &v))
		delete(v, "created")
		got[key] = v
	}
	for key := range want {
		if got[key] == nil {
			d.t.Errorf("%s of %s lacks %s: %v", d.id, subject, key, want[key])
		} else if !reflect.DeepEqual(got[key], want[key]) {
			d.t.Errorf("%s of %s has %s as %v, the table as %v", d.id, subject, key, got[key], want[key])
		}
		delete(got, key)
	}
	for key := range got {
		d.t.Errorf("%s of %s still has %s", d.id, subject, key)
	}
	for _, r := range d.made {
		var n int
		sql := `SELECT count(*) FROM lists WHERE owner = $1 AND title = $2 AND $3::text IS NOT NULL`
		parent := r.parent
		if r.collection == "items" {
			sql = `SELECT count(*) FROM items i JOIN lists l ON l.id = i.list_id WHERE i.owner = $1 AND l.owner = $1 AND i.title = $2 AND i.created = $3::timestamptz AND ($4 = l.id::text OR
				$4 = (SELECT local_id FROM walgate.local_ids WHERE subject = $1 AND client_id = $5 AND collection = 'lists' AND doc_id = l.id::text))`
		}
		args := []any{subject, r.title, d.clock}
		if r.collection == "items" {
			args = append(args, parent, d.id)
		}
		must(d.t, conn.QueryRow(d.t.Context(), sql, args...).Scan(&n))
		if n != 1 {
			d.t.Errorf("%s of %s: %v is there %d times", d.id, subject, r, n)
		}
	}
	if len(d.made) < 12 {
		d.t.Errorf("only %d rows were made", len(d.made))
	}
}

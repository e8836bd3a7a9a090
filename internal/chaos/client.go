package chaos

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
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/walgate/walgate/policies"
)

type rawJSON = json.RawMessage

// errAway is a lost connection, an instance that is down or an answer that says to come again.
var errAway = errors.New("away")

// errWrong is an answer that no client should get; it has been noted as a violation.
var errWrong = errors.New("a wrong answer")

// client follows the protocol through the load balancer, and checks what it is told. It pulls, streams, pushes and keeps
// files, in an order that follows from its seed.
type client struct {
	w       *World
	n       int
	subject string
	device  string // client_id
	claims  map[string]any
	roles   []string
	caller  *policies.Caller
	token   string
	names   []string // the collections that it may read
	rng     *rand.Rand
	http    *http.Client

	documents map[string]map[string]rawJSON // by collection and doc_id
	cursor    string
	settles   string   // what it holds is consistent from this position on
	lost      []string // collections that need a full resync before anything else
	history   *history
	promises  []wants
	slow      bool // it reads slowly, and at times not at all
	keepless  bool // it keeps no position, but opens sessions
	calm      bool // writes have stopped: no more adventures

	edits pushes
	files files

	telling sync.Mutex
	trail   []string // what it did last, for the story
	turns   []string // what changed its course, which a long trail would have pushed out
}

const (
	trailLength = 40
	patience    = 4 * time.Second // with an answer, once writes have stopped; less before, for a round is short
)

func newClient(w *World, n int, rng *rand.Rand) (*client, error) {
	c := &client{w: w, n: n, rng: rng, subject: w.subjects[n%len(w.subjects)], device: fmt.Sprintf("chaos-%x-%d", w.o.Seed, n), documents: map[string]map[string]rawJSON{},
		http: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 4, IdleConnTimeout: 5 * time.Second}}, slow: n%4 == 3, keepless: n%5 == 4}
	c.files.kept = map[string]string{}
	c.history = newHistory(c.device, c.mine, func(rule, text string) { c.violation(rule, "%s", text) })
	return c, c.claim()
}

// claim draws roles and claims. The first client has everything, one in six lacks a claim.
func (c *client) claim() error {
	w, rng := c.w, c.rng
	c.claims, c.roles = map[string]any{}, nil
	for _, r := range w.roles {
		if c.n == 0 || rng.IntN(4) > 0 {
			c.roles = append(c.roles, r)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(w.pools)) {
		p := w.pools[name]
		one := func() any {
			v := pick(rng, p.values)
			if p.number {
				return json.Number(v)
			}
			return v
		}
		var claim any
		switch {
		case name == "sub":
			claim = c.subject
		case c.n > 0 && rng.IntN(6) == 0:
			continue
		case rng.IntN(2) == 0 && !w.scalar[name]:
			list := []any{}
			for range 1 + rng.IntN(3) {
				list = append(list, one())
			}
			claim = list
		default:
			claim = one()
		}
		into := c.claims
		path := strings.Split(name, ".")
		for _, step := range path[:len(path)-1] {
			inner, ok := into[step].(map[string]any)
			if !ok {
				inner = map[string]any{}
				into[step] = inner
			}
			into = inner
		}
		into[path[len(path)-1]] = claim
	}
	c.token = w.o.Token(c.subject, c.roles, c.claims)
	var err error
	if c.caller, err = w.set.NewCaller(c.subject, c.roles, c.claims); err != nil {
		return err
	}
	c.names = nil
	for _, t := range w.tables {
		if t.policy.MayRead(c.caller) {
			c.names = append(c.names, t.name)
		}
	}
	return nil
}

// note remembers a step for the story.
func (c *client) note(format string, args ...any) {
	c.telling.Lock()
	defer c.telling.Unlock()
	c.trail = append(c.trail, stamped(format, args))
	c.trail = c.trail[max(0, len(c.trail)-trailLength):]
}

// turn notes what changes the client's course.
func (c *client) turn(format string, args ...any) {
	c.note(format, args...)
	c.telling.Lock()
	defer c.telling.Unlock()
	c.turns = append(c.turns, stamped(format, args))
	c.turns = c.turns[max(0, len(c.turns)-trailLength/2):]
}

func stamped(format string, args []any) string {
	return time.Now().UTC().Format("15:04:05.000 ") + fmt.Sprintf(format, args...)
}

// story is who the client is, and what it did last.
func (c *client) story() string {
	c.telling.Lock()
	defer c.telling.Unlock()
	claims, _ := json.Marshal(c.claims) // from JSON
	return fmt.Sprintf("client %d (subject %s, device %s, roles %v, claims %s) at %q, settles %q\n    turns:\n    %s\n    trail:\n    %s", c.n, c.subject, c.device, c.roles, claims, c.cursor, c.settles, strings.Join(c.turns, "\n    "), strings.Join(c.trail, "\n    "))
}

func (c *client) violation(rule, format string, args ...any) {
	c.w.violation(rule, fmt.Sprintf(format, args...)+"\n  "+c.story())
}

// run does this and that until ctx ends.
func (c *client) run(ctx context.Context) {
	for ; ctx.Err() == nil; pause(ctx, upTo(c.rng, 40*time.Millisecond)) {
		var err error
		switch n := c.rng.IntN(24); {
		case c.keepless && n < 9:
			err = c.session(ctx)
		case !c.keepless && (c.cursor == "" || len(c.lost) > 0):
			err = c.resync(ctx)
		case n == 0 && c.rng.IntN(4) == 0:
			c.lost = slices.Clone(c.names) // it lost its storage
			err = c.resync(ctx)
		case n < 6:
			err = c.pullOn(ctx)
		case n < 9:
			watching, cancel := context.WithTimeout(ctx, 50*time.Millisecond+upTo(c.rng, 800*time.Millisecond))
			err = c.follow(watching, false)
			cancel()
		case n == 9 && c.n > 0 && !c.keepless && c.rng.IntN(6) == 0:
			c.renew()
		case n == 9:
			pause(ctx, upTo(c.rng, 300*time.Millisecond))
		case n < 20:
			err = c.write(ctx)
		default:
			err = c.keepFiles(ctx)
		}
		if err != nil && ctx.Err() == nil {
			pause(ctx, 20*time.Millisecond)
		}
	}
}

// answer is a response whose body was read.
type answer struct {
	status int
	body   []byte
	header http.Header
}

// ask makes a request and reads its answer. errAway says to come again; errWrong that a violation was noted.
func (c *client) ask(ctx context.Context, method, path string, query url.Values, body []byte, header ...string) (answer, error) {
	res, cancel, err := c.open(ctx, method, path, query, body, header...)
	if err != nil {
		return answer{}, err
	}
	defer cancel()
	defer res.Body.Close()
	a := answer{status: res.StatusCode, header: res.Header}
	if a.body, err = io.ReadAll(res.Body); err != nil {
		c.note("%s %s: cut after %d bytes: %v", method, path, len(a.body), err)
		return a, errAway
	}
	return a, nil
}

// open makes a request whose answer's body the caller reads. Answers that say to come again are errAway.
func (c *client) open(ctx context.Context, method, path string, query url.Values, body []byte, header ...string) (*http.Response, context.CancelFunc, error) {
	limit := patience
	switch {
	case c.calm:
	case c.rng.IntN(10) == 0: // it doesn't wait for the answer
		limit = time.Millisecond + upTo(c.rng, 60*time.Millisecond)
	case c.rng.IntN(3) > 0:
		limit = patience/20 + upTo(c.rng, patience/4)
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	address := path
	if strings.HasPrefix(path, "/") {
		address = c.w.o.Gateway + path
		if len(query) > 0 {
			address += "?" + query.Encode()
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, address, bytes.NewReader(body))
	if err != nil {
		cancel()
		c.violation("addresses can be read", "%s: %v", address, err)
		return nil, nil, errWrong
	}
	req.Header.Set("Authorization", "Bearer "+c.token)
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	req.Close = c.rng.IntN(3) == 0 // the next one may go to another instance
	res, err := c.http.Do(req)
	if err != nil {
		cancel()
		c.note("%s %s?%s: no answer: %v", method, path, query.Encode(), errors.Unwrap(err))
		c.w.count("clients: no answer")
		return nil, nil, errAway
	}
	if res.StatusCode < http.StatusInternalServerError && res.StatusCode != http.StatusTooManyRequests && res.StatusCode != http.StatusRequestTimeout {
		return res, cancel, nil
	}
	defer cancel()
	defer res.Body.Close()
	text, _ := io.ReadAll(res.Body) // a part is good enough for the story
	code, _ := problem(text)
	c.note("%s %s: %d %.300s%s", method, path, res.StatusCode, text, from(res.Header))
	c.w.count("clients: told " + strconv.Itoa(res.StatusCode) + " " + code)
	if code == "internal" {
		c.violation("no fault is the gateway's own", "%s %s?%s: %d %s", method, path, query.Encode(), res.StatusCode, text)
	}
	return nil, nil, errAway
}

// wrong notes an answer that no client should get.
func (c *client) wrong(what string, a answer) error {
	c.violation("answers are those of the documentation", "%s: %d %.600s%s", what, a.status, a.body, from(a.header))
	return errWrong
}

// problem reads the code of a refusal; a balancer's own answers have none.
func problem(text []byte) (code string, retryable bool) {
	var p struct {
		Code      string
		Retryable bool
	}
	if json.Unmarshal(text, &p) != nil {
		return "", true
	}
	return p.Code, p.Retryable
}

// from names the instance that answered, where the balancer tells.
func from(h http.Header) string {
	if name := h.Get("X-Chaos-Instance"); name != "" {
		return " (instance " + name + ")"
	}
	return ""
}

// mine says whether the caller may see a row, as far as the document tells: by its scope's columns and its mark of deletion.
func (c *client) mine(ch *change) bool {
	t := c.w.table(ch.Collection)
	if t == nil || !slices.Contains(c.names, ch.Collection) {
		return false
	}
	row := map[string]rawJSON{}
	if json.Unmarshal(ch.Data, &row) != nil {
		return false
	}
	for _, name := range t.spec.Columns.Exclude {
		if _, ok := row[name]; ok {
			return false
		}
	}
	if mark, ok := row[t.spec.SoftDelete]; ok && string(mark) != "null" && string(mark) != "false" {
		return false
	}
	if len(t.spec.Scope) == 0 {
		return true
	}
	for _, alternative := range t.spec.Scope {
		all := true
		for name, claim := range alternative {
			text, ok := row[name]
			all = all && (!ok || slices.Contains(c.selected(claim), strings.Trim(string(text), `"`)))
		}
		if all {
			return true
		}
	}
	return false
}

// selected are the values that a claim selects, written as documents have them.
func (c *client) selected(claim string) (values []string) {
	var v any = c.claims
	for _, step := range strings.Split(claim, ".")[1:] {
		inner, ok := v.(map[string]any)
		if !ok {
			return nil
		}
		v = inner[step]
	}
	list, ok := v.([]any)
	if !ok {
		list = []any{v}
	}
	for _, e := range list {
		if e != nil {
			values = append(values, fmt.Sprint(e))
		}
	}
	return values
}

func (c *client) put(collection, id string, doc rawJSON) {
	if c.documents[collection] == nil {
		c.documents[collection] = map[string]rawJSON{}
	}
	c.documents[collection][id] = doc
}

// store applies a unit together with its position.
func (c *client) store(u *unit) {
	c.take(u)
	c.keepPromises()
}

func (c *client) take(u *unit) {
	c.history.apply(u)
	for i := range u.changes {
		ch := &u.changes[i]
		if ch.Operation == "delete" {
			delete(c.documents[ch.Collection], ch.DocID)
		} else {
			c.put(ch.Collection, ch.DocID, ch.Data)
		}
	}
	c.cursor = u.last
	c.w.add("clients: changes", len(u.changes))
}

// keepPromises holds the present position against what pushes were answered.
func (c *client) keepPromises() {
	c.promises = slices.DeleteFunc(c.promises, func(w wants) bool { return w.lost != c.w.lossCount() })
	c.promises = c.history.readYourWrites(c.cursor, c.promises, func(p promised) (string, bool) {
		row := map[string]rawJSON{}
		if json.Unmarshal(c.documents[p.collection][p.id], &row) != nil {
			return "", false
		}
		var text string
		return text, json.Unmarshal(row[p.column], &text) == nil
	})
}

package chaos

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/schema"
)

// script is a gateway that gives the answers of a list, one after the other.
type script struct {
	mu      sync.Mutex
	answers []scripted
}

type scripted struct {
	status int
	header map[string]string
	body   string
}

func (s *script) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.answers) == 0 {
		http.Error(w, "the script is over", http.StatusServiceUnavailable)
		return
	}
	a := s.answers[0]
	s.answers = s.answers[1:]
	for name, v := range a.header {
		w.Header().Set(name, v)
	}
	if a.status != 0 {
		w.WriteHeader(a.status)
	}
	fmt.Fprint(w, a.body)
}

// scriptedClient is a client of one collection, notes, in front of a scripted gateway. It stands at version 5.
func scriptedClient(t *testing.T, answers ...scripted) *client {
	t.Helper()
	server := httptest.NewServer(&script{answers: answers})
	t.Cleanup(server.Close)
	text := (&schema.Types{}).Lookup(25)
	relation := &schema.Table{OID: 1, Schema: "public", Name: "notes", Kind: 'r', Persistence: 'p', Identity: 'f', Readable: true, Key: []int{0}}
	for i, name := range []string{"id", "owner_id", "token", "photo"} {
		relation.Columns = append(relation.Columns, schema.Column{Name: name, Num: int16(i + 1), Type: text, NotNull: i == 0, Deterministic: true})
	}
	set, faults := policies.Compile(map[string]policies.Spec{"notes": {Table: "public.notes", Scope: []map[string]string{{"owner_id": "claims.sub"}},
		Write: &policies.WriteSpec{}, Attachments: []policies.AttachmentSpec{{Column: "photo"}}}},
		func(string, string) *schema.Table { return relation }, []string{"public.notes"})
	if faults != nil {
		t.Fatalf("%+v", faults)
	}
	collection := set.Collections[0]
	notes := &table{name: "notes", spec: collection.Spec, policy: collection, sql: relation.SQL(), key: relation.Key, counted: "token", owns: true}
	for i, c := range relation.Columns {
		notes.columns = append(notes.columns, column{Column: c, quoted: quoteName(c.Name), parent: -1, made: true, shown: true, key: i == 0, pushed: i > 1})
	}
	w := &World{o: WorldOptions{Gateway: server.URL, Token: testToken, Logf: t.Logf}, set: set, tables: []*table{notes}, scalar: map[string]bool{}, subjects: []string{"u0"},
		pools: map[string]*pool{"sub": {values: []string{"u0"}}}, counts: map[string]int{}, ledger: newLedger(), uploads: []string{"f1.jpg"}}
	c, err := newClient(w, 0, rand.New(rand.NewPCG(1, 1)))
	must(t, err)
	t.Cleanup(c.http.CloseIdleConnections)
	c.calm, c.cursor = true, at(5)
	w.clients = []*client{c}
	return c
}

// at is a version whose order is that of n.
func at(n int) string { return fmt.Sprintf("20260502T150000.000Z-%04x-a1b2-00ff00ff", n) }

// told is an upsert of u0's, in a transaction that began at tx.
func told(id string, version, tx int) change {
	return change{Version: at(version), Tx: at(tx), Collection: "notes", DocID: id, Operation: "upsert", Data: rawJSON(fmt.Sprintf(`{"id":%q,"owner_id":"u0","token":"old"}`, id))}
}

func applied(since, last int, changes ...change) *unit {
	return &unit{since: at(since), last: at(last), changes: changes}
}

func but(c change, mend func(*change)) change {
	mend(&c)
	return c
}

func body(text string) scripted { return scripted{body: text} }

func fullOf(lines string) scripted {
	return scripted{header: map[string]string{"X-Sync-LastSeq": at(7), "X-Sync-Mode": "replace"}, body: lines}
}

func pageOf(last int, more, partial bool, changes ...string) scripted {
	return body(fmt.Sprintf(`{"changes":[%s],"last_seq":%q,"has_more":%t,"partial":%t}`, strings.Join(changes, ","), at(last), more, partial))
}

func entry(id string, version, tx int) string {
	return fmt.Sprintf(`{"version":%q,"tx":%q,"collection":"notes","doc_id":%q,"operation":"upsert","data":{"id":%q,"owner_id":"u0"}}`, at(version), at(tx), id, id)
}

func streamed(frames ...frame) func(t *testing.T, c *client) {
	return func(_ *testing.T, c *client) {
		s := &following{c: c, seen: c.cursor}
		for i := range frames {
			_, _ = s.handle(&frames[i], nil) // its errors are noted
		}
	}
}

func units(all ...*unit) func(t *testing.T, c *client) {
	return func(_ *testing.T, c *client) {
		for _, u := range all {
			c.store(u)
		}
	}
}

// pulling pulls once, from a gateway with these answers.
func pulling(t *testing.T, c *client) {
	if u, _, _ := c.pull(t.Context(), c.cursor, c.names, "", 0); u != nil { // its errors are noted
		c.store(u)
	}
}

func judging(applied int, sent int, results ...pushResult) func(t *testing.T, c *client) {
	return func(_ *testing.T, c *client) {
		e := &edit{client: c, table: c.w.tables[0], change: &pushChange{ChangeID: "c1", Collection: "notes", DocID: "a", Operation: "update"}, token: "push 1", sent: sent, results: results, losses: make([]int, len(results))}
		c.w.ledger.add(e)
		c.w.ledger.judge(map[string]int{"push 1": applied}, 0, func(e *edit, rule, text string) { e.client.violation(rule, "%s", text) })
	}
}

func promising(value string, p promised, all ...*unit) func(t *testing.T, c *client) {
	return func(_ *testing.T, c *client) {
		p.column, p.value = "token", value
		c.promises = []wants{{visible: at(8), change: "c1", doc: p}}
		for _, u := range all {
			c.store(u)
		}
	}
}

// ruleCase is something that breaks a rule, and what is like it and breaks none.
type ruleCase struct {
	rule          string
	answers       []scripted
	breaks, sound func(t *testing.T, c *client)
	soundAnswers  []scripted
}

var checkpoint = func(n int) frame { return frame{Type: "checkpoint", LastSeq: at(n)} }

func digestOf(id string) string {
	sum := sha256.Sum256(fileBytes(id))
	return hex.EncodeToString(sum[:])
}

func framed(c change) frame { return frame{change: c} }

var (
	accepted = pushResult{Status: "accepted"}
	rejected = pushResult{Status: "rejected", Code: "conflict"}
)

// TestEachRuleIsNoticed breaks every rule that the world holds clients' histories against, and sees that it is noticed and
// that its like, which breaks none, isn't.
func TestEachRuleIsNoticed(t *testing.T) {
	t.Parallel()
	foreign := but(told("a", 6, 6), func(c *change) { c.Data = rawJSON(`{"id":"a","owner_id":"u1"}`) })
	pushOne := func(t *testing.T, c *client) {
		b := &batch{}
		c.addChange(b, c.w.tables[0], &pushChange{DocID: "a", Operation: "delete"})
		_ = c.send(t.Context(), b, false) // its errors are noted
	}
	files := func(t *testing.T, c *client) { _ = c.syncFiles(t.Context()) }
	full := func(t *testing.T, c *client) { c.cursor = ""; _ = c.resync(t.Context()) }
	others := func(t *testing.T, c *client) {
		c.names, c.lost = []string{"notes", "others"}, []string{"others"}
		_ = c.resync(t.Context()) // its errors are noted
	}
	nothing := fullOf(fmt.Sprintf(`{"end":true,"count":0,"last_seq":%q}`, at(7)))
	leftOver := func(t *testing.T, c *client) {
		b := &batch{}
		c.addChange(b, c.w.tables[0], &pushChange{DocID: "a", Operation: "delete"})
		c.edits.queue = append(c.edits.queue, b)
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		c.settlePushes(ctx)
	}
	sessions := func(t *testing.T, c *client) { _ = c.session(t.Context()) }
	opened := body(fmt.Sprintf(`{"sync_uuid":"1","last_sync":%q,"max_checkin":%q}`, at(5), at(8)))
	download := func(digest string) string {
		return fmt.Sprintf(`{"current_version":3,"operations":[{"operation":"download","attachment_id":"f1.jpg","version":3,"sha256":%q}]}`, digest)
	}
	upsert := fmt.Sprintf(`{"collection":"notes","doc_id":"a","data":{"id":"a","owner_id":"u0"}}
{"end":true,"count":1,"last_seq":%q}`, at(7))
	cases := []ruleCase{
		{rule: "versions rise, and nothing comes twice", breaks: units(applied(5, 7, told("a", 6, 6), told("b", 6, 6))), sound: units(applied(5, 7, told("a", 6, 6), told("b", 7, 6)))},
		{rule: "versions rise, and nothing comes twice", breaks: units(applied(5, 7, told("a", 5, 5))), sound: units(applied(5, 7, told("a", 6, 6)))},
		{rule: "versions rise, and nothing comes twice", breaks: streamed(framed(told("a", 6, 6)), checkpoint(6), framed(told("a", 6, 6)), checkpoint(6)),
			sound: streamed(framed(told("a", 6, 6)), checkpoint(6), framed(told("a", 7, 7)), checkpoint(7))},
		{rule: "transactions come in their order", breaks: units(applied(5, 9, told("a", 7, 7), told("b", 8, 6))), sound: units(applied(5, 9, told("a", 7, 7), told("b", 8, 8)))},
		{rule: "a transaction comes whole", breaks: units(applied(5, 6, told("a", 6, 6)), applied(6, 7, told("b", 7, 6))), sound: units(applied(5, 6, told("a", 6, 6)), applied(6, 7, told("b", 7, 7)))},
		{rule: "a transaction comes whole", breaks: streamed(framed(told("a", 6, 6)), framed(told("b", 7, 7)), checkpoint(7)), sound: streamed(framed(told("a", 6, 6)), framed(told("b", 7, 6)), checkpoint(7))},
		{rule: "a transaction comes whole", breaks: streamed(framed(told("a", 6, 6)), frame{Type: "heartbeat", LastSeq: at(6)}), sound: streamed(framed(told("a", 6, 6)), checkpoint(6), frame{Type: "heartbeat", LastSeq: at(6)})},
		{rule: "only the own changes are marked", breaks: units(applied(5, 6, but(told("a", 6, 6), func(c *change) { c.ClientID = "another" }))), sound: units(applied(5, 6, but(told("a", 6, 6), func(c *change) { c.ClientID = "chaos-0-0" })))},
		{rule: "nobody is shown a row that isn't theirs", breaks: units(applied(5, 6, foreign)), sound: units(applied(5, 6, told("a", 6, 6)))},
		{rule: "nobody is shown a row that isn't theirs", breaks: full, answers: []scripted{fullOf(strings.Replace(upsert, "u0", "u1", 1))}, sound: full, soundAnswers: []scripted{fullOf(upsert)}},
		{rule: "operations are upsert and delete", breaks: units(applied(5, 6, but(told("a", 6, 6), func(c *change) { c.Operation = "leave" }))), sound: units(applied(5, 6, but(told("a", 6, 6), func(c *change) { c.Operation = "delete" })))},
		{rule: "last_seq doesn't go back", breaks: units(applied(5, 6, told("a", 7, 7))), sound: units(applied(5, 7, told("a", 7, 7)))},
		{rule: "last_seq doesn't go back", breaks: pulling, answers: []scripted{pageOf(4, false, false)}, sound: pulling, soundAnswers: []scripted{pageOf(5, false, false)}},
		{rule: "last_seq doesn't go back", breaks: streamed(frame{Type: "ready", LastSeq: at(4)}), sound: streamed(frame{Type: "ready", LastSeq: at(5)})},
		{rule: "a document is once in a page", breaks: pulling, answers: []scripted{pageOf(7, false, false, entry("a", 6, 6), entry("a", 7, 7))}, sound: pulling, soundAnswers: []scripted{pageOf(7, false, false, entry("a", 6, 6), entry("b", 7, 7))}},
		{rule: "a page keeps to its limit", breaks: pulling, answers: []scripted{pageOf(1006, false, false, slices.Collect(func(yield func(string) bool) {
			for n := range 1001 {
				yield(entry(fmt.Sprint(n), 6+n, 6+n))
			}
		})...)}, sound: pulling, soundAnswers: []scripted{pageOf(7, false, false, entry("a", 6, 6))}},
		{rule: "more comes only after a step", breaks: pulling, answers: []scripted{pageOf(5, true, false)}, sound: pulling, soundAnswers: []scripted{pageOf(6, true, false)}},
		{rule: "more comes only after a step", breaks: pulling, answers: []scripted{pageOf(6, false, true, entry("a", 6, 6)), pageOf(7, false, false)}, sound: pulling, soundAnswers: []scripted{pageOf(6, true, true, entry("a", 6, 6)), pageOf(7, false, false, entry("b", 7, 6))}},
		{rule: "a resync names its collections", breaks: pulling, answers: []scripted{body(`{"full_resync_required":true,"reason":"too_old"}`)}, sound: pulling, soundAnswers: []scripted{body(`{"full_resync_required":true,"reason":"too_old","collections":["notes"]}`)}},
		{rule: "answers are those of the documentation", breaks: pulling, answers: []scripted{{status: 400, body: `{"code":"invalid_since"}`}}, sound: pulling, soundAnswers: []scripted{{status: 503, body: `{"code":"log_behind","retryable":true}`}}},
		{rule: "answers are those of the documentation", breaks: streamed(frame{Type: "surprise"}), sound: streamed(frame{Type: "goodbye"})},
		{rule: "no fault is the gateway's own", breaks: pulling, answers: []scripted{{status: 500, body: `{"code":"internal","retryable":true}`}}, sound: pulling, soundAnswers: []scripted{{status: 502, body: `the balancer`}}},
		{rule: "no fault is the gateway's own", breaks: streamed(frame{Type: "error", Code: "internal"}), sound: streamed(frame{Type: "error", Code: "slow_reader"})},
		{rule: "all pages of a full resync have one position", breaks: full, answers: []scripted{
			{header: map[string]string{"X-Sync-LastSeq": at(7), "X-Sync-Cursor": "more"}, body: fmt.Sprintf(`{"end":true,"count":0,"last_seq":%q}`, at(7))}, {header: map[string]string{"X-Sync-LastSeq": at(8)}, body: strings.Replace(upsert, at(7), at(8), 1)}},
			sound: full, soundAnswers: []scripted{{header: map[string]string{"X-Sync-LastSeq": at(7), "X-Sync-Cursor": "more"}, body: fmt.Sprintf(`{"end":true,"count":0,"last_seq":%q}`, at(7))}, fullOf(upsert)}},
		{rule: "a full resync says what it has sent", breaks: full, answers: []scripted{fullOf(strings.Replace(upsert, `"count":1`, `"count":2`, 1))}, sound: full, soundAnswers: []scripted{fullOf(upsert)}},
		{rule: "a full resync has what was asked for", breaks: full, answers: []scripted{fullOf(strings.Replace(upsert, `"notes"`, `"others"`, 1))}, sound: full, soundAnswers: []scripted{fullOf(upsert)}},
		{rule: "a checkpoint ends a transaction", breaks: streamed(checkpoint(6)), sound: streamed(frame{Type: "attachment"}, checkpoint(6))},
		{rule: "a stream is ready once", breaks: streamed(frame{Type: "ready", LastSeq: at(5)}, frame{Type: "ready", LastSeq: at(5)}), sound: streamed(frame{Type: "ready", LastSeq: at(5)}, frame{Type: "heartbeat", LastSeq: at(5)})},
		{rule: "a client reads its writes", breaks: promising("push 1", promised{"notes", "a", at(7), "", ""}, applied(5, 8, told("b", 6, 6))), sound: promising("push 1", promised{"notes", "a", at(7), "", ""}, applied(5, 8, told("a", 8, 8)))},
		{rule: "a client reads its writes", breaks: promising("push 1", promised{"notes", "a", at(7), "", ""}, applied(5, 8, told("a", 7, 7))), sound: promising("old", promised{"notes", "a", at(7), "", ""}, applied(5, 8, told("a", 7, 7)))},
		{rule: "a push is applied at most once", breaks: judging(2, 2, accepted, pushResult{Status: "duplicate"}), sound: judging(1, 2, accepted, pushResult{Status: "duplicate"})},
		{rule: "an acknowledged push is applied", breaks: judging(0, 2, accepted), sound: judging(1, 2, accepted)},
		{rule: "what wasn't written has no effect", breaks: judging(1, 2, rejected, rejected), sound: judging(1, 2, rejected)},
		{rule: "what wasn't written has no effect", breaks: judging(1, 1, pushResult{Status: "conflict_resolved", Policy: "server_wins"}), sound: judging(1, 1, pushResult{Status: "conflict_resolved", Policy: "client_wins"})},
		{rule: "results are in the order of the changes", breaks: pushOne, answers: []scripted{body(`{"results":[{"change_id":"c2","doc_id":"a","status":"accepted"}]}`)}, sound: pushOne, soundAnswers: []scripted{body(`{"results":[{"change_id":"c1","doc_id":"a","status":"accepted"}]}`)}},
		{rule: "answers are those of the documentation", breaks: pushOne, answers: []scripted{{status: 409, body: `{"code":"change_id_reused"}`}}, sound: pushOne, soundAnswers: []scripted{{status: 429, body: `{"code":"rate_limited"}`}}},
		{rule: "a manifest is in the order of versions", breaks: files, answers: []scripted{body(`{"current_version":9,"operations":[{"operation":"delete","attachment_id":"a","version":7},{"operation":"delete","attachment_id":"b","version":6}]}`)},
			sound: files, soundAnswers: []scripted{body(`{"current_version":9,"operations":[{"operation":"delete","attachment_id":"a","version":6},{"operation":"delete","attachment_id":"b","version":7}]}`)}},
		{rule: "an attachment is once in a manifest", breaks: files, answers: []scripted{body(`{"current_version":9,"operations":[{"operation":"delete","attachment_id":"a","version":6},{"operation":"delete","attachment_id":"a","version":7}]}`)}, sound: files, soundAnswers: []scripted{body(`{"current_version":9}`)}},
		{rule: "a manifest's position doesn't go back", breaks: files, answers: []scripted{body(`{"current_version":3,"operations":[{"operation":"delete","attachment_id":"a","version":6}]}`)}, sound: files, soundAnswers: []scripted{body(`{"current_version":9}`)}},
		{rule: "answers are those of the documentation", breaks: files, answers: []scripted{body(`{"full_resync_required":true,"reason":"too_old"}`)}, sound: files, soundAnswers: []scripted{body(`{"current_version":9}`)}},
		{rule: "a pull ends where it is told to", breaks: others, answers: []scripted{nothing, pageOf(6, false, false)}, sound: others, soundAnswers: []scripted{nothing, pageOf(7, false, false)}},
		{rule: "pushes get an outcome", breaks: leftOver, answers: []scripted{{status: 503}}, sound: leftOver, soundAnswers: []scripted{body(`{"results":[{"change_id":"c1","doc_id":"a","status":"accepted"}]}`)}},
		{rule: "a session keeps to its window", breaks: sessions, answers: []scripted{opened, pageOf(9, false, false, entry("a", 9, 9)), body(`{}`)}, sound: sessions, soundAnswers: []scripted{opened, pageOf(8, false, false, entry("a", 8, 8)), body(`{}`)}},
		{rule: "nobody is shown a row that isn't theirs", breaks: sessions, answers: []scripted{opened, pageOf(8, false, false, strings.Replace(entry("a", 8, 8), "u0", "u1", 1)), body(`{}`)}, sound: sessions, soundAnswers: []scripted{opened, {status: 404, body: `{"code":"unknown_session"}`}}},
		{rule: "a download is what was uploaded", breaks: files, answers: []scripted{body(download("00")), body("other bytes")}, sound: files, soundAnswers: []scripted{body(download(digestOf("f1.jpg"))), body(string(fileBytes("f1.jpg")))}},
	}
	for i, r := range cases {
		t.Run(fmt.Sprintf("%d %s", i, r.rule), func(t *testing.T) {
			t.Parallel()
			c := scriptedClient(t, r.answers...)
			r.breaks(t, c)
			if !slices.ContainsFunc(c.w.violations, func(v string) bool { return strings.Contains(v, "“"+r.rule+"”") && strings.Contains(v, "client 0") }) {
				t.Errorf("it isn't noticed; what is: %q", c.w.violations)
			}
			c = scriptedClient(t, r.soundAnswers...)
			if r.sound(t, c); len(c.w.violations) > 0 {
				t.Errorf("what breaks no rule is told: %s", c.w.violations)
			}
		})
	}
	tried := map[string]bool{}
	for _, r := range cases {
		tried[r.rule] = true
	}
	for _, rule := range brokenElsewhere {
		tried[rule] = true
	}
	for _, rule := range rulesInSource(t) {
		if !tried[rule] {
			t.Errorf("no case breaks the rule %q", rule)
		}
	}
}

// brokenElsewhere are the rules that need tables, which TestWorldWithoutFaults breaks, and those that only a bug of the world's own can.
var brokenElsewhere = []string{"clients converge", "an acknowledged push is applied, and nothing else",
	"the ledger can be read", "addresses can be read", "pushes can be written", "frames are JSON"}

var ruleInSource = regexp.MustCompile(`(?:violation|fault|broken)\((?:\w+, )?"([a-z][^"%]+)"`)

func rulesInSource(t *testing.T) []string {
	t.Helper()
	found := map[string]bool{}
	paths, err := filepath.Glob("*.go")
	must(t, err)
	for _, path := range paths {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		text, err := os.ReadFile(path)
		must(t, err)
		for _, m := range ruleInSource.FindAllStringSubmatch(string(text), -1) {
			found[m[1]] = true
		}
	}
	if len(found) < 20 {
		t.Fatalf("only these rules were found: %v", found)
	}
	return slices.Sorted(maps.Keys(found))
}

// TestResyncAsksForTheOthers: one collection is to be read in full, at a position that the client already has. What its new
// claims mean for the others, only a pull of them says.
func TestResyncAsksForTheOthers(t *testing.T) {
	t.Parallel()
	nothing := fullOf(fmt.Sprintf(`{"end":true,"count":0,"last_seq":%q}`, at(7)))
	c := scriptedClient(t, nothing, body(`{"full_resync_required":true,"collections":["notes"],"reason":"scopes_changed"}`))
	c.names, c.lost, c.cursor = []string{"notes", "others"}, []string{"others"}, at(7)
	if err := c.resync(t.Context()); err != nil {
		t.Fatal(err)
	}
	if want := []string{"others", "notes"}; !slices.Equal(c.lost, want) {
		t.Errorf("to be read in full: %v, want %v", c.lost, want)
	}
}

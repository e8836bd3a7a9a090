package changelog

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

func TestNoLogBeforeTheFirstLeader(t *testing.T) {
	t.Parallel()
	l, _ := newLog(t)
	if _, err := l.Head(t.Context()); !errors.Is(err, ErrNotInitialised) {
		t.Errorf("head of an empty log: %v, want ErrNotInitialised", err)
	}
	if _, err := l.Read(t.Context(), Request{Scopes: [][16]byte{scope(1)}, Limit: 1, MaxBytes: 1}); !errors.Is(err, ErrNotInitialised) {
		t.Errorf("read of an empty log: %v, want ErrNotInitialised", err)
	}
}

func TestFirstStart(t *testing.T) {
	t.Parallel()
	l, _ := newLog(t)
	filled := testCollection("filled")
	filled.Empty = false
	c := testClaim()
	c.SlotCreated, c.Collections = true, append(c.Collections, filled)
	_, got := lead(t, l, c)
	if got.NewHistory != FirstStart || got.Epoch != 1 || got.LSN != c.SlotLSN || len(got.History) != 4 || got.Version < VersionAt(c.SourceTime) {
		t.Errorf("claimed %+v", got)
	}
	h := mustHead(t, l)
	if h.Floor != 0 || h.Version != got.Version || h.History != got.History {
		t.Errorf("head %+v, want floor 0 and version %d", h, got.Version)
	}
	if st := h.Collections[0]; st.Name != "tasks" || st.Floor != 0 {
		t.Errorf("a table that was empty has floor %d (%s), want 0: the log reaches back to its beginning", st.Floor, st.FloorReason)
	}
	if st := h.Collections[1]; st.Name != "filled" || st.Floor != got.Version {
		t.Errorf("a table that had rows has floor %d, want %d", st.Floor, got.Version)
	}
}

// claimCase is what a second leader finds changed.
type claimCase struct {
	change  func(*Claim)
	sql     string // what happened to the stored log meanwhile
	history string // part of the reason of the new history; empty: it goes on
	raised  string // part of the reason why the collection's floor rose; empty: it stays
}

func TestSecondClaim(t *testing.T) {
	t.Parallel()
	cases := map[string]claimCase{
		"nothing changed":                        {},
		"slot behind the log":                    {change: func(c *Claim) { c.SlotLSN = 1 }},
		"slot created":                           {change: func(c *Claim) { c.SlotCreated = true }, history: "slot was lost"},
		"slot ahead":                             {change: func(c *Claim) { c.SlotLSN = 101 }, history: "slot confirms 0/65 but the change log ends at 0/64"},
		"slot made anew by a process that ended": {change: func(c *Claim) { c.Remembered = HistoryForgotten }, history: "slot was lost"},
		"source behind the log":                  {change: func(c *Claim) { c.SourceEnd = 99 }, history: "WAL ends at 0/63 but the change log holds it up to 0/64"},
		"source at the log":                      {change: func(c *Claim) { c.SourceEnd = 100 }},
		"source of another history":              {change: func(c *Claim) { c.Remembered = "zzzz" }, history: "remembers history zzzz"},
		"source noted once more":                 {change: func(c *Claim) { c.Noted = 1 }},
		"source older than the log":              {sql: `UPDATE walgate.checkpoint SET noted = 1`, history: "source was restored"},
		"log older than the source":              {change: func(c *Claim) { c.Noted = 2 }, history: "change log was restored"},
		"other system":                           {change: func(c *Claim) { c.Source.System = "8" }, history: "source is another server"},
		"other timeline":                         {change: func(c *Claim) { c.Source.Timeline++ }, history: "source is another server or timeline"},
		"other storage":                          {sql: `UPDATE walgate.checkpoint SET storage_system = '1'`, history: "change log is on another server"},
		"storage promoted":                       {sql: `UPDATE walgate.checkpoint SET storage_timeline = 9`, history: "change log is on another server or timeline"},
		"log lost": {change: func(c *Claim) { c.Remembered = "0000" },
			sql: `TRUNCATE walgate.checkpoint, walgate.collections, walgate.changes, walgate.transactions`, history: "log was lost"},
		"revision higher":     {change: func(c *Claim) { c.ConfigRevision = 7 }},
		"fingerprint changed": {change: func(c *Claim) { c.Collections[0].Fingerprint = "f2" }, raised: "policy changed"},
		"shape changed":       {change: func(c *Claim) { c.Collections[0].Shape = "shape 2" }, raised: "shape changed"},
		"shape kept": {change: func(c *Claim) {
			c.Collections[0].Shape, c.Collections[0].Keep = "shape 2", func(stored string) bool { return stored == "shape 1" }
		}},
		"was stopped":  {sql: `UPDATE walgate.collections SET stopped = 'why'`, raised: "was stopped: why"},
		"came back":    {sql: `UPDATE walgate.collections SET fingerprint = ''`, raised: "policy changed"},
		"filled since": {change: func(c *Claim) { c.Collections[0].Empty = false }},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testSecondClaim(t, tc)
		})
	}
}

func testSecondClaim(t *testing.T, tc claimCase) {
	l, dsn := newLog(t)
	a, first := restart(t, l, nil)
	v := first.Version + 5
	appendNow(t, a, transaction(100, upsert(v, v, 1, "a")))
	a.Close()
	if tc.sql != "" {
		mustExec(t, session(t, dsn), tc.sql)
	}
	_, got := restart(t, l, tc.change)
	if (tc.history == "") != (got.NewHistory == "") || !strings.Contains(got.NewHistory, tc.history) {
		t.Fatalf("new history %q, want %q", got.NewHistory, tc.history)
	}
	h := mustHead(t, l)
	if h.History != got.History || h.Version != got.Version || h.LSN != got.LSN {
		t.Errorf("stored %+v, claimed %+v", h, got)
	}
	st := h.Collections[0]
	switch {
	case tc.history != "":
		if got.History == first.History || got.Version <= v || h.Floor != got.Version || got.LSN == 100 {
			t.Errorf("a new history %+v (floor %d) after %+v at %d: it must have another id, lie above and start at the slot", got, h.Floor, first, v)
		}
		if st.Floor != got.Version {
			t.Errorf("floor %d of the collection, want the history's first version %d", st.Floor, got.Version)
		}
		if tc.history == "log was lost" && got.Version < VersionAt(time.Now().Add(59*time.Minute)) {
			t.Errorf("after the log was lost versions start at %s: a clock that ran ahead may have issued those", got.Version.Time())
		}
	case tc.raised != "":
		if len(got.Raised) != 1 || !strings.Contains(got.Raised[0], tc.raised) || st.Floor <= v || st.Floor > h.Version || got.History != first.History || st.Stopped != "" {
			t.Errorf("raised %v to %d (head %d), want %q above %d, which clients may stand on", got.Raised, st.Floor, h.Version, tc.raised, v)
		}
	default:
		if len(got.Raised) != 0 || got.Version != v || got.LSN != 100 || st.Floor != 0 || got.History != first.History {
			t.Errorf("claimed %+v, floor %d; want everything as it was", got, st.Floor)
		}
	}
	if tc.history != "log was lost" && got.Epoch != first.Epoch+1 {
		t.Errorf("epoch %d after %d", got.Epoch, first.Epoch)
	}
}

func TestOlderConfigurationIsRefused(t *testing.T) {
	t.Parallel()
	l, _ := newLog(t)
	_, first := restart(t, l, func(c *Claim) { c.ConfigRevision = 3 })
	old := testClaim()
	old.ConfigRevision, old.Collections[0].Fingerprint = 2, "old"
	if _, _, err := l.NewAppender(t.Context(), NewMemoryBus(), old); !errors.Is(err, ErrConfigRevision) || !strings.Contains(err.Error(), "2 here, 3 there") {
		t.Fatalf("claim with an older configuration: %v", err)
	}
	if st := mustHead(t, l).Collections[0]; st.Fingerprint != "f1" || st.Floor != 0 {
		t.Errorf("the refused claim changed the collection to %+v", st)
	}
	if _, again := restart(t, l, func(c *Claim) { c.ConfigRevision = 3 }); again.Epoch != first.Epoch+1 {
		t.Errorf("epoch %d after %d: the refused claim raised it", again.Epoch, first.Epoch)
	}
}

// TestCollectionsComeAndGo: one that was not configured for a while was not logged, so it starts anew; what others have
// stays; one that joins with rows has its floor above every version that clients may stand on.
func TestCollectionsComeAndGo(t *testing.T) {
	t.Parallel()
	l, _ := newLog(t)
	_, first := restart(t, l, nil)
	_, second := restart(t, l, func(c *Claim) {
		joined := testCollection("notes")
		joined.Empty = false
		c.Collections = []ClaimedCollection{joined, testCollection("fresh")}
	})
	h := mustHead(t, l)
	floors := map[string]Version{}
	for _, c := range h.Collections {
		floors[c.Name] = c.Floor
	}
	if floors["notes"] <= first.Version || floors["notes"] > h.Version || floors["fresh"] != 0 || floors["tasks"] != 0 {
		t.Errorf("floors %v at version %d, first start at %d", floors, h.Version, first.Version)
	}
	if st := h.Collection(first.Collections[0].ID); st.Fingerprint != "" || st.FloorReason != "not configured" {
		t.Errorf("the collection that left: %+v", st)
	}
	_, third := restart(t, l, nil)
	if st := third.Collections[0]; st.ID != first.Collections[0].ID || st.Floor <= second.Version || len(third.Raised) != 1 {
		t.Errorf("back again: %+v (raised %v), want the same id and a floor above %d", st, third.Raised, second.Version)
	}
}

func TestHistoriesAndVersionsNeverRepeat(t *testing.T) {
	t.Parallel()
	for i := range 70000 { // every id as the last one
		last := fmt.Sprintf("%04x", i%65536)
		if h := newHistory(last); h == last || len(h) != 4 || !isHex(h) {
			t.Fatalf("history %q after %q", h, last)
		}
	}
	l, _ := newLog(t)
	last := Version(0)
	history := ""
	for range 5 {
		_, c := restart(t, l, func(c *Claim) { c.SlotCreated, c.SourceTime = true, time.Unix(0, 0) })
		if c.Version <= last || c.History == history {
			t.Fatalf("history %s from version %d after %s at %d", c.History, c.Version, history, last)
		}
		last, history = c.Version, c.History
	}
	// A source whose clock is ahead of everything stays ahead.
	ahead := time.Now().Add(48 * time.Hour)
	if _, c := restart(t, l, func(c *Claim) { c.SlotCreated, c.SourceTime = true, ahead }); c.Version <= VersionAt(ahead) {
		t.Errorf("version %s begins before the source's clock %s", c.Version.Time(), ahead)
	}
}

// TestClaimReadsTheSourceLast: a leader that doesn't know yet that it is deposed notes once more, in the source and in the log,
// while the next one claims. What that one read of the source before then isn't older than the log, which would pass for a
// restored source.
func TestClaimReadsTheSourceLast(t *testing.T) {
	t.Parallel()
	l, _ := newLog(t)
	_, first := lead(t, l, testClaim())
	noted := make(chan error, 1)
	_, second := restart(t, l, func(c *Claim) {
		c.Again = func(ctx context.Context) (string, int64, error) {
			go func() { noted <- l.Note(ctx, first.Epoch, 1) }()
			awaitThat(t, "the note is done or waits for the claim", func() bool {
				var waits bool
				if err := l.pool.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_locks WHERE relation = 'walgate.checkpoint'::regclass AND NOT granted)`).Scan(&waits); err != nil {
					t.Error(err)
				}
				return waits || len(noted) > 0
			})
			return first.History, 0, nil
		}
	})
	if err := <-noted; err == nil {
		t.Error("a deposed leader has noted a number in the log")
	}
	if second.NewHistory != "" || second.Remembered != first.History {
		t.Errorf("claimed %+v", second)
	}
}

// TestEmptyOnlyWhileNobodyLeads: a table looked empty, and another leader has been at work since.
func TestEmptyOnlyWhileNobodyLeads(t *testing.T) {
	t.Parallel()
	for name, between := range map[string]func(*Log){
		"nobody": nil,
		"another leader": func(l *Log) {
			a, _ := restart(t, l, nil)
			a.Close()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l, _ := newLog(t)
			a, _ := lead(t, l, testClaim())
			known, err := a.Known(t.Context(), 0)
			if err != nil || !known.Collections["tasks"] || known.Epoch != 1 {
				t.Fatalf("known %+v: %v", known, err)
			}
			if between != nil {
				between(l)
			}
			_, got := restart(t, l, func(c *Claim) { c.Known, c.Collections = known, append(c.Collections, testCollection("fresh")) })
			if st := got.Collections[1]; (st.Floor == 0) != (between == nil) {
				t.Errorf("the floor of the table that looked empty: %d (%s)", st.Floor, st.FloorReason)
			}
		})
	}
}

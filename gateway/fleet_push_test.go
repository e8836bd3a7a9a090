package gateway

import (
	"fmt"
	"maps"
	"sync"
	"testing"
	"time"
)

// TestFleetPushEcho: a push to an instance that doesn't lead is answered with its versions, whether the bus brings them, brings
// them late or loses them; and whoever is asked next shows it once, at the version of the answer.
func TestFleetPushEcho(t *testing.T) {
	t.Parallel()
	for name, x := range map[string]struct {
		delay time.Duration
		lost  bool
		every time.Duration
	}{
		"by the bus":    {every: time.Hour},
		"by a late bus": {delay: 30 * time.Millisecond, every: time.Hour},
		"lost":          {lost: true, every: 50 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := newPushEnv(t, setup{before: counted})
			b, c := &farBus{delay: x.delay, lost: x.lost}, &farBus{delay: x.delay, lost: x.lost}
			f := fleet{e, e.another(t, b.with(x.every)), e.another(t, c.with(x.every))}
			ana := tokenFor(t, "ana", nil)
			at := e.here(t, ana)
			for i := range 12 {
				change := fmt.Sprintf(`{"collection":"boards","operation":"upsert","doc_id":"%d","change_id":"c%d","data":{"n":%d}}`, i%4, i, i)
				p := f.at(1+i%2).submit(t, ana, "", change).want(t, fmt.Sprintf("accepted %d", i%4))
				if p.Results[0].NewVersion == nil || p.VisibleAt == nil {
					t.Fatalf("push %d has no version: %+v", i, p)
				}
				changes, last := f.at(i).pullAll(t, ana, at)
				if briefs(changes) != fmt.Sprintf("upsert boards/%d", i%4) || changes[0].Version != *p.Results[0].NewVersion || last < *p.VisibleAt {
					t.Fatalf("push %d, at %s, is pulled as %v up to %s", i, *p.Results[0].NewVersion, changes, last)
				}
				at = last
				again := f.at(2+i).submit(t, ana, "", change).want(t, fmt.Sprintf("duplicate %d", i%4))
				if again.Results[0].NewVersion == nil || *again.Results[0].NewVersion != *p.Results[0].NewVersion || *again.VisibleAt != *p.VisibleAt {
					t.Fatalf("push %d was answered %+v and then %+v", i, p, again)
				}
			}
			if got := e.one(t, `SELECT sum(n)::text FROM counts`); got != "12" {
				t.Errorf("12 pushes wrote %s times", got)
			}
		})
	}
}

// TestFleetPushUnheard: an instance that doesn't hear of its push in time answers without a version. The change is there all the
// same, and its repetition at another instance is answered as it was first.
func TestFleetPushUnheard(t *testing.T) {
	t.Parallel()
	e := newPushEnv(t, setup{before: counted})
	s := deaf
	s.options = func(o *Options) { o.EchoTimeout = 100 * time.Millisecond }
	f := fleet{e, e.another(t, s), e.another(t, setup{})}
	ana := tokenFor(t, "ana", nil)
	at := e.here(t, ana)
	change := `{"collection":"boards","operation":"insert","doc_id":"1","change_id":"c","data":{"n":1}}`
	p := f[1].submit(t, ana, "", change).want(t, "accepted 1")
	if p.TxID == nil || p.VisibleAt != nil || p.Results[0].NewVersion != nil {
		t.Fatalf("a deaf instance says %+v", p)
	}
	again := f[2].submit(t, ana, "", change).want(t, "duplicate 1")
	changes, _ := f[1].pullAll(t, ana, at)
	if briefs(changes) != "upsert boards/1" || again.Results[0].NewVersion == nil || changes[0].Version != *again.Results[0].NewVersion {
		t.Errorf("the repetition says %+v, the pull %v", again, changes)
	}
	if got := e.one(t, `SELECT sum(n)::text FROM counts`); got != "1" {
		t.Errorf("written %s times", got)
	}
}

// TestFleetPushRepeated sends one push to all instances at once: it is done once, and all answers name the same version.
func TestFleetPushRepeated(t *testing.T) {
	t.Parallel()
	e := newPushEnv(t, setup{before: counted})
	heard := &farBus{}
	f := fleet{e, e.another(t, heard.alone()), e.another(t, (&farBus{lost: true}).with(50*time.Millisecond))}
	ana := tokenFor(t, "ana", nil)
	var mu sync.Mutex
	versions, statuses := map[string]bool{}, map[string]int{}
	var wg sync.WaitGroup
	for i := range 15 {
		wg.Go(func() {
			p := f.at(i).submit(t, ana, "", `{"collection":"boards","operation":"upsert","doc_id":"1","change_id":"c","data":{"n":1}}`)
			mu.Lock()
			defer mu.Unlock()
			statuses[p.Results[0].Status]++
			if v := p.Results[0].NewVersion; v != nil {
				versions[*v] = true
			} else {
				versions["none"] = true
			}
		})
	}
	wg.Wait()
	if statuses["accepted"] != 1 || statuses["duplicate"] != 14 || len(versions) != 1 || versions["none"] {
		t.Errorf("ended as %v, at %v", statuses, versions)
	}
	if got := e.one(t, `SELECT string_agg(id || ':' || n, ' ') FROM counts`); got != "1:1" {
		t.Errorf("written %s times", got)
	}
}

// TestFleetSession takes each step of a device's sessions to another instance: opened at one, pushed at the next, pulled a row at
// a time at each in turn, completed at another. In the end the device holds what the rows are, and knows its own.
func TestFleetSession(t *testing.T) {
	t.Parallel()
	e := newPushEnv(t, setup{})
	heard := &farBus{delay: 5 * time.Millisecond}
	f := fleet{e, e.another(t, heard.alone()), e.another(t, (&farBus{lost: true}).with(20*time.Millisecond))}
	ana := tokenFor(t, "ana", nil)
	n := 0
	next := func() *env { n++; return f.at(n) }
	e.synced(t, ana, "phone")
	held := map[string]string{}
	var before *wireSession
	for i := range 6 {
		if i%2 == 0 {
			n++ // else three steps are always at the same three
		}
		e.exec(t, fmt.Sprintf(`INSERT INTO lists (id, owner, name) VALUES (%d, 'ana', 'before %d')`, 1000+i, i))
		e.sync(t)
		s := next().openSession(t, ana, "phone")
		if before != nil {
			next().get(t, "/sync/pull?session="+before.ID, ana).problem(t, UnknownSession)
		}
		p := next().submit(t, ana, "", fmt.Sprintf(`{"collection":"lists","operation":"insert","local_id":"l%d","change_id":"c%d","data":{"name":"own %d"}}`, i, i, i))
		e.exec(t, fmt.Sprintf(`INSERT INTO lists (id, owner, name) VALUES (%d, 'ana', 'meanwhile %d')`, 2000+i, i))
		own := false
		for since, more := "", true; more; {
			page := next().pullSession(t, ana, s, since, "limit", "1")
			if page.Resync || page.HasMore && page.LastSeq == since {
				t.Fatalf("session %d: %+v", i, page)
			}
			for _, c := range page.Changes {
				held[c.DocID] = string(c.Data)
				own = own || c.LocalID == fmt.Sprint("l", i) && c.DocID == *p.Results[0].DocID && c.Version == *p.Results[0].NewVersion
			}
			since, more = page.LastSeq, page.HasMore
			if !more {
				next().complete(t, ana, s, since)
			}
		}
		if !own {
			t.Fatalf("session %d doesn't bring the device its own row %+v", i, p.Results[0])
		}
		before = s
	}
	s := next().openSession(t, ana, "phone")
	changes, last := next().pullWindow(t, ana, s, "")
	for _, c := range changes {
		held[c.DocID] = string(c.Data)
	}
	next().complete(t, ana, s, last)
	want := map[string]string{}
	for cursor, more := "", true; more; more = cursor != "" { // a resync's pages too
		params := []string{"collections", "lists", "limit", "5"}
		if cursor != "" {
			params = append(params, "cursor", cursor)
		}
		page := next().full(t, ana, params...)
		for _, l := range page.lines(t) {
			want[l.DocID] = string(l.Data)
		}
		cursor = page.header.Get("X-Sync-Cursor")
	}
	if !maps.Equal(held, want) || len(want) != 18 {
		t.Errorf("the device holds\n%v, and there is\n%v", held, want)
	}
}

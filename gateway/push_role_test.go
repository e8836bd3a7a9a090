package gateway

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/policies"
)

// TestPushAsUser writes as a role for which row-level security holds: the application's policies and triggers see the end
// user, with their own search path, and nothing of it stays with the connection.
func TestPushAsUser(t *testing.T) {
	t.Parallel()
	var role string
	e := newPushEnv(t, setup{
		before: `CREATE TABLE secure (id int PRIMARY KEY, who text, body text); CREATE TABLE audit (who text, role text, path text);
			CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
				INSERT INTO audit VALUES (current_setting('request.jwt.claims', true)::json ->> 'sub', current_user, current_setting('search_path')); RETURN NEW; END $$;
			CREATE TRIGGER note BEFORE INSERT OR UPDATE ON secure FOR EACH ROW EXECUTE FUNCTION note();
			ALTER TABLE secure ENABLE ROW LEVEL SECURITY;
			CREATE POLICY own ON secure USING (who = current_setting('request.jwt.claims', true)::json ->> 'sub');
			INSERT INTO secure VALUES (1, 'bob', 'bobs'); DELETE FROM audit;
			DO $$ BEGIN EXECUTE format('CREATE ROLE %I NOLOGIN; GRANT SELECT, INSERT, UPDATE, DELETE ON secure, audit TO %1$I', 'writer_' || current_database()); END $$;`,
		specs: map[string]policies.Spec{"secure": {Table: "public.secure", Write: &policies.WriteSpec{}}},
		options: func(o *Options) {
			ok(t, o.Source.QueryRow(context.Background(), `SELECT 'writer_' || current_database()`).Scan(&role))
			o.PushRole = role
		},
	})
	t.Cleanup(func() {
		name := pgx.Identifier{role}.Sanitize()
		if _, err := e.db.Exec(context.Background(), `DROP OWNED BY `+name+`; DROP ROLE `+name); err != nil {
			t.Error(err)
		}
	})
	for i := range 30 { // over all connections of the pool
		sub := fmt.Sprintf("u%d", i)
		e.submit(t, tokenFor(t, sub, nil), "", fmt.Sprintf(`{"collection":"secure","operation":"upsert","doc_id":"%d","data":{"who":%q}}`, 100+i, sub)).want(t, fmt.Sprintf("accepted %d", 100+i))
		if got := e.one(t, `SELECT string_agg(concat_ws(' ', who, role, path), ',') FROM audit`); got != sub+" "+role+` "$user", public` {
			t.Fatalf("the trigger saw %s", got)
		}
		e.exec(t, `DELETE FROM audit`)
	}
	ana := tokenFor(t, "ana", nil)
	for _, mode := range []string{"", `,"atomic":false`} {
		e.submit(t, ana, mode, `{"collection":"secure","operation":"update","doc_id":"1","data":{"body":"anas"}}`).want(t, "rejected 1 permission")
		e.submit(t, ana, mode, `{"collection":"secure","operation":"delete","doc_id":"1"}`).want(t, "rejected 1 permission")
		e.submit(t, ana, mode, `{"collection":"secure","operation":"insert","doc_id":"2","data":{"who":"bob"}}`).want(t, "rejected 2 permission")
	}
	for _, c := range e.g.o.Source.AcquireAllIdle(t.Context()) {
		var who, user, path, security, claims string
		err := c.QueryRow(t.Context(), `SELECT current_user::text, session_user::text, current_setting('search_path'), current_setting('row_security'), coalesce(current_setting('request.jwt.claims', true), '')`).
			Scan(&who, &user, &path, &security, &claims)
		c.Release()
		if err != nil || who != user || path != "pg_catalog" || security != "off" || claims != "" {
			t.Errorf("a connection of the pool is left with role %s, search path %s, row_security %s, claims %q (%v)", who, path, security, claims, err)
		}
	}
}

// TestPushWithoutEcho stalls the log: what was pushed is durable and answered, without versions; so is what a client asks
// for again.
func TestPushWithoutEcho(t *testing.T) {
	t.Parallel()
	e := newPushEnv(t, setup{options: func(o *Options) { o.EchoTimeout = 50 * time.Millisecond }})
	ana := tokenFor(t, "ana", nil)
	tx, err := e.db.Begin(t.Context())
	ok(t, err)
	_, err = tx.Exec(t.Context(), `SELECT FROM walgate.checkpoint FOR UPDATE`)
	ok(t, err)
	change := `{"collection":"boards","operation":"update","doc_id":"1","change_id":"c","data":{"n":5}}`
	e.exec(t, `INSERT INTO boards VALUES (1, 'x', '', '', 0)`)
	p := e.submit(t, ana, "", change).want(t, "accepted 1")
	if p.TxID == nil || p.VisibleAt != nil || p.Results[0].NewVersion != nil {
		t.Errorf("%+v", p)
	}
	p = e.submit(t, ana, "", change).want(t, "duplicate 1")
	if p.VisibleAt != nil || p.Results[0].NewVersion != nil {
		t.Errorf("%+v", p)
	}
	if got := e.one(t, `SELECT n::text FROM boards`); got != "5" {
		t.Errorf("n is %s", got)
	}
	ok(t, tx.Rollback(t.Context()))
	e.sync(t)
	eventually(t, "the repeated push has its version", func() bool {
		p := e.submit(t, ana, "", change)
		return p.VisibleAt != nil && p.Results[0].NewVersion != nil
	})
}

// TestPushTwoInstances repeats pushes at another instance than they went to first, and reads what one wrote from the other.
func TestPushTwoInstances(t *testing.T) {
	t.Parallel()
	e := newPushEnv(t, setup{})
	other := e.another(t, setup{})
	ana := tokenFor(t, "ana", nil)
	change := `{"collection":"boards","operation":"upsert","doc_id":"1","change_id":"c","data":{"n":5}}`
	at := e.here(t, ana)
	first := other.submit(t, ana, "", change).want(t, "accepted 1")
	again := e.submit(t, ana, "", change).want(t, "duplicate 1")
	if *first.Results[0].NewVersion != *again.Results[0].NewVersion || *first.VisibleAt != *again.VisibleAt {
		t.Errorf("%+v, then %+v", first, again)
	}
	changes, last := e.pullAll(t, ana, at)
	if briefs(changes) != "upsert boards/1" || changes[0].Version != *first.Results[0].NewVersion || last < *first.VisibleAt {
		t.Errorf("%v up to %s, pushed at %s", briefs(changes), last, *first.VisibleAt)
	}
}

// TestPushCrash ends the gateway's connections in the middle of pushes and at their commits: whatever the client was told, a
// repeat ends with each change done once.
func TestPushCrash(t *testing.T) {
	t.Parallel()
	e := newPushEnv(t, setup{before: counted})
	stop := make(chan struct{})
	var killer sync.WaitGroup
	killer.Go(func() {
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				e.db.Exec(context.Background(), `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'walgate' AND datname = current_database() AND xact_start IS NOT NULL AND query ~ 'pushes|outcomes|COMMIT|boards' ORDER BY random() LIMIT 1`)
			}
		}
	})
	var wg sync.WaitGroup
	for c := range 4 {
		token := tokenFor(t, fmt.Sprintf("c%d", c), nil)
		wg.Go(func() {
			for i := range 25 {
				body := fmt.Sprintf(`{"client_id":"phone","changes":[{"collection":"boards","operation":"insert","doc_id":"%d","change_id":"%d","data":{"n":1}}]}`, c*100+i, i)
				for {
					a := e.post(t, "/sync/push", token, body)
					if a.status == 200 {
						if !strings.Contains(string(a.body), `"accepted"`) && !strings.Contains(string(a.body), `"duplicate"`) {
							t.Errorf("%s", a.body)
						}
						break
					}
					if a.status != 503 && a.status != 429 {
						t.Errorf("answered %d %s", a.status, a.body)
						return
					}
				}
			}
		})
	}
	wg.Wait()
	close(stop)
	killer.Wait()
	if got := e.one(t, `SELECT count(*) || ' ' || max(n) FROM counts`); got != "100 1" {
		t.Errorf("rows and the most writes of one: %s", got)
	}
}

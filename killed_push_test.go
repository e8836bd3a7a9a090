package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"syscall"
	"testing"
	"time"

	"github.com/walgate/walgate/internal/failpoint"
	"github.com/walgate/walgate/internal/pgserver"
)

// killedPushSQL is an application that counts what is done to each row.
const killedPushSQL = `CREATE TABLE docs (id bigint PRIMARY KEY, owner_id text NOT NULL, body text, n int NOT NULL DEFAULT 0);
	CREATE FUNCTION counted() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN NEW.n := OLD.n + 1; RETURN NEW; END$$;
	CREATE TRIGGER counted BEFORE UPDATE ON docs FOR EACH ROW EXECUTE FUNCTION counted();
	INSERT INTO docs VALUES (0, 'u0')`

const killedPushConfig = `
auto_init: true
database: {url: %q}
http: {listen: "127.0.0.1:%%[1]d"}
auth: {jwt: {secret: %%[2]q}}
log: {format: text}
collections:
  docs: {table: public.docs, scope: {owner_id: claims.sub}, write: {set: {owner_id: claims.sub}, columns: [body]}}
`

// TestPushKilledAtEveryStep kills the gateway at every step of a push. The client repeats it until it is answered: whether
// the first attempt was committed or not, each change is done once, and the answer has its version.
func TestPushKilledAtEveryStep(t *testing.T) {
	t.Parallel()
	dsn := pgserver.ForTest(t).Database(t)
	conn := connect(t, dsn)
	resyncExec(t, conn, killedPushSQL)
	p, cfg := newGatewayProcess(t, fmt.Sprintf(killedPushConfig, dsn))
	token, err := signToken(cfg, "u0", nil, nil, time.Hour)
	must(t, err)
	must(t, p.start(t.Context()))
	for i, at := range []failpoint.Point{failpoint.PushOpened, failpoint.PushWritten, failpoint.PushSent, failpoint.PushCommitted} {
		must(t, p.end(syscall.SIGTERM))
		must(t, p.launchToDie(at, 1))
		must(t, p.awaitReady(t.Context()))
		body := fmt.Appendf(nil, `{"client_id":"phone","changes":[
			{"change_id":"insert %[1]d","collection":"docs","operation":"insert","doc_id":"%[1]d","data":{"body":"new"}},
			{"change_id":"update %[1]d","collection":"docs","operation":"update","doc_id":"0","data":{"body":"%[1]d"}}]}`, i+1)
		if answer, err := killedPush(t.Context(), p.base, token, body); err == nil {
			t.Fatalf("%s: the push was answered by a gateway that was to die: %s", at, answer)
		}
		resyncEventually(t, "the gateway is dead", func() bool {
			dead, err := p.killedItself()
			must(t, err)
			return dead
		})
		must(t, p.start(t.Context()))
		var answer []byte
		resyncEventually(t, "the push is answered", func() bool {
			answer, err = killedPush(t.Context(), p.base, token, body)
			return err == nil
		})
		var got struct {
			Results []struct {
				Status     string  `json:"status"`
				NewVersion *string `json:"new_version"`
			} `json:"results"`
			VisibleAt *string `json:"visible_at"`
		}
		must(t, json.Unmarshal(answer, &got))
		want := "accepted"
		if at == failpoint.PushCommitted {
			want = "duplicate"
		}
		for _, r := range got.Results {
			if r.Status != want && at != failpoint.PushSent || r.NewVersion == nil || got.VisibleAt == nil {
				t.Errorf("%s: answered %s, want %s with versions", at, answer, want)
			}
		}
		var rows, updates int
		resyncScan(t, conn, []any{&rows, &updates}, `SELECT count(*), max(n) FROM docs`)
		if rows != i+2 || updates != i+1 {
			t.Errorf("%s: %d rows and %d updates, want %d and %d", at, rows, updates, i+2, i+1)
		}
	}
}

// killedPush returns the answer to a push; without one there is an error.
func killedPush(ctx context.Context, base, token string, body []byte) ([]byte, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, base+"/sync/push", bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	r.Header.Set("Authorization", "Bearer "+token)
	r.Header.Set("Content-Type", "application/json")
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	a, err := client.Do(r)
	if err != nil {
		return nil, err
	}
	defer a.Body.Close()
	text, err := io.ReadAll(a.Body)
	if err == nil && a.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", a.Status, text)
	}
	return text, err
}

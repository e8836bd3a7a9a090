package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/walgate/walgate/internal/badlink"
	"github.com/walgate/walgate/internal/pgserver"
	"github.com/walgate/walgate/internal/redisserver"
)

// shows runs walgate status in both forms and fails unless exactly these lines are wrong; says are parts of the text.
func (w *followedSource) shows(wrong []string, says ...string) *status {
	w.t.Helper()
	text, err := walgate(w.t, "status", "--config", w.gateway.config)
	if (err != nil) != (len(wrong) > 0) {
		w.t.Errorf("status ended with %v", err)
	}
	var usage *usageError
	if errors.As(err, &usage) {
		w.t.Errorf("that something is wrong counts as wrong usage: %v", err)
	}
	for _, part := range says {
		if !strings.Contains(text, part) {
			w.t.Errorf("status doesn't say %q:\n%s", part, text)
		}
	}
	out, _ := walgate(w.t, "status", "--json", "--config", w.gateway.config)
	s := &status{}
	if err := json.Unmarshal([]byte(out), s); err != nil {
		w.t.Fatalf("%v:\n%s", err, out)
	}
	if !slices.Equal(s.Wrong, wrong) || s.Well != (len(wrong) == 0) {
		w.t.Errorf("wrong: %q, want %q:\n%s", s.Wrong, wrong, text)
	}
	for _, l := range s.Lines {
		if bad := l.Level != statusOK; bad != (l.Means != "") || bad != (l.Next != "") {
			w.t.Errorf("line %+v: each that isn't ok says what it means and what to do", l)
		}
	}
	return s
}

// TestStatus goes through what an operator may find, and back.
func TestStatus(t *testing.T) {
	t.Parallel()
	storage := pgserver.ForTest(t).Database(t)
	link := badlink.To(t, storage)
	server := pgserver.StartForTest(t, pgserver.Options{Settings: map[string]string{"max_slot_wal_keep_size": "1MB", "min_wal_size": "32MB", "max_wal_size": "32MB"}})
	w := followSource(t, server, link.DSN(t, storage))
	s := w.shows([]string{}, "ok       leader", "a primary, wal_level = logical", "application walgate", "max_slot_wal_keep_size is 1MB", "collection docs", "ok       config_revision")
	if !s.Slot.Active || !s.Slot.Ours || s.Slot.WALStatus != "reserved" || s.Log.History != historyOf(w.absent) || s.Log.Epoch != 1 || len(s.Collections) != 1 || s.Collections[0].State != "well" {
		t.Errorf("status: %+v %+v %+v", s.Slot, s.Log, s.Collections)
	}

	link.Down()
	w.shows([]string{"change log"}, "can't be read", "storage.url")
	link.Up()

	w.stopGateway()
	w.gateway.rewrite("limits: {", "limits: {max_slot_lag: 2MB, ")
	w.shows([]string{"leader"}, "WRONG    leader", "nobody reads slot walgate")
	w.exec(`ALTER TABLE docs REPLICA IDENTITY DEFAULT`)
	w.shows([]string{"leader", "collection docs"}, "impaired", "run walgate init")
	w.exec(`ALTER PUBLICATION walgate DROP TABLE docs`)
	w.shows([]string{"leader", "collection docs"}, "stopped: ", "is not in publication walgate")
	w.prepareAnew()
	other := connect(t, server.DSN("postgres"))
	resyncExec(t, other, `BEGIN; INSERT INTO docs VALUES (50, 'u0', '')`)
	w.exec(`SELECT pg_logical_emit_message(false, 'noise', repeat('x', 3000000))`)
	s = w.shows([]string{"leader", "slot lag"}, "limits.max_slot_lag is 2.1 MB", "see the oldest transaction", "idle in transaction")
	if s.Slot.LagBytes < 2_500_000 || s.Slot.LagLimit < 2_000_000 {
		t.Errorf("slot: %+v", s.Slot)
	}
	resyncExec(t, other, `ROLLBACK`)
	w.outrunSlot()
	w.shows([]string{"leader", "slot"}, "was invalidated: it held back more WAL than max_slot_wal_keep_size allows", "every client resynchronises")
	w.exec(`SELECT pg_drop_replication_slot('walgate')`)
	w.shows([]string{"leader", "slot"}, "walgate doesn't exist")

	w.startGateway()
	w.exec(`INSERT INTO docs VALUES (51, 'u0', 'with another slot')`)
	w.settle(w.absent)
	w.shows([]string{})

	metrics := w.metrics()
	for _, line := range []string{"walgate_leading 1", "walgate_slot_lost 0", "walgate_slot_lag_bytes ", "walgate_slot_safe_bytes "} {
		if !strings.Contains(metrics, "\n"+line) || strings.Contains(metrics, "walgate_slot_safe_bytes 0\n") {
			t.Errorf("no metric %s:\n%s", line, metrics)
		}
	}

	w.gateway.rewrite("auto_init: true", "auto_init: true\nredis: {url: "+redisserver.StartForTest(t, redisserver.Options{}).URL()+"}")
	w.shows([]string{}, "ok       redis")
	w.gateway.rewrite("redis://", "redis://nobody:")
	w.shows([]string{"redis"}, "nothing is lost: instances look at the change log four times a second")
	w.gateway.rewrite("redis: {url", "# redis: {url")

	w.gateway.rewrite("auto_init: true", "auto_init: true\nconfig_revision: 3")
	must(t, w.gateway.end(syscall.SIGTERM))
	w.startGateway()
	w.exec(`INSERT INTO docs VALUES (60, 'u0', 'under another revision')`)
	w.settle(w.absent)
	w.gateway.rewrite("config_revision: 3", "config_revision: 2")
	w.shows([]string{"config_revision"}, "2 in ", "3 in the change log", "deploy the newer configuration")
	w.gateway.rewrite("config_revision: 2", "config_revision: 4")
	w.gateway.rewrite("owner_id: claims.sub", "owner_id: claims.other")
	if s = w.shows([]string{}, "warning  config_revision", "other policy"); s.Collections[0].State != "other policy" {
		t.Errorf("collection: %+v", s.Collections)
	}
	must(t, server.Stop(t.Context()))
	w.shows([]string{"source"}, "database.url")
}

// metrics are those of the gateway.
func (w *followedSource) metrics() string {
	w.t.Helper()
	res, err := w.absent.http.Get(w.gateway.base + "/metrics")
	must(w.t, err)
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	must(w.t, err)
	return string(text)
}

// TestStatusStaysTheSame: programs read it. A member that is renamed or left out breaks them; new ones are added here.
func TestStatusStaysTheSame(t *testing.T) {
	t.Parallel()
	s := &status{Wrong: []string{}, Warnings: []string{}, Source: &statusSource{}, Slot: &statusSlot{}, Log: &statusLog{}, Collections: []statusCollection{{}}, Redis: &statusRedis{}, Attachments: &statusAttachments{}}
	s.add(statusOK, "x", "", "", "")
	text, err := json.Marshal(s)
	must(t, err)
	const want = `{"well":false,"wrong":[],"warnings":[],"lines":[{"name":"x","level":"ok","says":"","means":"","next":""}],` +
		`"source":{"version":"","standby":false,"wal_level":"","max_slot_wal_keep_size":"","system":"","timeline":0,"standbys":0,"synchronized_standby_slots":""},` +
		`"slot":{"exists":false,"active":false,"holder_pid":0,"holder":"","ours":false,"wal_status":"","invalidation_reason":"","lag_bytes":0,"bounded":false,"safe_bytes":0,"failover":false,"synced":false,` +
		`"restart_lsn":"","confirmed_lsn":"","oldest_transaction":"","oldest_transaction_seconds":0,"name":"","lag_limit":0},` +
		`"log":{"history":"","version":"","floor":"","lsn":"","age_seconds":0,"epoch":0,"config_revision":0,"bytes":0},` +
		`"collections":[{"name":"","state":"","reason":"","floor":"","floor_reason":""}],"redis":{"address":"","answers":false,"error":""},` +
		`"attachments":{"uploaded":0,"missing":0,"unreferenced":0,"deleted":0,"bytes":0,"unfilled":""}}`
	if string(text) != want {
		t.Errorf("got  %s\nwant %s", text, want)
	}
}

// TestStatusOfAWrongConfiguration is wrong usage, not something wrong.
func TestStatusOfAWrongConfiguration(t *testing.T) {
	t.Parallel()
	path := t.TempDir() + "/config.yaml"
	must(t, os.WriteFile(path, []byte("databse: {}\n"), 0o600))
	_, err := walgate(t, "status", "--config", path)
	var faults *ConfigError
	if !errors.As(err, &faults) {
		t.Errorf("status ended with %v", fmt.Sprint(err))
	}
}

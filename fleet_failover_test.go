package main

import (
	"fmt"
	"strings"
	"testing"

	"github.com/walgate/walgate/internal/badlink"
	"github.com/walgate/walgate/internal/pgserver"
)

// TestPromotionUnderThree: a standby is promoted that never got what clients have seen. Whichever of three gateways leads
// then, every client of every one of them begins anew by itself, and none keeps a row of the lost timeline: also where one
// gateway can't reach the log meanwhile.
func TestPromotionUnderThree(t *testing.T) {
	t.Parallel()
	for name, v := range map[string]struct {
		from      int
		settings  map[string]string
		before    string // in the promoted server, before it is used
		elsewhere bool   // the log is on another server, which one of the gateways can't reach meanwhile
	}{
		"without a slot":           {},
		"with a slot made by hand": {before: `SELECT pg_create_logical_replication_slot('walgate', 'pgoutput')`},
		"with a synchronised slot": {from: 17, settings: map[string]string{"sync_replication_slots": "on", "hot_standby_feedback": "on", "primary_slot_name": "standby"}},
		"one cut off from the log": {elsewhere: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := pgserver.StartForTest(t, pgserver.Options{Settings: map[string]string{"wal_keep_size": "1GB"}})
			if server.Version() < v.from {
				return // it has no such slots
			}
			storage := ""
			var cut *badlink.Link
			var change func(string) string
			if v.elsewhere {
				storage = pgserver.ForTest(t).Database(t)
				cut = badlink.To(t, storage)
				gateways := 1
				change = func(config string) string {
					if gateways++; gateways < 3 {
						return config
					}
					return strings.Replace(config, storage, cut.DSN(t, storage)+"&connect_timeout=2", 1)
				}
			}
			f := newFleet(t, server, storage, change)
			f.present.base = f.all[0].base
			clients := []*syncClient{f.present, f.absent}
			for i, p := range f.all[1:] {
				c := f.client(fmt.Sprintf("of gateway %d", i+2), uint64(7+i))
				c.base = p.base
				clients = append(clients, c)
			}
			f.absent.base = f.all[1].base
			f.exec(`SELECT pg_create_physical_replication_slot('standby', true)`)
			standby, wal := f.standby(false, v.settings)
			f.replayed(standby)
			if v.settings != nil {
				f.synchronised(standby)
			}
			f.settle(clients...)
			wal.Down()
			f.lose()
			f.settle(clients...)
			history := historyOf(f.absent)
			refused := f.witness()
			end := f.during()
			if cut != nil {
				cut.Stall()
			}
			must(t, server.Crash())
			must(t, standby.Promote(t.Context()))
			f.use(standby)
			if v.before != "" {
				f.exec(v.before)
			}
			for _, l := range f.links {
				l.Turn(t, standby.DSN("postgres"))
			}
			f.goOn()
			refused()
			if cut != nil {
				f.settle(f.absent)
				cut.Resume()
			}
			end()
			f.settle(clients...)
			f.exec(`INSERT INTO docs VALUES (8, 'u0', 'later')`)
			f.settle(clients...)
			for _, c := range clients {
				if n := resynchronised(c); n < 1 || historyOf(c) == history {
					t.Errorf("client %s was told %d times to begin anew, history %s after %s", c.name, n, historyOf(c), history)
				}
			}
		})
	}
}

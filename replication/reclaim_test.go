package replication

import (
	"testing"
	"time"

	"github.com/walgate/walgate/policies"
)

// TestBareCollectionLeavesTheOthersAlone: a collection whose identity lacks old values is stopped; that its policy's fingerprint
// changes too, or that the log doesn't know it yet, must not have the leader take the log over again and again.
func TestBareCollectionLeavesTheOthersAlone(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(s *source){
		"a label is added to the enum of its scope": func(s *source) {
			s.exec(`ALTER TABLE items REPLICA IDENTITY DEFAULT`)
			s.await("the collection is stopped", func() bool { return s.collection("items").Stopped != "" })
			s.exec(`ALTER TYPE kind ADD VALUE 'c'`)
		},
		"the log doesn't know it": func(s *source) {
			s.stop()
			s.exec(`DELETE FROM walgate.collections WHERE name = 'items'`)
			s.exec(`ALTER TABLE items REPLICA IDENTITY DEFAULT`)
			s.start()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSource(t, setup{every: 20 * time.Millisecond, before: `CREATE TYPE kind AS ENUM ('a', 'b');
				CREATE TABLE items (id int PRIMARY KEY, k kind, title text); CREATE TABLE notes (id int PRIMARY KEY, body text);`,
				specs: map[string]policies.Spec{"items": {Table: "items", Scope: []map[string]string{{"k": "claims.k"}}}, "notes": {Table: "notes"}}})
			before := s.settle()
			epoch := query[int](s, `SELECT epoch FROM walgate.checkpoint`)
			change(s)
			for n := range 40 { // each waits for the log
				s.exec(`INSERT INTO notes VALUES ($1)`, n)
				s.exec(`INSERT INTO items VALUES ($1, 'a')`, n)
				s.settle()
			}
			if now := query[int](s, `SELECT epoch FROM walgate.checkpoint`); now > epoch+3 {
				t.Errorf("the log was taken over %d times", now-epoch)
			}
			s.exec(`ALTER TABLE items REPLICA IDENTITY FULL`)
			s.await("it goes on", func() bool {
				return query[bool](s, `SELECT EXISTS (SELECT FROM walgate.collections WHERE name = 'items' AND stopped = '' AND floor > $1)`, before.Version)
			})
			since := s.settle().Version
			s.exec(`INSERT INTO items VALUES (100, 'a')`)
			s.expect(since, "u 100")
		})
	}
}

package replication

import (
	"cmp"
	"context"
	"encoding/json"
	"log/slog"
	"regexp"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/policies"
)

// thingsTable has every kind of reference, a key of two columns, and a column that is stored out of line.
const thingsTable = `CREATE TABLE things (a int, b text, owner text, hidden boolean NOT NULL DEFAULT false, gone timestamptz,
		photo text, extra jsonb, tags text[], body text, PRIMARY KEY (a, b));
	ALTER TABLE things ALTER extra SET STORAGE EXTERNAL;
	CREATE TABLE cards (id int PRIMARY KEY, image uuid);`

func thingsSpec() map[string]policies.Spec {
	return map[string]policies.Spec{
		"things": {Table: "things", Scope: []map[string]string{{"owner": "claims.sub"}}, Where: "!row.hidden", SoftDelete: "gone",
			Attachments: []policies.AttachmentSpec{{Column: "photo"}, {Column: "extra", Path: "$.photos[*].id"}, {Column: "tags"}}},
		"cards": {Table: "cards", Attachments: []policies.AttachmentSpec{{Column: "image"}}},
	}
}

// held is a reference by names.
type held struct{ attachment, scope, document [16]byte }

// thingsSQL reads what the rows refer to, independently of the product: SQL and the meaning of the policy.
const thingsSQL = `SELECT a::text, b, owner, NOT hidden AND gone IS NULL AND owner IS NOT NULL, ARRAY(
	SELECT photo WHERE photo IS NOT NULL UNION SELECT e #>> '{}' FROM jsonb_path_query(extra, '$.photos[*].id[*]') e WHERE jsonb_typeof(e) IN ('string', 'number')
	UNION SELECT t FROM unnest(tags) t WHERE t IS NOT NULL) FROM things`

var someID = regexp.MustCompile(`^[A-Za-z0-9._-]{1,255}$`)

// wantHeld reads what the log should hold.
func (s *source) wantHeld() map[held]bool {
	s.t.Helper()
	set, out := s.watcher.Current().Set, map[held]bool{}
	things, cards := set.ByName("things"), set.ByName("cards")
	id := func(name string) int32 { return s.collection(name).ID }
	thingsID, cardsID := id("things"), id("cards")
	nobody, err := set.NewCaller("nobody", nil, nil)
	s.ok(err)
	everyCard := nobody.Scopes(cards)[0]
	scopes := map[string]policies.ScopeKey{}
	rows, err := s.conn.Query(s.t.Context(), thingsSQL, pgx.QueryExecModeExec)
	s.ok(err)
	for rows.Next() {
		var a, b string
		var owner *string
		var visible bool
		var ids []string
		s.ok(rows.Scan(&a, &b, &owner, &visible, &ids))
		var scope policies.ScopeKey
		if owner == nil {
			everyone, ok := scopes["\x00"]
			if !ok {
				everyone = hiddenOf(s, things)
				scopes["\x00"] = everyone
			}
			scope = everyone
		} else {
			if _, ok := scopes[*owner]; !ok {
				caller, err := set.NewCaller(*owner, nil, map[string]any{"sub": *owner})
				s.ok(err)
				scopes[*owner] = caller.Scopes(things)[0]
			}
			if scope = scopes[*owner]; !visible {
				scope = policies.HiddenScope(scope)
			}
		}
		doc, err := json.Marshal([]string{a, b})
		s.ok(err)
		for _, id := range ids {
			if someID.MatchString(id) && !strings.Contains(id, "..") && id != "." {
				out[held{policies.AttachmentKey([]byte(id)), scope, policies.DocumentKey(thingsID, doc)}] = true
			}
		}
	}
	s.ok(rows.Err())
	rows, err = s.conn.Query(s.t.Context(), `SELECT id::text, image::text FROM cards WHERE image IS NOT NULL`)
	s.ok(err)
	for rows.Next() {
		var id, image string
		s.ok(rows.Scan(&id, &image))
		out[held{policies.AttachmentKey([]byte(image)), everyCard, policies.DocumentKey(cardsID, []byte(id))}] = true
	}
	s.ok(rows.Err())
	return out
}

// hiddenOf returns the scope of rows that are in no scope.
func hiddenOf(s *source, c *policies.Collection) policies.ScopeKey {
	s.t.Helper()
	b, err := c.Bind(c.Table.Ordinary())
	s.ok(err)
	row := make([][]byte, b.Width())
	for i, col := range c.Table.Ordinary() {
		switch col.Name {
		case "a":
			row[i] = []byte("1")
		case "b", "photo":
			row[i] = []byte("x")
		case "hidden":
			row[i] = []byte("f")
		}
	}
	_, err = b.Route(nil, nil, row)
	s.ok(err)
	pairs := b.AppendReferences(nil, nil, row, false)
	if len(pairs) != 1 {
		s.t.Fatalf("%d references of a row in no scope", len(pairs))
	}
	return pairs[0].Scope
}

// haveHeld reads what the log holds of rows.
func (s *source) haveHeld() map[held]bool {
	s.t.Helper()
	out := map[held]bool{}
	rows, err := s.storage().Query(s.t.Context(), `SELECT attachment, scope, document FROM walgate.attachment_references WHERE document <> '00000000-0000-0000-0000-000000000000'`)
	s.ok(err)
	for rows.Next() {
		var h held
		s.ok(rows.Scan(&h.attachment, &h.scope, &h.document))
		out[h] = true
	}
	s.ok(rows.Err())
	return out
}

// storage connects to the log's database.
func (s *source) storage() *pgx.Conn {
	s.t.Helper()
	if s.store == nil {
		var err error
		s.store, err = pgx.Connect(s.t.Context(), cmp.Or(s.storageDSN, s.dsn))
		s.ok(err)
		s.t.Cleanup(func() { s.store.Close(context.Background()) })
	}
	return s.store
}

// filled waits until nothing is left to look through or to sweep, and the log holds everything committed so far.
func (s *source) filled() *changelog.Head {
	s.t.Helper()
	s.settle()
	s.await("every fill is done and swept", func() bool {
		fills, err := s.log.Fills(s.t.Context())
		s.ok(err)
		h, err := s.log.Head(s.t.Context())
		s.ok(err)
		newest := map[int32]changelog.Fill{}
		for _, f := range fills {
			if newest[f.Collection].Fill < f.Fill {
				newest[f.Collection] = f
			}
		}
		for _, f := range newest {
			if c := h.Collection(f.Collection); !f.Done || !f.Swept || c != nil && c.Refill > f.Version {
				return false
			}
		}
		return len(newest) > 0
	})
	return s.settle()
}

// sameHeld compares the log with the tables, once nobody writes.
func (s *source) sameHeld() {
	s.t.Helper()
	s.filled()
	want, have := s.wantHeld(), s.haveHeld()
	lacks, wrong := 0, 0
	for h := range want {
		if !have[h] {
			lacks++
		}
	}
	for h := range have {
		if !want[h] {
			wrong++
		}
	}
	if lacks+wrong > 0 || len(want) == 0 {
		s.t.Errorf("the log lacks %d references and holds %d that no row has; the rows have %d\nlog:\n%s", lacks, wrong, len(want), s.logged)
	}
	s.sameOperations(want)
}

// sameOperations compares who is told to hold which attachment with who should: every scope that names one whose bytes are
// there. One that no row has named since it was uploaded may be held by its uploader's scope.
func (s *source) sameOperations(refs map[held]bool) {
	s.t.Helper()
	type pair struct{ attachment, scope [16]byte }
	rows, err := s.conn.Query(s.t.Context(), `SELECT attachment_id, subject FROM walgate.files WHERE state = 'u'`)
	s.ok(err)
	want, there := map[pair]bool{}, map[[16]byte]policies.ScopeKey{}
	for rows.Next() {
		var id, subject string
		s.ok(rows.Scan(&id, &subject))
		there[policies.AttachmentKey([]byte(id))] = policies.SubjectScope(subject)
	}
	s.ok(rows.Err())
	named := map[[16]byte]bool{}
	for h := range refs {
		if _, ok := there[h.attachment]; ok {
			want[pair{h.attachment, h.scope}], named[h.attachment] = true, true
		}
	}
	rows, err = s.storage().Query(s.t.Context(), `SELECT attachment, scope FROM walgate.attachment_operations WHERE op = 'u'`)
	s.ok(err)
	for rows.Next() {
		var p pair
		s.ok(rows.Scan(&p.attachment, &p.scope))
		if home, ok := there[p.attachment]; ok && !named[p.attachment] && p.scope == home {
			continue
		}
		if !want[p] {
			s.t.Errorf("a scope is told to hold %x, which it shouldn't", p.attachment)
		}
		delete(want, p)
	}
	s.ok(rows.Err())
	if len(want) > 0 {
		s.t.Errorf("%d scopes aren't told to hold what they name", len(want))
	}
}

// respec starts a leader whose configuration differs.
func (s *source) respec(specs map[string]policies.Spec) {
	s.t.Helper()
	s.stop()
	s.watcher = NewWatcher(s.pool, s.watcher.publications, specs, s.watcher.autoInit, s.watcher.every, slog.New(slog.NewTextHandler(s.logged, nil)))
	faults, err := s.watcher.Start(s.t.Context())
	s.ok(err)
	if len(faults) > 0 {
		s.t.Fatal(faults)
	}
	s.start()
}

// documentsHeld returns the documents that name an attachment, once nothing is left to look through.
func (s *source) documentsHeld(id string) (documents [][16]byte) {
	s.t.Helper()
	s.filled()
	return s.documentsHeldNow(id)
}

// documentsHeldNow returns the documents that the log knows to name an attachment.
func (s *source) documentsHeldNow(id string) (documents [][16]byte) {
	s.t.Helper()
	for h := range s.haveHeld() {
		if h.attachment == policies.AttachmentKey([]byte(id)) {
			documents = append(documents, h.document)
		}
	}
	return documents
}

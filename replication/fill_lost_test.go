package replication

import (
	"errors"
	"testing"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/internal/pgserver"
	"github.com/walgate/walgate/policies"
)

// TestFillOfALostLog: who came to a file by a row that was written after its upload has it still when the log was lost, once
// care has noted that nothing was withheld.
func TestFillOfALostLog(t *testing.T) {
	t.Parallel()
	server := pgserver.ForTest(t)
	s := newSource(t, setup{server: server, storage: server.Database(t), specs: thingsSpec(), before: oneThing})
	s.upload("f5", "u")
	s.exec(`UPDATE things SET photo = 'f6' WHERE a = 2`) // before it is uploaded
	s.exec(`INSERT INTO walgate.attachments (attachment_id, event, size, content_type, sha256, subject, scopes) VALUES ('f6', 'u', 1, 'x/y', '\x00', 'eve', '{00000000-0000-0000-0000-000000000001}')`)
	s.exec(`UPDATE walgate.files SET scopes = '{00000000-0000-0000-0000-000000000001}'`)
	s.exec(`UPDATE things SET photo = 'f5' WHERE a = 1`)
	s.filled()
	ana, err := s.watcher.Current().Set.NewCaller("ana", nil, map[string]any{"sub": "ana"})
	s.ok(err)
	var scopes [][16]byte
	for _, k := range ana.ReadableScopes() {
		scopes = append(scopes, k)
	}
	key := [][16]byte{policies.AttachmentKey([]byte("f5"))}
	readable := func() bool {
		held, err := s.log.Held(t.Context(), key, scopes)
		s.ok(err)
		return held[0].Readable
	}
	s.await("ana reads it", readable)
	events, err := s.log.Unwithheld(t.Context(), append(key, policies.AttachmentKey([]byte("f6")), policies.AttachmentKey([]byte("f7"))))
	s.ok(err)
	if len(events) != 3 || events[0] == 0 || events[1] != 0 || events[2] != 0 {
		t.Fatalf("%v", events)
	}
	s.exec(`UPDATE walgate.files SET scopes = NULL WHERE event_id = $1`, events[0]) // as care does
	s.stop()
	log, err := changelog.Open(t.Context(), s.storageDSN, 2) // as a start does
	s.ok(err)
	defer log.Close()
	_, err = s.storage().Exec(t.Context(), `DROP SCHEMA walgate CASCADE`)
	s.ok(err)
	s.ok(log.Migrate(t.Context()))
	s.start()
	s.filled()
	if !readable() {
		t.Error("ana doesn't read it any more")
	}
}

// TestFilesWaitForRows: a file that isn't everybody's is looked at only when all rows were: a scope that names it and may not have
// it must be known by then, also where the rows of a collection take their time.
func TestFilesWaitForRows(t *testing.T) {
	t.Parallel()
	s := newSource(t, setup{specs: thingsSpec(), before: oneThing})
	s.upload("f5", "u")
	s.exec(`UPDATE walgate.files SET scopes = '{00000000-0000-0000-0000-000000000001}'`)
	rows := &fillTask{collection: 1}
	f := &filler{tenure: &tenure{leader: &Leader{o: Options{Source: s.pool}}}, rows: 10, tasks: map[int32]*fillTask{1: rows, bytesFill: {}}}
	if err := f.files(t.Context(), f.tasks[bytesFill]); !errors.Is(err, errNotNow) {
		t.Errorf("rows are left: %v", err)
	}
	if rows.done = true; f.rowsLeft() {
		t.Error("no rows are left")
	}
}

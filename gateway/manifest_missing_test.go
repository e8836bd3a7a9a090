package gateway

import (
	"fmt"
	"testing"
)

// lose tells the stream of a file what its care would: m, that its bytes are missing; r, that they are back.
func (e *env) lose(t testing.TB, id, event string) {
	t.Helper()
	e.exec(t, fmt.Sprintf(`WITH e AS (INSERT INTO walgate.attachments (attachment_id, event, size, content_type, sha256, subject, client_id, scopes)
			SELECT attachment_id, '%[2]s', size, content_type, sha256, subject, client_id, scopes FROM walgate.files WHERE attachment_id = '%[1]s' RETURNING id)
		UPDATE walgate.files SET event_id = e.id, state = CASE '%[2]s' WHEN 'r' THEN 'u' ELSE '%[2]s' END::"char" FROM e WHERE attachment_id = '%[1]s'`, id, event))
}

// TestLostBytesAreNotDeletedByDevices: where the store lost a file, a device may have the last copy. Nobody is told to delete it, nor
// to fetch what isn't there; it may be sent again; and the rows decide as before.
func TestLostBytesAreNotDeletedByDevices(t *testing.T) {
	t.Parallel()
	e := newFileEnv(t, setup{})
	a := tokenFor(t, "a", nil)
	e.upload(t, "x.jpg", "x", 5, "a", "")
	e.upload(t, "own.jpg", "own", 5, "a", "")
	e.exec(t, `INSERT INTO photos (id, owner, file) VALUES (1, 'a', 'x.jpg')`)
	e.sync(t)
	s := e.live(t, a, `,"attachments":true`)
	first := e.manifest(t, a, "phone", 0, 0)
	if first.brief() != "download own.jpg, download x.jpg" {
		t.Fatal(first.brief())
	}
	told := func(what string, since int64, want, fresh string) int64 {
		t.Helper()
		e.sync(t)
		m := e.manifest(t, a, "phone", since, 0)
		if m.brief() != want {
			t.Errorf("%s: %q, want %q", what, m.brief(), want)
		}
		if f := e.manifest(t, a, "tablet", 0, 0).brief(); f != fresh {
			t.Errorf("%s: a new device is told %q, want %q", what, f, fresh)
		}
		return m.Current
	}
	e.lose(t, "x.jpg", "m")
	e.lose(t, "own.jpg", "m")
	at := told("lost", first.Current, "", "")
	e.exec(t, `INSERT INTO photos (id, owner, file) VALUES (2, 'a', 'own.jpg')`)
	at = told("named while it is lost", at, "", "")
	e.lose(t, "own.jpg", "r")
	at = told("back", at, "download own.jpg", "download own.jpg")
	e.exec(t, `UPDATE photos SET file = NULL WHERE id = 1`)
	at = told("let go of while it is lost", at, "delete x.jpg", "download own.jpg")
	e.exec(t, `UPDATE photos SET file = 'x.jpg' WHERE id = 1`)
	at = told("named again", at, "", "download own.jpg")
	e.upload(t, "x.jpg", "x", 5, "a", "")
	told("sent again", at, "download x.jpg", "download own.jpg, download x.jpg")
	s.wantFrames(t, "upsert photos/2")
	s.wantFrames(t, "download own.jpg")
	s.wantFrames(t, "upsert photos/1", "delete x.jpg")
	s.wantFrames(t, "upsert photos/1")
	s.wantFrames(t, "download x.jpg")
}

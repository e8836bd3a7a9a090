package gateway

import (
	"bytes"
	"fmt"
	"net/http"
	"strings"
	"testing"
)

// TestAttachmentRights holds every verb against who asks and what the attachment is to it. What a caller can't see has the
// answer of what was never there, byte for byte.
func TestAttachmentRights(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{options: func(o *Options) { o.AttachmentDeleteRoles = []string{"keeper"} }})
	ana, ben := editor(t, "ana"), editor(t, "ben")
	// What stands to ana as its name says; ben is somebody else. "both" is in a row of each.
	things := map[string]func(id string){
		"unknown":        func(string) {},
		"own row":        func(id string) { e.name(t, "ana", id); e.put(t, id, ana, "x").created(t) },
		"own row empty":  func(id string) { e.name(t, "ana", id) },
		"own row dead":   func(id string) { e.name(t, "ana", id); e.put(t, id, ana, "x").created(t); e.remove(t, id, ana) },
		"other row":      func(id string) { e.name(t, "ben", id); e.put(t, id, ben, "x").created(t) },
		"other empty":    func(id string) { e.name(t, "ben", id) },
		"other row dead": func(id string) { e.name(t, "ben", id); e.put(t, id, ben, "x").created(t); e.remove(t, id, ben) },
		"both":           func(id string) { e.name(t, "ana", id); e.put(t, id, ana, "x").created(t); e.name(t, "ben", id) },
		"own upload":     func(id string) { e.put(t, id, ana, "x").created(t) },
		"own dead":       func(id string) { e.put(t, id, ana, "x").created(t); e.remove(t, id, ana) },
		"other upload":   func(id string) { e.put(t, id, ben, "x").created(t) },
		"withheld": func(id string) { // ben's bytes under an id that only a row of ana names by now
			e.name(t, "ana", id)
			e.name(t, "ben", id)
			e.put(t, id, ben, "x").created(t)
			e.exec(t, `DELETE FROM photos WHERE owner = 'ben' AND file = $1`, id)
		},
		"other dead": func(id string) { e.put(t, id, ben, "x").created(t); e.remove(t, id, ben) },
	}
	roles := []string{"none", "reader", "editor", "keeper reader"}
	const missing, gone, unseen = "404 attachment_missing", "410 attachment_deleted", "404 not_found"
	// By thing: the answer to GET, PUT of other bytes, and DELETE, of each role.
	want := map[string]map[string][4]string{
		"GET": {
			"unknown": {unseen, unseen, unseen, unseen}, "own row": {unseen, "200", "200", "200"}, "own row empty": {unseen, missing, missing, missing},
			"own row dead": {unseen, gone, gone, gone}, "other row": {unseen, unseen, unseen, unseen}, "other empty": {unseen, unseen, unseen, unseen},
			"other row dead": {unseen, unseen, unseen, unseen}, "both": {unseen, "200", "200", "200"}, "own upload": {"200", "200", "200", "200"},
			"own dead": {gone, gone, gone, gone}, "other upload": {unseen, unseen, unseen, unseen}, "other dead": {unseen, unseen, unseen, unseen},
			"withheld": {unseen, missing, missing, missing}},
		"PUT": {
			"unknown": {"403", "403", "201", "403"}, "own row": {"403", "403", "409", "403"}, "own row empty": {"403", "403", "201", "403"},
			"own row dead": {"403", "403", "201", "403"}, "other row": {"403", "403", "409", "403"}, "other empty": {"403", "403", "409", "403"},
			"other row dead": {"403", "403", "409", "403"}, "both": {"403", "403", "409", "403"}, "own upload": {"403", "403", "409", "403"},
			"own dead": {"403", "403", "201", "403"}, "other upload": {"403", "403", "409", "403"}, "other dead": {"403", "403", "201", "403"},
			"withheld": {"403", "403", "409", "403"}},
		"DELETE": {
			"unknown": {"204", "204", "204", "204"}, "own row": {"204", "403", "204 away", "204 away"}, "own row empty": {"204", "204", "204", "204"},
			"own row dead": {"204", "204", "204", "204"}, "other row": {"204", "204", "204", "204"}, "other empty": {"204", "204", "204", "204"},
			"other row dead": {"204", "204", "204", "204"}, "both": {"204", "403", "403", "204 away"}, "own upload": {"204 away", "204 away", "204 away", "204 away"},
			"own dead": {"204", "204", "204", "204"}, "other upload": {"204", "204", "204", "204"}, "other dead": {"204", "204", "204", "204"},
			"withheld": {"204", "204", "204", "204"}},
	}
	n := 0
	for name, make := range things {
		for r, role := range roles {
			token := tokenFor(t, "ana", map[string]any{"roles": role})
			for _, verb := range []string{"GET", "HEAD", "URL", "PUT", "DELETE"} {
				n++
				id := fmt.Sprintf("thing-%d", n)
				make(id)
				e.sync(t)
				there := e.one(t, `SELECT coalesce((SELECT state::text FROM walgate.files WHERE attachment_id = $1), '-')`, id)
				expected := want[verb][name][r]
				ask := func(id string) *answer {
					switch path := "/attachments/" + id; verb {
					case "PUT":
						return e.put(t, id, token, "other", "X-Request-ID", "same")
					case "URL":
						return e.get(t, path+"/download-url", token, "X-Request-ID", "same")
					default:
						return e.do(t, verb, path, token, "X-Request-ID", "same")
					}
				}
				if verb == "HEAD" || verb == "URL" {
					expected = want["GET"][name][r]
				}
				a := ask(id)
				status, code, _ := strings.Cut(expected, " ")
				if got := fmt.Sprint(a.status); got != status {
					t.Errorf("%s by %s of %s: %s, want %s: %s", verb, role, name, got, expected, a.body)
				}
				if code != "" && code != "away" && verb != "HEAD" && !bytes.Contains(a.body, []byte(`"code":"`+code+`"`)) {
					t.Errorf("%s by %s of %s: %s, want %s", verb, role, name, a.body, expected)
				}
				if now := e.one(t, `SELECT coalesce((SELECT state::text FROM walgate.files WHERE attachment_id = $1), '-')`, id); verb == "DELETE" {
					if code == "away" && now != "d" || code != "away" && now != there {
						t.Errorf("DELETE by %s of %s: state %s became %s", role, name, there, now)
					}
				}
				if code == "not_found" {
					if b := ask("never-" + id); b.status != a.status || !bytes.Equal(b.body, a.body) || fmt.Sprint(withoutDate(b.header)) != fmt.Sprint(withoutDate(a.header)) {
						t.Errorf("%s by %s of %s tells it from what isn't there:\n%v %s\n%v %s", verb, role, name, a.header, a.body, b.header, b.body)
					}
				}
			}
		}
	}
	e.get(t, "/attachments/x", "").problem(t, InvalidToken)
	e.put(t, "x", "", "x").problem(t, InvalidToken)
	// Refused uploads, of what a row names elsewhere and of what is taken, have one answer, also where the bytes are the same.
	e.name(t, "ben", "named")
	e.put(t, "taken", ben, "x").created(t)
	e.sync(t)
	for _, condition := range []string{"", "*"} {
		a, b := e.put(t, "named", ana, "x", "X-Request-ID", "same", "If-None-Match", condition), e.put(t, "taken", ana, "x", "X-Request-ID", "same", "If-None-Match", condition)
		if a.status < 400 || a.status != b.status || !bytes.Equal(a.body, b.body) {
			t.Errorf("told apart: %d %s and %d %s", a.status, a.body, b.status, b.body)
		}
	}
}

// name has a row of an owner's name an attachment.
func (e *env) name(t testing.TB, owner, id string) {
	t.Helper()
	e.exec(t, `INSERT INTO photos (owner, file) VALUES ($1, $2)`, owner, id)
	e.sync(t)
}

func (e *env) remove(t testing.TB, id, token string) {
	t.Helper()
	if a := e.do(t, http.MethodDelete, "/attachments/"+id, token); a.status != http.StatusNoContent {
		t.Fatalf("delete %s: %d %s", id, a.status, a.body)
	}
}

func withoutDate(h http.Header) http.Header {
	h = h.Clone()
	h.Del("Date")
	return h
}

// TestAttachmentAnnounced: bytes given to an id that rows name are for the scopes in which their uploader may write, and for no
// others that name it.
func TestAttachmentAnnounced(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{})
	e.name(t, "ana", "shared")
	e.name(t, "ben", "shared")
	e.put(t, "shared", editor(t, "ana"), "x").created(t)
	e.get(t, "/attachments/shared", reader(t, "ana")).bytesAre(t, 200, "x")
	e.get(t, "/attachments/shared", reader(t, "ben")).problem(t, AttachmentMissing)
}

// TestAttachmentDevice: what is private to a device is listed for it alone.
func TestAttachmentDevice(t *testing.T) {
	t.Parallel()
	e := newBytesEnv(t, "", setup{})
	ana := editor(t, "ana")
	e.put(t, "a?client_id=phone", ana, "x").created(t)
	e.put(t, "b", ana, "y").created(t)
	for params, want := range map[string]string{"": `"b"`, "?client_id=tablet": `"b"`, "?client_id=phone": `"a" "b"`} {
		a := e.get(t, "/attachments"+params, ana)
		var got []string
		for _, id := range []string{`"a"`, `"b"`} {
			if bytes.Contains(a.body, []byte(id)) {
				got = append(got, id)
			}
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s: listed %s, want %s", params, a.body, want)
		}
	}
	e.get(t, "/attachments/a", ana).bytesAre(t, 200, "x")
	e.put(t, "c?client_id=%00", ana, "x").problem(t, InvalidRequest)
	e.put(t, "c?clientid=x", ana, "x").problem(t, InvalidRequest)
}

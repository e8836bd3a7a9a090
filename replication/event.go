package replication

import (
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/policies"
	"github.com/walgate/walgate/schema"
)

// walgate.attachments is where uploads and deletions of files are told: each inserted row is one event.
const eventsTable = "attachments"

// eventColumns are the columns of walgate.attachments that are read, in the order of eventColumn.
var eventColumns = [...]string{"id", "attachment_id", "event", "size", "content_type", "sha256", "subject", "client_id", "scopes", "created_at"}

// events reads the rows of walgate.attachments by the layout of the last Relation message.
type events struct {
	relation uint32
	columns  int
	at       [len(eventColumns)]int // positions in the row; -1: there is no such column
}

// eventsOf returns the layout where the relation is walgate.attachments, else nil.
func eventsOf(r *relation) *events {
	if r.schema != marksSchema || r.name != eventsTable {
		return nil
	}
	e := &events{relation: r.oid, columns: len(r.columns)}
	for i, name := range eventColumns {
		e.at[i] = -1
		for j, c := range r.columns {
			if c.name == name {
				e.at[i] = j
			}
		}
	}
	return e
}

// read returns the event that a row stands for.
func (e *events) read(row schema.Row) (*changelog.FileEvent, error) {
	var fields [len(eventColumns)][]byte
	for i, at := range e.at {
		if at < 0 || len(row) != e.columns {
			return nil, fmt.Errorf("the row doesn't have the columns that this walgate knows")
		}
		fields[i] = row[at]
	}
	return readEvent(fields)
}

// readEvent reads the texts of eventColumns.
func readEvent(f [len(eventColumns)][]byte) (out *changelog.FileEvent, err error) {
	out = &changelog.FileEvent{AttachmentID: string(f[1]), ContentType: string(f[4])}
	if out.ID, err = strconv.ParseInt(string(f[0]), 10, 64); err != nil {
		return nil, fmt.Errorf("its id: %w", err)
	}
	if !policies.ValidAttachmentID(out.AttachmentID) {
		return nil, fmt.Errorf("event %d: %.100q is no attachment's id", out.ID, out.AttachmentID)
	}
	out.Key = policies.AttachmentKey(f[1])
	switch string(f[2]) {
	case "u", "d", "m", "r":
		out.Event = f[2][0]
	default:
		return nil, fmt.Errorf("event %d: unknown kind %q", out.ID, f[2])
	}
	if out.Size, err = strconv.ParseInt(string(f[3]), 10, 64); err != nil {
		return nil, fmt.Errorf("event %d: its size: %w", out.ID, err)
	}
	if out.SHA256, err = hex.DecodeString(strings.TrimPrefix(string(f[5]), `\x`)); err != nil {
		return nil, fmt.Errorf("event %d: its digest: %w", out.ID, err)
	}
	if out.Home = policies.SubjectScope(string(f[6])); f[7] != nil {
		out.Home = policies.DeviceScope(string(f[6]), string(f[7]))
	}
	if out.Scopes, err = readScopes(f[8]); err != nil {
		return nil, fmt.Errorf("event %d: its scopes: %w", out.ID, err)
	}
	if out.CreatedAt, err = time.Parse("2006-01-02 15:04:05.999999-07", string(f[9])); err != nil {
		return nil, fmt.Errorf("event %d: its time: %w", out.ID, err)
	}
	return out, nil
}

// readScopes reads the text of a uuid[]; nil stays nil.
func readScopes(text []byte) ([][16]byte, error) {
	if text == nil {
		return nil, nil
	}
	scopes := [][16]byte{}
	for _, t := range strings.FieldsFunc(strings.Trim(string(text), "{}"), func(r rune) bool { return r == ',' }) {
		b, err := hex.DecodeString(strings.ReplaceAll(t, "-", ""))
		if err != nil || len(b) != 16 {
			return nil, fmt.Errorf("%.100q is no uuid", t)
		}
		scopes = append(scopes, [16]byte(b))
	}
	return scopes, nil
}

// event adds an event at this place of the order. One that can't be read stops nothing: a new fill of the bytes makes up for
// it.
func (s *sequencer) event(row schema.Row, at changelog.LSN) error {
	e, err := s.events.read(row)
	if err != nil {
		s.log.Error("an upload or deletion of a file was not recognised; walgate.files is read anew instead, which must be as walgate init made it", "lsn", at.String(), "error", err)
		if s.fills[bytesFill] != nil {
			s.startFill(bytesFill)
		}
		return nil
	}
	e.Version = s.clock.Next(s.millis)
	if s.tx == 0 {
		s.tx = e.Version
	}
	s.piece.Files = append(s.piece.Files, *e)
	if s.piece.Size += e.Bytes(); s.piece.Size >= pieceBytes {
		return s.flush()
	}
	return nil
}

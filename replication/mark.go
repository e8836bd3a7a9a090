package replication

import (
	"encoding/json"
	"fmt"
	"strconv"

	"github.com/walgate/walgate/changelog"
	"github.com/walgate/walgate/schema"
)

// walgate.pushes is where a push marks its transaction: the first row says whose it is, a second one names the local ids.
const marksSchema, marksTable = "walgate", "pushes"

// marks reads the rows of walgate.pushes by the layout of the last Relation message.
type marks struct {
	relation                    uint32
	columns                     int
	id, subject, client, locals int // positions in the row; -1: there is no such column
}

// marksOf returns the layout where the relation is walgate.pushes, else nil.
func marksOf(r *relation) *marks {
	if r.schema != marksSchema || r.name != marksTable {
		return nil
	}
	m := &marks{relation: r.oid, columns: len(r.columns), id: -1, subject: -1, client: -1, locals: -1}
	for i, c := range r.columns {
		switch c.name {
		case "id":
			m.id = i
		case "subject":
			m.subject = i
		case "client_id":
			m.client = i
		case "locals":
			m.locals = i
		}
	}
	return m
}

// read returns the push that a row stands for.
func (m *marks) read(row schema.Row) (*changelog.Push, error) {
	if min(m.id, m.subject, m.client, m.locals) < 0 || len(row) != m.columns {
		return nil, fmt.Errorf("the row doesn't have the columns that this walgate knows")
	}
	id, err := strconv.ParseInt(string(row[m.id]), 10, 64)
	if err != nil {
		return nil, fmt.Errorf("its id: %w", err)
	}
	p := &changelog.Push{ID: id, Subject: string(row[m.subject]), ClientID: string(row[m.client])}
	if text := row[m.locals]; text != nil {
		if err := json.Unmarshal(text, &p.Locals); err != nil {
			return nil, fmt.Errorf("its local ids: %w", err)
		}
	}
	return p, nil
}

// mark notes that the present transaction is a push. A row that can't be read marks nothing: what the push changed is logged
// all the same, and stopping there would stop for good.
func (s *sequencer) mark(row schema.Row, at changelog.LSN) {
	p, err := s.marks.read(row)
	if err != nil {
		s.log.Error("a push was not recognised: its client isn't told the version and the keys of what it wrote; walgate.pushes must be as walgate init made it", "lsn", at.String(), "error", err)
		return
	}
	switch {
	case s.push == nil:
		s.push = p
	case s.push.Subject == p.Subject && s.push.ClientID == p.ClientID:
		s.push.Locals = append(s.push.Locals, p.Locals...)
	}
}

package gateway

import (
	"context"
	"errors"
	"fmt"
	"regexp"

	"github.com/jackc/pgx/v5"

	"github.com/walgate/walgate/changelog"
)

// storeOpened makes s the device's present session, and completes s by what is known of the device.
func (g *Gateway) storeOpened(ctx context.Context, s *syncSession) error {
	var last *string
	err := g.o.Source.QueryRow(ctx, `INSERT INTO walgate.sessions (subject, device_uuid, sync_uuid, max_checkin) VALUES ($1, $2, gen_random_uuid(), $3)
		ON CONFLICT (subject, device_uuid) DO UPDATE SET sync_uuid = excluded.sync_uuid, max_checkin = excluded.max_checkin,
			pulled = NULL, opened_at = now(), completed_at = NULL
		RETURNING sync_uuid::text, last_sync`, s.subject, s.device, s.checkin.String()).Scan(&s.id, &last)
	if err == nil {
		s.lastSync, err = storedCursor(last)
	}
	return storeProblem(err)
}

const sessionColumns = `device_uuid, last_sync, max_checkin, pulled`

// loadSession reads a subject's session. What isn't the subject's, or was superseded, doesn't exist.
func (g *Gateway) loadSession(ctx context.Context, id, subject string) (*syncSession, error) {
	if !isUUID(id) {
		return nil, &Problem{Code: UnknownSession}
	}
	s, err := scanSession(g.o.Source.QueryRow(ctx, `SELECT `+sessionColumns+` FROM walgate.sessions WHERE sync_uuid = $1 AND subject = $2`, id, subject), id, subject)
	return s, storeProblem(err)
}

// storeCompleted lets complete change a session's last_sync, one at a time.
func (g *Gateway) storeCompleted(ctx context.Context, id, subject string, complete func(*syncSession) error) (s *syncSession, err error) {
	if !isUUID(id) {
		return nil, &Problem{Code: UnknownSession}
	}
	err = pgx.BeginFunc(ctx, g.o.Source, func(tx pgx.Tx) error {
		var err error
		s, err = scanSession(tx.QueryRow(ctx, `SELECT `+sessionColumns+` FROM walgate.sessions WHERE sync_uuid = $1 AND subject = $2 FOR UPDATE`, id, subject), id, subject)
		if err != nil {
			return err
		}
		if err := complete(s); err != nil || s.lastSync.History == "" {
			return err
		}
		_, err = tx.Exec(ctx, `UPDATE walgate.sessions SET last_sync = $2, completed_at = now() WHERE sync_uuid = $1`, id, s.lastSync.String())
		return err
	})
	return s, storeProblem(err)
}

// storePulled remembers how far a session's pulls have handed out.
func (g *Gateway) storePulled(ctx context.Context, s *syncSession, upTo changelog.Cursor) error {
	if s.pulled == upTo || behind(upTo, s.pulled) {
		return nil
	}
	_, err := g.o.Source.Exec(ctx, `UPDATE walgate.sessions SET pulled = $3 WHERE sync_uuid = $1 AND subject = $2`, s.id, s.subject, upTo.String())
	s.pulled = upTo
	return storeProblem(err)
}

// confirmLocalIDs notes which rows the device has confirmed, so that their local ids may be forgotten in time. A client's
// pushes follow each other, so that the ids of those before the newest one confirmed are lower.
func (g *Gateway) confirmLocalIDs(ctx context.Context, s *syncSession) error {
	if s.lastSync.History == "" {
		return nil
	}
	newest, err := g.o.Log.NewestPush(ctx, s.subject, s.device, s.lastSync.Version)
	if err != nil || newest == nil {
		return g.logProblem(err)
	}
	_, err = g.o.Source.Exec(ctx, `UPDATE walgate.local_ids SET confirmed_at = now() WHERE subject = $1 AND client_id = $2 AND push_id <= $3 AND confirmed_at IS NULL`,
		s.subject, s.device, newest.ID)
	return storeProblem(err)
}

func scanSession(row pgx.Row, id, subject string) (*syncSession, error) {
	s := &syncSession{id: id, subject: subject}
	var checkin string
	var last, pulled *string
	err := row.Scan(&s.device, &last, &checkin, &pulled)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, &Problem{Code: UnknownSession}
	}
	for _, c := range []struct {
		text *string
		into *changelog.Cursor
	}{{last, &s.lastSync}, {&checkin, &s.checkin}, {pulled, &s.pulled}} {
		if err == nil {
			*c.into, err = storedCursor(c.text)
		}
	}
	return s, err
}

func storedCursor(text *string) (changelog.Cursor, error) {
	if text == nil {
		return changelog.Cursor{}, nil
	}
	c, err := changelog.ParseCursor(*text)
	if err != nil {
		err = fmt.Errorf("walgate.sessions holds a position that can't be read: %q", *text)
	}
	return c, err
}

var uuidPattern = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)

func isUUID(text string) bool { return uuidPattern.MatchString(text) }

// storeProblem makes a problem of what goes wrong with walgate.sessions.
func storeProblem(err error) error {
	if err == nil {
		return nil
	}
	return sourceProblem(err)
}

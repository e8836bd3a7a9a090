package schema

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"

	"github.com/jackc/pgx/v5/pgxpool"
)

// SigningKey returns the secret of download URLs, which all instances share. Migrate made it; where somebody deleted it, for
// a new one, a new one is made.
func SigningKey(ctx context.Context, source *pgxpool.Pool) ([]byte, error) {
	key := make([]byte, 32)
	_, _ = rand.Read(key) // never fails
	err := source.QueryRow(ctx, `WITH made AS (INSERT INTO walgate.secrets (name, value) SELECT 'signing_key', $1
			WHERE NOT EXISTS (SELECT FROM walgate.secrets WHERE name = 'signing_key') ON CONFLICT (name) DO UPDATE SET value = secrets.value RETURNING value)
		SELECT value FROM walgate.secrets WHERE name = 'signing_key' UNION ALL SELECT value FROM made`, key).Scan(&key)
	if err != nil {
		return nil, fmt.Errorf("read the signing key of download URLs from walgate.secrets: %w", err)
	}
	return key, nil
}

// Installation returns a name that all instances on this source share and no other installation has: 16 hex digits. It goes
// with the source: a copy of the database has the same one.
func Installation(ctx context.Context, source *pgxpool.Pool) (string, error) {
	key, err := SigningKey(ctx, source)
	if err != nil {
		return "", err
	}
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte("installation"))
	return hex.EncodeToString(mac.Sum(nil)[:8]), nil
}

package main

import (
	"encoding/json"
	"fmt"
	"strings"
)

// convergenceSQL is an application's schema with one table for each kind of policy. Keys overlap between tables on
// purpose: the same document id lives in several collections.
const convergenceSQL = `
CREATE TABLE notes (id uuid PRIMARY KEY, owner_id text, title text NOT NULL, body text, meta jsonb, secret text DEFAULT 'hidden', tag bigint NOT NULL DEFAULT 0, at timestamptz NOT NULL DEFAULT clock_timestamp());
ALTER TABLE notes ALTER body SET STORAGE EXTERNAL;
CREATE TABLE items (list_id int, lang text, owner_id text, team_id int, n int NOT NULL DEFAULT 0, body text, PRIMARY KEY (list_id, lang));
ALTER TABLE items ALTER body SET STORAGE EXTERNAL;
CREATE TYPE mood AS ENUM ('calm');
CREATE TABLE levels (id bigint PRIMARY KEY, level int, archived bool NOT NULL DEFAULT false, name text, double bigint GENERATED ALWAYS AS (id * 2) STORED, tag bigint NOT NULL DEFAULT 0, mood mood DEFAULT 'calm');
CREATE TABLE softs (id int PRIMARY KEY, owner_id text, name text, deleted_at timestamptz);
` + goodsSQL + `;
CREATE TABLE events (region text, id int, owner_id text, body text, PRIMARY KEY (region, id)) PARTITION BY LIST (region);
CREATE TABLE events_north PARTITION OF events FOR VALUES IN ('north');
CREATE TABLE events_south (id int NOT NULL, body text, owner_id text, region text NOT NULL);
ALTER TABLE events ATTACH PARTITION events_south FOR VALUES IN ('south');
CREATE TABLE events_rest PARTITION OF events DEFAULT;
CREATE TABLE keyed (owner_id int, id int, n int, on_ bool, at timestamp, PRIMARY KEY (owner_id, id));
CREATE TABLE exact (id bigint PRIMARY KEY, owner_id text, amount numeric, big bigint, meta json, tag bigint NOT NULL DEFAULT 0);
CREATE SEQUENCE tags;
INSERT INTO notes (id, owner_id, title) SELECT note_id, 'u' || o, 'pair' FROM generate_series(0, 4) o, generate_series(1, 3) i, LATERAL (SELECT ('00000000-0000-4000-9000-' || lpad((o * 10 + i)::text, 12, '0'))::uuid AS note_id) k;
INSERT INTO exact (id, owner_id, amount) SELECT 900000 + o * 10 + i, 'u' || o, i FROM generate_series(0, 4) o, generate_series(1, 3) i;
INSERT INTO levels (id, level, name) SELECT g, g % 5, 'level ' || g FROM generate_series(1, 500) g;
INSERT INTO goods (id, name) SELECT g, 'good ' || g FROM generate_series(1, 1200) g;
`

// goodsSQL is apart because the table is dropped and made anew.
const goodsSQL = `CREATE TABLE goods (id int PRIMARY KEY, name text, tags text[], size int DEFAULT 1, label text DEFAULT 'x')`

// convergenceConfig is the gateway's configuration but for the databases.
const convergenceConfig = `
auto_init: true
catalog: {poll_interval: 300ms}
http: {listen: "127.0.0.1:%[1]d"}
limits: {drain: 3s, requests_per_second: 100000, burst: 100000}
auth: {jwt: {secret: %[2]q}}
log: {format: text}
collections:
  notes:
    table: public.notes
    columns: {exclude: [secret]}
    scope: {owner_id: claims.sub}
  items:
    table: public.items
    scope: [{owner_id: claims.sub}, {team_id: claims.teams}]
  levels:
    table: public.levels
    where: "row.level <= int(claims.level) && !row.archived"
  softs:
    table: public.softs
    scope: {owner_id: claims.sub}
    soft_delete: {column: deleted_at}
  goods:
    table: public.goods
    read: {roles: [reader]}
  events:
    table: public.events
    scope: {owner_id: claims.sub}
  keyed:
    table: public.keyed
    scope: {owner_id: claims.number}
    replica_identity: default
  exact:
    table: public.exact
    scope: {owner_id: claims.sub}
    lossless: true
`

// convergenceClaims are the callers, one client each. One lacks the claims that scopes and filter ask for.
var convergenceClaims = []string{
	`{"sub":"u0","number":0,"teams":[1,2],"level":1,"roles":["reader"]}`,
	`{"sub":"u1","number":1,"teams":[2],"level":2,"roles":["editor"]}`,
	`{"sub":"u2","number":2,"teams":[],"level":0,"roles":["reader"]}`,
	`{"sub":"u3","number":3,"teams":[3,4],"level":3,"roles":["editor","reader"]}`,
	`{"sub":"u0","number":"0","teams":["5"],"level":2,"roles":["reader"]}`,
	`{"sub":"u4","roles":["reader"]}`,
	`{"sub":"u1","number":1,"teams":[1,2,3,4,5],"level":3,"roles":[]}`,
	`{"sub":"u2","number":2,"teams":3,"level":1,"roles":["reader"]}`,
}

// syncCaller is what the test itself makes of a caller's claims, so that it doesn't trust the policies that it tests.
type syncCaller struct {
	sub    string
	number string // empty: none
	teams  []string
	level  int // below 0: none
	reader bool
}

func parseSyncCaller(text string) (c syncCaller, claims map[string]any) {
	d := json.NewDecoder(strings.NewReader(text))
	d.UseNumber()
	if err := d.Decode(&claims); err != nil {
		panic(err)
	}
	c.sub, c.level = claims["sub"].(string), -1
	if n, ok := claims["number"]; ok {
		c.number = fmt.Sprint(n)
	}
	if l, ok := claims["level"].(json.Number); ok {
		n, _ := l.Int64()
		c.level = int(n)
	}
	switch t := claims["teams"].(type) {
	case []any:
		for _, v := range t {
			c.teams = append(c.teams, fmt.Sprint(v))
		}
	case json.Number:
		c.teams = []string{t.String()}
	}
	for _, r := range claims["roles"].([]any) {
		c.reader = c.reader || r == "reader"
	}
	return c, claims
}

// collections are those that the caller may read.
func (c syncCaller) collections() []string {
	all := []string{"events", "exact", "items", "keyed", "levels", "notes", "softs"}
	if c.reader {
		all = append(all, "goods")
	}
	return all
}

// where is the policy of a collection as SQL, written without the product's help.
func (c syncCaller) where(collection string) string {
	owner := "owner_id = '" + c.sub + "'"
	switch collection {
	case "items":
		if len(c.teams) > 0 {
			return "(" + owner + " OR team_id IN (" + strings.Join(c.teams, ",") + "))"
		}
	case "levels":
		return fmt.Sprintf("level <= %d AND NOT archived", c.level)
	case "softs":
		return owner + " AND deleted_at IS NULL"
	case "goods":
		return "true"
	case "keyed":
		if c.number == "" {
			return "false"
		}
		return "owner_id = " + c.number
	}
	return owner
}

// maySee is the same policy over a received document.
func (c syncCaller) maySee(collection string, doc json.RawMessage) bool {
	var row struct {
		OwnerID   any    `json:"owner_id"`
		TeamID    *int   `json:"team_id"`
		Level     *int   `json:"level"`
		Archived  bool   `json:"archived"`
		DeletedAt any    `json:"deleted_at"`
		Secret    any    `json:"secret"`
		Double    *int64 `json:"double"`
	}
	if err := json.Unmarshal(doc, &row); err != nil || row.Secret != nil || row.Double != nil {
		return false
	}
	owner := row.OwnerID == c.sub
	switch collection {
	case "items":
		for _, t := range c.teams {
			owner = owner || row.TeamID != nil && t == fmt.Sprint(*row.TeamID)
		}
	case "levels":
		return row.Level != nil && *row.Level <= c.level && !row.Archived
	case "softs":
		return owner && row.DeletedAt == nil
	case "goods":
		return c.reader
	case "keyed":
		return c.number != "" && fmt.Sprint(row.OwnerID) == c.number
	}
	return owner
}

// convergenceKeys are the expressions of doc_id.
var convergenceKeys = map[string]string{
	"items":  `'["' || list_id || '","' || lang || '"]'`,
	"events": `'["' || region || '","' || id || '"]'`,
	"keyed":  `'["' || owner_id || '","' || id || '"]'`,
}

// oracleSQL selects doc_id and document of everything that the caller must hold; columns are the table's present ones
// with their types.
func (c syncCaller) oracleSQL(collection string, columns [][2]string) string {
	var list []string
	for _, col := range columns {
		name := col[0]
		if collection == "exact" && (col[1] == "bigint" || col[1] == "numeric") {
			list = append(list, fmt.Sprintf("t.%q::text AS %q", name, name))
			continue
		}
		if name == "secret" || name == "double" {
			continue
		}
		list = append(list, fmt.Sprintf("t.%q", name))
	}
	key := "id::text"
	if k := convergenceKeys[collection]; k != "" {
		key = k
	}
	return fmt.Sprintf(`SELECT %s, (SELECT row_to_json(doc)::text FROM (SELECT %s) AS doc) FROM %s AS t WHERE %s`,
		key, strings.Join(list, ", "), collection, c.where(collection))
}

-- The application that the built-in world runs: one table for each kind of policy, and a log of the pushes that were applied.
CREATE TYPE mood AS ENUM ('calm', 'busy', 'angry');
CREATE TABLE edits (seq bigserial PRIMARY KEY, at timestamptz NOT NULL DEFAULT clock_timestamp(), xid xid8 NOT NULL DEFAULT pg_current_xact_id(), "table" text NOT NULL, token text NOT NULL);
CREATE FUNCTION log_edit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
	IF TG_OP = 'INSERT' AND TG_TABLE_NAME LIKE 'events%' AND EXISTS (SELECT FROM edits e WHERE e.token = new.token) THEN
		RETURN NULL; -- the row moves to another partition
	END IF;
	IF new.token LIKE 'push %' THEN -- also where it stood there before: it must not be written twice
		INSERT INTO edits ("table", token) VALUES (TG_TABLE_NAME, new.token);
	END IF;
	RETURN NULL;
END $$;
CREATE FUNCTION both_names(current jsonb, incoming jsonb, base jsonb) RETURNS jsonb LANGUAGE sql AS $$
	SELECT CASE WHEN incoming IS NULL THEN 'null'::jsonb
		WHEN current->>'name' LIKE '%7%' THEN NULL
		ELSE incoming || jsonb_build_object('name', left(concat(current->>'name', ' + ', incoming->>'name'), 200)) END $$;

CREATE TABLE teams (id int PRIMARY KEY, name text NOT NULL);
INSERT INTO teams SELECT g, 'team ' || g FROM generate_series(1, 5) g;
CREATE TABLE tasks (id uuid PRIMARY KEY, owner_id text NOT NULL, team_id int REFERENCES teams ON DELETE SET NULL, title text, mood mood DEFAULT 'calm',
	tags text[], meta jsonb, n int NOT NULL DEFAULT 0, secret text DEFAULT 'hidden', token text);
CREATE TABLE steps (task_id uuid REFERENCES tasks ON DELETE CASCADE, n int, owner_id text, body text, token text, PRIMARY KEY (task_id, n));
ALTER TABLE steps ALTER body SET STORAGE EXTERNAL;
CREATE TABLE notes (id text PRIMARY KEY, owner_id text, title text, body text, photo text, extra jsonb, files text[], token text, deleted_at timestamptz);
ALTER TABLE notes ALTER body SET STORAGE EXTERNAL;
CREATE TABLE events (region text, id int, owner_id text, body text, at timestamp, token text, PRIMARY KEY (region, id)) PARTITION BY LIST (region);
CREATE TABLE events_north PARTITION OF events FOR VALUES IN ('north', 'k1', 'k2', 'k3');
CREATE TABLE events_south (token text, id int NOT NULL, at timestamp, body text, owner_id text, region text NOT NULL);
ALTER TABLE events ATTACH PARTITION events_south FOR VALUES IN ('south', 'k4', 'k5', 'k6');
CREATE TABLE events_rest PARTITION OF events DEFAULT;
CREATE TABLE prices (id bigint PRIMARY KEY, org int NOT NULL, amount numeric CHECK (amount > -900), big bigint, double bigint GENERATED ALWAYS AS (id * 2) STORED,
	meta json, history bigint[], token text);
CREATE TABLE levels (id int PRIMARY KEY, level int, archived bool NOT NULL DEFAULT false, name text, token text);
CREATE TABLE goods (id int PRIMARY KEY, name text, label text DEFAULT 'x', at timestamptz DEFAULT now());
INSERT INTO goods SELECT g, 'good ' || g FROM generate_series(1, 300) g;

CREATE TRIGGER log_edit AFTER INSERT OR UPDATE OF token ON tasks FOR EACH ROW EXECUTE FUNCTION log_edit();
CREATE TRIGGER log_edit AFTER INSERT OR UPDATE OF token ON steps FOR EACH ROW EXECUTE FUNCTION log_edit();
CREATE TRIGGER log_edit AFTER INSERT OR UPDATE OF token ON notes FOR EACH ROW EXECUTE FUNCTION log_edit();
CREATE TRIGGER log_edit AFTER INSERT OR UPDATE OF token ON events FOR EACH ROW EXECUTE FUNCTION log_edit();
CREATE TRIGGER log_edit AFTER INSERT OR UPDATE OF token ON prices FOR EACH ROW EXECUTE FUNCTION log_edit();
CREATE TRIGGER log_edit AFTER INSERT OR UPDATE OF token ON levels FOR EACH ROW EXECUTE FUNCTION log_edit();

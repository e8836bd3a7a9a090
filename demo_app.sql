-- The database of a to-do application, as its authors might have written it. It knows nothing of walgate.

CREATE TABLE users (
    id         uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    name       text NOT NULL,
    email      text NOT NULL UNIQUE,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE teams (
    id         uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    name       text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE team_members (
    team_id   uuid NOT NULL REFERENCES teams ON DELETE CASCADE,
    user_id   uuid NOT NULL REFERENCES users ON DELETE CASCADE,
    joined_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (team_id, user_id)
);

CREATE TABLE lists (
    id         uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    owner_id   uuid NOT NULL REFERENCES users,
    team_id    uuid REFERENCES teams, -- NULL: a private list
    name       text NOT NULL,
    color      text NOT NULL DEFAULT 'blue',
    updated_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE todos (
    id            uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    list_id       uuid NOT NULL REFERENCES lists ON DELETE CASCADE,
    owner_id      uuid NOT NULL REFERENCES users,
    team_id       uuid REFERENCES teams,
    title         text NOT NULL CHECK (length(title) BETWEEN 1 AND 200),
    done          boolean NOT NULL DEFAULT false,
    due           date,
    photo_id      text,
    comment_count integer NOT NULL DEFAULT 0,
    created_at    timestamptz NOT NULL DEFAULT now(),
    updated_at    timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX todos_list ON todos (list_id);

CREATE TABLE comments (
    id         uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    todo_id    uuid NOT NULL REFERENCES todos ON DELETE CASCADE,
    author_id  uuid NOT NULL REFERENCES users,
    owner_id   uuid NOT NULL REFERENCES users, -- owner and team of the todo, kept by triggers for the access rules
    team_id    uuid REFERENCES teams,
    body       text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX comments_todo ON comments (todo_id);

-- The application's own triggers.

CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.updated_at := clock_timestamp();
    RETURN NEW;
END $$;
CREATE TRIGGER lists_touch BEFORE UPDATE ON lists FOR EACH ROW EXECUTE FUNCTION touch();
CREATE TRIGGER todos_touch BEFORE UPDATE ON todos FOR EACH ROW EXECUTE FUNCTION touch();

CREATE FUNCTION comment_belongs() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    SELECT owner_id, team_id INTO NEW.owner_id, NEW.team_id FROM todos WHERE id = NEW.todo_id;
    RETURN NEW;
END $$;
CREATE TRIGGER comments_belong BEFORE INSERT ON comments FOR EACH ROW EXECUTE FUNCTION comment_belongs();

CREATE FUNCTION count_comments() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        UPDATE todos SET comment_count = comment_count + 1 WHERE id = NEW.todo_id;
    ELSE
        UPDATE todos SET comment_count = comment_count - 1 WHERE id = OLD.todo_id;
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER comments_count AFTER INSERT OR DELETE ON comments FOR EACH ROW EXECUTE FUNCTION count_comments();

CREATE FUNCTION comments_follow() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE comments SET owner_id = NEW.owner_id, team_id = NEW.team_id WHERE todo_id = NEW.id;
    RETURN NULL;
END $$;
CREATE TRIGGER todos_comments AFTER UPDATE ON todos FOR EACH ROW
    WHEN (OLD.owner_id <> NEW.owner_id OR OLD.team_id IS DISTINCT FROM NEW.team_id) EXECUTE FUNCTION comments_follow();

-- Some people and what they have to do.

INSERT INTO users (id, name, email) VALUES
    ('a0000000-0000-4000-8000-000000000001', 'Ana', 'ana@example.com'),
    ('b0000000-0000-4000-8000-000000000002', 'Ben', 'ben@example.com'),
    ('c0000000-0000-4000-8000-000000000003', 'Cleo', 'cleo@example.com');

INSERT INTO teams (id, name) VALUES
    ('70000000-0000-4000-8000-000000000001', 'Design'),
    ('70000000-0000-4000-8000-000000000002', 'Kitchen');

INSERT INTO team_members (team_id, user_id) VALUES
    ('70000000-0000-4000-8000-000000000001', 'a0000000-0000-4000-8000-000000000001'),
    ('70000000-0000-4000-8000-000000000001', 'b0000000-0000-4000-8000-000000000002'),
    ('70000000-0000-4000-8000-000000000002', 'b0000000-0000-4000-8000-000000000002'),
    ('70000000-0000-4000-8000-000000000002', 'c0000000-0000-4000-8000-000000000003');

INSERT INTO lists (id, owner_id, team_id, name, color) VALUES
    ('10000000-0000-4000-8000-000000000001', 'a0000000-0000-4000-8000-000000000001', NULL, 'Ana''s inbox', 'green'),
    ('10000000-0000-4000-8000-000000000002', 'b0000000-0000-4000-8000-000000000002', NULL, 'Ben''s inbox', 'red'),
    ('10000000-0000-4000-8000-000000000003', 'a0000000-0000-4000-8000-000000000001',
     '70000000-0000-4000-8000-000000000001', 'New logo', 'violet'),
    ('10000000-0000-4000-8000-000000000004', 'c0000000-0000-4000-8000-000000000003',
     '70000000-0000-4000-8000-000000000002', 'Summer menu', 'orange');

INSERT INTO todos (list_id, owner_id, team_id, title, due, photo_id)
SELECT l.id, l.owner_id, l.team_id, t.title, t.due, t.photo
FROM (VALUES
    ('Ana''s inbox', 'Call the dentist', current_date + 2, NULL),
    ('Ana''s inbox', 'Renew the passport', current_date + 30, 'passport.jpg'),
    ('Ben''s inbox', 'Buy a birthday present', current_date + 5, NULL),
    ('Ben''s inbox', 'Mend the bicycle', NULL, 'flat-tyre.jpg'),
    ('New logo', 'Collect three drafts', current_date + 7, 'draft-1.png'),
    ('New logo', 'Ask Ben what he thinks', NULL, NULL),
    ('New logo', 'Check it in black and white', NULL, NULL),
    ('Summer menu', 'Taste the cold soup', current_date + 1, NULL),
    ('Summer menu', 'Find a supplier of cherries', NULL, NULL)
) AS t (list, title, due, photo)
JOIN lists l ON l.name = t.list;

INSERT INTO comments (todo_id, author_id, body)
SELECT id, owner_id, 'Started on this.' FROM todos WHERE photo_id IS NOT NULL;

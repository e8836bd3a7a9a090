-- What pushes leave behind. Only walgate.pushes is published, and only its inserts.

-- One row per push, and a second one where it gave rows their keys: written in the push's own transaction, they mark it in
-- the stream as this client's.
CREATE TABLE walgate.pushes (
    id         bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    subject    text NOT NULL,                    -- of the token
    client_id  text NOT NULL,
    locals     json,                             -- of the second row: [{"collection", "doc_id", "local_id"}]
    created_at timestamptz NOT NULL DEFAULT now()
);

-- What became of each change that has an id, so that a repeated push is answered as the first was.
CREATE TABLE walgate.outcomes (
    subject    text   NOT NULL,
    client_id  text   NOT NULL,
    change_id  text   NOT NULL,
    hash       bytea  NOT NULL,                  -- of the change: an id must not come back with another content
    push_id    bigint NOT NULL,                  -- walgate.pushes.id
    outcome    json   NOT NULL,                  -- status, doc_id, policy, columns
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (subject, client_id, change_id)
);
CREATE INDEX outcomes_created_at ON walgate.outcomes (created_at);

-- Which row the source made of what a client names by an id of its own.
CREATE TABLE walgate.local_ids (
    subject    text   NOT NULL,
    client_id  text   NOT NULL,
    collection text   NOT NULL,
    local_id   text   NOT NULL,
    doc_id     text   NOT NULL,
    push_id    bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (subject, client_id, collection, local_id)
);
CREATE INDEX local_ids_doc_id ON walgate.local_ids (subject, client_id, collection, doc_id);

-- What walgate knows of files. Only walgate.attachments is published, and only its inserts; the bytes are in the blob store.

-- One row per event, written in the event's own transaction: the stream orders it with the rows.
CREATE TABLE walgate.attachments (
    id            bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    attachment_id text   NOT NULL,
    event         "char" NOT NULL,               -- 'u' uploaded, 'd' deleted, 'm' its bytes are missing from the store, 'r' they are back
    size          bigint NOT NULL,
    content_type  text   NOT NULL,
    sha256        bytea  NOT NULL,
    subject       text   NOT NULL,               -- of the uploader's token
    client_id     text,                          -- null: not private to a device
    scopes        uuid[],                        -- in which the uploader may write; null: all
    created_at    timestamptz NOT NULL DEFAULT now()
);

-- The present state of each id that was ever uploaded.
CREATE TABLE walgate.files (
    attachment_id      text   PRIMARY KEY,
    event_id           bigint NOT NULL,          -- walgate.attachments.id of the latest event
    state              "char" NOT NULL,          -- 'u' there, 'd' deleted, 'm' missing
    storage_key        text   COLLATE "C" NOT NULL UNIQUE, -- in the order of the store's listing
    parts              bigint[],                 -- sizes; null: one object at storage_key, else storage_key.0, .1 …; 0: there is no such object
    size               bigint NOT NULL,
    content_type       text   NOT NULL,
    filename           text   NOT NULL DEFAULT '',
    sha256             bytea  NOT NULL,
    subject            text   NOT NULL,
    client_id          text,
    scopes             uuid[],
    created_at         timestamptz NOT NULL DEFAULT now(),
    deleted_at         timestamptz,
    unreferenced_since timestamptz,
    bytes_gone         boolean NOT NULL DEFAULT false
);
CREATE INDEX files_unreferenced ON walgate.files (unreferenced_since) WHERE unreferenced_since IS NOT NULL;
CREATE INDEX files_bytes_to_delete ON walgate.files (attachment_id) WHERE state = 'd' AND NOT bytes_gone;

-- Uploads under way, each with what it reserves of its subject's quota. Kind gone: its objects are to be deleted.
CREATE TABLE walgate.uploads (
    id            uuid   PRIMARY KEY,
    kind          text   NOT NULL CHECK (kind IN ('put', 'tus', 'direct', 'gone')),
    attachment_id text   NOT NULL,
    subject       text   NOT NULL,
    client_id     text,
    storage_key   text   COLLATE "C" NOT NULL UNIQUE,
    length        bigint,                        -- null: not said
    received      bigint NOT NULL DEFAULT 0,
    parts         bigint[],                      -- as in walgate.files
    hash          bytea,                         -- state of the SHA-256 over what was received
    content_type  text   NOT NULL DEFAULT '',
    filename      text   NOT NULL DEFAULT '',
    sha256        bytea,                         -- that the bytes should have
    reserved      bigint NOT NULL,
    created_at    timestamptz NOT NULL DEFAULT now(),
    expires_at    timestamptz NOT NULL
);
CREATE INDEX uploads_expires_at ON walgate.uploads (expires_at);

-- A file counts as used until its bytes are gone.
CREATE TABLE walgate.quotas (
    subject  text   PRIMARY KEY,
    used     bigint NOT NULL DEFAULT 0 CHECK (used >= 0),
    reserved bigint NOT NULL DEFAULT 0 CHECK (reserved >= 0)
);

-- With which scopes a client last asked for its manifest.
CREATE TABLE walgate.manifests (
    subject    text NOT NULL,
    client_id  text NOT NULL,
    scope_hash text NOT NULL,
    whole_from bigint   NOT NULL DEFAULT 0,      -- positions below it are of other scopes
    run_from   bigint   NOT NULL DEFAULT 0,      -- a listing from 0 under way: where it began
    pages      bigint[] NOT NULL DEFAULT '{}',   -- and the ends of its last pages
    seen_at    timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (subject, client_id)
);
CREATE INDEX manifests_seen_at ON walgate.manifests (seen_at);

-- Secrets that all instances share.
CREATE TABLE walgate.secrets (
    name  text  PRIMARY KEY,
    value bytea NOT NULL
);
INSERT INTO walgate.secrets (name, value) VALUES ('signing_key', sha256(convert_to(gen_random_uuid()::text || gen_random_uuid()::text || gen_random_uuid()::text, 'UTF8')));

-- One row: how far the care of the files has come, and what its last rounds found.
CREATE TABLE walgate.care (
    one           boolean PRIMARY KEY DEFAULT true CHECK (one),
    swept_at      timestamptz,
    reconciled_at timestamptz,
    progress      json NOT NULL DEFAULT '{}',    -- of the round under way
    result        json NOT NULL DEFAULT '{}'     -- of the last rounds that ended
);
INSERT INTO walgate.care DEFAULT VALUES;

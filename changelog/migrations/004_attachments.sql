-- What rows refer to which attachments, which bytes exist, and what each scope is to do about them. All of it is a state, not a
-- history: written by the leader's appends (docs/decisions/attachment-tables.md).

-- Who refers to what. A bag: a document's fill and its changes may both put a row here; a removal takes all copies.
CREATE TABLE walgate.attachment_references (
    attachment uuid    NOT NULL,                  -- hash of the attachment's id
    scope      uuid    NOT NULL,
    document   uuid    NOT NULL,                  -- hash of collection and doc_id
    fill       integer NOT NULL                   -- the collection's fill under which it was written
);
CREATE INDEX attachment_references_key ON walgate.attachment_references (attachment, scope, document);

-- Which bytes exist: the latest event of each attachment.
CREATE TABLE walgate.attachment_bytes (
    key          uuid PRIMARY KEY,
    id           text   NOT NULL,
    event        bigint NOT NULL,                 -- walgate.attachments.id in the source
    state        "char" NOT NULL,                 -- u uploaded, d deleted, m missing from the store
    size         bigint NOT NULL,
    content_type text   NOT NULL,
    sha256       bytea,
    created_at   timestamptz NOT NULL,
    home         uuid,                            -- the scope of its uploader, which holds it until the first row names it
    version      bigint NOT NULL,
    fill         integer NOT NULL                 -- the fill of the bytes under which it was written
);

-- Scopes that named an attachment when somebody uploaded it who may not write there.
CREATE TABLE walgate.attachment_withheld (
    attachment uuid NOT NULL,
    scope      uuid NOT NULL,
    PRIMARY KEY (attachment, scope)
);

-- The latest operation of each attachment in each scope.
CREATE TABLE walgate.attachment_operations (
    attachment   uuid   NOT NULL,
    scope        uuid   NOT NULL,
    version      bigint NOT NULL,
    op           "char" NOT NULL,                 -- u download, d delete, m neither: the store lost the bytes
    id           text   NOT NULL,
    size         bigint NOT NULL,
    content_type text   NOT NULL,
    sha256       bytea,
    created_at   timestamptz NOT NULL,
    PRIMARY KEY (attachment, scope)
);
CREATE INDEX attachment_operations_scope ON walgate.attachment_operations (scope, version);
CREATE INDEX attachment_operations_version ON walgate.attachment_operations (version);
CREATE INDEX attachment_operations_deleted ON walgate.attachment_operations (version) WHERE op = 'd'; -- for expiry

-- How far existing rows have been looked through for references.
CREATE TABLE walgate.attachment_fills (
    fill       integer PRIMARY KEY,
    collection integer NOT NULL,                  -- 0: the bytes
    version    bigint  NOT NULL,                  -- where it began
    position   text[]  NOT NULL DEFAULT '{}',     -- key of the last row
    rows       bigint  NOT NULL DEFAULT 0,
    estimate   bigint  NOT NULL DEFAULT 0,
    done       boolean NOT NULL DEFAULT false,
    swept      boolean NOT NULL DEFAULT false,    -- what earlier fills wrote is gone
    started_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

ALTER TABLE walgate.collections ADD COLUMN refill bigint NOT NULL DEFAULT 0; -- version of the last raise of the floor that isn't retention's
ALTER TABLE walgate.checkpoint ADD COLUMN attachments_floor bigint NOT NULL DEFAULT 0; -- delete operations below it were dropped

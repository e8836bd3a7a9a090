-- The change log. Everything here is written by the leader only.

-- One row: where the log stands. It is updated in the transaction that appends.
CREATE TABLE walgate.checkpoint (
    one              boolean PRIMARY KEY DEFAULT true CHECK (one),
    epoch            bigint  NOT NULL,            -- raised by each new leader
    writer           bigint  NOT NULL,            -- the epoch of whoever wrote last
    history          text    NOT NULL CHECK (history ~ '^[0-9a-f]{4}$'),
    version          bigint  NOT NULL,            -- the newest version that readers may see
    floor            bigint  NOT NULL,            -- the oldest from which any client may continue
    lsn              pg_lsn  NOT NULL,            -- all commits of the source that end at or before it are logged
    source_system    text    NOT NULL,
    source_timeline  bigint  NOT NULL,
    storage_system   text    NOT NULL,
    storage_timeline bigint  NOT NULL,
    config_revision  bigint  NOT NULL,
    written_at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT deposed_leader CHECK (writer = epoch) -- a leader of an older epoch can't write: its update violates this
) WITH (fillfactor = 10);

CREATE TABLE walgate.collections (
    id           integer PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    name         text NOT NULL UNIQUE,
    fingerprint  text NOT NULL,                   -- of the policy that the log was written under
    shape        text NOT NULL,                   -- of the table, as last seen
    floor        bigint NOT NULL,
    floor_reason text NOT NULL,
    stopped      text NOT NULL DEFAULT '',        -- why nothing of it is logged; empty: running
    retention    interval NOT NULL
);

-- One row per change and scope that it touches, in version order.
CREATE TABLE walgate.changes (
    version    bigint  NOT NULL,
    tx         bigint  NOT NULL,                  -- version of the first change of the same source transaction
    scope      uuid    NOT NULL,                  -- hash of collection, scope columns and values
    collection integer NOT NULL,
    op         "char"  NOT NULL,                  -- u upsert, d delete, l left the scope
    size       integer NOT NULL,                  -- bytes of data
    doc_id     text    NOT NULL,
    data       json,                              -- the document, of an upsert
    guard      bytea,                             -- what a filter on claims reads, before and after
    changed    bytea                              -- bit set by attnum of the columns that an update changed; null: all
) PARTITION BY RANGE (version);
CREATE INDEX changes_version ON walgate.changes (version);
CREATE INDEX changes_scope ON walgate.changes (scope, version);

-- One row per source transaction that logged something.
CREATE TABLE walgate.transactions (
    tx  bigint NOT NULL,
    xid bigint NOT NULL                           -- its 64-bit top-level transaction id in the source
) PARTITION BY RANGE (tx);
CREATE INDEX transactions_tx ON walgate.transactions (tx);
CREATE INDEX transactions_xid ON walgate.transactions (xid);

-- What walgate keeps in the source database, wherever the change log lives.

-- One row: whether a change log was ever started for this source, and its last history.
CREATE TABLE walgate.source (
    one     boolean PRIMARY KEY DEFAULT true CHECK (one),
    history text NOT NULL,
    noted   bigint NOT NULL DEFAULT 0            -- rises while the log does, here first: which of the two was restored shows
);

-- The tables that walgate altered, with the replica identity that uninstall gives back.
CREATE TABLE walgate.tables (
    relation        regclass PRIMARY KEY,
    former_identity "char" NOT NULL,             -- pg_class.relreplident
    former_index    regclass,                    -- of identity i
    joined_at       timestamptz NOT NULL DEFAULT now()
);

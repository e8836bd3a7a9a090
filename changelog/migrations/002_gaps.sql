-- Versions that no leader of this history ever issued: those between the two. Each gap ends where a leader went on after the
-- log's server had been started anew. Only this history's are kept.
CREATE TABLE walgate.gaps (
    after_version bigint PRIMARY KEY,             -- the newest version that the log held
    first_version bigint NOT NULL CHECK (first_version > after_version)
);
ALTER TABLE walgate.checkpoint ADD COLUMN server_started timestamptz; -- when the log's server was started, as of the last claim
ALTER TABLE walgate.checkpoint ADD COLUMN noted bigint NOT NULL DEFAULT 0; -- follows walgate.source in the source, at most one behind

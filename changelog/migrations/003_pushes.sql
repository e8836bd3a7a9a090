-- Which transactions are pushes of whom. Null for all others.
ALTER TABLE walgate.transactions
    ADD COLUMN last      bigint,                  -- the newest version of the transaction
    ADD COLUMN push      bigint,                  -- walgate.pushes.id in the source
    ADD COLUMN subject   text,
    ADD COLUMN client_id text,
    ADD COLUMN locals    json;                    -- [{"collection", "doc_id", "local_id"}]
CREATE INDEX transactions_push ON walgate.transactions (push) WHERE push IS NOT NULL;
CREATE INDEX transactions_client ON walgate.transactions (subject, client_id, tx) WHERE push IS NOT NULL;

-- A hash of collection and doc_id: finds a document's changes without a wide index (docs/decisions/document-lookups.md).
ALTER TABLE walgate.changes ADD COLUMN document bigint;
CREATE INDEX changes_document ON walgate.changes (document, version);

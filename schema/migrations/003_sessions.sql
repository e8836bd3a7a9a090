-- Where the devices stand that leave that to the server. Positions are those that clients see: a version, the history and the
-- hash of the scopes.
CREATE TABLE walgate.sessions (
    subject      text NOT NULL,                   -- of the token
    device_uuid  text NOT NULL,                   -- plays the part of client_id
    sync_uuid    uuid NOT NULL UNIQUE,            -- of the present session: each opening makes a new one
    last_sync    text,                            -- what the device has confirmed; null: nothing yet
    max_checkin  text NOT NULL,                   -- where the log stood when the session was opened
    pulled       text,                            -- how far the session's pulls have handed out; null: not at all
    opened_at    timestamptz NOT NULL DEFAULT now(),
    completed_at timestamptz,                     -- of the present session
    PRIMARY KEY (subject, device_uuid)
);
CREATE INDEX sessions_opened_at ON walgate.sessions (opened_at);

-- A local id is forgotten only some time after its device has confirmed the row.
ALTER TABLE walgate.local_ids ADD COLUMN confirmed_at timestamptz;
CREATE INDEX local_ids_confirmed_at ON walgate.local_ids (confirmed_at) WHERE confirmed_at IS NOT NULL;

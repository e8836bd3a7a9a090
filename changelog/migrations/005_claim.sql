-- A random number of each taking over. Announcements carry it: one of another log, such as that of a copy of this database
-- whose instances use the same Redis, or of a leader before the present one, is told by it.
ALTER TABLE walgate.checkpoint ADD COLUMN claim bigint NOT NULL DEFAULT 0;

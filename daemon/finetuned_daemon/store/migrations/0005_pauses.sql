-- The order of the queue. Before, it was the order of the rows.
ALTER TABLE runs ADD COLUMN place INTEGER NOT NULL DEFAULT 0;
UPDATE runs SET place = key;
-- Number of the run's process, one more after each pause, and how often that one was started.
ALTER TABLE runs ADD COLUMN attempt INTEGER NOT NULL DEFAULT 1;
ALTER TABLE runs ADD COLUMN starts INTEGER NOT NULL DEFAULT 0;
UPDATE runs SET starts = 1 WHERE state <> 'QUEUED';
-- Why it is to be paused, or is: REQUESTED, DISK_FULL.
ALTER TABLE runs ADD COLUMN pause TEXT;
ALTER TABLE tasks ADD COLUMN pause_reason TEXT;
-- Checkpoint that the present process goes on from, after a pause.
ALTER TABLE runs ADD COLUMN resume_path TEXT NOT NULL DEFAULT '';
-- The call that started it, as it stands in the log.
ALTER TABLE runs ADD COLUMN request_id TEXT NOT NULL DEFAULT '';
CREATE INDEX runs_paused ON runs (key) WHERE state = 'PAUSED';

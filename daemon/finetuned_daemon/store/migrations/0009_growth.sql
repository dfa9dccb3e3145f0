-- The place behind everybody's, without a look at every run.
CREATE INDEX runs_by_place ON runs (place);
-- In the order of the queue.
DROP INDEX runs_active;
CREATE INDEX runs_active ON runs (place, key, device) WHERE state IN ('QUEUED', 'RUNNING');
-- Runs that measured a speed, by what they trained on. Whatever is no JSON is found where it is read, not here.
CREATE INDEX runs_by_speed ON runs (iif(json_valid(parameters), json_extract(parameters, '$.data.model_path'), NULL), device, key)
    WHERE state = 'COMPLETED' AND NOT is_probe;

-- What is left of a run's log: WHOLE; THINNING, while it is made less; THINNED, where a curve and some events stand in its place; GONE.
ALTER TABLE runs ADD COLUMN log TEXT NOT NULL DEFAULT 'WHOLE';
CREATE INDEX runs_by_log ON runs (log, key);

-- What stands for a run whose events are deleted, or are about to be: its curves, thinned out. first_seq: the first of its
-- events that was there then. body: as `events/digest.py` has it.
CREATE TABLE digests (
    task_key INTEGER NOT NULL REFERENCES tasks (key) ON DELETE CASCADE,
    run INTEGER NOT NULL,
    first_seq INTEGER NOT NULL,
    body BLOB NOT NULL,
    PRIMARY KEY (task_key, run)
) WITHOUT ROWID;

-- Events of such a run that people look back at, under the numbers that they had.
CREATE TABLE kept_events (
    task_key INTEGER NOT NULL REFERENCES tasks (key) ON DELETE CASCADE,
    run INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    body BLOB NOT NULL,
    PRIMARY KEY (task_key, run, seq)
) WITHOUT ROWID;

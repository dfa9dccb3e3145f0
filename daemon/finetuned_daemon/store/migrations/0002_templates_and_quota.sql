-- The template that a task was made from, by its resource name; it may be gone since.
ALTER TABLE tasks ADD COLUMN template TEXT NOT NULL DEFAULT '';

-- Custom templates. Presets stand in the code.
CREATE TABLE templates (
    key INTEGER PRIMARY KEY AUTOINCREMENT,
    template_id TEXT NOT NULL UNIQUE,
    display_name TEXT NOT NULL UNIQUE,
    training_type TEXT NOT NULL,
    parameters TEXT NOT NULL,
    create_time INTEGER NOT NULL,
    update_time INTEGER NOT NULL,
    revision INTEGER NOT NULL
);

-- One row a checkpoint that a run has saved. It outlives the task, and the checkpoint: what is used stays used.
CREATE TABLE quota_ledger (
    key INTEGER PRIMARY KEY AUTOINCREMENT,
    time INTEGER NOT NULL,
    task_id TEXT NOT NULL,
    run INTEGER NOT NULL,
    step INTEGER NOT NULL,
    path TEXT NOT NULL
);

-- Checkpoints that a run was planned to save, so that what it has not saved yet is not promised to another.
ALTER TABLE runs ADD COLUMN planned_checkpoints INTEGER NOT NULL DEFAULT 0;
-- Checkpoints that it has saved.
ALTER TABLE runs ADD COLUMN saved_checkpoints INTEGER NOT NULL DEFAULT 0;

CREATE INDEX runs_by_output ON runs (output_dir);

-- The run only measures what a run takes.
ALTER TABLE runs ADD COLUMN is_probe INTEGER NOT NULL DEFAULT 0;
-- While a probe of the task is queued or runs: what the task was before, as JSON.
ALTER TABLE tasks ADD COLUMN before_probe TEXT;

-- What probes have measured. A row outlives its task: it corrects the estimates of this machine. `model` and `device` tell one from
-- every other of its kind; parameters and report are JSON.
CREATE TABLE measurements (
    key INTEGER PRIMARY KEY AUTOINCREMENT,
    time INTEGER NOT NULL,
    model TEXT NOT NULL,
    device TEXT NOT NULL,
    training_type TEXT NOT NULL,
    parameters TEXT NOT NULL,
    report TEXT NOT NULL
);
CREATE INDEX measurements_by_model ON measurements (model, device, training_type, key);

-- Times are microseconds since the epoch, 0 for "not yet". Parameters and progress are JSON.

CREATE TABLE meta (
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;

-- AUTOINCREMENT: the key of a deleted task never comes again.
CREATE TABLE tasks (
    key INTEGER PRIMARY KEY AUTOINCREMENT,
    task_id TEXT NOT NULL UNIQUE,
    display_name TEXT NOT NULL UNIQUE,
    training_type TEXT NOT NULL,
    parameters TEXT NOT NULL,
    device TEXT NOT NULL,
    state TEXT NOT NULL,
    phase TEXT,
    end_reason TEXT,
    end_message TEXT NOT NULL,
    run INTEGER NOT NULL,
    progress TEXT NOT NULL,
    last_checkpoint TEXT NOT NULL,
    create_time INTEGER NOT NULL,
    update_time INTEGER NOT NULL,
    start_time INTEGER NOT NULL,
    end_time INTEGER NOT NULL,
    last_seq INTEGER NOT NULL,
    revision INTEGER NOT NULL
);
CREATE INDEX tasks_by_state ON tasks (state, key);

CREATE TABLE runs (
    key INTEGER PRIMARY KEY AUTOINCREMENT,
    task_key INTEGER NOT NULL REFERENCES tasks (key) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    state TEXT NOT NULL,
    device TEXT NOT NULL,
    parameters TEXT NOT NULL,
    end_reason TEXT,
    end_message TEXT NOT NULL,
    create_time INTEGER NOT NULL,
    start_time INTEGER NOT NULL,
    end_time INTEGER NOT NULL,
    identity TEXT,
    exit_code INTEGER,
    signal TEXT NOT NULL,
    progress TEXT NOT NULL,
    last_checkpoint TEXT NOT NULL,
    run_dir TEXT NOT NULL,
    output_dir TEXT NOT NULL,
    stop TEXT,
    stop_time INTEGER NOT NULL,
    ingested_bytes INTEGER NOT NULL,
    ingested_seq INTEGER NOT NULL,
    UNIQUE (task_key, number)
);
CREATE INDEX runs_active ON runs (device, key) WHERE state IN ('QUEUED', 'RUNNING');

-- body: a serialized finetuned.v1.Event. seq is dense: tasks.last_seq, which outlives any deletion, plus one.
CREATE TABLE events (
    task_key INTEGER NOT NULL REFERENCES tasks (key) ON DELETE CASCADE,
    seq INTEGER NOT NULL,
    run INTEGER NOT NULL,
    body BLOB NOT NULL,
    PRIMARY KEY (task_key, seq)
) WITHOUT ROWID;
CREATE INDEX events_by_run ON events (task_key, run, seq);

-- Answers by the request id that a client chose, so that a repeat gets the first answer again.
CREATE TABLE requests (
    request_id TEXT PRIMARY KEY,
    digest BLOB NOT NULL,
    answer BLOB NOT NULL,
    time INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX requests_by_time ON requests (time);

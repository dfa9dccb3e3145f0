-- What somebody is to be told of, as it is sent: JSON. A row outlives its task.
CREATE TABLE notifications (
    key INTEGER PRIMARY KEY AUTOINCREMENT,
    notification_id TEXT NOT NULL UNIQUE,
    time INTEGER NOT NULL,
    task_key INTEGER NOT NULL,
    run INTEGER NOT NULL,
    cause TEXT NOT NULL,
    body TEXT NOT NULL
);
CREATE INDEX notifications_by_run ON notifications (task_key, run, cause, time);

-- A notification on each of its ways. state: PENDING, DELIVERED, GIVEN_UP. next_time: not before; 0: at once.
CREATE TABLE deliveries (
    notification INTEGER NOT NULL REFERENCES notifications (key) ON DELETE CASCADE,
    channel TEXT NOT NULL,
    state TEXT NOT NULL,
    attempts INTEGER NOT NULL,
    next_time INTEGER NOT NULL,
    done_time INTEGER NOT NULL,
    error TEXT NOT NULL,
    PRIMARY KEY (notification, channel)
) WITHOUT ROWID;
CREATE INDEX deliveries_due ON deliveries (state, channel, next_time);

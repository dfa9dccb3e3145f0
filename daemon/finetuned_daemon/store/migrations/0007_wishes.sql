-- The call that wished for a stop or a pause, until the run has ended or is paused.
ALTER TABLE runs ADD COLUMN wish_request_id TEXT NOT NULL DEFAULT '';

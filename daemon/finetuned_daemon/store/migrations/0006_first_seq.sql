-- The oldest event that is kept. Numbers of events that were deleted are never used again.
ALTER TABLE tasks ADD COLUMN first_seq INTEGER NOT NULL DEFAULT 1;

-- How many runs in a row were started by themselves after memory ran out, this one included; 0: somebody started it.
ALTER TABLE runs ADD COLUMN retry INTEGER NOT NULL DEFAULT 0;

"""SQLite: tasks, runs, events, answered requests. The only place with SQL."""

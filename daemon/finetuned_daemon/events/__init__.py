"""Events: one durable log per task with dense sequence numbers, and its watchers."""

"""Files and durable batches: endpoints, the runner, and their storage in SQLite and on disk."""

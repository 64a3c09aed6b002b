"""Files and batches on disk: SQLite beside the files. Synchronous; the server runs it on a thread of its own."""

"""One kind of prompt pair per file. A file added here is a new task."""

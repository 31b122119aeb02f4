"""One task family per file. Adding a file here adds a task."""

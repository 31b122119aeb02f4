"""Transcoder files: every published format is read here, and ours are written."""

"""The pieces of sequential searches over edges."""

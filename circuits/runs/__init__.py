"""Run folders: results on disk that are found again instead of computed again."""

"""Run folders: a finished run is found again, an interrupted one resumes."""

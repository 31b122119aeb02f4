"""The `circuits` command."""

"""The `circuits` command."""

from circuits.cli.main import main

__all__ = ["main"]

"""The `ossia` command: `app` with all its commands, and `main`, its entry point."""

from ossia.cli import commands
from ossia.cli.app import app, main, reporting

__all__ = ["app", "commands", "main", "reporting"]

"""The `deinfer` command; one module per subcommand."""

from deinfer.cli.main import main

__all__ = ["main"]

"""The command line: the only module that reads argv. Commands import what they need when they run."""

from tutelage.cli.main import main

__all__ = ["main"]

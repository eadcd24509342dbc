"""A module that is also a command: `python -m pipelines.serve` is `aegan serve`."""

import sys
from importlib import import_module


def run_command(name: str) -> None:
    """Do what `aegan NAME` does with the arguments of this process.

    The command line is imported by its name: it knows all commands, and no command knows it.
    """
    sys.argv.insert(1, name)
    import_module("pipelines.cli").main()

"""What a command of `aegan` makes of its arguments, without doing it."""

from collections.abc import Sequence
from typing import Any

import typer.main

from pipelines import cli


def options_of(command: str, arguments: Sequence[str]) -> dict[str, Any]:
    group: Any = typer.main.get_command(cli.app)
    context = group.commands[command].make_context(command, list(arguments))
    return dict(context.params)

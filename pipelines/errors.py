"""Errors that a user can cure are one line; everything else is a bug and keeps its traceback."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Names the thing, what was expected and the cure; shown without a traceback."""


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage's main function and turn a UserError into one line and exit code 1."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)

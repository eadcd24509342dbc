"""Errors that a user can cure are one line; everything else is a bug and keeps its traceback."""

import logging
import signal
import sys
from collections.abc import Callable

from pipelines.names import shown


class UserError(Exception):
    """Names the thing, what was expected and the cure; shown without a traceback."""


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage's main function: plain log lines, one line for a UserError, 130 for Ctrl-C."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is a Ctrl-C
    try:
        main()
    except UserError as error:
        # A file's name may be in it, which must not steer the terminal.
        lines = (shown(line) for line in f"error: {error}".split("\n"))
        sys.exit("\n".join(lines))
    except KeyboardInterrupt:
        sys.exit(130)

"""Errors that a user can cure are one line; everything else is a bug and keeps its traceback."""

import logging
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from pipelines.base.names import shown


class UserError(Exception):
    """Names the thing, what was expected and the cure; shown without a traceback."""


def shown_lines(text: str) -> str:
    """The lines of a text; a file's name in it must not steer the terminal."""
    return "\n".join(map(shown, text.split("\n")))


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return shown_lines(super().format(record))


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage's main function: plain log lines, one for a user's error, 130 for Ctrl-C."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is a Ctrl-C
    try:
        main()
    except UserError as error:
        _end(error)
    except ValueError as error:
        from aegan.config import ConfigError  # needs packages, which `make clean` does without

        if not isinstance(error, ConfigError):
            raise
        _end(error)
    except KeyboardInterrupt:
        sys.exit(130)


def _end(error: Exception) -> NoReturn:
    """End with a user's error as the last line, also in a file that takes all output."""
    sys.stdout.flush()
    sys.exit(shown_lines(f"error: {error}"))

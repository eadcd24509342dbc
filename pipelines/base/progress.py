"""Progress for a person: a bar in a terminal, a plain line now and then elsewhere."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

LINE_INTERVAL_SECONDS = 15.0

Item = TypeVar("Item")
log = logging.getLogger(__name__)


def progress(items: Iterable[Item], label: str, *, unit: str, total: int | None) -> Iterator[Item]:
    """The items themselves, counted on stderr while they pass."""
    if sys.stderr.isatty():
        yield from tqdm(items, desc=label, unit=f" {unit}", total=total, leave=False)
        return
    last = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - last > LINE_INTERVAL_SECONDS:
            last = time.monotonic()
            log.info("%s: %d%s %s", label, count, f" of {total}" if total else "", unit)

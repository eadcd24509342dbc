"""The list of files that are in no shard: a table that is safe to open in a spreadsheet."""

import csv
from collections import Counter
from collections.abc import Iterable
from io import StringIO
from pathlib import Path

from pipelines.base.files import read_bytes
from pipelines.base.names import shown

FORMULA_SIGNS = "=+-@＝＋－＠"  # a spreadsheet would run what follows

KEPT_OUT_REASON = "near duplicate of a reference image"  # that preprocess.keep_out names


def kind_of_reason(reason: str) -> str:
    """`not an image` of `not an image: a video`."""
    return reason.partition(":")[0]


def write_quarantine(rows: Iterable[tuple[str, str]], file: Path) -> Counter[str]:
    """A line for every (source, reason); returns how many there are of each kind."""
    kinds: Counter[str] = Counter()
    with file.open("w", newline="", encoding="utf-8") as out:
        quarantine = csv.writer(out, lineterminator="\n")
        quarantine.writerow(["source", "reason"])
        for source, reason in rows:
            quarantine.writerow([cell(source), cell(reason)])
            kinds[kind_of_reason(reason)] += 1
    return kinds


def read_quarantine(file: Path) -> list[tuple[str, str]]:
    """Each (source, reason), escaped as they were written; UserError where the table is missing."""
    text = read_bytes(file, stage="preprocess").decode("utf-8")
    return [(source, reason) for source, reason in list(csv.reader(StringIO(text)))[1:]]


def cell(text: str) -> str:
    """A name or reason as the table has it."""
    text = shown(text)
    return f"'{text}" if text.startswith(tuple(FORMULA_SIGNS)) else text


def summary(kinds: Counter[str], files: int) -> str:
    """`26 of 163 files skipped (14 not an image, 12 duplicate)`."""
    counts = ", ".join(f"{count} {shown(kind)}" for kind, count in kinds.most_common())
    return f"{kinds.total()} of {files} files skipped" + (f" ({counts})" if counts else "")

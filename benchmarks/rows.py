"""Rows of measurements in a JSON file, and as a table of means and standard errors."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aegan.files import write_json
from benchmarks.machine import describe
from pipelines.base.errors import UserError

Row = dict[str, Any]


class Results:
    """Rows that are in the file as soon as they are added; a repeated command goes on with them.

    With `keys`, which name a line of the table, the file has the mean and the standard error of
    every other number of its rows, one of which is a seed's, under `summary`.
    """

    def __init__(
        self,
        file: Path | None,
        settings: dict[str, Any],
        *,
        keys: Sequence[str] = (),
        **facts: Any,
    ) -> None:
        self.file, self.rows, self.keys = file, [], keys
        self.report = {"machine": describe("torch", "scikit-learn"), "settings": settings} | facts
        if file is not None and file.exists():
            before = json.loads(file.read_text(encoding="utf-8"))
            if before["settings"] != json.loads(json.dumps(settings)):
                raise UserError(f"{file} holds results of other settings; name another file")
            self.report, self.rows = before, before["rows"]

    def find(self, **keys: Any) -> list[Row]:
        """The rows with these values."""
        return [row for row in self.rows if keys.items() <= row.items()]

    def add(self, *rows: Row) -> None:
        self.rows += rows
        if self.file is not None:
            summary = {"summary": summarise(self.rows, self.keys)} if self.keys else {}
            write_json(self.file, self.report | summary | {"rows": self.rows})


def groups(rows: Iterable[Row], keys: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    """The rows of each line of a table, by the values of its keys, None where a row has none."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return found


def summarise(rows: Iterable[Row], keys: Sequence[str]) -> list[Row]:
    """Of each group its number of rows, and mean and standard error of every score."""
    summary = []
    for group, chosen in groups(rows, keys).items():
        line: Row = dict(zip(keys, group, strict=True)) | {"seeds": len(chosen)}
        numbers = [name for name, value in chosen[0].items() if isinstance(value, int | float)]
        for name in (name for name in numbers if name not in {*keys, "seed"}):
            values = [row[name] for row in chosen]
            line[name] = {"mean": statistics.mean(values), "standard_error": error_of(values)}
        summary.append(line)
    return summary


def as_table(rows: Iterable[Row], keys: Sequence[str], scores: Mapping[str, int]) -> str:
    """A line for each group of rows: mean and standard error over seeds, with so many digits."""
    lines = []
    for group, chosen in groups(rows, keys).items():
        cells = [
            mean_and_error([row[score] for row in chosen], digits) if score in chosen[0] else ""
            for score, digits in scores.items()
        ]
        lines.append(["" if key is None else f"{key}" for key in group] + cells)
    return table([name.replace("_", " ") for name in (*keys, *scores)], lines)


def error_of(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None of a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def mean_and_error(values: Sequence[float], digits: int) -> str:
    """`mean ± standard error` over seeds; of one value that value alone."""
    mean, error = f"{statistics.mean(values):.{digits}f}", error_of(values)
    return mean if error is None else f"{mean} ± {error:.{digits}f}"


def table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [headings, ["---"] * len(headings), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)

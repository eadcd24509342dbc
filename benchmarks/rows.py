"""Rows of measurements in a JSON file, and as a table of means and standard errors."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from aegan.files import write_json
from benchmarks.machine import describe
from pipelines.base.errors import UserError

Row = dict[str, Any]
Scores = dict[str, list[float]]  # one value a seed


class Results:
    """Rows that are in the file as soon as they are added; a repeated command goes on with them."""

    def __init__(self, file: Path | None, settings: dict[str, Any], **facts: Any) -> None:
        self.file, self.rows = file, []
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
            write_json(self.file, self.report | {"rows": self.rows})


def per_seed(scores: Iterable[dict[str, float]]) -> Scores:
    """The scores of all seeds, by name."""
    scores = list(scores)
    return {name: [round(score[name], 5) for score in scores] for name in scores[0]}


def mean_and_error(values: Sequence[float], digits: int) -> str:
    """`mean ± standard error` over seeds; of one value that value alone."""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [headings, ["---"] * len(headings), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)

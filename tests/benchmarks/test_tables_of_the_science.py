"""The tables of docs/science.md say what the files of results say."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.trained import ROOT

PAGE = ROOT / "docs/science.md"
FILE = re.compile(r"[\w/]+\.json")
MEAN_AND_ERROR = re.compile(r"(\d*\.?\d+) ± (\d*\.?\d+)")
NAMES = ("arm", "steps", "step", "samples_from", "loss", "width")  # of a line in a file of results
SCALES = (1, 100, 1000)  # figures are also given in percent and in thousandths


class TableRow(NamedTuple):
    line: int
    cells: list[str]
    files: tuple[Path, ...]  # named since the heading


def table_rows() -> Iterator[TableRow]:
    files: dict[Path, None] = {}
    for number, line in enumerate(PAGE.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("#"):
            files = {}
        elif not line.startswith("|"):
            for name in FILE.findall(line):
                folder = ROOT if "/" in name else ROOT / "benchmarks/collapse/results"
                files[folder / name] = None
        elif "±" in line:
            cells = [cell.strip(" *`") for cell in line.strip("|").split("|")]
            yield TableRow(number, cells, tuple(files))


ROWS = list(table_rows())


def summary(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text(encoding="utf-8"))["summary"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"line {row.line}")
def test_a_row_of_a_table_is_that_of_its_file(row: TableRow) -> None:
    assert row.files, "no file of results is named above this table"
    lines = list(itertools.chain.from_iterable(map(summary, row.files)))
    named = {cell.replace(",", "") for cell in row.cells}
    for name in NAMES:
        if named & {str(line.get(name)) for line in lines}:
            lines = [line for line in lines if str(line.get(name)) in named]
    for cell in row.cells:
        for stated in MEAN_AND_ERROR.findall(cell):
            assert any(is_of(stated, line) for line in lines), (cell, row.files)


def is_of(stated: tuple[str, str], line: dict[str, Any]) -> bool:
    """Whether a line of results has this mean with this error, rounded as stated."""
    scores = [score for score in line.values() if isinstance(score, dict)]
    return any(
        all(
            is_rounded(text, scale * value)
            for text, value in zip(stated, (score["mean"], score["standard_error"]), strict=True)
        )
        for score, scale in itertools.product(scores, SCALES)
        if score["standard_error"] is not None
    )


def is_rounded(text: str, value: float) -> bool:
    decimals = len(text.partition(".")[2])
    return abs(float(text) - value) <= 0.5001 * 10**-decimals

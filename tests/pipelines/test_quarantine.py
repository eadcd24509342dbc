import csv
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.ingest.quarantine import summary, write_quarantine

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def read(file: Path) -> list[tuple[str, str]]:
    with file.open(newline="", encoding="utf-8") as content:
        return [(row["source"], row["reason"]) for row in csv.DictReader(content)]


@pytest.mark.parametrize(
    "name", ["=1+1.png", "+1.png", "-1.png", "@SUM(A1).png", "\t=1.png", "\r=1.png", "＝1.png"]
)
def test_no_source_name_is_a_formula_in_a_spreadsheet(tmp_path, name):
    write_quarantine([(name, f"duplicate: {name}")], tmp_path / "quarantine.csv")
    ((source, reason),) = read(tmp_path / "quarantine.csv")
    assert source[0] in ("'", "\\")
    assert reason.startswith("duplicate: ")
    assert source.isprintable()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(TEXT, TEXT), max_size=5))
def test_any_source_name_is_one_cell_that_is_safe_to_show(tmp_path, rows):
    kinds = write_quarantine(rows, tmp_path / "quarantine.csv")
    found = read(tmp_path / "quarantine.csv")
    assert len(found) == len(rows) == kinds.total()
    for cell in (cell for row in found for cell in row):
        assert not cell.startswith(("=", "+", "-", "@", "\t", "\r"))
        assert not set(cell) & set("\0\a\b\t\n\r\x1b\x7f\x9b\u202e\u2028\u2066")


def test_a_summary_of_skipped_source_files_begins_with_the_most_frequent_reason():
    assert summary(Counter({"duplicate": 9, "not an image": 17}), 163) == (
        "26 of 163 files skipped (17 not an image, 9 duplicate)"
    )

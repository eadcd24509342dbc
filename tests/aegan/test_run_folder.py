import json

import pytest

from aegan.training.run_folder import NAMES, RunFolder, append_row, step_of

ROWS = [{"step": 2, "image_reconstruction": 0.5}, {"step": 4, "image_reconstruction": 0.25}]


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_rows(ROWS[:1])
    append_row(folder.log, ROWS[1])
    return folder


def test_rows_are_read_as_they_were_written(folder):
    assert folder.rows() == ROWS
    assert folder.newest_row() == ROWS[-1]


def test_a_folder_without_a_log_has_no_rows(tmp_path):
    assert RunFolder(tmp_path).rows() == RunFolder(tmp_path).system_rows() == []
    assert RunFolder(tmp_path).newest_row() is None


@pytest.mark.fault("killed processes")
@pytest.mark.parametrize("length", range(1, len(json.dumps(ROWS[1]))))
def test_a_row_that_was_cut_off_at_any_character_is_passed_over(folder, length):
    with folder.log.open("ab") as file:
        file.write(json.dumps(ROWS[1]).encode()[:length])
    assert folder.rows() == ROWS
    assert folder.newest_row() == ROWS[-1]
    folder.system.write_bytes(folder.log.read_bytes().replace(b"step", b"time"))
    assert [row["time"] for row in folder.system_rows()] == [2, 4]


@pytest.mark.fault("damaged files")
def test_lines_that_are_no_rows_are_passed_over(folder):
    folder.log.write_bytes(b"\xff\n[1]\n3\n{}\n\n" + folder.log.read_bytes())
    assert folder.rows() == ROWS


def test_pictures_are_found_by_step_and_kind_and_nothing_else_is(tmp_path):
    folder = RunFolder(tmp_path)
    names = [
        folder.picture(step, kind) for step in (5, 10) for kind in ("reconstructions", "samples")
    ]
    folder.samples.mkdir()
    for file in (*names, folder.samples / "step-1-samples.png", folder.samples / "mine.png"):
        file.touch()
    assert folder.pictures() == names
    assert [step_of(file) for file in folder.pictures("samples")] == [5, 10]


def test_names_on_the_disk_stay_what_they_are():
    assert NAMES.checkpoint(500).as_posix() == "checkpoints/step-00000500"
    assert NAMES.picture(500, "samples").as_posix() == "samples/step-00000500-samples.png"
    files = (NAMES.log, NAMES.system, NAMES.facts, NAMES.outcome, NAMES.stop)
    assert [*map(str, files)] == [
        "metrics.jsonl",
        "system.jsonl",
        "run.json",
        "outcome.json",
        "stop",
    ]

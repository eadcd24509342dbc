import errno
import json
import math
from pathlib import Path

import pytest

from aegan.files import new_file, write_json
from pipelines.base.errors import UserError
from pipelines.base.files import clear_disk_errors, new_folder, read_json


def write_half(file: Path) -> None:
    file.write_text("half")
    raise InterruptedError


def fill_disk(file: Path) -> None:
    file.write_text("half")
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.fault("killed processes")
def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    file = tmp_path / "deep/er/figures.json"
    write_json(file, {"name": "é", "values": [1, 2.5]})
    with pytest.raises(InterruptedError), new_file(file) as temporary:
        write_half(temporary)
    assert json.loads(file.read_text(encoding="utf-8")) == {"name": "é", "values": [1, 2.5]}
    assert list(file.parent.iterdir()) == [file]


def test_files_of_the_longest_names_are_written_side_by_side(tmp_path):
    files = [tmp_path / (letter + "é" * 127) for letter in "ab"]  # 255 bytes each
    with new_file(files[0]) as first, new_file(files[1]) as second:
        first.write_text("a")
        second.write_text("b")
    assert sorted(tmp_path.iterdir()) == files
    assert [file.read_text() for file in files] == ["a", "b"]


def test_a_number_that_json_cannot_hold_changes_no_file(tmp_path):
    write_json(tmp_path / "figure.json", 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "figure.json", math.nan)
    assert (tmp_path / "figure.json").read_text() == "1\n"


@pytest.mark.fault("killed processes")
def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    for content in ("first", "second"):
        with new_folder(tmp_path / "out", written=("*",)) as temporary:
            (temporary / content).touch()
    with pytest.raises(InterruptedError), new_folder(tmp_path / "out", written=("*",)) as temporary:
        write_half(temporary / "third")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["out", "second"]


def test_a_link_to_a_larger_disk_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with new_folder(tmp_path / "out", written=("*",)) as temporary:
        (temporary / "file").touch()
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk/file").exists()


@pytest.mark.fault("disk full")
def test_a_full_disk_is_one_line_that_names_the_place_and_leaves_nothing(tmp_path):
    file = tmp_path / "out.json"
    with (
        pytest.raises(UserError, match=f"no space left for {file}"),
        clear_disk_errors(file),
        new_file(file) as temporary,
    ):
        fill_disk(temporary)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "not found: run the stage train first"),
        (b'{"step": 1', "is damaged: run the stage train again"),
        (b"[1]", "is damaged: run the stage train again"),
        (b"\xff", "is damaged: run the stage train again"),
    ],
)
def test_what_a_stage_has_not_written_or_not_whole_is_one_line_that_names_it(
    tmp_path, content, said
):
    file = tmp_path / "run.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=f"{file} {said}"):
        read_json(file, stage="train")

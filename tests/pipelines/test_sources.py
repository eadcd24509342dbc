import io
import os
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from pipelines import sources
from pipelines.errors import UserError
from pipelines.sources import RawFile, Skipped, read_archive, read_folder, without_repetitions

UNSAFE = ["/etc/passwd", "../../outside.png", "a/../../b.png", "C:/windows.png", "..\\outside.png"]
SYSTEM = ["__MACOSX/a.png", ".DS_Store", "a/Thumbs.db", "a/.hidden/b.png", "desktop.ini"]


def outcome(entries) -> dict[str, bytes | str]:
    """Content of each file read, reason of each file skipped."""
    return {e.source: e.content if isinstance(e, RawFile) else e.reason for e in entries}


def read(file: Path) -> dict[str, bytes | str]:
    return outcome(read_archive(file, "the archive"))


def make_zip(file: Path, contents: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return file


def make_tar(file: Path, contents: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(file, mode) as archive:
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file


def test_a_folder_gives_every_file_with_its_path_shallow_ones_first(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    for name in ("a/b/deep.png", "z.png", "a/x.png", "notes.txt"):
        (tmp_path / name).write_bytes(name.encode())
    names = [entry.source for entry in read_folder(tmp_path)]
    assert names == ["notes.txt", "z.png", "a/x.png", "a/b/deep.png"]
    assert outcome(read_folder(tmp_path))["a/x.png"] == b"a/x.png"


def test_links_and_special_files_of_a_folder_are_listed_and_not_read(tmp_path):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_bytes(b"secret")
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "file.png").symlink_to(secret / "key")
    (folder / "folder").symlink_to(secret)
    os.mkfifo(folder / "pipe")
    assert outcome(read_folder(folder)) == {
        "file.png": "link: not followed",
        "folder": "link: not followed",
        "pipe": "special file",
    }


def test_a_file_name_that_is_no_unicode_is_still_read(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(b"x")
    assert outcome(read_folder(tmp_path)) == {"caf�.png": b"x"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_listed(tmp_path):
    (tmp_path / "a.png").touch(mode=0)
    assert outcome(read_folder(tmp_path)) == {"a.png": "not readable: Permission denied"}


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_zip_and_tar_give_the_files_whatever_the_archive_is_called(tmp_path, mode):
    contents = {"b.png": b"b", "data/a.png": b"a"}
    assert read(make_tar(tmp_path / "one.zip", contents, mode)) == contents
    assert read(make_zip(tmp_path / "two.tar", contents)) == contents


def test_a_tar_that_ends_with_a_zip_is_read_as_a_tar(tmp_path):
    inner = make_zip(tmp_path / "inner.zip", {"a.png": b"a"}).read_bytes()
    assert read(make_tar(tmp_path / "outer.tar", {"inner.zip": inner})) == {"inner.zip": inner}


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_unsafe_names_are_listed_and_never_written(tmp_path, make):
    file = make(tmp_path / "archive", dict.fromkeys([*UNSAFE, "good.png"], b"x"))
    found = read(file)
    assert found.pop("good.png") == b"x"
    assert {name: reason.split(":")[0] for name, reason in found.items()} == dict.fromkeys(
        UNSAFE, "unsafe path"
    )
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_files_of_operating_systems_are_listed(tmp_path, make):
    found = read(make(tmp_path / "archive", dict.fromkeys(SYSTEM, b"x")))
    assert found == dict.fromkeys(SYSTEM, "hidden or system file")


def test_links_and_devices_in_archives_are_listed(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in {
            "soft": tarfile.SYMTYPE,
            "hard": tarfile.LNKTYPE,
            "device": tarfile.CHRTYPE,
            "pipe": tarfile.FIFOTYPE,
        }.items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    assert read(tmp_path / "a.tar") == {
        "soft": "link: not followed",
        "hard": "link: not followed",
        "device": "special file",
        "pipe": "special file",
    }
    assert read(tmp_path / "a.zip") == {"link.png": "link: not followed"}


def test_a_file_above_the_limit_is_listed(tmp_path):
    size = sources.MAX_FILE_BYTES + 1
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(size)
    assert outcome(read_folder(tmp_path))["large.png"].startswith(f"too large: {size} bytes")


def test_a_decompression_bomb_in_a_zip_is_listed_and_one_in_a_tar_ends_the_run(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 4 * 1024**2)
    zeros = bytes(4 * 1024**2)
    found = read(make_zip(tmp_path / "bomb.zip", {"zeros.png": zeros, "good.png": b"x"}))
    assert found["zeros.png"].startswith("decompression bomb")
    assert found["good.png"] == b"x"
    bomb = make_tar(tmp_path / "bomb.tar.xz", {f"{i}.png": zeros for i in range(3)}, "w:xz")
    with pytest.raises(UserError, match="decompression bomb"):
        read(bomb)


def test_a_zip_that_lies_about_sizes_does_not_get_more_than_it_says(tmp_path):
    file = make_zip(tmp_path / "lies.zip", {"a.png": bytes(5 * 1024**2)})
    content = bytearray(file.read_bytes())
    central = content.index(b"PK\x01\x02")
    content[central + 24 : central + 28] = struct.pack("<I", 10)
    file.write_bytes(content)
    assert read(file)["a.png"].startswith("damaged in the archive")


def test_an_encrypted_or_damaged_zip_entry_is_listed_and_the_rest_read(tmp_path):
    file = make_zip(tmp_path / "a.zip", {"a.png": b"a" * 99, "b.png": b"b" * 99, "c.png": b"c"})
    content = bytearray(file.read_bytes())
    for header, flags in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        content[content.index(header) + flags] |= 1  # the first entry says it is encrypted
    content[content.index(b"b.png") + len(b"b.png")] ^= 0xFF  # the second's first byte
    file.write_bytes(content)
    found = read(file)
    assert found["a.png"] == "encrypted"
    assert found["b.png"].startswith("damaged in the archive")
    assert found["c.png"] == b"c"


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
def test_an_archive_that_ends_early_is_one_clear_error(tmp_path, mode):
    contents = {f"{i}.png": os.urandom(5000) for i in range(20)}
    file = make_tar(tmp_path / "a.tar", contents, mode)
    file.write_bytes(file.read_bytes()[:50_000])
    with pytest.raises(UserError, match=r"the archive is (damaged \(.+\)|neither)"):
        read(file)


def test_something_else_is_no_archive(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match="neither a folder nor a sound zip or tar archive"):
        read(tmp_path / "a.zip")


def test_repeated_contents_and_names_are_read_once():
    entries = [
        RawFile("data/a.png", b"1"),
        RawFile("data/data/a.png", b"1"),
        RawFile("data/a.png", b"2"),
        Skipped("x", "link: not followed"),
        RawFile("b.png", b"2"),
    ]
    assert list(without_repetitions(entries)) == [
        entries[0],
        Skipped("data/data/a.png", "identical file: data/a.png"),
        Skipped("data/a.png", "name occurs twice"),
        entries[3],
        entries[4],
    ]

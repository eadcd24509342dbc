import gzip
import io
import os
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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


def test_a_zip_whose_entries_share_their_bytes_is_a_decompression_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 4 * 1024**2)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", os.urandom(30_000) + bytes(4 * 1024**2 - 30_000))
        archive.filelist *= 100
    with pytest.raises(UserError, match="decompression bomb"):
        read(tmp_path / "a.zip")


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


@pytest.mark.parametrize("member", [1, 15, 29])
def test_a_bad_header_in_a_tar_is_an_error_and_not_its_end(tmp_path, member):
    file = make_tar(tmp_path / "a.tar", {f"{i}.png": b"%d" % i for i in range(30)})
    content = bytearray(file.read_bytes())
    content[member * 1024 + 3] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"the archive is damaged \(a header is bad"):
        read(file)


@pytest.mark.parametrize("bytes_left", [10 * 1024, 10 * 1024 - 512, 10 * 1024 + 100])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_tar_without_its_end_is_an_error_wherever_it_was_cut(tmp_path, bytes_left, pack):
    file = make_tar(tmp_path / "a.tar", {f"{i}.png": b"%d" % i for i in range(30)})
    file.write_bytes(pack(file.read_bytes()[:bytes_left]))
    with pytest.raises(UserError, match="the archive is damaged"):
        read(file)


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_the_checksum_at_the_end_of_a_compressed_tar_is_checked(tmp_path, mode):
    file = make_tar(tmp_path / "a.tar", {"a.png": bytes(100_000)}, mode)
    assert len(read(file)) == 1
    content = bytearray(file.read_bytes())
    content[-6 if mode == "w:gz" else -4] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="the archive is damaged"):
        read(file)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
@pytest.mark.parametrize("size", [sources.MAX_HEADER_BYTES + 1, 2**35, -512])
def test_a_long_header_in_a_tar_is_refused_before_it_is_read(tmp_path, kind, size):
    file = make_tar(tmp_path / "a.tar", {"a.png": b"a"})
    long = tarfile.TarInfo("long")
    long.type, long.size = kind, size
    header = long.tobuf(tarfile.GNU_FORMAT)
    file.write_bytes(file.read_bytes()[:1024] + header + bytes(100 * 1024))
    with pytest.raises(UserError, match="a header is larger than 65536 bytes"):
        read(file)


def test_long_names_in_a_tar_are_read(tmp_path):
    contents = {f"{'folder/' * 40}{i}.png": b"%d" % i for i in range(300)}
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=format) as archive:
            for name, content in contents.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        assert read(tmp_path / "a.tar") == contents


def test_a_negative_size_in_a_tar_does_not_send_the_reader_back(tmp_path):
    negative = tarfile.TarInfo("a.png")
    negative.size = -1024
    (tmp_path / "a.tar").write_bytes(negative.tobuf(tarfile.GNU_FORMAT) * 3 + bytes(1024))
    with pytest.raises(UserError, match="a size is negative"):
        read(tmp_path / "a.tar")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_zip_entry_is_listed_however_it_is_packed(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        archive.writestr("a.png", os.urandom(3000))
        archive.writestr("b.png", b"b")
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[50:90] = bytes(40)
    (tmp_path / "a.zip").write_bytes(content)
    found = read(tmp_path / "a.zip")
    assert found["a.png"].startswith("damaged in the archive: ")
    assert found["b.png"] == b"b"


@pytest.mark.parametrize("header", [b"PK\x01\x02", b"PK\x03\x04"])
def test_a_zip_name_that_only_claims_to_be_utf8_is_no_traceback(tmp_path, header):
    file = make_zip(tmp_path / "a.zip", {"é.png": b"a", "b.png": b"b"})
    content = bytearray(file.read_bytes())
    content[content.index("é".encode(), content.index(header))] = 0xFF
    file.write_bytes(content)
    if header == b"PK\x01\x02":  # the table of contents
        with pytest.raises(UserError, match=r"the archive is damaged \('utf-8' codec"):
            read(file)
    else:
        found = read(file)
        assert found["é.png"].startswith("damaged in the archive: 'utf-8' codec")
        assert found["b.png"] == b"b"


def test_a_zip_entry_without_a_name_is_listed(tmp_path):
    file = make_zip(tmp_path / "a.zip", {"a.png": b"x"})
    file.write_bytes(file.read_bytes().replace(b"a.png", b"\0.png"))  # names end at a zero
    assert read(file) == {"": "unsafe path"}


@pytest.mark.parametrize("mode", ["zip", "w", "w:gz", "w:bz2", "w:xz"])
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(places=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=3))
def test_damage_anywhere_is_one_error_or_listed_and_loses_nothing_in_silence(
    tmp_path, mode, places
):
    contents = {f"{i}{'long' * 30}.png": b"%d" % i * 99 for i in range(5)}
    file = tmp_path / "archive"
    make_zip(file, contents) if mode == "zip" else make_tar(file, contents, mode)
    content = bytearray(file.read_bytes())
    for where, change in places:
        content[int(where * (len(content) - 1))] ^= change
    file.write_bytes(content)
    try:
        entries = list(read_archive(file, "the archive"))
    except UserError:
        return
    assert len(entries) == 5
    if mode != "w":  # contents have a checksum
        read = [entry.content for entry in entries if isinstance(entry, RawFile)]
        assert set(read) <= set(contents.values())


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

import gzip
import io
import os
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import tracemalloc
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.base import names
from pipelines.base.errors import UserError
from pipelines.ingest import archives, entries
from pipelines.ingest.entries import RawFile, Skipped, is_container_name
from pipelines.ingest.sources import read_archive, read_folder, without_repetitions

ODD_NAMES = [  # pictures that people have, and names made to reach outside
    "Screenshot 2024-01-01 at 3.04.05\u202fPM.png",
    "全角\u3000空白.png",
    "nbsp\u00a0name.png",
    "family\U0001f468\u200d\U0001f469\u200d\U0001f467.png",
    "می\u200cخواهم.png",
    "soft\u00adhyphen.png",
    "colon 12:30:45.png",
    "2024:01:02/a.png",
    "back\\slash/a.png",
    "C:/windows.png",
    "=1+1.png",
    "red\x1b[31m.png",
    "two\nlines.png",
    "gnp.\u202eexe",
    "/etc/passwd",
    "../../outside.png",
    "a/../../b.png",
]
PNG = b"\x89PNG\r\n\x1a\n"
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
    assert [entry.source for entry in read_folder(tmp_path)] == [
        "notes.txt",
        "z.png",
        "a/x.png",
        "a/b/deep.png",
    ]
    assert outcome(read_folder(tmp_path))["a/x.png"] == b"a/x.png"


@pytest.mark.fault("damaged files")
def test_a_pipe_in_a_source_folder_is_listed_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert outcome(read_folder(tmp_path)) == {"pipe.png": "special file"}


def test_links_in_a_source_folder_are_followed_to_images_archives_and_folders(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "faces").mkdir(parents=True)
    for name in ("one.png", "faces/two.png", "password"):
        (elsewhere / name).write_bytes(b"secret" if name == "password" else PNG + name.encode())
    make_zip(elsewhere / "set.zip", {"three.png": b"three"})
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("one.png", "faces", "password", "set.zip", "nothing"):
        (folder / name).symlink_to(elsewhere / name)
    assert outcome(read_folder(folder)) == {
        "one.png": PNG + b"one.png",
        "faces/two.png": PNG + b"faces/two.png",
        "three.png": b"three",
        "password": "link: leads to a file that is no image, not followed",
        "nothing": "link: leads nowhere",
    }


@pytest.mark.fault("damaged files")
def test_links_in_a_source_folder_that_lead_in_a_circle_end(tmp_path):
    folder = tmp_path / "images"
    (folder / "a/b").mkdir(parents=True)
    (folder / "a/b/one.png").write_bytes(PNG)
    for name, target in {"a/b/up": "..", "self": ".", "above": "../..", "b": "a/b"}.items():
        (folder / name).symlink_to(target)
    (folder / "to itself").symlink_to("to itself")
    found = outcome(read_folder(folder))
    assert found.pop("a/b/one.png") == PNG
    assert found.pop("to itself") == "link: leads nowhere"
    assert set(found) == {"a/b/up", "self", "above", "b"}
    assert {reason.partition(":")[0] for reason in found.values()} == {"link"}


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
def test_a_link_to_another_file_system_is_not_followed_from_a_source_folder(tmp_path):
    (tmp_path / "other").symlink_to("/dev/shm")
    (tmp_path / "null.png").symlink_to("/dev/null")
    reason = "link: leads to another file system, not followed"
    assert outcome(read_folder(tmp_path)) == {"other": reason, "null.png": reason}


@pytest.mark.fault("damaged files")
def test_paths_longer_than_the_system_allows_are_listed_and_the_rest_is_read(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    step = "d" * 250
    handles = [os.open(tmp_path, os.O_RDONLY)]
    try:
        for _ in range(18):  # more than 4,096 bytes
            os.mkdir(step, dir_fd=handles[-1])
            handles.append(os.open(step, os.O_RDONLY, dir_fd=handles[-1]))
            picture = os.open("b.png", os.O_WRONLY | os.O_CREAT, dir_fd=handles[-1])
            os.write(picture, PNG)
            os.close(picture)
        found = outcome(read_folder(tmp_path))
    finally:
        for handle in reversed(handles[:-1]):  # which pytest could not remove either
            inner = os.open(step, os.O_RDONLY, dir_fd=handle)
            os.unlink("b.png", dir_fd=inner)
            os.close(inner)
            os.rmdir(step, dir_fd=handle)
        for handle in handles:
            os.close(handle)
    reasons = {content for content in found.values() if content != PNG}
    assert found["a.png"] == PNG
    assert reasons == {"folder not readable: File name too long"}
    assert len(found) > 10


READS_BAD_DISK = """
import os, subprocess, sys
from pathlib import Path
from pipelines.base.errors import UserError
from pipelines.ingest.sources import read_folder
folder = Path(sys.argv[1])
subprocess.run(["mount", "--bind", f"/proc/{os.getpid()}/mem", folder / sys.argv[2]], check=True)
try:
    for entry in read_folder(folder):
        print(entry.source, getattr(entry, "reason", "read"), sep=": ")
except UserError as error:
    print("error", error, sep=": ")
"""


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("b.png", "b.png: not readable: Input/output error"),
        ("b.zip", "error: b.zip cannot be read (Input/output error): check its disk"),
    ],
)
def test_a_source_file_at_a_bad_place_of_the_disk_is_named(tmp_path, name, told):
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / name).touch()
    alone = ["unshare", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], check=False).returncode:
        pytest.skip("only root can put a bad disk below a file")
    command = [*alone, sys.executable, "-c", READS_BAD_DISK, str(tmp_path), name]
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "a.png: read"
    assert done.stdout.splitlines()[1].startswith(told)


@pytest.mark.fault("damaged files")
def test_an_encrypted_array_in_a_source_is_one_clear_error(tmp_path):
    file = io.BytesIO()
    np.savez(file, images=np.zeros((2, 16, 16, 3), np.uint8))
    content = bytearray(file.getvalue())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the mark in the directory
    (tmp_path / "set.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"set.npz is damaged .*encrypted"):
        list(read_archive(tmp_path / "set.npz", "set.npz"))


def test_a_file_name_that_is_no_unicode_is_a_source_like_any_other(tmp_path):
    for folder, name in (("folder", b"caf\xe9.png"), ("folder/b\xfccher", b"a.png")):
        where = tmp_path / os.fsdecode(folder.encode("latin-1"))
        where.mkdir()
        (where / os.fsdecode(name)).write_bytes(name)
    expected = {"café.png": b"caf\xe9.png", "bücher/a.png": b"a.png"}
    assert outcome(read_folder(tmp_path / "folder")) == expected
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        archive.add(tmp_path / "folder", "")
    assert read(tmp_path / "a.tar") == expected


def test_a_folder_of_hidden_files_is_one_line_and_not_looked_into(tmp_path):
    (tmp_path / ".git/objects").mkdir(parents=True)
    (tmp_path / ".git/objects/a").touch()
    (tmp_path / "lost+found").mkdir()
    reason = "hidden or system file"
    assert outcome(read_folder(tmp_path)) == {".git": reason, "lost+found": reason}


@pytest.mark.fault("damaged files")
def test_a_source_file_that_vanishes_or_grows_while_it_is_read_is_listed(tmp_path, monkeypatch):
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(PNG)
    entries = read_folder(tmp_path)
    assert next(entries).source == "a.png"
    (tmp_path / "b.png").unlink()
    fstat = os.fstat

    def grow_after(handle: int) -> os.stat_result:
        before = fstat(handle)
        with (tmp_path / "c.png").open("ab") as file:
            file.write(b"more")
        return before

    monkeypatch.setattr(os, "fstat", grow_after)
    assert outcome(entries) == {
        "b.png": "not readable: it vanished while the folder was read",
        "c.png": "not readable: it changed while it was read, `make refresh` reads it again",
    }


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_zip_and_tar_give_the_files_whatever_the_archive_is_called(tmp_path, mode):
    contents = {"b.png": b"b", "data/a.png": b"a"}
    assert read(make_tar(tmp_path / "one.zip", contents, mode)) == contents
    assert read(make_zip(tmp_path / "two.tar", contents)) == contents


def test_a_tar_that_ends_with_a_zip_is_read_as_a_tar(tmp_path):
    inner = make_zip(tmp_path / "inner.zip", {"a.png": b"a"}).read_bytes()
    found = read(make_tar(tmp_path / "outer.tar", {"b.png": b"b", "inner.zip": inner}))
    assert found == {"b.png": b"b", "a.png": b"a"}


@pytest.mark.fault("names from outside")
@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_any_name_in_a_source_archive_is_kept_as_text_and_nothing_is_written(tmp_path, make):
    contents = {name: name.encode() for name in ODD_NAMES}
    file = make(tmp_path / "archive", contents)
    assert read(file) == contents
    assert list(tmp_path.iterdir()) == [file]


def is_read(name: str) -> bool:
    """Whether a name is a file's, and no system's."""
    return not names.is_system_file(archives.as_path(name)) and name.strip("/") != ""


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40).map(
    lambda text: text.rstrip("/")  # or it is a folder's
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=st.lists(TEXT.filter(is_read), min_size=1, max_size=6))
@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_any_text_is_a_name_in_a_source_archive_and_twice_the_same_is_two_files(
    tmp_path, make, found
):
    file = tmp_path / "archive"
    if make is make_zip:
        with zipfile.ZipFile(file, "w") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the same name twice
            for number, name in enumerate(found):
                entry = zipfile.ZipInfo()
                entry.filename = name
                archive.writestr(entry, b"%d" % number)
    else:
        with tarfile.open(file, "w") as archive:
            for number, name in enumerate(found):
                entry = tarfile.TarInfo(name)
                entry.size = 1
                archive.addfile(entry, io.BytesIO(b"%d" % number))
    entries = list(without_repetitions(read_archive(file, "the archive")))
    containers = [name for name in found if is_container_name(name)]
    files = [entry for entry in entries if isinstance(entry, RawFile)]
    assert len(files) == len(found) - len(containers)
    assert len({entry.source for entry in files}) == len(files)
    assert all(names.shown(entry.source).encode() for entry in files)
    assert list(tmp_path.iterdir()) == [file]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=st.sets(st.binary(min_size=1, max_size=30), min_size=1, max_size=6))
def test_any_bytes_are_a_name_in_a_source_folder(tmp_path, found):
    found = {name.replace(b"/", b"-").replace(b"\0", b"-") for name in found}
    found = {name for name in found if is_read(names.decoded(name)) and name not in (b".", b"..")}
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        for name in found:
            (Path(folder) / os.fsdecode(name)).write_bytes(name)
        entries = list(without_repetitions(read_folder(Path(folder))))
    assert len({entry.source for entry in entries}) == len(found)
    assert {e.content for e in entries if isinstance(e, RawFile)} == {
        name for name in found if not is_container_name(names.decoded(name))
    }


def test_backslashes_of_windows_archives_are_folders_of_the_source(tmp_path):
    content = {f"data\\{kind}\\{row}.png": b"%d" % row for row in range(5) for kind in "ab"}
    for make in (make_zip, make_tar):
        assert set(read(make(tmp_path / "archive", content))) == {
            f"data/{kind}/{row}.png" for row in range(5) for kind in "ab"
        }


@pytest.mark.parametrize(("raw", "name"), [("é".encode(), "é"), (b"caf\x82", "café")])
def test_a_source_zip_without_the_mark_for_utf8_has_its_names_all_the_same(tmp_path, raw, name):
    file = make_zip(tmp_path / "a.zip", {"x" * len(raw): b"a"})
    file.write_bytes(file.read_bytes().replace(b"x" * len(raw), raw))
    assert read(file) == {name: b"a"}


def test_a_name_in_a_source_is_shown_without_steering_the_terminal():
    shown = names.shown("a\x1b[31m\u202e\n\x9b\u2066\udce9\u3000é👨\u200d👩.png")
    assert shown == r"a\x1b[31m\u202e\n\x9b\u2066\udce9" + "\u3000é👨\u200d👩.png"


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_files_of_operating_systems_are_listed(tmp_path, make):
    found = read(make(tmp_path / "archive", dict.fromkeys(SYSTEM, b"x")))
    assert found == dict.fromkeys(SYSTEM, "hidden or system file")


@pytest.mark.fault("damaged files")
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
        "soft": "link: to /etc/passwd, not followed in an archive",
        "hard": "link: to /etc/passwd, not followed in an archive",
        "device": "special file",
        "pipe": "special file",
    }
    assert read(tmp_path / "a.zip") == {"link.png": "link: not followed in an archive"}


def test_a_file_above_the_limit_is_listed(tmp_path):
    size = entries.MAX_FILE_BYTES + 1
    with (tmp_path / "large.png").open("wb") as file:
        file.write(b"\0\0\0\x20ftypisom")
        file.truncate(size)
    reason = outcome(read_folder(tmp_path))["large.png"]
    assert reason.startswith(
        f"too large: {size} bytes, at most {entries.MAX_FILE_BYTES}; it is a v"
    )


def test_a_decompression_bomb_in_a_zip_is_listed_and_one_in_a_tar_ends_the_run(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(entries, "MAX_FILE_BYTES", 4 * 1024**2)
    zeros = bytes(4 * 1024**2)
    found = read(make_zip(tmp_path / "bomb.zip", {"zeros.png": zeros, "good.png": b"x"}))
    assert found["zeros.png"].startswith("decompression bomb")
    assert found["good.png"] == b"x"
    bomb = make_tar(tmp_path / "bomb.tar.xz", {f"{i}.png": zeros for i in range(3)}, "w:xz")
    with pytest.raises(UserError, match="decompression bomb"):
        read(bomb)


@pytest.mark.fault("damaged files")
def test_a_zip_whose_entries_share_their_bytes_is_a_decompression_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(entries, "MAX_FILE_BYTES", 4 * 1024**2)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", os.urandom(30_000) + bytes(4 * 1024**2 - 30_000))
        archive.filelist *= 100
    with pytest.raises(UserError, match="decompression bomb"):
        read(tmp_path / "a.zip")


@pytest.mark.fault("damaged files")
def test_a_zip_that_lies_about_sizes_does_not_get_more_than_it_says(tmp_path):
    file = make_zip(tmp_path / "lies.zip", {"a.png": bytes(5 * 1024**2)})
    content = bytearray(file.read_bytes())
    central = content.index(b"PK\x01\x02")
    content[central + 24 : central + 28] = struct.pack("<I", 10)
    file.write_bytes(content)
    assert read(file)["a.png"].startswith("damaged in the archive")


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize("name", ["a.png", "a.npy", "a.zip"])  # a file, an array, an archive
@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_that_lies_about_sizes_takes_little_memory(tmp_path, method, name):
    with zipfile.ZipFile(tmp_path / "lies.zip", "w", method) as archive:
        archive.writestr(name, bytes(32 * 1024**2))
    content = bytearray((tmp_path / "lies.zip").read_bytes())
    central = content.index(b"PK\x01\x02")
    content[central + 24 : central + 28] = struct.pack("<I", 1000)
    if method == zipfile.ZIP_LZMA:  # its header asks for a large dictionary
        header = content.index(name.encode()) + len(name)
        content[header + 5 : header + 9] = struct.pack("<I", 2**30)
    (tmp_path / "lies.zip").write_bytes(content)
    tracemalloc.start()
    try:
        with suppress(UserError):
            assert "damaged" in read(tmp_path / "lies.zip")[name]
        assert tracemalloc.get_traced_memory()[1] < 6 * 1024**2
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "method",
    [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA],
)
def test_the_files_of_a_zip_are_read_however_they_are_packed(tmp_path, method):
    contents = {"a.png": os.urandom(1024**2 + 7), "b.png": bytes(10**6), "empty.png": b""}
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    assert read(tmp_path / "a.zip") == contents


@pytest.mark.parametrize("more", [0, 1])
def test_a_zip_of_more_files_than_its_end_can_count_is_read(tmp_path, more):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", b"a")
        archive.mkdir("folder")
        archive.filelist += archive.filelist[1:] * (2**16 + 2)
    content = (tmp_path / "a.zip").read_bytes()
    end = bytearray(content[-22:])
    end[8:12] = struct.pack("<HH", 4 + more, 4 + more)  # as without zip64: modulo 2**16
    (tmp_path / "a.zip").write_bytes(content[: -22 - 20 - 56] + end)
    if more:  # an entry that is hidden
        with pytest.raises(UserError, match="65540 of 5 entries found"):
            read(tmp_path / "a.zip")
    else:
        assert read(tmp_path / "a.zip") == {"a.png": b"a"}


@pytest.mark.fault("damaged files")
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


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
def test_an_archive_that_ends_early_is_one_clear_error(tmp_path, mode):
    contents = {f"{i}.png": os.urandom(5000) for i in range(20)}
    file = make_tar(tmp_path / "a.tar", contents, mode)
    file.write_bytes(file.read_bytes()[:50_000])
    with pytest.raises(UserError, match=r"the archive is (damaged \(.+\)|neither)"):
        read(file)


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize("member", [1, 15, 29])
def test_a_bad_header_in_a_tar_is_an_error_and_not_its_end(tmp_path, member):
    file = make_tar(tmp_path / "a.tar", {f"{i}.png": b"%d" % i for i in range(30)})
    content = bytearray(file.read_bytes())
    content[member * 1024 + 3] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"the archive is damaged \(a header is bad"):
        read(file)


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize("bytes_left", [10 * 1024, 10 * 1024 - 512, 10 * 1024 + 100])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_tar_without_its_end_is_an_error_wherever_it_was_cut(tmp_path, bytes_left, pack):
    file = make_tar(tmp_path / "a.tar", {f"{i}.png": b"%d" % i for i in range(30)})
    file.write_bytes(pack(file.read_bytes()[:bytes_left]))
    with pytest.raises(UserError, match="the archive is damaged"):
        read(file)


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_the_checksum_at_the_end_of_a_compressed_tar_is_checked(tmp_path, mode):
    file = make_tar(tmp_path / "a.tar", {"a.png": bytes(100_000)}, mode)
    assert len(read(file)) == 1
    content = bytearray(file.read_bytes())
    content[-6 if mode == "w:gz" else -4] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="the archive is damaged"):
        read(file)


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
@pytest.mark.parametrize("size", [archives.MAX_HEADER_BYTES + 1, 2**35, -512])
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


@pytest.mark.fault("damaged files")
def test_a_negative_size_in_a_tar_does_not_send_the_reader_back(tmp_path):
    negative = tarfile.TarInfo("a.png")
    negative.size = -1024
    (tmp_path / "a.tar").write_bytes(negative.tobuf(tarfile.GNU_FORMAT) * 3 + bytes(1024))
    with pytest.raises(UserError, match="a size is negative"):
        read(tmp_path / "a.tar")


@pytest.mark.fault("damaged files")
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


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize("header", [b"PK\x01\x02", b"PK\x03\x04"])
def test_a_zip_name_that_only_claims_to_be_utf8_is_no_traceback(tmp_path, header):
    file = make_zip(tmp_path / "a.zip", {"é.png": b"a", "b.png": b"b"})
    content = bytearray(file.read_bytes())
    content[content.index("é".encode(), content.index(header))] = 0xFF
    file.write_bytes(content)
    if header == b"PK\x01\x02":  # the table of contents
        with pytest.raises(UserError, match=r"the archive is damaged \(a name is not"):
            read(file)
    else:
        found = read(file)
        assert found["é.png"].startswith("damaged in the archive: a name is not")
        assert found["b.png"] == b"b"


def test_a_zip_entry_without_a_name_is_a_source_that_gets_one(tmp_path):
    file = make_zip(tmp_path / "a.zip", {"a.png": b"x"})
    file.write_bytes(file.read_bytes().replace(b"a.png", b"\0.png"))  # names end at a zero
    assert list(without_repetitions(read_archive(file, ""))) == [RawFile("unnamed", b"x")]


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize("mode", ["zip", "w", "w:gz", "w:bz2", "w:xz"])
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(places=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=3))
def test_damage_anywhere_is_one_error_or_listed_and_loses_nothing_in_silence(
    tmp_path, record_property, mode, places
):
    record_property("faults", 40)
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


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize("left", [0.1, 0.5, 0.95])
def test_a_source_zip_that_was_cut_off_says_so(tmp_path, left):
    file = make_zip(tmp_path / "a.zip", {f"{i}.png": os.urandom(500) for i in range(9)})
    content = file.read_bytes()
    file.write_bytes(content[: int(left * len(content))])
    with pytest.raises(UserError, match="it is a zip archive without its end: fetch it again"):
        read(file)


def test_a_source_that_is_one_image_says_what_is_wanted(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    with pytest.raises(UserError, match="it is one image: put many into a folder"):
        read(tmp_path / "a.png")


def test_something_else_is_no_archive(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match="neither a folder nor a sound zip or tar archive"):
        read(tmp_path / "a.zip")


def test_repeated_contents_are_read_once_and_source_names_made_unique():
    entries = [
        RawFile("data/a.png", b"1"),
        RawFile("data/data/a.png", b"1"),
        RawFile("data/a.png", b"2"),
        Skipped("x", "link: not followed"),
        RawFile("b.png", b"2"),
        RawFile("data/a.png", b"3"),
        RawFile("data/a (2).png", b"4"),
        RawFile("", b"5"),
        RawFile("", b"6"),
    ]
    assert list(without_repetitions(entries)) == [
        entries[0],
        Skipped("data/data/a.png", "identical file: data/a.png"),
        RawFile("data/a (2).png", b"2"),
        entries[3],
        Skipped("b.png", "identical file: data/a (2).png"),
        RawFile("data/a (3).png", b"3"),
        RawFile("data/a (2) (2).png", b"4"),
        RawFile("unnamed", b"5"),
        RawFile("unnamed (2)", b"6"),
    ]


@pytest.mark.parametrize("pack", ["folder", make_zip, make_tar])
def test_archives_in_a_source_give_their_files_as_if_unpacked_where_they_lie(tmp_path, pack):
    inner = make_zip(tmp_path / "innermost", {"x.png": b"x"}).read_bytes()
    make_zip(tmp_path / "cats", {"cats/1.png": b"1", "deep/too-deep.zip": inner})
    make_tar(tmp_path / "dogs", {"2.png": b"2"}, "w:gz")
    contents = {
        "0.png": b"0",
        "sub/cats.zip": (tmp_path / "cats").read_bytes(),
        "sub/dogs.tgz": (tmp_path / "dogs").read_bytes(),
        "page.zip": b"<html>not found</html>",
        "empty.npz": b"",
    }
    if pack == "folder":
        for name, content in contents.items():
            (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "set" / name).write_bytes(content)
        found = outcome(read_folder(tmp_path / "set"))
    else:
        found = read(pack(tmp_path / "set", contents))
    assert found.pop("page.zip").startswith("no images within: page.zip is neither a folder nor")
    assert found.pop("empty.npz").endswith("it is an empty file")
    assert found == {
        "0.png": b"0",
        "sub/cats/1.png": b"1",
        "sub/2.png": b"2",
        "sub/deep/too-deep.zip": "archive in an archive in the source: unpack it first",
    }


@pytest.mark.fault("damaged files")
def test_a_damaged_archive_in_a_source_ends_the_run_and_names_itself(tmp_path):
    inner = make_tar(tmp_path / "inner", {"a.png": os.urandom(9000)}, "w:gz").read_bytes()
    (tmp_path / "set").mkdir()
    (tmp_path / "set/sub.tar.gz").write_bytes(inner[:-5000])
    with pytest.raises(UserError, match=r"sub.tar.gz is (damaged|neither)"):
        list(read_folder(tmp_path / "set"))
    outer = make_zip(tmp_path / "outer", {"sub/inner.zip": bytes(range(256)) * 40})
    content = bytearray(outer.read_bytes())
    content[len("sub/inner.zip") + 60] ^= 0xFF
    outer.write_bytes(content)
    with pytest.raises(UserError, match=r"sub/inner\.zip is damaged"):
        read(outer)


@pytest.mark.fault("damaged files")
def test_bombs_within_a_source_archive_count_against_the_outer_one(tmp_path, monkeypatch):
    monkeypatch.setattr(entries, "MAX_FILE_BYTES", 1024**2)
    inner = make_zip(tmp_path / "inner", {f"{i}": b"%d" % i * 2**18 for i in range(6)})
    contents = {f"{i}.zip": inner.read_bytes() for i in range(40)}
    outer = make_tar(tmp_path / "outer", contents, "w:xz")
    with pytest.raises(UserError, match="decompression bomb"):
        read(outer)


def test_a_webdataset_source_gives_images_with_classes_and_counts_their_companions(tmp_path):
    contents = {}
    for row in range(30):
        contents |= {
            f"shard/{row:03d}.cls": b"%d\n" % (row % 3),
            f"shard/{row:03d}.jpg": b"jpg%d" % row,
            f"shard/{row:03d}.json": b"{}",
            f"shard/{row:03d}.seg.png": b"png%d" % row,
        }
    contents["README.txt"] = b"alone"
    found = list(read_archive(make_tar(tmp_path / "00000.tar", contents), "a/00000.tar"))
    images = [e for e in found if isinstance(e, RawFile) and e.source.startswith("shard/")]
    assert [e.source for e in images[:2]] == ["shard/000.jpg", "shard/000.seg.png"]
    assert [e.label for e in images] == [str(row // 2 % 3) for row in range(60)]
    assert found[60:] == [
        RawFile("README.txt", b"alone"),
        Skipped("00000.tar", "companions of images, not read: 30 .cls, 30 .json"),
    ]


def test_a_source_folder_of_many_files_is_read_in_order_within_little_memory(tmp_path):
    for number in range(3000):
        (tmp_path / f"{number:05d}.png").touch()
    assert [entry.source for entry in read_folder(tmp_path)] == [
        f"{number:05d}.png" for number in range(3000)
    ]

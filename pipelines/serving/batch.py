"""`aegan encode` and `aegan reconstruct`: many image files through the networks (docs/batch.md).

Files are read in order and decoded in other processes; the networks run here. Results come in
parts, written aside and renamed: a second call does the files that no part has yet.

    OUT/batch.json                    what the parts are of; another model is refused
    OUT/latents/part-000000.parquet   `source`, `latent`, or the `reason` why there is none
    OUT/pictures/NAME.png             of `reconstruct`
    OUT/quarantine.csv                the files with a reason, of all parts
"""

import errno
import logging
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple, TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from filelock import FileLock, Timeout

import aegan
from aegan.data.file_kinds import START_BYTES, is_image
from aegan.files import write_json
from aegan.operations import BATCH_SIZE
from aegan.pictures import save_png
from pipelines.base import outside
from pipelines.base.errors import UserError
from pipelines.base.files import clear_disk_errors, clear_read_errors, read_json
from pipelines.base.names import UniqueNames, shown
from pipelines.base.progress import progress
from pipelines.bucket import storage
from pipelines.ingest.decode import available_cores
from pipelines.ingest.entries import (
    Entries,
    ListedFile,
    RawFile,
    Skipped,
    is_container_name,
)
from pipelines.ingest.quarantine import summary, write_quarantine
from pipelines.ingest.shards import write_parquet
from pipelines.ingest.sources import list_bucket, read_archive, read_folder
from pipelines.registry import tracking
from pipelines.serving.decoding import Decoded, Decoder, decode_on_cluster
from pipelines.serving.pictures import check_not_over
from pipelines.serving.served import Served, check_encoder, load

PART_BATCHES = 16  # of BATCH_SIZE files: what a run that is cut off does again, at most
NO_NAME = "name: no file in a folder can be called so"
EXPECTED = "a folder, an image, a .zip, .tar, .parquet, .npy or .npz file, or s3://bucket/prefix"

Operation = Literal["encode", "reconstruct"]
Item = TypeVar("Item")

log = logging.getLogger(__name__)


class Row(NamedTuple):
    """One file: its latent, or why there is none."""

    source: str
    latent: list[float] | None
    reason: str | None


def main(operation: Operation, source: str, out: str, model: str) -> dict[str, Any]:
    """The command: one image to the terminal or a PNG file, else `run` => what was done.

    Raises UserError.
    """
    path = Path(source).expanduser()
    with clear_read_errors(source):
        is_one = path.is_file() and not is_many(path)
    if not out and not (is_one and operation == "encode"):
        raise UserError("--out is missing: name a folder for the results")
    if is_one and out:
        check_not_over(Path(out), [path])
    served = load(model or tracking.default_model())
    check_encoder(served.model, called=served.about["model"])
    if not is_one or not (out == "" or out.lower().endswith(".png")):
        return run(operation, source, Path(out), served)
    try:
        images = aegan.read_images([path], served.model)
    except aegan.UnusableImageError as error:
        raise UserError(str(error)) from None
    if operation == "encode":
        if out:
            raise UserError(
                f"--out {out}: latents go to a folder, or without --out to the terminal"
            )
        return {"source": source, "latent": aegan.encode(served.model, images)[0].tolist()}
    with clear_disk_errors(Path(out)):
        save_png(aegan.reconstruct(served.model, images)[0], out)
    return {"source": source, "out": out}


def run(operation: Operation, source: str, out: Path, served: Served) -> dict[str, Any]:
    """Work on all files of a source that no part in `out` has yet => their numbers.

    Raises UserError.
    """
    check_encoder(served.model, called=served.about["model"])
    _check_outside(out, source)
    started = time.monotonic()
    with clear_disk_errors(out), TemporaryDirectory() as downloads:
        entries = _open(source, Path(downloads))
        with _claimed(out, operation, source, served):
            if done := {row.source for row in _rows(out)}:
                log.info("%d files are done already", len(done))
            entries = _not_done(entries, done)
            count = _work(operation, entries, out, Path(downloads), served.model)
            if not count and not done:
                raise UserError(f"no files in {shown(source)}: expected {EXPECTED}")
            bad = ((row.source, row.reason) for row in _rows(out) if row.reason is not None)
            kinds = write_quarantine(bad, out / "quarantine.csv")
    rate = count / (time.monotonic() - started)
    log.info("%s: %d files, %.0f a second, in %s", operation, count, rate, out)
    if kinds:
        log.info("%s, see %s", summary(kinds, count + len(done)), out / "quarantine.csv")
    files = {"files": count, "done_before": len(done), "skipped": kinds.total()}
    return {"source": source, "out": str(out), "model": served.about["model"], **files}


def _check_outside(out: Path, source: str) -> None:
    """UserError if the results would lie in the source: the next call would read them, too."""
    folder = Path(source).expanduser()
    with clear_read_errors(source):
        is_folder = not storage.is_s3(source) and folder.is_dir()
    if is_folder and out.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"--out {out} lies in the source, {shown(source)}, whose next call would take the "
            "results for images: name a folder outside it"
        )


def _work(
    operation: Operation, entries: Entries, out: Path, downloads: Path, model: aegan.Model
) -> int:
    """Write parts for all entries; returns how many entries there were."""
    skipped: list[Row] = []
    pictures = out / "pictures" if operation == "reconstruct" else None
    number = len(list((out / "latents").glob("part-*.parquet")))
    count = 0
    decoded = progress(
        _decoded(entries, skipped, downloads, model), operation, unit="files", total=None
    )
    batches = (_through(model, batch, pictures) for batch in _batched(decoded, BATCH_SIZE))
    for part in _batched(batches, PART_BATCHES):
        rows = [*(row for batch in part for row in batch), *skipped]
        skipped.clear()
        _write_part(out, number, rows)
        number, count = number + 1, count + len(rows)
    if skipped:  # after the last file, or without any
        _write_part(out, number, skipped)
    return count + len(skipped)


def _decoded(
    entries: Entries, skipped: list[Row], downloads: Path, model: aegan.Model
) -> Iterator[Decoded]:
    """All files that are read; those that are not go to `skipped`."""

    def read(entries: Entries) -> Iterator[RawFile | ListedFile]:
        for entry in entries:
            if isinstance(entry, Skipped):
                skipped.append(Row(entry.source, None, entry.reason))
            else:
                yield entry

    files, first = _peek(read(entries))
    if isinstance(first, ListedFile) and has_cluster():
        yield from decode_on_cluster(cast(Iterator[ListedFile], files), model.form, downloads)
        return
    with Decoder(model.form, processes=available_cores()) as decoder:
        yield from decoder.decode(_fetched(files))


def has_cluster() -> bool:
    """Whether the environment names a Ray cluster."""
    return bool(os.environ.get("RAY_ADDRESS"))


def _through(model: aegan.AEGAN, files: list[Decoded], pictures: Path | None) -> list[Row]:
    """Images => rows with their latents; their reconstructions go to `pictures`."""
    images = [found for _, found in files if not isinstance(found, str)]
    latents = aegan.encode(model, np.stack(images)) if images else torch.empty(0)
    drawn = iter(aegan.decode(model, latents) if images and pictures else ())
    numbers = iter(latents.tolist())
    rows = []
    for source, found in files:
        if isinstance(found, str):
            rows.append(Row(source, None, found))
            continue
        latent, reason = next(numbers), ""
        if pictures:
            reason = _draw(next(drawn), source, pictures)
        rows.append(Row(source, None if reason else latent, reason or None))
    return rows


def _draw(image: torch.Tensor, name: str, pictures: Path) -> str:
    """Write `pictures/NAME.png`; returns why not, where the name is none of a file in there."""
    try:
        save_png(image, outside.path_inside(pictures, f"{name}.png", origin="the source"))
    except (outside.UntrustedError, FileExistsError, NotADirectoryError):
        return NO_NAME
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # some disks allow less than others
            raise
        return NO_NAME
    return ""


def _write_part(out: Path, number: int, rows: list[Row]) -> None:
    columns = [list(column) for column in zip(*rows, strict=True)]
    types = (pa.string(), pa.list_(pa.float32()), pa.string())
    arrays = [pa.array(column, kind) for column, kind in zip(columns, types, strict=True)]
    file = out / f"latents/part-{number:06d}.parquet"
    file.parent.mkdir(exist_ok=True)
    write_parquet(iter([pa.table(arrays, names=Row._fields)]), file)


def _rows(out: Path) -> Iterator[Row]:
    """What all parts have."""
    for file in sorted((out / "latents").glob("part-*.parquet")):
        table = pq.read_table(file, columns=["source", "reason"])
        for source, reason in zip(*table.to_pydict().values(), strict=True):
            yield Row(source, None, reason)


@contextmanager
def _claimed(out: Path, operation: Operation, source: str, served: Served) -> Iterator[None]:
    """The folder of the results, this process's alone; UserError if it is one of something else."""
    description = {"operation": operation, "source": source, "model": served.about["sha256"]}
    file = out / "batch.json"
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: name a folder")
    if any(_rows(out)):
        found = read_json(file, stage=operation)
        if differing := [name for name in description if found.get(name) != description[name]]:
            raise UserError(
                f"{out} holds results of another {differing[0]} (see {file}): name another folder "
                "with --out, or delete this one"
            )
    elif out.exists() and any(out.iterdir()) and not file.exists():
        raise UserError(f"{out} holds other files: name a new folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            write_json(file, description)
            yield
    except Timeout:
        raise UserError(f"another process is at work in {out}: wait for it") from None


def _open(source: str, downloads: Path) -> Entries:
    """The files of a source, those of a bucket's prefix as a listing."""
    path = Path(source).expanduser()
    if storage.is_s3(source):
        if not (is_container_name(source) or storage.is_object(source)):
            return list_bucket(source)
        path = downloads / source.rpartition("/")[2]
        storage.download_object(source, path)
    with clear_read_errors(source):
        if path.is_dir():
            return read_folder(path)
        if path.is_file():
            return read_archive(path, source) if is_many(path) else iter([_read(path)])
    raise UserError(f"{shown(source)} not found: expected {EXPECTED}")


def is_many(path: Path) -> bool:
    """Whether a file is one that holds files, and no image."""
    with path.open("rb") as content:
        return is_container_name(path.name) and not is_image(content.read(START_BYTES))


def _read(path: Path) -> RawFile:
    return RawFile(path.name, path.read_bytes())


def _not_done(entries: Entries, done: set[str]) -> Entries:
    """Under names that are unique, so that each file is done once."""
    names = UniqueNames()
    for entry in entries:
        name = names.take(entry.source)
        if name not in done:
            yield replace(entry, source=name)


def _fetched(entries: Iterable[RawFile | ListedFile]) -> Iterator[RawFile]:
    """Listed objects as files, several read at once."""

    def read(entry: RawFile | ListedFile) -> RawFile:
        if isinstance(entry, RawFile):
            return entry
        return RawFile(entry.source, storage.read_object(entry.url))

    return storage.read_ahead(read, entries)


def _peek(items: Iterator[Item]) -> tuple[Iterator[Item], Item | None]:
    """The same items, and the first of them."""
    first = next(items, None)
    return (iter(()) if first is None else chain([first], items)), first


def _batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch

"""Stage `download`: any source -> artifacts/raw/, the files as found in a few Parquet shards.

With `data.in_place` only the listing of a bucket's prefix is stored, and the files stay there.
"""

import hashlib
import io
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from aegan.config import DataConfig
from aegan.data import designed_faces
from aegan.files import remove, sha256_of, write_json
from pipelines.base import locks, params
from pipelines.base.errors import UserError, run_stage
from pipelines.base.files import clear_read_errors, new_folder, project_folder
from pipelines.base.names import shown
from pipelines.base.outputs import FOLDERS, LAST_RAW, PREPROCESS, RAW
from pipelines.base.progress import progress
from pipelines.bucket import storage
from pipelines.ingest import fetched_before, https, kaggle, source_address
from pipelines.ingest.entries import (
    Entries,
    ListedFile,
    RawFile,
    Skipped,
    Version,
    is_container_name,
)
from pipelines.ingest.fetched_before import FetchedBefore, Notes
from pipelines.ingest.quarantine import kind_of_reason, summary
from pipelines.ingest.shards import ShardWriter
from pipelines.ingest.sources import (
    download_version,
    list_bucket,
    read_archive,
    read_bucket,
    read_folder,
    version_of,
    with_version,
    without_repetitions,
)

SCHEMA_VERSION = 1
SHARD_BYTES = 64 * 1024**2  # of content; a reader's memory is bounded by it
ROW_GROUP_BYTES = 8 * 1024**2  # the piece one worker of preprocess takes
ROW_GROUP_ROWS = 1024
LABEL = pa.field("label", pa.string())  # a column only of sources that state classes
LISTED_ROWS = 256  # of a listing: every file is a request, so a piece takes long enough

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A named stream of raw files."""

    name: str
    entries: Entries
    archive: Path | None = None  # hashed as it is; otherwise the files are
    archive_sha256: str = ""  # of one that was fetched before
    factors: tuple[str, ...] = ()
    in_place: bool = False  # the entries are a listing


def download(config: DataConfig, folder: Path, *, earlier: Sequence[Path] = ()) -> dict[str, Any]:
    """Write the snapshot of the source to `folder`; returns its manifest. Raises UserError.

    What one of the earlier snapshots holds of a bucket or server is not fetched again.
    """
    with (
        new_folder(folder, written=FOLDERS[RAW]) as temporary,
        _open_source(config, temporary, earlier) as source,
    ):
        manifest = _write_snapshot(source, temporary)
        write_json(temporary / "manifest.json", manifest)
    return manifest


@contextmanager
def _open_source(config: DataConfig, workspace: Path, earlier: Sequence[Path]) -> Iterator[Source]:
    """What `data.source` names; a fetched archive lies in the workspace meanwhile."""
    address = source_address.resolve(config.source)
    scheme = source_address.scheme_of(address)
    fetched = workspace / "fetched"
    name = source_address.without_secrets(address) if scheme in ("http", "https") else address
    before = None if config.in_place else fetched_before.find(earlier, name)
    is_one = scheme == "s3" and (is_container_name(address) or storage.is_object(address))
    if config.in_place and (scheme != "s3" or is_one):
        raise UserError(
            f"params.yaml: data.in_place is true, but data.source {address!r} is no "
            "s3://bucket/prefix with images below it: set data.in_place to false"
        )
    try:
        if address == source_address.DESIGNED:
            yield _manifold(config)
        elif scheme == "kaggle":
            yield Source(address, read_folder(kaggle.fetch(address.partition(":")[2])))
        elif is_one:
            listed = version_of(address, name)
            fetch_object = partial(download_version, address, listed, fetched)
            yield _fetched_archive(name, listed, fetch_object, fetched, before)
        elif config.in_place:
            yield Source(address, list_bucket(address), in_place=True)
        elif scheme == "s3":
            yield Source(address, read_bucket(address, before))
        elif scheme in ("http", "https"):
            told = _ask(address, name) if before else None
            fetch_file = partial(_fetch, address, name, fetched)
            yield _fetched_archive(name, told, fetch_file, fetched, before)
        else:
            yield _local(config.source, Path(address))
        if before and before.taken:
            log.info("%d objects had been fetched before", before.taken)
    finally:
        fetched.unlink(missing_ok=True)


def _local(name: str, path: Path) -> Source:
    """A folder, or one archive, table or array, of this machine."""
    with clear_read_errors(name):
        if path.is_dir():
            return Source(name, read_folder(path))
        if path.is_file():
            return Source(name, read_archive(path, name), path)
    raise UserError(
        f"data.source {name} not found (a path counts from the project's folder): "
        f"expected {source_address.EXPECTED}"
    )


def _fetched_archive(
    name: str,
    version: Version | None,
    fetch: Callable[[], Version | None],
    file: Path,
    before: FetchedBefore | None,
) -> Source:
    """One archive, table or array from elsewhere; `version` is what is there now, if known."""
    if before and version and (known := before.entries_of(version)) is not None:
        return Source(name, known, archive_sha256=before.source_sha256)
    return Source(name, with_version(read_archive(file, name), fetch()), file)


def _fetch(address: str, name: str, file: Path) -> Version | None:
    etag, size = https.fetch(address, file)
    return Version(name, etag, size) if etag else None


def _ask(address: str, name: str) -> Version | None:
    """What lies at an address now; None if its server does not say."""
    try:
        etag, size = https.ask(address)
    except UserError:  # fetching tries again, and says why
        return None
    return Version(name, etag, size) if etag else None


def _manifold(config: DataConfig) -> Source:
    """The designed data set: PNG files of faces with their true factors."""

    def entries() -> Entries:
        for start in range(0, config.manifold_images, ROW_GROUP_ROWS):
            count = min(ROW_GROUP_ROWS, config.manifold_images - start)
            images, factors = designed_faces.generate(
                start, count, seed=config.manifold_seed, image_size=config.manifold_size
            )
            for offset, (image, values) in enumerate(zip(images, factors, strict=True)):
                png = io.BytesIO()
                Image.fromarray(image).save(png, "PNG", compress_level=1)
                name = f"face-{start + offset:07d}.png"
                yield RawFile(name, png.getvalue(), tuple(values.tolist()))

    return Source("manifold", entries(), factors=tuple(f.name for f in designed_faces.FACTORS))


def _write_snapshot(source: Source, folder: Path) -> dict[str, Any]:
    columns = [("source", pa.string())]
    if source.in_place:
        columns += [("url", pa.string()), ("etag", pa.string()), ("bytes", pa.int64())]
    else:
        columns += [("content", pa.large_binary())]
    columns += [(f"factor_{name}", pa.float32()) for name in source.factors]  # and LABEL, if any
    writer = ShardWriter(folder, "files", schema=pa.schema(columns))
    hashes = hashlib.sha256()
    skipped: list[Skipped] = []
    group: list[RawFile | ListedFile] = []
    most_rows = LISTED_ROWS if source.in_place else ROW_GROUP_ROWS
    group_bytes = files = total_bytes = 0

    def write_group() -> None:
        if LABEL.name not in writer.schema.names and any(file.label for file in group):
            writer.add_column(LABEL)
        rows = [_row(file, writer.schema) for file in group]
        arrays = [
            pa.array(values, field.type)
            for values, field in zip(zip(*rows, strict=True), writer.schema, strict=True)
        ]
        if writer.bytes + group_bytes > SHARD_BYTES:
            writer.finish_shard()
        writer.write(pa.Table.from_arrays(arrays, schema=writer.schema))

    notes = Notes(folder)
    entries = without_repetitions(notes.passing(source.entries))
    for entry in progress(entries, f"reading {shown(source.name)}", unit="files", total=None):
        if isinstance(entry, Skipped):
            skipped.append(entry)
            continue
        if group and (group_bytes + entry.size > ROW_GROUP_BYTES or len(group) == most_rows):
            write_group()
            group, group_bytes = [], 0
        group.append(entry)
        group_bytes += entry.size
        files += 1
        total_bytes += entry.size
        hashes.update(entry.digest + entry.source.encode() + b"\0")
        if entry.label:
            hashes.update(b"\1" + entry.label.encode() + b"\0")
    if not group:
        told = f"no files in {source.name}"
        if skipped:
            first = f"{skipped[0].source} ({skipped[0].reason})"
            told += f": {len(skipped)} skipped, the first is {first}"
        raise UserError(told)
    write_group()
    writer.finish_shard()

    sha256 = source.archive_sha256 or (
        sha256_of(source.archive) if source.archive else hashes.hexdigest()
    )
    log.info("%s: %d files, %d bytes", shown(source.name), files, total_bytes)
    if skipped:
        kinds = Counter(kind_of_reason(item.reason) for item in skipped)
        told = summary(kinds, files + len(skipped))
        log.info("%s, see %s after the stage preprocess", told, PREPROCESS / "quarantine.csv")
    return {
        "schema_version": SCHEMA_VERSION,
        "source": source.name,
        "source_sha256": sha256,
        "files": files,
        "bytes": total_bytes,
        "shards": writer.shards,
        "skipped": [
            {"source": shown(item.source), "reason": shown(item.reason)} for item in skipped
        ],
        "factors": list(source.factors),
        **notes.facts(),
    }


def _row(file: RawFile | ListedFile, schema: pa.Schema) -> tuple[Any, ...]:
    """The values of the snapshot's columns for one file."""
    if isinstance(file, ListedFile):
        return file.source, file.url, file.etag, file.size
    label = (file.label,) if LABEL.name in schema.names else ()
    return file.source, file.content, *file.factors, *label


def main() -> None:
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # retries: our own error says enough
    with locks.hold("download"):
        manifest = download(
            params.load(DataConfig), RAW, earlier=[LAST_RAW, project_folder() / LAST_RAW]
        )
        _keep(manifest)


def _keep(manifest: dict[str, Any]) -> None:
    """Keep a snapshot that was fetched, by links: nothing is copied until DVC copies its output."""
    if fetched_before.KEY not in manifest:
        remove(LAST_RAW)
        return
    try:
        with new_folder(LAST_RAW, written=FOLDERS[RAW]) as temporary:
            for file in RAW.iterdir():
                os.link(file.resolve(), temporary / file.name)
    except (OSError, UserError) as error:  # a disk without links, say
        log.info("not kept for the next time, when all is fetched again: %s", error)


if __name__ == "__main__":
    run_stage(main)

"""Whether a source has changed, without fetching it."""

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

from aegan.config import DataConfig
from aegan.files import sha256_of_json
from pipelines.base import params
from pipelines.base.errors import UserError
from pipelines.bucket import storage
from pipelines.ingest import https, kaggle, source_address, sources

log = logging.getLogger(__name__)


def look(config: DataConfig) -> tuple[str, str]:
    """(address without secrets, hash of the source's state); raises UserError.

    The state is every file's name, size and time of a folder, the size and etag of every object,
    what an https server says of the file, the version of a Kaggle set. It may change although no
    image did: then fetching finds the same images.
    """
    address = source_address.resolve(config.source)
    scheme = source_address.scheme_of(address)
    if address == source_address.DESIGNED:
        return address, sha256_of_json(params.as_dict(config))
    if scheme == "s3":
        state = _hash(
            f"{url}\0{size}\0{etag}" for url, size, etag in storage.list_versions(address)
        )
    elif scheme == "kaggle":
        state = str(kaggle.fetch(address.partition(":")[2]))  # the folder of its newest version
    elif scheme in ("http", "https"):
        state = https.state(address)
    else:
        state = _hash(files_seen(Path(address)))
    return source_address.without_secrets(address) if "://" in address else config.source, state


def files_seen(path: Path) -> Iterator[str]:
    """A line for the file, or for each file below the folder that `download` would find."""
    if not path.exists():
        raise UserError(f"data.source {path} not found: expected {source_address.EXPECTED}")
    if path.is_file():
        yield _line(path)
        return
    for name in sorted(found.path for found in sources.walk(path)):
        yield _line(path / name)


def _line(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:  # a link that leads nowhere
        return f"{path}\0missing"
    return f"{path}\0{found.st_size}\0{found.st_mtime_ns}"


def _hash(lines: Iterator[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()

"""Shards in a bucket: the driver puts them there once, each node fetches them once.

<storage>/data/<dataset_sha256>/ holds the files of artifacts/shards, manifest.json last.
A node keeps them on its own disk, from which training reads them, resident or row group by row
group. It takes no one's word but the driver's for what they are: the bucket's manifest only says
that they are all there.
"""

import hashlib
import json
import logging
import os
import re
import stat
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from aegan.config import SPLITS
from aegan.data.dataset import read_manifest
from aegan.files import sha256_of, sha256_of_json
from pipelines.base.errors import UserError
from pipelines.base.files import new_folder
from pipelines.base.outputs import FOLDERS, SHARDS
from pipelines.base.outside import SHA256, UntrustedError, check_name, check_names, path_inside
from pipelines.bucket.storage import (
    LARGER,
    StorageError,
    download_object,
    list_objects,
    read_object_if_any,
    retry,
    upload_object,
)

MANIFEST = "manifest.json"
SHARDS_OF_NODE = "shards"
SHARD = re.compile(rf"({'|'.join(SPLITS)})-[0-9]{{5,}}\.parquet")

log = logging.getLogger(__name__)


def node_path() -> Path:
    """Where a node keeps what it fetched: in its TMPDIR, for this user only."""
    return Path(tempfile.gettempdir()) / f"aegan-{os.getuid()}"


def node_folder() -> Path:
    """That folder, which is made if it is not there; raises UserError if it is another user's."""
    folder = node_path()
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()  # a link of another user's would lead us into our own files
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode):
        raise UserError(f"{folder} belongs to another user: set TMPDIR to a folder of your own")
    folder.chmod(0o700)
    return folder


def send_shards(folder: Path, storage: str) -> None:
    """Upload the shards unless they are there already."""
    manifest = read_manifest(folder)
    shards = checked_shards(manifest, origin=str(folder / MANIFEST))
    url = _address(storage, manifest)
    if retry(partial(read_object_if_any, f"{url}/{MANIFEST}")) is not None:
        return
    stored = dict(retry(lambda: list(list_objects(url))))
    log.info("uploading %d shards to %s", len(shards), url)
    for shard in shards:
        target = f"{url}/{shard['file']}"
        file = path_inside(folder, shard["file"], origin=str(folder / MANIFEST))
        if stored.get(target) != shard["bytes"]:  # else of an upload that was cut off
            retry(partial(upload_object, file, target))
    retry(partial(upload_object, folder / MANIFEST, f"{url}/{MANIFEST}"))


def fetch_shards(storage: str, manifest: dict[str, Any]) -> Path:
    """The folder on this node that holds the shards of the driver's manifest.

    The first of its workers fetches them.
    """
    url = _address(storage, manifest)
    shards = checked_shards(manifest, origin="the driver's manifest of the shards")
    name = sha256_of_json(manifest)
    folder = node_folder() / SHARDS_OF_NODE / name
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not _is_whole(folder, manifest, shards):
            with new_folder(folder, written=FOLDERS[SHARDS]) as temporary:
                for shard in shards:
                    _fetch_shard(f"{url}/{shard['file']}", temporary / shard["file"], shard)
                (temporary / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def checked_shards(manifest: Any, *, origin: str) -> list[dict[str, Any]]:
    """All shards that a manifest names: files called as ours are, whose hashes make up its own.

    Raises UntrustedError.
    """
    try:
        shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
        for shard in shards:
            check_name(shard["file"], origin=origin, pattern=SHARD)
            check_name(shard["sha256"], origin=origin, pattern=SHA256)
            if type(shard["bytes"]) is not int:
                raise TypeError
        check_names((shard["file"] for shard in shards), origin=origin)
        hashes = "".join(shard["sha256"] for shard in shards)
        whole = manifest["dataset_sha256"] == hashlib.sha256(hashes.encode()).hexdigest()
    except (KeyError, TypeError, AttributeError):
        raise UntrustedError(origin, "is no manifest of shards") from None
    if not whole:
        raise UntrustedError(origin, "states another dataset_sha256 than its shards make")
    return shards


def _fetch_shard(url: str, file: Path, shard: dict[str, Any]) -> None:
    try:
        retry(partial(download_object, url, file, most_bytes=shard["bytes"]))
        sound = sha256_of(file) == shard["sha256"]
    except StorageError as error:
        if error.code != LARGER:
            raise
        sound = False
    if not sound:
        raise UserError(
            f"{url} is damaged: delete everything below {url.rpartition('/')[0]}, "
            "then the same command uploads the shards again"
        )


def _is_whole(folder: Path, manifest: dict[str, Any], shards: list[dict[str, Any]]) -> bool:
    """Whether a node has these very shards: each was verified when it was fetched."""
    try:
        sizes = [(folder / shard["file"]).lstat().st_size for shard in shards]
        return read_manifest(folder) == manifest and sizes == [shard["bytes"] for shard in shards]
    except (OSError, ValueError):
        return False


def _address(storage: str, manifest: dict[str, Any]) -> str:
    return f"{storage.rstrip('/')}/data/{manifest['dataset_sha256']}"

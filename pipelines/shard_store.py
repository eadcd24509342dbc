"""Shards in a bucket: the driver puts them there once, each node fetches them once.

<storage>/data/<dataset_sha256>/ holds the files of artifacts/shards, manifest.json last.
A node keeps them on its own disk, from which training reads them, resident or row group by row
group.
"""

import json
import logging
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from aegan.dataset import read_manifest
from pipelines.errors import UserError
from pipelines.files import new_folder, sha256_of
from pipelines.outputs import FOLDERS, SHARDS
from pipelines.storage import (
    download_object,
    list_objects,
    patiently,
    read_object,
    read_object_if_any,
    upload_object,
)

MANIFEST = "manifest.json"

log = logging.getLogger(__name__)


def node_folder() -> Path:
    """Where a node keeps what it fetched: in its TMPDIR, for this user only."""
    folder = Path(tempfile.gettempdir()) / f"aegan-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder} belongs to another user: set TMPDIR to a folder of your own")
    return folder


def send_shards(folder: Path, storage: str) -> None:
    """Upload the shards unless they are there already."""
    manifest = read_manifest(folder)
    url = _address(storage, manifest["dataset_sha256"])
    if patiently(partial(read_object_if_any, f"{url}/{MANIFEST}")) is not None:
        return
    stored = dict(patiently(lambda: list(list_objects(url))))
    shards = _shards(manifest)
    log.info("uploading %d shards to %s", len(shards), url)
    for shard in shards:
        target = f"{url}/{shard['file']}"
        if stored.get(target) != shard["bytes"]:  # else of an upload that was cut off
            patiently(partial(upload_object, folder / shard["file"], target))
    patiently(partial(upload_object, folder / MANIFEST, f"{url}/{MANIFEST}"))


def fetch_shards(storage: str, dataset_sha256: str) -> Path:
    """The folder on this node that holds the shards; the first of its workers fetches them."""
    url = _address(storage, dataset_sha256)
    folder = node_folder() / "shards" / dataset_sha256
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            manifest = json.loads(patiently(partial(read_object, f"{url}/{MANIFEST}")))
            with new_folder(folder, written=FOLDERS[SHARDS]) as aside:
                for shard in _shards(manifest):
                    file = aside / shard["file"]
                    patiently(partial(download_object, f"{url}/{shard['file']}", file))
                    if sha256_of(file) != shard["sha256"]:
                        raise UserError(
                            f"{url}/{shard['file']} is damaged: delete everything below {url}, "
                            "then the same command uploads the shards again"
                        )
                (aside / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def _address(storage: str, dataset_sha256: str) -> str:
    return f"{storage.rstrip('/')}/data/{dataset_sha256}"


def _shards(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return [shard for split in manifest["splits"].values() for shard in split["shards"]]

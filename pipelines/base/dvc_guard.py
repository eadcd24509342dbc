"""What DVC takes out of a remote or its cache is checked before it becomes files.

DVC 3.67.1 trusts whoever can write a remote: it follows `..` in the lists of files that stand for
folders (`.dir` objects) and in the names of the run cache's entries, checks out whichever outputs
such an entry names, and asks for no hash of what it has fetched. All of that passes through the few
functions that `install` replaces, whichever command asks.
"""

import copy
import functools
import hashlib
import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from dvc.data_cloud import Remote
from dvc.exceptions import DvcException
from dvc.stage.cache import StageCache, _get_cache_hash
from dvc_data.hashfile.db import HashFileDB
from dvc_data.hashfile.db.local import LocalHashFileDB
from dvc_data.hashfile.tree import Tree
from dvc_objects.db import ObjectDB
from dvc_objects.errors import ObjectFormatError
from dvc_objects.fs import generic

from pipelines.base.names import shown
from pipelines.base.outside import UntrustedError, check_names

OBJECT = re.compile(r"[0-9A-Za-z-]{3,}(\.dir)?")  # a hash, of whichever kind
MD5 = re.compile(r"[0-9a-f]{32}(\.dir)?")
RUN = re.compile(r"runs/[0-9a-f]{2}/[0-9a-f]{64}/[0-9a-f]{64}")  # an entry of the run cache
MAX_LIST_BYTES = 2**30  # of a folder's list of files: about ten million files
MAX_RUN_BYTES = 2**20  # of an entry of the run cache
OUTPUT = {"path", "hash", "md5", "size", "nfiles", "isexec"}  # what a lock says of an output

log = logging.getLogger(__name__)
_from_list = Tree.from_list.__func__


class RefusedError(DvcException):  # type: ignore[misc]
    """DVC says it in one line, and fails."""


def install() -> None:
    """Check names and hashes in this process's DVC from here on."""
    for database in (ObjectDB, LocalHashFileDB):
        database.oid_to_path = _check_hash(database.oid_to_path)
    HashFileDB.check = _say_which(HashFileDB.check)
    Remote.__init__ = _verify(Remote.__init__)
    Tree.from_list = classmethod(_list_of_files)
    Tree.load = classmethod(_load_list)
    StageCache._load_cache = _check_entry(StageCache._load_cache)
    StageCache.transfer = _check_addresses(StageCache.transfer)


def check_outputs(outputs: Any, *, origin: str) -> dict[str, str]:
    """Path => hash in a lock's list of outputs, which must say no more than that of each.

    Raises UntrustedError.
    """
    if not isinstance(outputs, list) or not all(isinstance(item, Mapping) for item in outputs):
        raise UntrustedError(origin, "has no list of outputs")
    check_names((item.get("path") for item in outputs), origin=origin)
    for item in outputs:
        hashed = item.get("hash", "md5") == "md5" and MD5.fullmatch(str(item.get("md5")))
        if not hashed or item.keys() - OUTPUT:
            raise UntrustedError(origin, f"has no hash of {shown(item['path'])}, or more than that")
    return {item["path"]: item["md5"] for item in outputs}


def _check_hash(plain: Any) -> Any:
    @functools.wraps(plain)
    def oid_to_path(self: Any, oid: str) -> Any:
        """Where an object lies, by its hash: never outside the folder of the objects."""
        if not OBJECT.fullmatch(oid):
            raise RefusedError(f"{shown(oid[:200])} is no hash: find out who wrote it")
        return plain(self, oid)

    return oid_to_path


def _verify(plain: Any) -> Any:
    @functools.wraps(plain)
    def init(self: Any, *arguments: Any, **config: Any) -> None:
        """A remote, of whose objects DVC checks the hashes once they are here."""
        plain(self, *arguments, **{**config, "verify": True})

    return init


def _say_which(plain: Any) -> Any:
    @functools.wraps(plain)
    def check(self: Any, oid: str, *arguments: Any, **keywords: Any) -> Any:
        try:
            return plain(self, oid, *arguments, **keywords)
        except ObjectFormatError:
            log.warning("the object %s is not what its name says: left out", oid)
            raise

    return check


def _list_of_files(cls: Any, entries: Any, hash_name: str | None = None) -> Any:
    return _tree(cls, entries, hash_name, origin="a list of files in a lock")


def _load_list(cls: Any, odb: Any, hash_info: Any, hash_name: str | None = None) -> Any:
    """A folder's list of files, which must be the one that its name is the hash of."""
    found = odb.get(hash_info.value)
    with found.fs.open(found.path, "rb") as file:
        content = file.read(MAX_LIST_BYTES + 1)
    if f"{hashlib.md5(content, usedforsecurity=False).hexdigest()}.dir" != hash_info.value:
        raise RefusedError(f"{found.path} is not what its name says: delete it, or put it back")
    try:
        entries = json.loads(content)
    except (ValueError, RecursionError):
        raise ObjectFormatError(f"{found.path} is no list of files") from None
    if hash_name is None and odb.hash_name == "md5-dos2unix":
        hash_name = odb.hash_name
    tree = _tree(cls, entries, hash_name, origin=found.path)
    tree.fs, tree.path = found.fs, found.path
    tree.hash_info, tree.oid = hash_info, hash_info.value
    return tree


def _tree(cls: Any, entries: Any, hash_name: str | None, *, origin: str) -> Any:
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise RefusedError(f"{origin} is no list of files")
    try:
        check_names((entry.get(Tree.PARAM_RELPATH) for entry in entries), origin=origin)
    except UntrustedError as error:
        raise RefusedError(str(error)) from None
    return _from_list(cls, entries, hash_name=hash_name)


def _check_entry(plain: Any) -> Any:
    @functools.wraps(plain)
    def load_cache(self: Any, key: str, value: str) -> Any:
        """An entry of the run cache; None for one that is of another stage than it lies under.

        The key hashes the stage's command, dependencies, and the names of its outputs.
        """
        entry = plain(self, key, value)
        if entry is None:
            return None
        origin = f"the entry {key[:12]} of the run cache"
        try:
            check_outputs(entry.get("outs"), origin=origin)
            if _get_cache_hash(copy.deepcopy(entry), key=True) != key:
                raise UntrustedError(origin, "has other outputs than its stage")
        except UntrustedError as error:
            log.warning("%s; the stage runs instead", error)
            return None
        return entry

    return load_cache


def _check_addresses(plain: Any) -> Any:
    @functools.wraps(plain)
    def transfer(self: Any, from_odb: Any, to_odb: Any, force: bool = True) -> Any:
        """Copy the run cache from a remote, or to it: what is called as its entries are."""
        source, target = from_odb.fs, to_odb.fs
        if {"http", "https"} & {source.protocol, target.protocol}:
            return plain(self, from_odb, to_odb, force=force)  # which refuses
        moved = []
        folder = source.join(from_odb.path, "runs")
        for path in source.find(folder) if source.exists(folder) else ():
            name = f"runs{path.removeprefix(folder)}"
            if not RUN.fullmatch(name) or source.size(path) > MAX_RUN_BYTES:
                log.warning("%s is no entry of the run cache: left out", shown(path))
                continue
            generic.copy(source, path, target, target.join(to_odb.path, *name.split("/")))
            moved.append(tuple(name.split("/")[2:]))
        return moved

    return transfer

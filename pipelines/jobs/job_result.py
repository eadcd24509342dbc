"""What a job left in the bucket, checked before any of it becomes a file of this folder.

Whoever can write the bucket can write results. They may say what the stages' outputs hold, by hash,
and nothing else: not which outputs there are, nor where they lie.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pipelines.base.errors import UserError
from pipelines.base.names import shown
from pipelines.base.outputs import is_written, listed
from pipelines.base.outside import UntrustedError, check_name, check_names

DVC_FILE = Path("dvc.yaml")
MAX_FILE_BYTES = 2**20  # of what DVC names but does not store


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """Of a job that succeeded."""

    job: str
    files_sha256: str  # of the files that it ran
    dvc_lock: str
    outputs: list[str]  # paths of what is in the DVC remote
    files: dict[str, str]  # path => text of what DVC names but does not store


def parse(content: bytes, *, origin: str) -> JobResult:
    """A job's result; UntrustedError if it is none."""
    try:
        found = json.loads(content)
        result = JobResult(**{field.name: found[field.name] for field in fields(JobResult)})
        texts = [result.job, result.files_sha256, result.dvc_lock, *result.files.values()]
        sound = isinstance(result.outputs, list) and all(isinstance(text, str) for text in texts)
        sound = sound and bool(result.outputs)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise UntrustedError(origin, "is no job's result")
    return result


def check(result: JobResult, *, origin: str) -> dict[str, str]:
    """Path => hash of the outputs that are in the remote; raises UserError.

    Its dvc.lock and its files must be those of the stages of dvc.yaml here.
    """
    stages = _stages()
    stored = {path for outputs in stages.values() for path, in_remote in outputs if in_remote}
    small = {path for outputs in stages.values() for path, in_remote in outputs if not in_remote}
    check_names(result.outputs, origin=origin)
    check_names(result.files, origin=origin)
    foreign = {*result.outputs} - stored | {*result.files} - small
    hashes: dict[str, str] = {}
    for stage, outputs in _locked(result.dvc_lock, origin=origin):
        if stage not in stages:
            foreign.add(stage)
        foreign |= outputs.keys() ^ {path for path, _ in stages.get(stage, [])}
        hashes |= outputs
    if foreign:
        raise UserError(
            f"{origin} is about other outputs than those of {DVC_FILE} here "
            f"({listed(sorted(foreign))}): nothing was fetched; results of another version are "
            "fetched where that is checked out"
        )
    if missing := sorted({*result.outputs} - hashes.keys()):
        raise UntrustedError(origin, f"has no hash of {shown(missing[0])}")
    if any(len(text.encode()) > MAX_FILE_BYTES for text in result.files.values()):
        raise UntrustedError(origin, f"has files of more than {MAX_FILE_BYTES} bytes")
    return {path: hashes[path] for path in result.outputs}


def check_folders(hashes: Mapping[str, str], *, origin: str) -> None:
    """UntrustedError for a fetched folder with other files than the stages write there."""
    from dvc.repo import Repo
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree
    from dvc_objects.errors import ObjectFormatError

    with Repo() as repo:
        for path, md5 in hashes.items():
            if md5.endswith(".dir"):
                try:
                    tree = Tree.load(repo.cache.local, HashInfo("md5", md5))
                except (FileNotFoundError, ObjectFormatError):
                    raise UserError(
                        f"{origin} names a folder {path} that is not in the bucket: delete the "
                        "result, which lies under jobs/ there, then the job runs again"
                    ) from None
                names = ["/".join((path, *key)) for key, _, _ in tree]
                if foreign := sorted(name for name in names if not is_written(name)):
                    raise UntrustedError(origin, f"names {listed(foreign)}, which no stage writes")


def _stages() -> dict[str, list[tuple[str, bool]]]:
    """Of each stage of this project: its outputs' paths, and whether they are in the remote."""
    from dvc.utils.serialize import load_yaml

    return {
        name: list(_outputs(stage)) for name, stage in load_yaml(DVC_FILE).get("stages", {}).items()
    }


def _outputs(stage: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    for kind in ("outs", "metrics", "plots"):
        for item in stage.get(kind, []):
            path, options = (item, {}) if isinstance(item, str) else next(iter(item.items()))
            yield path, options.get("cache", True)


def _locked(text: str, *, origin: str) -> Iterator[tuple[str, dict[str, str]]]:
    """(stage, path => hash of its outputs) in a dvc.lock; UntrustedError if it is none of ours."""
    from dvc.exceptions import DvcException
    from dvc.utils.serialize import parse_yaml

    from pipelines.base.dvc_guard import check_outputs

    where = f"the dvc.lock of {origin}"
    try:
        lock = parse_yaml(text, "dvc.lock")
        stages = dict(lock["stages"])
        sound = lock.keys() == {"schema", "stages"} and lock["schema"] == "2.0"
        dependencies = [item["path"] for stage in stages.values() for item in stage["deps"]]
    except (DvcException, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UntrustedError(where, "is no lock of stages") from None
    if not sound:
        raise UntrustedError(where, "is no lock of stages")
    for name in dependencies:
        check_name(name, origin=where)
    for name, stage in stages.items():
        yield str(name), check_outputs(stage.get("outs"), origin=where)

"""What this machine has for a run: memory, disk, cores, sockets. Known at once, without a server.

`aegan doctor` shows all of it; a training looks at it before it begins.
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from aegan.config import ComputeConfig
from pipelines.base.errors import UserError
from pipelines.cluster import session

GIB = 2**30
LEAST_DISK, ENOUGH_DISK = GIB // 10, 5 * GIB  # for a few checkpoints; for data and cache too
LEAST_MEMORY, ENOUGH_MEMORY = 1 * GIB, 2.5 * GIB  # the demo takes 2.2
ENOUGH_SHARED_MEMORY = session.LOCAL_OBJECT_STORE_BYTES * 3 // 2
# Perhaps links to a larger disk. DVC keeps a copy of what is in artifacts/ in its cache.
WRITTEN = (Path("artifacts"), Path("runs"), Path(".dvc/cache"))
CGROUPS = Path("/sys/fs/cgroup")
NO_LIMIT = 2**60  # version 1 of control groups says so with a number near 2**63

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    status: Literal["ok", "warn", "fail"]
    subject: str
    found: str
    cure: str = ""


def before_training() -> None:
    """Say what may end a training on this machine; UserError for what surely would."""
    for finding in of_this_machine():
        require(finding)


def require(finding: Finding) -> None:
    """UserError for what failed; a warning is logged."""
    said = f"{finding.subject}: {finding.found}; {finding.cure}"
    if finding.status == "fail":
        raise UserError(said)
    if finding.status == "warn":
        log.warning("%s", said)


def of_this_machine() -> Iterator[Finding]:
    """What a run here needs, whichever cluster trains; for a private Ray its own needs too."""
    yield memory()
    yield disk(*WRITTEN)
    if not os.environ.get("RAY_ADDRESS"):
        yield attempt("Ray's folder", session.private_place, "set RAY_TMPDIR")
        yield shared_memory()


def attempt(subject: str, action: Callable[[], object], cure: str = "") -> Finding:
    """What an action says, or the UserError that it ends with, which holds the cure."""
    try:
        return Finding("ok", subject, str(action()))
    except UserError as error:
        return Finding("fail", subject, str(error), cure)


def memory() -> Finding:
    """The memory that this process may still take, of which Ray ends workers near the limit."""
    total, free = memory_bounds()
    found = f"{_gib(free)} of {_gib(total)} free"
    cure = (
        "end other programs, give the container more, or lower training.batch_size, "
        "compute.micro_batch_size (training.reader: streamed keeps images on disk)"
    )
    status: Literal["ok", "warn", "fail"] = "ok"
    if free < LEAST_MEMORY:
        status = "fail"
    elif free < ENOUGH_MEMORY:
        status = "warn"
    return Finding(status, "memory", found, cure if status != "ok" else "")


def memory_bounds() -> tuple[int, int]:
    """(bytes that there are, bytes that are free), of the machine or of its container's limit."""
    machine = psutil.virtual_memory()
    total, free = machine.total, machine.available
    for folder in _control_groups():
        limit, used = _read(folder, "memory.max", "memory.limit_in_bytes"), _used(folder)
        if limit is not None and limit < NO_LIMIT:
            total, free = min(total, limit), min(free, max(limit - used, 0))
    return total, free


def _control_groups() -> Iterator[Path]:
    """Folders of the groups that this process is in, in both versions of Linux's control groups."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = CGROUPS / controllers
        folder = root / path.lstrip("/")
        yield from (f for f in (folder, *folder.parents) if f.is_relative_to(root) and f.is_dir())


def _used(folder: Path) -> int:
    """Without the cache of files, which the system gives back when memory is wanted."""
    used = _read(folder, "memory.current", "memory.usage_in_bytes") or 0
    try:
        lines = (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
    except OSError:
        return used
    figures = dict(line.split() for line in lines)
    cache = figures.get("total_inactive_file", figures.get("inactive_file", 0))
    return max(used - int(cache), 0)


def _read(folder: Path, *names: str) -> int | None:
    for name in names:
        try:
            text = (folder / name).read_text(encoding="utf-8").strip()
        except OSError:
            continue
        return int(text) if text.isdigit() else None
    return None


def disk(*folders: Path) -> Finding:
    """The space where a run writes: of its folders, that with the least."""
    places = {_existing(folder): None for folder in folders}
    for place in places:
        if not os.access(place, os.W_OK | os.X_OK):
            return Finding("fail", "disk", f"not allowed to write {place}", "check owner and mode")
    free, place = min((shutil.disk_usage(place).free, place) for place in places)
    found = f"{_gib(free)} free in {place}"
    linked = "artifacts/, runs/ and .dvc/cache"
    cure = f"free some, or link its folders {linked} to a larger disk (make clean)"
    if free < LEAST_DISK:
        return Finding("fail", "disk", found, cure)
    return (
        Finding("warn", "disk", found, cure) if free < ENOUGH_DISK else Finding("ok", "disk", found)
    )


def _existing(folder: Path) -> Path:
    """Where a folder lies or will lie, links followed."""
    folder = folder.resolve()
    return next(place for place in (folder, *folder.parents) if os.access(place, os.F_OK))


def shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """Where Ray's processes hand each other data; a container has 64 MiB unless told otherwise."""
    if not folder.is_dir():
        return Finding("warn", str(folder), "not there", "Ray takes the disk instead, slower")
    free = shutil.disk_usage(folder).free
    found = f"{free / 2**20:,.0f} MiB free"
    if free < ENOUGH_SHARED_MEMORY:
        cure = "Ray takes the disk instead, slower: docker run --shm-size=1g, or free some"
        return Finding("warn", str(folder), found, cure)
    return Finding("ok", str(folder), found)


def places(compute: ComputeConfig, present: Mapping[str, float]) -> Finding:
    """Whether the workers find a core or a share of a GPU each, of what there is by Ray's names."""
    subject, (kind, number) = "cores and GPUs", session.wanted(compute, present)
    key = "min_workers" if compute.min_workers else "num_workers"
    found = f"compute.{key} is {getattr(compute, key)}, "
    if present.get(kind, 0) < number:
        cure = f"lower compute.{key}" + (" or set compute.device: cpu" if kind == "GPU" else "")
        found += f"but there are {present.get(kind, 0):.0f} {kind}s"
        return Finding("fail", subject, found, cure)
    return Finding("ok", subject, f"{found}and there are {present[kind]:.0f} {kind}s")


def gpus() -> Finding:
    """The GPUs that PyTorch sees here."""
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding("ok", "GPUs", ", ".join(names) or "none: training takes the CPU")


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"

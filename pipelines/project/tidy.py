"""`make tidy`: what runs have left behind, how large it is, and what of it nothing names any more.

It shows; `make tidy YES=1` removes what it shows. A run of training that nothing names may be
one that is to go on: it stays until it has not been written to for `DAYS`. `aegan clean` is
the same; with `--keep N` registered versions beyond the newest, and their runs, go as well.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
from filelock import FileLock, Timeout

from aegan.files import remove
from aegan.training.run_folder import DRIVER_LOCK, RunFolder
from pipelines.base import locks, outputs
from pipelines.base.command import run_command
from pipelines.base.defaults import DAYS
from pipelines.base.errors import UserError
from pipelines.base.git import git
from pipelines.base.names import shown
from pipelines.bucket import shard_store
from pipelines.cluster import session
from pipelines.project import clean, old_versions
from pipelines.registry import mlflow_files, mlflow_leftovers
from pipelines.retraining.workplace import WORK

SESSION_DAYS = 1 / 24  # a younger session of Ray may be about to start its processes
# In TMPDIR or /tmp; private ones are of our own.
RAY_SESSIONS = ("ray/session_*", f"{session.PRIVATE_FOLDER}*")
SYSTEM_TEMPORARY = Path("/tmp")
DATABASE = Path("mlflow.db")
DVC_CACHE, DVC_COPIES, RUNS = Path(".dvc/cache"), Path(".dvc/tmp/exps"), Path("runs")
RUN = re.compile(r"\w+-[0-9a-f]{12}|preprocess-[0-9a-f-]{16,33}")  # folders in runs/ that are ours
COPY = re.compile(r"tmp\w{8}")
USED_BY_GIT = ("--workspace", "--all-commits", "--all-experiments")  # `dvc gc` keeps
FACTS = RunFolder(outputs.TRAIN).facts
RUN_FACTS = re.compile(rf"path: {re.escape(str(FACTS))}\n\s+hash: md5\n\s+md5: (\w{{2}})(\w+)")
RUN_NAME = re.compile(rb'"run_name": "([\w-]+)"')
OBJECT = re.compile(r"md5: (\w{2})(\w+(?:\.dir)?)$", re.MULTILINE)
SHOWN = 10  # things of a place

Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True)
class Place:
    """One place where runs leave files, and what of it can go."""

    name: str
    keeps: str  # what is kept there
    size: int  # bytes in all
    unnamed: list[Path]
    remove: Callable[[list[Path]], None]


def main(*, days: float = DAYS, keep: int | None = None, yes: bool = False) -> dict[str, Any]:
    """Say what nothing names any more, and with `yes` remove it => sizes; raises UserError.

    A run that nothing names is kept for so many days; of registered versions all, or the newest so
    many (`keep`) and those that something needs.
    """
    with locks.hold(locks.PIPELINE):
        locks.check_stages()
        check_experiments()
        found, old = dict[str, Any](), set[str]()
        if keep is not None:
            old = old_versions.clean(keep, used=published_runs(), remove=yes)
        for place in places(days, old):
            sizes = {path: size_of(path) for path in place.unnamed}
            unnamed = in_words(sum(sizes.values()))
            print(f"{place.name}: {in_words(place.size)}, of which nothing names {unnamed}")
            print(f"    kept: {place.keeps}")
            for path, size in sorted(sizes.items(), key=lambda item: -item[1])[:SHOWN]:
                print(f"    {in_words(size):>9}  {shown(str(path))}, {_age(path)}")
            if len(sizes) > SHOWN:
                print(f"    and {len(sizes) - SHOWN} more")
            if yes:
                place.remove(place.unnamed)
            listed = {str(path): size for path, size in sizes.items()}
            found[place.name] = {"bytes": place.size, "unnamed": listed}
    freed = sum(sum(place["unnamed"].values()) for place in found.values())
    if yes:
        print(f"removed: {in_words(freed)}")
    else:
        print(f"nothing names {in_words(freed)} of it; YES=1 (--yes) removes what is listed")
    return {"places": found, "unnamed_bytes": freed, "removed": yes}


def places(days: float, old: Collection[str] = ()) -> Iterator[Place]:
    """Every place, one after the other: what one removes is not counted by the next.

    The runs of `old` go whatever names them.
    """
    folders = (RUNS, WORK / RUNS) if (WORK / RUNS).exists() else (RUNS,)
    named = named_runs() if any(runs.exists() for runs in folders) else set()
    for runs in folders:
        yield Place(
            name=str(runs),
            keeps="runs that a dvc.lock, an experiment or MLflow names, or that were written to "
            f"in the last {days:g} days",
            size=size_of(runs),
            unnamed=list(unnamed_runs(runs, named, days, old)),
            remove=remove_runs,
        )
    yield Place(
        name="half-written files",
        keeps="none: no stage is at work",
        size=sum(map(size_of, left_aside())),
        unnamed=list(left_aside()),
        remove=_remove,
    )
    yield Place(
        name=str(DVC_COPIES),
        keeps="what DVC notes of experiments",
        size=size_of(DVC_COPIES),
        unnamed=list(unused_copies()),
        remove=_remove,
    )
    unused = unused_objects()
    yield Place(
        name=str(DVC_CACHE),
        keeps="what a dvc.lock of this folder, any commit or experiment names",
        size=size_of(DVC_CACHE),
        unnamed=[*unused, *dangling_run_cache(set(unused))],
        remove=_remove,
    )
    deleted, unnamed = mlflow_leftovers.deleted(DATABASE), mlflow_leftovers.unnamed(DATABASE)
    yield Place(
        name=mlflow_files.FOLDER,
        keeps=f"what a run or model in {DATABASE} names, unless it was deleted there",
        size=size_of(Path(mlflow_files.FOLDER)),
        unnamed=[*deleted.values(), *unnamed],
        remove=_remove_from_mlflow,
    )
    yield Place(
        name="Ray's sessions",
        keeps="those of living processes and of the last hour",
        size=sum(map(size_of, ray_sessions())),
        unnamed=list(dead_ray_sessions()),
        remove=_remove,
    )
    shards = shard_store.node_path() / shard_store.SHARDS_OF_NODE
    yield Place(
        name=str(shards),
        keeps=f"shards that a node fetched in the last {days:g} days, all while Ray is at work",
        size=size_of(shards),
        unnamed=[] if ray_is_at_work() else [p for p in _folders(shards) if is_older(p, days)],
        remove=_remove,
    )


# -- runs -----------------------------------------------------------------------------------------


def unnamed_runs(
    runs: Path, named: Collection[str], days: float, old: Collection[str]
) -> Iterator[Path]:
    """Folders of trainings, searches and decodings that nothing names and nothing works in."""
    for folder in _folders(runs):
        goes = folder.name in old or (folder.name not in named and is_older(folder, days))
        if RUN.fullmatch(folder.name) and goes and not _is_at_work(folder):
            yield folder


def published_runs() -> set[str]:
    """Those whose results lie in this folder, or where it is retrained."""
    files = [folder / FACTS for folder in (Path(), WORK) if (folder / FACTS).exists()]
    return {match[1].decode() for file in files for match in RUN_NAME.finditer(file.read_bytes())}


def named_runs() -> set[str]:
    """Those that this folder, its commits and experiments, and MLflow's runs and versions name."""
    names = mlflow_leftovers.run_names() | published_runs()
    facts = {
        Path("files/md5") / match[1] / match[2]
        for text in (_read_text(Path("dvc.lock")), *_committed_locks())
        for match in RUN_FACTS.finditer(text)
    }
    cache = _cache() if facts else DVC_CACHE
    for file in facts:
        if (cache / file).exists():
            content = (cache / file).read_bytes()
            names |= {match[1].decode() for match in RUN_NAME.finditer(content)}
    return names


def remove_runs(folders: list[Path]) -> None:
    """Remove the runs' own files; one of the user's among them stays, with the folders above it."""
    for folder in folders:
        for file in list(folder.rglob("*")):
            name = file.relative_to(folder.parent).as_posix()
            if file.is_file() and outputs.fits(name, (*clean.WRITTEN[RUNS], *outputs.TEMPORARY)):
                file.unlink()
        clean.remove_empty_folders(folder)


def _is_at_work(folder: Path) -> bool:
    """Whether a driver holds the folder; the operating system ends its lock with it."""
    if not (folder / DRIVER_LOCK).exists():
        return False
    try:
        with FileLock(folder / DRIVER_LOCK, timeout=0):
            return False
    except Timeout:
        return True


def left_aside() -> Iterator[Path]:
    """Files and folders `.name.<pid>.tmp` of a process that was killed while it wrote them."""
    patterns = [(Path(), f".{name}.*.tmp") for name in ("dvc.lock", "params.yaml")]
    for folder in (Path("artifacts"), Path("report")):
        patterns += [(folder, ".*.tmp"), (folder, "*/.*.tmp")]
    for folder in outputs.FOLDERS:
        if (target := folder.resolve()) != folder.absolute():  # a link to a larger disk
            patterns.append((target.parent, f".{target.name}.*.tmp"))
    for folder, pattern in patterns:
        for path in folder.glob(pattern):
            process = path.name.split(".")[-2]
            if process.isdecimal() and not psutil.pid_exists(int(process)):
                yield path


# -- DVC ------------------------------------------------------------------------------------------


def check_experiments() -> None:
    """UserError while DVC's queue is at work, for whose results nothing has a name yet."""
    project, copies = Path.cwd(), DVC_COPIES.resolve()
    for process, place, arguments in _of_processes(lambda p: (p.pid, Path(p.cwd()), p.cmdline())):
        worker = "queue-worker" in arguments and place.is_relative_to(project)
        if worker or place.is_relative_to(copies):
            raise UserError(
                f"an experiment is at work in {DVC_COPIES}: process {process}; wait for it, or end "
                "it with `.venv/bin/dvc queue stop --kill`"
            )


def unused_copies() -> Iterator[Path]:
    """Copies of the project in which `dvc exp run --temp` or the queue was killed."""
    for where in (DVC_COPIES, DVC_COPIES / "standalone"):
        yield from (copy for copy in _folders(where) if COPY.fullmatch(copy.name))


def unused_objects() -> list[Path]:
    """What `dvc gc` would remove from the cache."""
    if not DVC_CACHE.exists():
        return []
    flags = USED_BY_GIT if _commits("--max-count=1") else USED_BY_GIT[:1]
    done = _dvc("gc", *flags, "--dry")
    lines = (done.stdout + done.stderr).splitlines()
    found = (line.removeprefix("Removing ") for line in lines if line.startswith("Removing "))
    # A cache elsewhere (`dvc config cache.dir`) may be shared by projects that we know nothing of.
    cache = DVC_CACHE.resolve()
    return [file for path in found if (file := Path(path).resolve()).is_relative_to(cache)]


def dangling_run_cache(gone: set[Path]) -> Iterator[Path]:
    """Records of stages that ran whose outputs the cache does not hold, once `gone` is gone."""
    objects = DVC_CACHE.resolve() / "files/md5"
    for record in (DVC_CACHE / "runs").glob("*/*/*"):
        made = OBJECT.findall(_read_text(record).partition("\nouts:")[2])
        kept = [objects / first / rest for first, rest in made]
        if any(file in gone or not file.exists() for file in kept):
            yield record


def _cache() -> Path:
    """Where DVC keeps what a dvc.lock names: it may be told of another place (`cache.dir`)."""
    return Path(_dvc("cache", "dir").stdout.strip()) if DVC_CACHE.parent.exists() else DVC_CACHE


def _dvc(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().rpartition("\n")[2]
        raise UserError(f"dvc {arguments[0]} does not say what the cache holds: {reason}")
    return done


# -- git ------------------------------------------------------------------------------------------


def _committed_locks() -> Iterator[str]:
    """What dvc.lock was in every commit and experiment."""
    revisions = _commits("--full-history", "--", "dvc.lock")  # also those that a merge passed over
    entries = {_git("ls-tree", revision, "--", "dvc.lock") for revision in revisions}
    for entry in filter(None, entries):  # empty where a commit has deleted it
        yield _git("cat-file", "blob", entry.split()[2])


def _commits(*arguments: str) -> list[str]:
    """Commits of all branches, tags and experiments; none outside of a repository.

    UserError where git does not answer: nothing that a commit may name is taken for unnamed.
    """
    folders = (Path.cwd(), *Path.cwd().parents)
    if "GIT_DIR" not in os.environ and not any(os.path.lexists(f / ".git") for f in folders):
        return []
    return _git("rev-list", "--all", *arguments).split()  # experiments are references, too


def _git(*arguments: str) -> str:
    need = "what the commits of this folder need is not known, so that nothing may go"
    return git(*arguments, need=need, cure="`git log --all` must work here")


# -- MLflow and Ray -------------------------------------------------------------------------------


def _remove_from_mlflow(folders: list[Path]) -> None:
    if ids := list(mlflow_leftovers.deleted(DATABASE)):
        mlflow_leftovers.purge(ids)
    _remove(folders)


def ray_sessions() -> list[Path]:
    """Folders of this user's Ray sessions."""
    places = {Path(tempfile.gettempdir()), SYSTEM_TEMPORARY}
    found = (folder for place in places for name in RAY_SESSIONS for folder in place.glob(name))
    return sorted(
        folder
        for folder in found
        if not folder.is_symlink() and folder.is_dir() and folder.stat().st_uid == os.getuid()
    )


def dead_ray_sessions() -> Iterator[Path]:
    """Those that no process names in its arguments."""
    arguments = " ".join(" ".join(line) for line in _of_processes(lambda p: p.cmdline()))
    for folder in ray_sessions():
        if folder.name not in arguments and is_older(folder, SESSION_DAYS):
            yield folder


def ray_is_at_work() -> bool:
    return any("raylet" in " ".join(line[:1]) for line in _of_processes(lambda p: p.cmdline()))


def _of_processes(ask: Callable[[psutil.Process], Answer]) -> Iterator[Answer]:
    """What each process answers that may be asked."""
    for process in psutil.process_iter():
        try:
            yield ask(process)
        except psutil.Error:  # it has ended, or is another user's
            continue


# -- files ----------------------------------------------------------------------------------------


def size_of(path: Path) -> int:
    """Bytes of a file or of all files below a folder."""
    return sum(file.stat().st_size for file in _files(path))


def is_older(path: Path, days: float) -> bool:
    """Whether nothing in it was written to for so long."""
    return time.time() - _last_written(path) >= days * 86400


def _last_written(path: Path) -> float:
    return max((file.stat().st_mtime for file in _files(path)), default=path.lstat().st_mtime)


def _files(path: Path) -> Iterator[Path]:
    if path.is_file() and not path.is_symlink():
        yield path
    for where, _, names in os.walk(path):
        files = (Path(where) / name for name in names)
        yield from (file for file in files if file.is_file() and not file.is_symlink())


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*") if p.is_dir() and not p.is_symlink())


def _read_text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.exists() else ""


def _remove(paths: list[Path]) -> None:
    for path in paths:
        remove(path)


def _age(path: Path) -> str:
    days = (time.time() - _last_written(path)) / 86400
    return f"{days:.0f} days old" if days >= 1 else "of the last day"


def in_words(size: float) -> str:
    """12345678 => `11.8 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


if __name__ == "__main__":
    run_command("clean")

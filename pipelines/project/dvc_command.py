"""What `.venv/bin/dvc` runs: DVC, where that takes nothing from the user and nobody is in the way.

DVC deletes outputs before a stage can look at them, and rewrites params.yaml under a run that goes
on. So its commands that write into the project's folder are checked first, and run one at a time.
What any command takes from a remote is checked too (pipelines/base/dvc_guard.py).
"""

import os
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, chdir
from pathlib import Path

from dvc.cli import DvcParserError, parse_args
from dvc.cli import main as run_dvc

from aegan.config import DataConfig
from pipelines.base import dvc_guard, locks, outputs, params
from pipelines.base.errors import UserError
from pipelines.ingest import source_address
from pipelines.project import dvc_locks

REPRODUCING = ("CmdRepro", "CmdExperimentsRun")  # DVC's names of `repro` and `exp run`
WRITING = (*REPRODUCING, "CmdCheckout", "CmdDataPull", "CmdExperimentsApply", "CmdGC")
# Of `exp show`: metrics, which have plain names, stay; files of code and data go.
READABLE = (
    "--only-changed",
    "--keep",
    r"(?!(rev|typ|parent|aegan)$)[a-z_]+$",
    "--drop",
    r"aegan$|.*/.*",
)
SETS_SOURCE = re.compile(r"(?:params\.yaml:)?\+{0,2}data\.source=(.*)", re.DOTALL)


def main() -> None:
    try:
        arguments = parse_args(sys.argv[1:])
    except DvcParserError:  # DVC has said what is wrong
        sys.exit(254)
    dvc_guard.install()
    # The stages' `python` is this one, also in a copy of the project (`dvc exp run --temp`).
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    project, command = _find_project(), arguments.func.__name__
    if project is not None:
        dvc_locks.release_stale(project)
        if command == "CmdExperimentsShow":
            sys.exit(run_dvc([*sys.argv[1:], *_readable_columns(arguments)]))
    if project is None or command not in WRITING:
        sys.exit(run_dvc(sys.argv[1:]))
    if not getattr(arguments, "targets", None):
        os.chdir(project)  # the same from a sub-folder
    try:
        with ExitStack() as held:
            with chdir(project):
                if command in REPRODUCING:
                    for source in _sources(arguments):
                        source_address.resolve(source)
                    _mention_old_outputs()
                outputs.check_folders()
                held.enter_context(locks.hold(locks.PIPELINE))
                locks.check_stages()
            if command == "CmdExperimentsRun":
                _name_author()
            status = run_dvc(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
    sys.exit(status)


def _find_project() -> Path | None:
    """The folder of a copy of this project, at or above the working folder."""
    folders = (Path.cwd(), *Path.cwd().parents)
    return next(
        (f for f in folders if (f / "pipelines/project" / Path(__file__).name).exists()), None
    )


def _sources(arguments: Namespace) -> Iterator[str]:
    """Every `data.source` that this command would run with."""
    given = [
        match[1]
        for setting in getattr(arguments, "set_param", None) or ()
        if (match := SETS_SOURCE.fullmatch(setting))
    ]
    if not given:
        yield params.load(DataConfig).source
    for value in given:
        plain = value.strip().strip("'\"")
        # Several, separated by commas, are a grid of experiments, unless that is a path's name.
        yield from [plain] if Path(plain).exists() else plain.split(",")


def _readable_columns(arguments: Namespace) -> list[str]:
    """What makes the table of experiments readable, unless its columns are chosen by the user.

    DVC shows every parameter and every file of code as a column each: what differs is enough.
    """
    chosen = (arguments.only_changed, arguments.keep, arguments.drop, arguments.param_deps)
    if any(chosen) or arguments.json:
        return []
    print("note: only what differs between the rows; all of it: --keep .", file=sys.stderr)
    return list(READABLE)


def _mention_old_outputs() -> None:
    for folder in source_address.OLD_OUTPUTS:
        if source_address.is_old_output(Path(folder)):
            print(f"note: {source_address.about_old_output(folder)}", file=sys.stderr)


def _name_author() -> None:
    """DVC commits experiments: where git knows no author, one is named for this process only."""
    for name, value in (("name", "aegan"), ("email", "aegan@localhost")):
        known = subprocess.run(["git", "config", f"user.{name}"], capture_output=True, check=False)
        if known.returncode != 0:
            os.environ.setdefault(f"GIT_AUTHOR_{name.upper()}", value)
            os.environ.setdefault(f"GIT_COMMITTER_{name.upper()}", value)


if __name__ == "__main__":
    main()

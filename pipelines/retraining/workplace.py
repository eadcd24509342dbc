"""Where a retraining works: a git worktree of the project's last commit, with a DVC of its own.

The user's working folder is never touched. Source, registry and DVC's cache are the project's; what
the stages write stays in the worktree, so that the next retraining goes on from there.
"""

import configparser
import os
import re
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

from aegan.files import remove, write_text
from pipelines.base import params
from pipelines.base.errors import UserError
from pipelines.base.files import clear_disk_errors, project_folder
from pipelines.base.git import git
from pipelines.jobs.job import DVC_LOCK, run_dvc
from pipelines.jobs.with_parent import END_SECONDS
from pipelines.retraining.ledger import FOLDER

WORK = Path(FOLDER) / "work"
MARK = Path("artifacts/.fetched")  # which fetch the files there are of
ROBOT = {
    f"GIT_{role}_{key}": value
    for role in ("AUTHOR", "COMMITTER")
    for key, value in (("NAME", "aegan retrain"), ("EMAIL", "aegan@localhost"))
}
DVC_PATHS = {  # section of DVC's settings => keys that hold a path, or an address
    "cache": {"dir"},
    "remote": {
        *("url", "keyfile", "credentialpath", "configpath", "cert_path", "key_path"),
        *("gdrive_user_credentials_file", "gdrive_service_account_json_file_path"),
    },
}
DVC_ADDRESS = re.compile(r"\w+://")
# In quotes or not, before a comment.
DVC_VALUE = re.compile(r"""\s*(?:"([^"]*)"|'([^']*)'|([^#]*[^#\s]))""")


class BudgetError(UserError):
    """The time that a retraining may take is over."""


def last_commit() -> str:
    """Its hash; UserError where files that git knows differ from it."""
    _git("rev-parse", "--git-dir", cure="`git init` first")
    changed = [
        line[3:]
        for line in _git("status", "--porcelain", "--untracked-files=no").split("\n")
        if line and line[3:] != str(DVC_LOCK)
    ]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise UserError(
            f"{changed[0]}{more}: changed and not committed; a retraining runs what is committed: "
            "`git commit` or `git restore` it"
        )
    return _git("rev-parse", "HEAD")


class Workplace:
    """The worktree at `retraining/work`."""

    def __init__(self) -> None:
        self.project = project_folder()
        self.folder = self.project / WORK

    def prepare(
        self, commit: str, settings: Mapping[str, Mapping[str, Any]], *, anew: bool = True
    ) -> None:
        """Its files as of a commit, with other values of some parameters, by section.

        Unless anew, dvc.lock stays what the steps before have left: with an older one DVC would put
        the images that it names in the place of those that were fetched.
        """
        if not self._is_worktree():
            self._make_worktree(commit)
        if anew:
            _git("checkout", "--quiet", "--force", "--detach", commit, folder=self.folder)
        else:  # git never writes dvc.lock here, so that nothing is lost if we are killed
            _git("update-ref", "--no-deref", "HEAD", commit, folder=self.folder)
            but_lock = ("--staged", "--worktree", "--", ".", f":(exclude){DVC_LOCK}")
            _git("restore", "--quiet", f"--source={commit}", *but_lock, folder=self.folder)
        params.change(settings, self.folder / params.PARAMS_FILE, said_by="aegan retrain")
        config = _dvc_config(self.project)
        with (self.folder / ".dvc/config.local").open("w", encoding="utf-8") as file:
            config.write(file)

    def _is_worktree(self) -> bool:
        """Whether it is one of the project's own repository.

        It is none if it is not there, nor in a project that was moved, and one of the original's in
        a copy of a project. Git is not asked there: it would take the original's for moved.
        """
        file = self.folder / ".git"
        if not file.is_file():
            return False
        known = self.folder / file.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
        ours = self.project / _git("rev-parse", "--git-common-dir")
        return known.is_dir() and known.resolve().parent == (ours / "worktrees").resolve()

    def _make_worktree(self, commit: str) -> None:
        """Files that lie there stay; what git knows is checked out later.

        As `git worktree add` takes no folder with files, it is added beside it. (`git worktree
        repair` would lead other copies' worktrees here.)
        """
        aside = self.folder.with_name(f"{self.folder.name}.new")
        remove(aside)
        _git("worktree", "prune")
        _git(
            *("worktree", "add", "--quiet", "--force", "--no-checkout", "--detach"),
            *(str(aside), commit),
        )
        known = Path(_git("rev-parse", "--absolute-git-dir", folder=aside))
        file = self.folder / ".git"
        (known / "gitdir").write_text(f"{file}\n", encoding="utf-8")
        self.folder.mkdir(exist_ok=True)
        (aside / ".git").replace(file)
        remove(aside)

    def mark(self) -> str:
        """Say that what lies here will be of one fetch; returns the random mark that says which."""
        mark = secrets.token_hex(8)
        file = self.folder / MARK
        with clear_disk_errors(file):
            file.parent.mkdir(exist_ok=True)
            write_text(file, mark)
        return mark

    def holds(self, mark: str | None) -> bool:
        """Whether what lies here is of that fetch; of one without a mark, if anything does.

        It is not on another machine, nor where another retraining has fetched since, nor where the
        project was copied or moved since.
        """
        if mark is None:  # by an earlier version
            return self._is_worktree()
        file = self.folder / MARK
        return self._is_worktree() and file.exists() and file.read_text(encoding="utf-8") == mark

    def has_remote(self) -> bool:
        """Whether the project has a DVC remote by default, where data is pushed to."""
        if _dvc_config(self.project).has_option("core", "remote"):
            return True
        return "remote" in _outer_dvc_config()["core"]

    def dvc(
        self, *arguments: str, deadline: float = float("inf"), folder: Path | None = None
    ) -> None:
        """Run DVC there, or in another folder; UserError with the failed stage's words.

        At the deadline (seconds since 1970), or when we end, it gets a Ctrl-C, so that a training
        saves its checkpoint; then BudgetError.
        """
        is_over = Event()

        @contextmanager
        def watched(process: "subprocess.Popen[str]") -> Iterator[None]:
            def stop_at_deadline() -> None:
                while process.poll() is None and not is_over.is_set():
                    if time.time() >= deadline:
                        is_over.set()
                        os.killpg(process.pid, signal.SIGINT)
                    time.sleep(1.0)

            Thread(target=stop_at_deadline, name="deadline", daemon=True).start()
            try:
                yield
            finally:
                _end(process)

        try:
            run_dvc(*arguments, folder=folder or self.folder, within=watched)
        except UserError:
            if is_over.is_set():
                raise BudgetError(
                    "retrain.max_hours is over: training has saved a checkpoint and ended; raise "
                    "it and run the same command to go on from there"
                ) from None
            raise

    def commit(self, name: str, message: str) -> str:
        """A commit of dvc.lock and params.yaml on branch `retrain/NAME`, tagged `retrained/NAME`.

        Returns its hash; where the same is there under that name already, that one's.
        """
        branch, tag = f"retrain/{name}", f"retrained/{name}"
        files = (str(DVC_LOCK), str(params.PARAMS_FILE))
        _git("add", "--force", *files, folder=self.folder)
        if _git("tag", "--list", tag):
            different = ("diff", "--cached", "--name-only", tag, "--", *files)
            if not _git(*different, folder=self.folder):
                return _git("rev-parse", f"{tag}^{{commit}}")
        if _git("diff", "--cached", "--name-only", folder=self.folder):
            _git("commit", "--quiet", "--no-verify", "--message", message, folder=self.folder)
        _git("branch", "--force", branch, "HEAD", folder=self.folder)
        _git("tag", "--force", "--annotate", tag, "--message", message, folder=self.folder)
        return _git("rev-parse", "HEAD", folder=self.folder)


def _dvc_config(project: Path) -> configparser.ConfigParser:
    """The project's settings of DVC with its cache, and no git: DVC knows no worktrees.

    Those of the user and the machine hold in the worktree as they are.
    """
    config = configparser.ConfigParser(interpolation=None)
    try:
        config.read([project / ".dvc/config", project / ".dvc/config.local"])
    except configparser.Error as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"DVC's settings: {reason}; `dvc config --list` must work") from None
    for section in ("core", "cache"):
        if not config.has_section(section):
            config.add_section(section)
    config.set("core", "no_scm", "true")
    if not config.has_option("cache", "dir") and "dir" not in _outer_dvc_config()["cache"]:
        config.set("cache", "dir", "cache")
    for section in config.sections():
        where = section.strip("\"'").partition(" ")[0]  # ['remote "NAME"'] => remote
        for key in config[section].keys() & DVC_PATHS.get(where, ()):
            config.set(section, key, _absolute(config[section][key], project / ".dvc"))
    return config


def _outer_dvc_config() -> Mapping[str, Any]:
    """DVC's settings of the user and the machine (`dvc config --global`, `--system`), by section.

    A project's own go before them.
    """
    from dvc.config import Config, ConfigError  # here, since most commands never ask

    try:
        config: dict[str, Any] = Config(validate=False)
    except ConfigError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"DVC's global settings: {reason}; `dvc config --global --list` must work"
        ) from None
    return config


def _absolute(written: str, folder: Path) -> str:
    """A path in DVC's settings, relative to the file that holds it => one that holds anywhere."""
    found = DVC_VALUE.match(written)
    path = found[1] or found[2] or found[3] if found else ""
    if not path or DVC_ADDRESS.match(path) or Path(path).expanduser().is_absolute():
        return written
    return f'"{os.path.abspath(folder / path)}"'  # noqa: PTH100 - as DVC does, along no links


def _end(process: "subprocess.Popen[str]") -> None:
    """Nothing of it goes on when we end."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _git(*arguments: str, folder: Path | None = None, cure: str = "") -> str:
    """What git prints in the project, or in the worktree; raises UserError."""
    where = folder or project_folder()
    if not where.exists():
        raise UserError(
            f"{where} not found: expected the worktree of a retraining: `aegan retrain` again"
        )
    need = "a retraining runs what is committed"
    return git(*arguments, need=need, cure=cure, folder=where, environment=ROBOT).strip("\n")

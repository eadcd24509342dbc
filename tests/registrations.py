"""`python -m pipelines.register` many times, killed where a test says: MLflow is imported once.

A process that has imported everything forks one child for each registration. A child can kill
itself, with SIGKILL, before its n-th step: a file opened for writing, a rename, a folder, a commit.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent


class Outcome(NamedTuple):
    code: int  # as of subprocess: negative for a signal
    output: str
    errors: str
    steps: int  # 0 for one that was killed


class Registrations:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def start(self, *projects: Path, kill_at: int = 0, environment: Mapping[str, str] = {}) -> None:
        jobs = {"projects": list(map(str, projects)), "kill_at": kill_at, "env": {**environment}}
        assert self._process.stdin
        print(json.dumps(jobs), file=self._process.stdin, flush=True)

    def wait(self) -> list[Outcome]:
        assert self._process.stdout
        return [Outcome(*outcome) for outcome in json.loads(self._process.stdout.readline())]

    def run(self, *projects: Path, **options: Any) -> list[Outcome]:
        """Register in these project folders, all at once."""
        self.start(*projects, **options)
        return self.wait()


@contextmanager
def registrations() -> Iterator[Registrations]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    with subprocess.Popen(
        [sys.executable, "-m", "tests.registrations"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Registrations(process)
        process.stdin.close()  # type: ignore[union-attr]


def main() -> None:
    from pipelines import register  # noqa: F401
    from pipelines.registry import mlflow_store

    mlflow_store.set_environment()
    import mlflow.models.model
    import mlflow.pyfunc
    import mlflow.store.model_registry.sqlalchemy_store
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

    from pipelines.registry import model_from_code  # noqa: F401

    for line in sys.stdin:
        jobs = json.loads(line)
        children = [_fork(Path(folder), jobs) for folder in jobs["projects"]]
        print(json.dumps([_outcome(*child) for child in children]), flush=True)


def _fork(folder: Path, jobs: dict[str, Any]) -> tuple[int, Path]:
    child = os.fork()
    if child:
        return child, folder
    os.chdir(folder)
    os.environ.update(jobs["env"])
    for descriptor, name in ((0, os.devnull), (1, "output"), (2, "errors")):
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(name, flags if descriptor else os.O_RDONLY, 0o644), descriptor)
    code = _register(jobs["kill_at"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _register(kill_at: int) -> int:
    import sqlalchemy

    steps = 0

    def step(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        changes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if changes or event in ("os.rename", "os.mkdir", "os.remove", "shutil.rmtree"):
            step()

    sys.addaudithook(watch)
    sqlalchemy.event.listen(sqlalchemy.Engine, "commit", step)
    sys.argv = ["pipelines.register"]
    del sys.modules["pipelines.register"]  # which is run, not imported
    try:
        runpy.run_module("pipelines.register", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        code = 1
    except BaseException:
        traceback.print_exc()
        code = 2
    Path("steps").write_text(str(steps))
    return code


def _outcome(child: int, folder: Path) -> Outcome:
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    steps = int((folder / "steps").read_text()) if code >= 0 else 0
    return Outcome(code, (folder / "output").read_text(), (folder / "errors").read_text(), steps)


if __name__ == "__main__":
    main()

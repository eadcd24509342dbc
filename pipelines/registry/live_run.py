"""A training's run in MLflow, from its start on (docs/training.md, Watch it in MLflow).

What is sent is the log of the newest checkpoint, which nothing takes back, and the machine's state.
The run's own tags say up to where it has them, MLflow keeps equal points once, and the run is found
by a mark that is in the run folder first: wherever one is cut off, the next goes on exactly.
A run that a model version was registered from is closed: a training that goes on opens another.
"""

import json
import logging
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from filelock import FileLock, Timeout

from aegan.files import write_json, write_text
from aegan.training.run_folder import Row, RunFolder
from pipelines.base.files import read_json
from pipelines.registry.mlflow_runs import create_run, log_numbers, make_experiment
from pipelines.registry.mlflow_store import alone, open_store, quoted, readable_errors
from pipelines.registry.training_record import determined_params, system_points, tags, train_points

RUNNING, FINISHED, FAILED, KILLED = "RUNNING", "FINISHED", "FAILED", "KILLED"  # words of MLflow
TRAINING, SENT_STEP, SENT_SYSTEM_ROWS = "training", "sent_step", "sent_system_rows"  # tags
REGISTERED = "registered_model"  # the tag of a run that belongs to a version of a model

log = logging.getLogger(__name__)


class LiveRun:
    """MLflow's side of a run folder."""

    def __init__(self, folder: RunFolder, experiment: str) -> None:
        self._folder, self._experiment = folder, experiment
        self._facts = read_json(folder.facts, stage="train")
        self._client: Any = None
        self._run_id = ""

    def send(self, status: str) -> str:
        """Send what the run lacks, then its status; returns its id. Raises UserError.

        There is a run afterwards; only one that was registered and lacks nothing is left alone, and
        the id is empty.
        """
        with readable_errors(), alone():
            if self._client is None:
                self._connect()
            rows = self._folder.kept_rows()
            if self._is_registered:
                if status != RUNNING and not self._new(rows):
                    return ""
                self._take(self._client, self._create(self._client, self._new_mark()))
            self._send_points(rows, ended=status != RUNNING)
            self._set_status(status)
            return self._run_id

    def _connect(self) -> None:
        """Find the run, or open it."""
        mark = mark_of(self._folder) or self._new_mark()  # before any server is asked
        mlflow = open_store()
        client = mlflow.MlflowClient()
        self._experiment_id = make_experiment(mlflow, self._experiment)
        run = find_run(client, self._experiment_id, mark)
        self._take(client, run or self._create(client, mark))
        self._client = client

    def _new_mark(self) -> str:
        mark = uuid.uuid4().hex
        write_json(self._folder.tracking, {TRAINING: mark})
        return mark

    def _create(self, client: Any, mark: str) -> Any:
        all_tags = tags(self._facts) | {TRAINING: mark}
        return create_run(client, self._experiment_id, self._facts["run_name"], all_tags)

    def _take(self, client: Any, run: Any) -> None:
        self._run_id, self._status = run.info.run_id, run.info.status
        found = run.data.tags
        self._is_registered = REGISTERED in found
        self._step, self._system_rows = (
            int(found.get(tag, start)) for tag, start in ((SENT_STEP, -1), (SENT_SYSTEM_ROWS, 0))
        )
        params = determined_params(self._facts)
        missing = {name: params[name] for name in params.keys() - run.data.params.keys()}
        log_numbers(client, self._run_id, params=missing)

    def _new(self, rows: Iterable[Row]) -> list[Row]:
        return [row for row in rows if row["step"] > self._step]

    def _send_points(self, rows: list[Row], *, ended: bool) -> None:
        new = self._new(rows)
        if ended and not new:
            new = rows[-1:]  # once more: the end may have added its scores
        system = self._folder.system_rows()[self._system_rows :]
        if not new and not system:
            return
        step = int(new[-1]["step"]) if new else self._step
        system_rows = self._system_rows + len(system)
        log_numbers(
            self._client,
            self._run_id,
            points=[
                *train_points(new, self._facts),
                *system_points(system, first=self._system_rows),
            ],
            tags={SENT_STEP: step, SENT_SYSTEM_ROWS: system_rows},
        )
        self._step, self._system_rows = step, system_rows

    def _set_status(self, status: str) -> None:
        if status == self._status:
            return
        if status == RUNNING:
            self._client.update_run(self._run_id, status)
        else:
            self._client.set_terminated(self._run_id, status)
        self._status = status


def find_run(client: Any, experiment_id: str, mark: str) -> Any:
    """The run that a training's mark is on; None where there is none, or it was deleted."""
    found = client.search_runs([experiment_id], f"tags.{TRAINING} = {quoted(mark)}")
    return found[0] if found else None


def tags_of_all(folder: RunFolder) -> dict[str, str]:
    """The tags of a run that has all of a training; none for one that was never to be seen."""
    if not (mark := mark_of(folder)):
        return {}
    step = max((int(row["step"]) for row in folder.kept_rows()), default=-1)
    system_rows = len(folder.system_rows())
    return {TRAINING: mark, SENT_STEP: f"{step}", SENT_SYSTEM_ROWS: f"{system_rows}"}


def mark_of(folder: RunFolder) -> str:
    """By which the run of this training is found; empty if it never was to have one."""
    try:
        return str(json.loads(folder.tracking.read_text(encoding="utf-8"))[TRAINING])
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # damaged: another one will do
        return ""


@contextmanager
def recorded_end(folder: RunFolder) -> Iterator[None]:
    """How the block ended is in the run folder afterwards; without a word it was killed."""
    folder.status.unlink(missing_ok=True)
    status = FAILED
    try:
        yield
        status = FINISHED
    except KeyboardInterrupt:
        status = KILLED
        raise
    finally:
        record_end(folder, status)


def record_end(folder: RunFolder, status: str) -> None:
    with suppress(OSError):  # a full disk, which the training itself finds
        write_text(folder.status, status)


def ended_as(folder: RunFolder) -> str:
    """How a training that is not at work ended."""
    try:
        found = folder.status.read_text(encoding="utf-8")
    except FileNotFoundError:
        return KILLED
    return found if found in (FINISHED, FAILED) else KILLED


def send_rest(folder: RunFolder, experiment: str) -> str:
    """Send what a training that has ended could not send; returns the id of its run.

    It is empty for a run that was registered and lacks nothing, and while the training is at work,
    which sends by itself. Raises UserError.
    """
    try:
        with FileLock(folder.driver_lock, timeout=0), FileLock(folder.tracking_lock, timeout=0):
            return LiveRun(folder, experiment).send(ended_as(folder))
    except Timeout:
        log.info("%s is at work and sends its values itself", folder.path.name)
        return ""

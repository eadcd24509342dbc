"""Run trials on Ray: the search itself, which Ray Tune can restore, and lists of single trainings.

Imported once Ray is up. Ray Tune stops and counts; what a trial has learnt lies in its own run
folder, so nothing that was trained is trained again.
"""

import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import ray
from optuna.distributions import FloatDistribution
from ray import cloudpickle, tune
from ray.exceptions import RayError, RayTaskError
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search.optuna import OptunaSearch

from aegan.config import ComputeConfig, ConfigError, Split, TrainConfig, TuneConfig
from aegan.training.checkpoint import CheckpointError
from pipelines.base.errors import UserError
from pipelines.base.progress import progress
from pipelines.cluster.session import show_ray_logs
from pipelines.registry import mlflow_store, search_runs
from pipelines.registry.mlflow_runs import Point
from pipelines.search.trial import (
    SCORES,
    Ended,
    Scores,
    Settings,
    Share,
    Task,
    Trial,
    rounded,
    run_trial,
    scores_in,
    share_of,
    train_and_judge,
)

ENVIRONMENT = {  # set unless the user has set them
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the loop keeps its own logs
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the stage; the same command goes on
    "TUNE_GLOBAL_CHECKPOINT_S": "5",
    "RAY_AIR_NEW_OUTPUT": "0",  # whose banner is printed at any verbosity
}

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Record:
    """Where the trials are recorded in MLflow."""

    search: str  # name of the search
    experiment: str


def share_of_cluster(config: TuneConfig, compute: ComputeConfig) -> Share:
    """What each of the concurrent trials gets; raises UserError where that is too little."""
    largest = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
    return share_of(config, compute, ray.cluster_resources(), largest=largest)


def search(
    task: Task,
    config: TuneConfig,
    share: Share,
    *,
    start: Settings,
    folder: Path,
    record: Record,
    max_failures: int,
) -> list[Trial]:
    """All trials by number, the first of them with the settings `start`; goes on where it was."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    mlflow_store.set_environment()  # Ray Tune imports MLflow to count who uses it
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if not show_ray_logs():
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # errors come with the results
    trainable = tune.with_resources(
        tune.with_parameters(trial_process, task=task.resolved()),
        {"cpu": share.cpus, "gpu": share.gpus},
    )
    experiment = folder.resolve() / "search"
    if _is_whole(experiment):
        log.info("going on with search %s", record.search)
        tuner = tune.Tuner.restore(str(experiment), trainable=trainable, resume_errored=True)
    else:
        shutil.rmtree(experiment, ignore_errors=True)
        scheduler = _scheduler(task, config)
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                num_samples=config.num_trials,
                max_concurrent_trials=config.concurrent_trials,
                search_alg=_sampler(task, config, start),
                scheduler=scheduler,
                reuse_actors=True,  # a process takes seconds to start
                trial_dirname_creator=folder_of,
            ),
            run_config=tune.RunConfig(
                name=experiment.name,
                storage_path=str(folder.resolve()),
                failure_config=tune.FailureConfig(max_failures=max_failures),
                callbacks=[Follower(scheduler, task, record, config.num_trials)],
                verbose=0,
            ),
        )
    results = tuner.fit()
    trials = [
        read_trial(task, number_of(result.path), result.config, result.metrics, error=result.error)
        for result in results
    ]
    if not any(trial.ended == "finished" for trial in trials):
        reasons = [result.metrics["error"] for result in results if "error" in result.metrics]
        reasons += [str(error).splitlines()[-1] for error in results.errors]
        raise UserError(
            f"no trial was trained to the end: {(reasons or ['each of them diverged'])[0]} "
            "(AEGAN_RAY_LOGS=1 shows all that Ray says)"
        )
    return sorted(trials, key=lambda trial: trial.number)


def trial_process(settings: Settings, task: Task) -> None:
    """What runs in a trial's process."""
    config = task.config(rounded(settings), seed=task.start.training.seed)
    run_trial(task, config, tune.report)


def train_all(
    task: Task, configs: list[TrainConfig], share: Share, *, split: Split, max_failures: int
) -> list[Scores]:
    """Scores of each training on a split's images; what was trained before is not trained again."""
    remote = ray.remote(
        num_cpus=share.cpus, num_gpus=share.gpus, max_retries=max_failures, max_calls=0
    )(train_and_judge)
    results = [remote.remote(task.resolved(), config, split) for config in configs]
    waiting = list(results)

    def ended() -> Any:
        nonlocal waiting
        while waiting:
            done, waiting = ray.wait(waiting)
            yield from done

    try:
        for result in progress(ended(), "trained", unit="runs", total=len(configs)):
            ray.get(result)
        return list(ray.get(results))
    except RayTaskError as error:
        if isinstance(error.cause, CheckpointError | ConfigError):
            raise UserError(str(error.cause)) from None
        raise
    except RayError as error:
        raise UserError(
            f"a training's process died: {error}; lower tune.concurrent_trials"
        ) from None


def folder_of(ray_trial: Any) -> str:
    """Ray Tune's folder for a trial: its number, from 0."""
    return str(int(ray_trial.experiment_tag.partition("_")[0]) - 1)


def number_of(folder: str) -> int:
    """The number in such a folder's name; Tune appends letters where there was one already."""
    return int(Path(folder).name.partition("_")[0])


def read_trial(
    task: Task, number: int, settings: Settings, result: Mapping[str, Any] | None, *, error: object
) -> Trial:
    """A trial from what Ray Tune knows of it: its settings and its last report."""
    result, settings = result or {}, rounded(settings)
    step = int(result.get("step", 0))
    ended: Ended = "finished" if step == task.start.training.num_steps else "stopped"
    if error or "error" in result:
        ended = "failed"
    elif result.get("diverged"):
        ended = "diverged"
    config = task.config(settings, seed=task.start.training.seed)
    scores = {name: float(result[name]) for name in SCORES if name in result}
    folder = task.run_folder(config)
    logged = {int(row["step"]): scores_in(row) for row in folder.rows()}
    return Trial(
        number=number,
        settings=settings,
        run_name=folder.path.name,
        ended=ended,
        step=step,
        scores=scores,
        history={at: row for at, row in logged.items() if row and at < step} | {step: scores},
    )


class Follower(tune.Callback):  # type: ignore[misc]
    """Shows and records each trial that ends; keeps the scheduler's state, which Tune forgets.

    Without it, the first trials after a restart would meet no others to be compared with. Ray's
    record holds all of this: the paths of `task` must lead from wherever the project is then.
    """

    def __init__(self, scheduler: Any, task: Task, record: Record, num_trials: int) -> None:
        self._scheduler, self._task, self._record = scheduler, task, record
        self._num_trials = num_trials

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._show(trial, error=None)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._show(trial, error=trial.error_file)

    def get_state(self) -> dict[str, Any]:
        return {"scheduler": vars(self._scheduler)}

    def set_state(self, state: dict[str, Any]) -> None:
        vars(self._scheduler).update(state["scheduler"])

    def _show(self, ray_trial: Any, *, error: object) -> None:
        number = int(folder_of(ray_trial))
        trial = read_trial(self._task, number, ray_trial.config, ray_trial.last_result, error=error)
        log.info(
            "trial %d (of %d) %s at step %d  %s  %s",
            trial.number,
            self._num_trials,
            trial.ended,
            trial.step,
            "  ".join(f"{name} {score:.4g}" for name, score in trial.scores.items()),
            "  ".join(f"{name} {value:g}" for name, value in trial.settings.items()),
        )
        try:
            record_trial(trial, self._task, self._record)
        except UserError as problem:  # recorded at the end
            log.warning("%s", problem)


def record_trial(trial: Trial, task: Task, record: Record) -> None:
    """Put a trial into MLflow unless it is there; raises UserError."""
    config = task.config(trial.settings, seed=task.start.training.seed)
    search_runs.log_trial(
        f"trial {trial.number:03}",
        search=record.search,
        experiment=record.experiment,
        params=trial.settings,
        tags={"run_name": trial.run_name, "ended": trial.ended},
        points=[
            Point(f"train/{name}", value, int(row["step"]), row["time"])
            for row in task.run_folder(config).rows()
            for name, value in row.items()
            if name not in ("step", "time") and math.isfinite(value)
        ],
    )


def _sampler(task: Task, config: TuneConfig, start: Settings) -> OptunaSearch:
    """Proposes settings: the start, some random ones, then what earlier trials make promising."""
    objectives = list(task.objectives)
    several = len(objectives) > 1
    return OptunaSearch(
        {
            name: FloatDistribution(between.low, between.high, log=between.scale == "log")
            for name, between in config.search.items()
        },
        metric=objectives if several else objectives[0],
        mode=["min"] * len(objectives) if several else "min",
        points_to_evaluate=[start],
        sampler=optuna.samplers.TPESampler(
            n_startup_trials=max(config.num_trials // 4, 2),
            constant_liar=True,  # trials that run at once should differ
            seed=config.seed,
        ),
    )


def _scheduler(task: Task, config: TuneConfig) -> Any:
    """Successive halving; there is none for several objectives."""
    if len(task.objectives) > 1:
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr="step",
        metric=task.objectives[0],
        mode="min",
        max_t=config.num_steps,
        grace_period=config.grace_steps,
        reduction_factor=config.reduction_factor,
    )


def _is_whole(experiment: Path) -> bool:
    """Whether a search can be restored: Tune's records are there and not cut off by a kill."""
    snapshots = list(experiment.glob("experiment_state-*.json"))
    try:
        for file in snapshots:
            json.loads(file.read_text(encoding="utf-8"))
        for file in experiment.glob("*.pkl"):
            cloudpickle.loads(file.read_bytes())
    except Exception:  # whatever half a pickle raises
        log.warning("the records of the search are damaged: starting again from the trained trials")
        return False
    return bool(snapshots)

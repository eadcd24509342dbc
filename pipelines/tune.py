"""Stage `tune`: search better lambdas, learning rates and gamma, and compare honestly.

Off by default: `make tune` runs it (docs/tuning.md). Trials are trained and judged on the training
and validation images; the comparison at the end is the only thing that sees test images. Works in
runs/<name>/, named by its content: the same command goes on, a changed one starts anew.
"""

import csv
import logging
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from aegan.config import (
    ComputeConfig,
    LossConfig,
    RegisterConfig,
    TrainConfig,
    TrainingConfig,
    TuneConfig,
)
from aegan.files import sha256_of_json, write_json
from aegan.training.run_folder import DRIVER_LOCK
from pipelines.base import locks, params
from pipelines.base.errors import UserError, run_stage
from pipelines.base.files import new_folder, read_json
from pipelines.base.identity import code_sha256, file_of
from pipelines.base.outputs import FOLDERS, SHARDS, TUNE
from pipelines.base.run_name import run_name
from pipelines.cluster.session import execution, ray_session
from pipelines.registry import tracking
from pipelines.search.trial import OBJECTIVES, Scores, Settings, Task, Trial, shortened
from pipelines.train import WORKER_ENVIRONMENT

RUNS = Path("runs")
CODE = (  # what determines a search, besides the trainings
    "pipelines.search.tuner",
    "pipelines.search.trial",
    "pipelines.tune",
)
SEARCHED = {"loss": LossConfig, "training": TrainingConfig}  # sections with settings to search

log = logging.getLogger(__name__)


def main() -> None:
    with locks.hold("tune"):
        tune(
            params.load_train_config(),
            params.load(TuneConfig),
            params.load(ComputeConfig),
            experiment=params.load(RegisterConfig).experiment,
        )


def tune(
    start: TrainConfig, config: TuneConfig, compute: ComputeConfig, *, experiment: str
) -> None:
    """Search, choose, compare, and write what is found into artifacts/tune; raises UserError."""
    check(start, config)
    manifest = read_json(SHARDS / "manifest.json", stage="preprocess")
    for split in ("validation", "test"):
        if not manifest["splits"][split]["rows"]:
            raise UserError(
                f"there are no {split} images to tune on: set preprocess.{split}_fraction"
            )
    dataset_sha256 = manifest["dataset_sha256"]
    start = shortened(start, num_steps=config.num_steps, interval=config.grace_steps)
    name = search_name(start, config, dataset_sha256)
    folder = RUNS / name  # within the project: what Ray keeps of it holds where the project is
    folder.mkdir(parents=True, exist_ok=True)
    for variable, value in WORKER_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)  # for the processes of a private Ray
    try:
        with FileLock(folder / DRIVER_LOCK, timeout=0), ray_session(dashboard=True):
            _tune(start, config, compute, folder=folder, experiment=experiment)
    except Timeout:
        raise UserError(f"another search works in {folder}: wait for it or end it") from None


def _tune(
    start: TrainConfig, config: TuneConfig, compute: ComputeConfig, *, folder: Path, experiment: str
) -> None:
    from pipelines.search import tuner  # imports Ray, whose environment is set by now

    share = tuner.share_of(config, compute)
    task = Task(
        start=start,
        objectives=OBJECTIVES[config.objective],
        shards=SHARDS,
        runs=folder / "trials",
        device=share.device,
        threads=compute.threads_per_worker or share.cpus,
        execution=execution(compute),
    )
    record = tuner.Record(search=folder.name, experiment=experiment)
    log.info(
        "search %s: %d trials of up to %d steps, %d at a time on %s",
        folder.name, config.num_trials, config.num_steps, config.concurrent_trials, share.device,
    )  # fmt: skip

    # Search.
    trials = tuner.search(
        task,
        config,
        share,
        start=settings_of(start, list(config.search)),
        folder=folder,
        record=record,
        max_failures=compute.max_failures,
    )

    # Choose: the best ones and the start again, with seeds that the search has not seen.
    def train_all(candidates: Sequence[Trial], seeds: range, split: Any) -> list[list[Scores]]:
        configs = [task.config(trial.settings, seed=seed) for trial in candidates for seed in seeds]
        scores = tuner.train_all(
            task, configs, share, split=split, max_failures=compute.max_failures
        )
        return [scores[i : i + len(seeds)] for i in range(0, len(scores), len(seeds))]

    first = start.training.seed + 1
    seeds = range(first, first + config.seeds_per_finalist)
    candidates = finalists(trials, task.objectives, count=config.num_finalists)
    log.info("training %d finalists with %d other seeds each", len(candidates), len(seeds))
    scores = train_all(candidates, seeds, "validation")
    means = [
        {key: statistics.fmean(row[key] for row in rows) for key in rows[0]} for rows in scores
    ]
    winner = candidates[ranked(means, task.objectives)[0]]

    # Compare, with seeds that have chosen nothing, on images that have chosen nothing.
    unseen = range(seeds.stop, seeds.stop + config.seeds_of_comparison)
    test = None  # there is nothing to compare where the start itself has won
    if winner.number != 0:
        log.info("comparing trial %d with params.yaml over %d seeds", winner.number, len(unseen))
        on_test = train_all([winner, trials[0]], unseen, "test")
        test = {
            "seeds": list(unseen),
            "winner": summary(on_test[0]),
            "start": summary(on_test[1]),
            "winner_minus_start": summary(differences(*on_test)),
        }
    comparison = {
        "objectives": list(task.objectives),
        "num_steps": config.num_steps,
        "winner": {"trial": winner.number, "settings": winner.settings},
        "start": trials[0].settings,
        "test": test,
        "finalists": [
            {"trial": trial.number, "settings": trial.settings, "seeds": list(seeds)}
            | {"validation": summary(rows)}
            for trial, rows in zip(candidates, scores, strict=True)
        ],
    }
    write(trials, comparison, config, TUNE)
    for trial in trials:
        tuner.record_trial(trial, task, record)
    tracking.log_search(
        folder.name,
        experiment=experiment,
        tags={"objective": config.objective, **winner.settings},
        files=sorted(TUNE.iterdir()),
    )
    for line in verdict(comparison):
        log.info("%s", line)


def check(start: TrainConfig, config: TuneConfig) -> None:
    """What types alone cannot say about the parameters; raises UserError."""
    for key in ("num_trials", "grace_steps", "concurrent_trials", "num_finalists",
                "seeds_per_finalist", "seeds_of_comparison"):  # fmt: skip
        if getattr(config, key) < 1:
            raise UserError(
                f"params.yaml: tune.{key} is {getattr(config, key)}; it must be 1 or more"
            )
    if config.grace_steps > config.num_steps:
        raise UserError(
            f"params.yaml: tune.grace_steps is {config.grace_steps}, more than tune.num_steps, "
            f"{config.num_steps}"
        )
    if config.reduction_factor < 2:
        raise UserError(
            f"params.yaml: tune.reduction_factor is {config.reduction_factor}; it must be 2 or more"
        )
    if not 0 < config.gpus_per_trial <= 1:
        raise UserError(
            f"params.yaml: tune.gpus_per_trial is {config.gpus_per_trial}; it must be above 0 and "
            "at most 1: a trial trains in one process"
        )
    if start.training.arm == "gan" and config.objective != "frechet_distance":
        raise UserError(
            f"params.yaml: tune.objective is {config.objective}, but training.arm: gan has no "
            "encoder to reconstruct with; use frechet_distance"
        )
    if start.training.start_from:
        raise UserError(
            "params.yaml: tune trains from random weights; empty training.start_from for it"
        )
    if not config.search:
        raise UserError("params.yaml: tune.search names no settings")
    valid = [
        f"{section}.{field.name}"
        for section, kind in SEARCHED.items()
        for field in fields(kind)
        if field.type is float
    ]
    for name, between in config.search.items():
        if name not in valid:
            raise UserError(f"params.yaml: tune.search has {name}; valid: {', '.join(valid)}")
        span = f"params.yaml: tune.search.{name} is {between.low:g} to {between.high:g}"
        if not between.low < between.high or not math.isfinite(between.high - between.low):
            raise UserError(f"{span}; low must be less than high")
        if between.scale == "log" and between.low <= 0:
            raise UserError(f"{span}; with scale: log both must be above 0")
        value = settings_of(start, [name])[name]
        if not between.low <= value <= between.high:
            raise UserError(
                f"{span}, but {name} itself, which is the first trial, is {value:g}: widen the "
                "range"
            )
    if start.training.update_rule == "reference" and "loss.gamma" in config.search:
        raise UserError("params.yaml: training.update_rule: reference has no loss.gamma to search")


def settings_of(config: TrainConfig, names: list[str]) -> Settings:
    """Some settings' values by their dotted names."""
    sections = asdict(config)
    pairs = [(name, *name.split(".", 1)) for name in names]
    return {name: sections[section][key] for name, section, key in pairs}


def search_name(start: TrainConfig, config: TuneConfig, dataset_sha256: str) -> str:
    """A name that changes with data, parameters, search space and code, and with nothing else."""
    code = code_sha256(filter(None, map(file_of, CODE)))
    versions = [version(package) for package in ("ray", "optuna")]
    content = [run_name(start, dataset_sha256), asdict(config), code, versions]
    return f"tune-{sha256_of_json(content)[:12]}"


# -- choosing -------------------------------------------------------------------------------------


def finalists(trials: list[Trial], objectives: tuple[str, ...], *, count: int) -> list[Trial]:
    """The best of those trained to the end, and the start, whatever became of it."""
    ended = [trial for trial in trials if trial.ended == "finished"]
    order = ranked([trial.scores for trial in ended], objectives)
    best = [ended[i] for i in order[:count]]
    return best if trials[0] in best else [*best, trials[0]]


def ranked(rows: Sequence[Scores], objectives: tuple[str, ...]) -> list[int]:
    """Indices, best first: the Pareto front before the others, then by the sum of ranks.

    With one objective that is the order of its scores.
    """
    values = np.array([[row[name] for name in objectives] for row in rows])
    ranks = (values[:, None] > values).sum(1).sum(1)  # in each objective, how many are better
    behind = ~on_front(values)
    return sorted(range(len(rows)), key=lambda i: (behind[i], ranks[i], i))


def on_front(values: np.ndarray) -> np.ndarray:
    """Which rows of [N, objectives] no other row beats: lower somewhere, higher nowhere; [N]."""
    no_worse = (values[:, None] <= values).all(2)  # [i, j]: i in comparison with j
    beats = no_worse & (values[:, None] < values).any(2)
    return np.asarray(~beats.any(0))


def differences(winner: list[Scores], start: list[Scores]) -> list[Scores]:
    """Seed by seed: the same seed gives both the same first weights and the same batches."""
    return [
        {name: a[name] - b[name] for name in a if name in b}
        for a, b in zip(winner, start, strict=True)
    ]


def summary(rows: list[Scores]) -> dict[str, dict[str, Any]]:
    """Per score its mean, standard error and values; null where training diverged."""
    table = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        finite = all(map(math.isfinite, values))
        several = finite and len(values) > 1
        table[name] = {
            "mean": statistics.fmean(values) if finite else None,
            "standard_error": statistics.stdev(values) / math.sqrt(len(values))
            if several
            else None,
            "values": [value if math.isfinite(value) else None for value in values],
        }
    return table


# -- writing --------------------------------------------------------------------------------------


def write(
    trials: list[Trial], comparison: dict[str, Any], config: TuneConfig, output: Path
) -> None:
    """The table of trials, the winner as an overlay of params.yaml, the comparison, the plots."""
    from pipelines.search import plots

    objectives = OBJECTIVES[config.objective]
    with new_folder(output, written=FOLDERS[TUNE]) as folder:
        write_trials(trials, objectives, folder / "trials.csv")
        write_json(folder / "comparison.json", comparison)
        params.write_overlay(
            comparison["winner"]["settings"],
            folder / "tuned.yaml",
            comment="\n".join(["Found by the stage tune (docs/tuning.md).", *verdict(comparison)]),
        )
        plots.draw(trials, config.search, objectives, folder)


def write_trials(trials: list[Trial], objectives: tuple[str, ...], file: Path) -> None:
    """One row a trial: how it ended, settings, scores, and whether it is on the Pareto front."""
    ended = [trial for trial in trials if trial.ended == "finished"]
    front = on_front(np.array([[trial.scores[name] for name in objectives] for trial in ended]))
    best = {trial.number for trial, on in zip(ended, front, strict=True) if on}
    columns = list(dict.fromkeys(name for trial in trials for name in trial.scores))
    with file.open("w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table)
        header = ["trial", "ended", "step", *trials[0].settings, *columns, "on_front", "run"]
        writer.writerow(header)
        for trial in trials:
            scores = [trial.scores.get(name, "") for name in columns]
            settings, front_mark = trial.settings.values(), int(trial.number in best)
            row = [trial.number, trial.ended, trial.step, *settings, *scores]
            writer.writerow([*row, front_mark, trial.run_name])


def verdict(comparison: dict[str, Any]) -> list[str]:
    """What the comparison says, in words; the figures decide, whatever they are."""
    test = comparison["test"]
    if test is None:
        return ["No trial was better than the settings of params.yaml over several seeds."]
    lines = []
    for name in comparison["objectives"]:
        winner, start, change = (
            test[key][name] for key in ("winner", "start", "winner_minus_start")
        )
        if winner["mean"] is None or start["mean"] is None:
            lines.append(f"{name}: a training of the comparison diverged")
            continue
        better = sum(value < 0 for value in change["values"])
        lines.append(
            f"test {name} (lower is better): {_with_error(winner)}, params.yaml "
            f"{_with_error(start)}; difference {_with_error(change)}, better with {better} of "
            f"{len(change['values'])} seeds"
        )
    return lines


def _with_error(figures: dict[str, Any]) -> str:
    error = figures["standard_error"]
    return f"{figures['mean']:.4g}" + (f" +- {error:.2g}" if error is not None else "")


if __name__ == "__main__":
    run_stage(main)

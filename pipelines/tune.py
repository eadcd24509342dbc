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
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from aegan.config import (
    ComputeConfig,
    RegisterConfig,
    TrainConfig,
    TuneConfig,
    check_batch_size,
    check_classes,
    check_search,
)
from aegan.files import sha256_of_json, write_json
from aegan.metrics.features import installed_features
from aegan.training.run_folder import DRIVER_LOCK
from pipelines.base import locks, params
from pipelines.base.errors import UserError, run_stage
from pipelines.base.files import new_folder, read_json
from pipelines.base.identity import ROOT, code_sha256
from pipelines.base.outputs import FOLDERS, SHARDS, TUNE
from pipelines.base.run_name import run_name
from pipelines.cluster.session import machine, ray_session
from pipelines.registry import search_runs
from pipelines.search.trial import (
    OBJECTIVES,
    Scores,
    Settings,
    Task,
    Trial,
    share_of,
    shortened,
)
from pipelines.train import WORKER_ENVIRONMENT

RUNS = Path("runs")
CODE = (  # what determines a search, besides the trainings
    "pipelines/search/tuner.py",
    "pipelines/search/trial.py",
    "pipelines/tune.py",
)

log = logging.getLogger(__name__)


def main() -> None:
    with locks.hold("tune"):
        tune(
            params.load(TrainConfig),
            params.load(TuneConfig),
            params.load(ComputeConfig),
            experiment=params.load(RegisterConfig).experiment,
        )


def tune(
    start: TrainConfig, config: TuneConfig, compute: ComputeConfig, *, experiment: str
) -> None:
    """Search, choose, compare, and write what is found into artifacts/tune; raises UserError."""
    check_search(start, config)
    manifest = read_json(SHARDS / "manifest.json", stage="preprocess")
    for split in ("validation", "test"):
        if not manifest["splits"][split]["rows"]:
            raise UserError(
                f"there are no {split} images to tune on: set preprocess.{split}_fraction"
            )
    check_classes(start.model, manifest.get("classes", []))
    check_batch_size(start.training.batch_size, images=manifest["splits"]["train"]["rows"])
    if not os.environ.get("RAY_ADDRESS"):  # of a cluster Ray alone knows what it has
        here = machine()
        share_of(config, compute, here, largest=here["CPU"])
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

    share = tuner.share_of_cluster(config, compute)
    task = Task(
        start=start,
        objectives=OBJECTIVES[config.objective],
        shards=SHARDS,
        runs=folder / "trials",
        device=share.device,
        threads=compute.threads_per_worker or share.cpus,
        micro_batch_size=compute.micro_batch_size,
        features=installed_features(),
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
        {name: statistics.fmean(row[name] for row in rows) for name in task.objectives}
        for rows in scores
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
        "features": task.features,
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
    search_runs.log_search(
        folder.name,
        experiment=experiment,
        tags={"objective": config.objective, **winner.settings},
        files=sorted(TUNE.iterdir()),
    )
    for line in verdict(comparison):
        log.info("%s", line)


def settings_of(config: TrainConfig, names: list[str]) -> Settings:
    """Some settings' values by their dotted names."""
    sections = asdict(config)
    pairs = [(name, *name.split(".", 1)) for name in names]
    return {name: sections[section][key] for name, section, key in pairs}


def search_name(start: TrainConfig, config: TuneConfig, dataset_sha256: str) -> str:
    """A name that changes with data, parameters, search space and code, and with nothing else."""
    code = code_sha256(ROOT / file for file in CODE)
    versions = [version(package) for package in ("ray", "optuna")]
    judged_in = installed_features()
    content = [run_name(start, dataset_sha256), asdict(config), code, versions, judged_in]
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
    for name in (name for name in rows[0] if all(name in row for row in rows)):
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

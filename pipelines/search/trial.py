"""One trial of the search: the training loop in this process, and scores of what it leaves.

`pipelines/search/tuner.py` decides which trials run, and where.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from filelock import FileLock

import aegan
from aegan.config import ComputeConfig, ConfigError, Split, TrainConfig, TuneConfig
from aegan.data.dataset import load_images, read_manifest
from aegan.metrics.features import installed_features
from aegan.metrics.neighbours import precision_recall_density_coverage
from aegan.training import checkpoint, loop
from aegan.training.checkpoint import CheckpointError
from aegan.training.run_folder import RunFolder
from aegan.training.state import export_model
from aegan.training.validation import Judge
from pipelines.base.errors import UserError
from pipelines.base.run_name import run_name
from pipelines.cluster.session import ORPHAN_WAIT_SECONDS, uses_gpu

SCORES = ("frechet_distance", "image_reconstruction", "uncovered")
ALSO_MEASURED = "kernel_distance"
OBJECTIVES: dict[str, tuple[str, ...]] = {  # scores that the search lowers, by `tune.objective`
    "frechet_distance": ("frechet_distance",),
    "image_reconstruction": ("image_reconstruction",),
    "pareto": SCORES,
}
IMAGES = {"validation": loop.VALIDATION_IMAGES, "test": 2000}  # that judge, at most
NEIGHBOURS = 5
SIGNIFICANT_DIGITS = 3  # of a setting that was searched: nobody should read more into it
PREFIX = "validation_"

Settings = dict[str, float]  # by dotted name, loss.gamma_image
Scores = dict[str, float]  # lower is better for each
Ended = Literal["finished", "stopped", "diverged", "failed"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all trials of a search share."""

    start: TrainConfig  # the settings of params.yaml, as short as a trial
    objectives: tuple[str, ...]
    shards: Path  # in the driver a path within the project, which may be moved meanwhile
    runs: Path  # every trial has its own folder there
    device: str
    threads: int
    micro_batch_size: int  # as in the section `compute`
    features: str  # in which all are judged

    def resolved(self) -> "Task":
        """The same for a process that works in another folder."""
        return replace(self, shards=self.shards.resolve(), runs=self.runs.resolve())

    def config(self, settings: Mapping[str, float], *, seed: int) -> TrainConfig:
        """What a trial trains: the start with some settings changed."""
        sections = {"loss": self.start.loss, "training": self.start.training}
        for name, value in settings.items():
            section, _, key = name.partition(".")
            sections[section] = replace(sections[section], **{key: value})  # type: ignore[type-var]
        sections["training"] = replace(sections["training"], seed=seed)  # type: ignore[type-var]
        return replace(self.start, **sections)  # type: ignore[arg-type]

    def run_folder(self, config: TrainConfig) -> RunFolder:
        """Named by its content: the same settings and seed on the same data are trained once."""
        name = run_name(config, read_manifest(self.shards)["dataset_sha256"])
        return RunFolder(self.runs / name)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial of a search and how it ended."""

    number: int  # 0: the settings of params.yaml
    settings: Settings
    run_name: str
    ended: Ended
    step: int
    scores: Scores  # at that step
    history: dict[int, Scores]  # at every step that was judged


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one trial gets of the machines."""

    cpus: int
    gpus: float
    device: str


def share_of(
    config: TuneConfig, compute: ComputeConfig, total: Mapping[str, float], *, largest: float
) -> Share:
    """What each of the concurrent trials gets of all CPUs and GPUs, by Ray's names.

    `largest`: the CPUs of the largest node. Raises UserError where that is too little.
    """
    gpus, concurrent = total.get("GPU", 0), config.concurrent_trials
    use_gpu = uses_gpu(compute, total)
    if use_gpu and math.floor(1 / config.gpus_per_trial) * gpus < concurrent:
        raise UserError(
            f"tune.concurrent_trials is {concurrent} with tune.gpus_per_trial "
            f"{config.gpus_per_trial:g}, but there are {gpus:.0f} GPUs: lower one of them, or set "
            "compute.device: cpu"
        )
    if total.get("CPU", 0) < concurrent:
        raise UserError(
            f"tune.concurrent_trials is {concurrent}, but there are {total.get('CPU', 0):.0f} "
            "CPUs: lower it"
        )
    return Share(
        cpus=int(min(total["CPU"] // concurrent, largest)),
        gpus=config.gpus_per_trial if use_gpu else 0,
        device="cuda" if use_gpu else "cpu",
    )


def rounded(settings: Mapping[str, float]) -> Settings:
    return {name: float(f"{value:.{SIGNIFICANT_DIGITS}g}") for name, value in settings.items()}


def shortened(start: TrainConfig, *, num_steps: int, interval: int) -> TrainConfig:
    """The same training for a number of steps, with a checkpoint at every interval."""
    training = replace(
        start.training,
        num_steps=num_steps,
        checkpoint_interval_steps=interval,
        log_interval_steps=min(start.training.log_interval_steps, interval),
        sample_interval_steps=num_steps,
        checkpoints_kept=1,
    )
    return replace(start, training=training)


def run_trial(task: Task, config: TrainConfig, report: Callable[[dict[str, Any]], None]) -> None:
    """Train, and report the scores on validation images at every checkpoint.

    What was trained before the search was killed is reported first, and may be enough. Objectives
    that the loop does not measure are reported at the end only. Training that diverges, or that
    no second try would help, is reported with infinite scores and without a step.
    """
    reported = False

    def on_checkpoint(row: Mapping[str, float]) -> None:
        nonlocal reported
        scores = scores_in(row)
        if set(task.objectives) <= scores.keys():
            reported = True
            report({"step": int(row["step"]), **scores})

    for row in task.run_folder(config).rows():
        on_checkpoint(row)
    try:
        train(task, config, on_checkpoint)
    except loop.DivergedError:
        report({"diverged": True, **dict.fromkeys(task.objectives, math.inf)})
        return
    except (CheckpointError, ConfigError) as error:
        report({"error": str(error), **dict.fromkeys(task.objectives, math.inf)})
        return
    if not reported:
        report({"step": config.training.num_steps, **judge(task, config, "validation")})


def train(
    task: Task, config: TrainConfig, report: Callable[[dict[str, float]], None] = lambda row: None
) -> None:
    """Train to the end in this process, going on from the newest checkpoint."""
    torch.set_num_threads(task.threads)
    if (features := installed_features()) != task.features:
        raise ConfigError(
            f"this node judges in {features}, the search in {task.features}: install the same "
            "packages on every node"
        )
    folder = task.run_folder(config)
    folder.path.mkdir(parents=True, exist_ok=True)
    # Wait for the process of a search that was killed, which would write there too.
    with FileLock(folder.worker_lock, timeout=ORPHAN_WAIT_SECONDS):
        loop.train(
            config,
            shards=task.shards,
            run_folder=folder.path,
            device=torch.device(task.device),
            report=report,
            micro_batch_size=task.micro_batch_size,
        )


def train_and_judge(task: Task, config: TrainConfig, split: Split) -> Scores:
    """Scores after training to the end; infinite ones if it diverges."""
    try:
        train(task, config)
    except loop.DivergedError:
        return dict.fromkeys(measured(config), math.inf)
    return judge(task, config, split)


def measured(config: TrainConfig) -> list[str]:
    """The scores of a finished training; a GAN reconstructs nothing."""
    names = (*SCORES, ALSO_MEASURED)
    return [n for n in names if n != "image_reconstruction" or config.training.arm != "gan"]


def judge(task: Task, config: TrainConfig, split: Split) -> Scores:
    """Scores of a finished training's averaged networks on held-out images.

    `uncovered` is the share of the images that no sample comes near: 1 - coverage.
    """
    newest = checkpoint.latest(task.run_folder(config).checkpoints)
    assert newest is not None
    with TemporaryDirectory() as folder:
        export_model(newest, Path(folder))
        model = aegan.load(folder)
    images = torch.from_numpy(load_images(task.shards, split, limit=IMAGES[split]))
    judging = Judge(images, features=task.features)
    # The seed of the loop's own validation: its scores and these agree.
    seed = config.training.seed
    samples = judging.features_of(aegan.sample(model, len(images), seed=seed))
    neighbourhood = precision_recall_density_coverage(
        judging.real_features, samples, neighbours=NEIGHBOURS
    )
    uncovered = 1 - neighbourhood["coverage"]
    found = {**scores_in(judging.scores_of(model, samples)), "uncovered": uncovered}
    return {name: found[name] for name in measured(config) if name in found}


def scores_in(row: Mapping[str, float]) -> Scores:
    """The validation scores among what the loop reports or logs."""
    return {
        name.removeprefix(PREFIX): value for name, value in row.items() if name.startswith(PREFIX)
    }

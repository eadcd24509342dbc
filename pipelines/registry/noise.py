"""How far the gated figures scatter over training seeds: measured once, kept with the reference."""

import logging
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

import aegan
from aegan.config import ComputeConfig, ConfigError, TrainConfig
from aegan.data.dataset import read_manifest
from aegan.files import remove, sha256_of_json
from aegan.latent_density import NoDensityError
from aegan.metrics.comparison import seed_noise
from aegan.training import checkpoint, loop, training_log
from aegan.training.checkpoint import CheckpointError
from aegan.training.latents import fit_latents
from aegan.training.run_folder import RunFolder
from aegan.training.state import export_model
from aegan.training.validation import selected_by
from pipelines.base import locks, params
from pipelines.base.errors import UserError
from pipelines.base.files import clear_disk_errors
from pipelines.base.outputs import SHARDS
from pipelines.base.run_name import run_name
from pipelines.registry.comparison import GATED, Examination, mean
from pipelines.registry.reference import current_or_first, keep_noise

RUNS = Path("runs")

log = logging.getLogger(__name__)


def measure_noise(*, seeds: int, num_steps: int) -> dict[str, float]:
    """Train with so many other seeds, for so many steps (0: `training.num_steps`), and examine.

    Returns the share by which each figure may worsen by chance, which is kept with the reference.
    A repeated command goes on where it was cut short. Raises UserError.
    """
    config, compute = params.load(TrainConfig), params.load(ComputeConfig)
    if config.training.start_from:
        raise UserError("the noise is that of whole trainings; empty training.start_from for it")
    num_steps = num_steps or config.training.num_steps
    gpu = compute.device != "cpu" and torch.cuda.is_available()
    with locks.hold("noise"):
        reference = current_or_first(SHARDS)
        examination, figures, folders = Examination(reference), [], []
        numbers = [config.training.seed + number for number in range(1, seeds + 1)]
        for seed in numbers:
            one = _with(config, seed=seed, num_steps=num_steps)
            folder = _folder(one)
            log.info("seed %d: %d steps, in %s", seed, num_steps, folder.path)
            model = _trained(one, folder, torch.device("cuda" if gpu else "cpu"), compute)
            rows = examination.examine(model)
            figures.append({name: mean(rows, name) for name in GATED if name in rows[0]})
            folders.append(folder)
        shares = {name: seed_noise([one[name] for one in figures]) for name in figures[0]}
        keep_noise(
            reference,
            {
                "shares": shares,
                "seeds": numbers,
                "steps": num_steps,
                "arm": config.training.arm,
                "figures": figures,
                "time": time.time(),
            },
        )
        for folder in folders:
            remove(folder.path)
    return shares


def _with(config: TrainConfig, *, seed: int, num_steps: int) -> TrainConfig:
    training = replace(config.training, seed=seed, num_steps=num_steps)
    return replace(config, training=training)


def _folder(config: TrainConfig) -> RunFolder:
    """A folder of its own: one of more steps would go on where it ended."""
    name = run_name(config, read_manifest(SHARDS)["dataset_sha256"])
    content = sha256_of_json([name, config.training.num_steps])
    return RunFolder(RUNS / f"noise-{content[:12]}")


def _trained(
    config: TrainConfig, folder: RunFolder, device: torch.device, compute: ComputeConfig
) -> aegan.AEGAN:
    """The networks that the stage `train` would publish."""
    try:
        with clear_disk_errors(folder.path):
            loop.train(
                config,
                shards=SHARDS,
                run_folder=folder.path,
                device=device,
                micro_batch_size=compute.micro_batch_size,
            )
            newest = checkpoint.latest(folder.checkpoints)
            assert newest is not None
            rows = training_log.all_rows(checkpoint.verify(newest)["log"])
            best = training_log.best_step(rows, selected_by(config.training.arm))
            model = folder.outbox / "model"
            export_model(newest if best is None else folder.checkpoint(best), model)
            with suppress(NoDensityError):
                mirrored = config.training.horizontal_flip
                fit_latents(model, SHARDS, mirrored=mirrored, seed=config.training.seed)
    except (CheckpointError, ConfigError, loop.DivergedError) as error:
        raise UserError(f"seed {config.training.seed}: {error}") from None
    return aegan.load(model)

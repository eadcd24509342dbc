"""The training loop of AEGAN. Open this file first.

Everything random in a step follows from (seed, attempt, step, rank), so the step's number is the
whole state of every random generator and of the reader: to resume, run the same command again.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aegan import checkpoint, distributed
from aegan.config import ConfigError, TrainConfig
from aegan.dataset import load_images, read_manifest
from aegan.ema import ema_decay, update_ema
from aegan.graphs import Graphed
from aegan.images import grid, save_png, to_float
from aegan.losses import ARMS, Terms
from aegan.reader import resident_reader, streamed_reader
from aegan.sampling import decode, random_latents, reconstruct
from aegan.state import TrainingState
from aegan.updates import ROUND, Updates
from aegan.validation import validate

VALIDATION_IMAGES = 512  # how many judge a checkpoint
STOP_INTERVAL_STEPS = 10  # how often workers agree whether to stop


class DivergedError(Exception):
    """A loss or weight was not finite again after every permitted rollback."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a call of `train` ended."""

    finished: bool  # False: asked to stop early; the same call goes on from the checkpoint
    step: int


def train(
    config: TrainConfig,
    *,
    shards: Path,
    run_folder: Path,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    micro_batch_size: int = 0,
    compile_networks: bool = False,
    cuda_graphs: bool = False,
    report: Callable[[dict[str, float]], None] = lambda metrics: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train until `num_steps`, going on from the newest checkpoint in `run_folder` if there is one.

    A worker's share of a batch goes through the networks in parts of `micro_batch_size` (0: whole).
    `cuda_graphs` needs a GPU and a single worker.
    The process group, if any, is up already. Rank 0 reads and writes `run_folder`: checkpoints,
    `metrics.jsonl`, sample pictures; the other ranks get the checkpoint from it. Every rank calls
    `report` at every checkpoint and asks `should_stop` every few steps.
    Raises ConfigError, CheckpointError, DivergedError.
    """
    options, terms = config.training, ARMS[config.training.arm]
    manifest = read_manifest(shards)
    if options.batch_size < world_size:
        raise ConfigError(
            f"training.batch_size is {options.batch_size}: it must be at least the number of "
            f"workers, {world_size}"
        )
    if options.update_rule == "reference" and (config.loss.adversarial, config.loss.gamma) != (
        "bce",
        0,
    ):
        raise ConfigError(
            "training.update_rule: reference needs loss.adversarial: bce and loss.gamma: 0"
        )

    if cuda_graphs and (device.type != "cuda" or world_size > 1):
        raise ConfigError("compute.cuda_graphs needs a GPU and one worker: set it to false")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = options.precision == "tf32"
        torch.backends.cudnn.allow_tf32 = options.precision == "tf32"

    # Load the data. A global batch is the same for any number of workers; each keeps its share.
    share = slice(*(options.batch_size * r // world_size for r in (rank, rank + 1)))
    reader = resident_reader if options.reader == "resident" else streamed_reader
    read_images = reader(
        shards, batch_size=options.batch_size, share=share, seed=options.seed, device=device
    )
    validation = torch.from_numpy(load_images(shards, "validation", limit=VALIDATION_IMAGES))

    def read_batch(number: int) -> tuple[Tensor, Tensor]:
        """x [N, C, H, W] in [-1, 1] and z [N, latent_dim]."""
        generator = torch.Generator().manual_seed(_seed(options.seed, state.attempt, number))
        z = torch.randn(options.batch_size, config.model.latent_dim, generator=generator)
        mirrored = torch.rand(options.batch_size, 1, 1, 1, generator=generator) < 0.5
        x = to_float(read_images(number))
        if options.horizontal_flip:
            x = torch.where(mirrored[share].to(device), x.flip(3), x)
        return x, z[share].to(device)

    # Construct networks and optimisers; resume, or keep the starting point.
    state = TrainingState(config, manifest, device)
    checkpoints, log = run_folder / "checkpoints", run_folder / "metrics.jsonl"
    newest = distributed.from_rank_0(lambda: _load_newest(checkpoints), device)
    if newest is not None:
        state.restore(*newest)
    if rank == 0:
        if newest is None:
            state.save(checkpoints)
        checkpoint.forget_after(checkpoints, state.step)
        _forget_rows_after(log, state.step)

    # Train.
    updates = Updates(
        state,
        config,
        device,
        world_size=world_size,
        micro_batch_size=micro_batch_size,
        compile_networks=compile_networks,
    )
    update = _update_functions(updates, cuda_graphs)
    realism = "x_hat" in terms  # does the arm train samples, or reconstructions only?
    selected_by = f"validation_{'frechet_distance' if realism else 'image_reconstruction'}"
    losses = _LossLog()
    clock, clock_step = time.perf_counter(), state.step
    while state.step < options.num_steps:
        step = state.step
        torch.manual_seed(_seed(options.seed, state.attempt, step, rank + 1))  # networks' noise

        # Update the networks.
        if options.update_rule == "shared":
            losses.add(update["all"](*read_batch(step)))
        else:  # the author's rule: rounds of updates, each on a fresh batch
            if step % len(ROUND) == 0:
                for turn, kind in enumerate(ROUND):
                    losses.add(update[kind](*read_batch(2 * step + turn)))
            fresh = read_batch(2 * step + len(ROUND) - step % len(ROUND))
            losses.add(update["encoder_generator"](*fresh))

        # Update the averages.
        images_shown = step * options.batch_size
        decay = ema_decay(options.batch_size, options.ema_half_life_images, images_shown)
        update_ema(state.ema, state.model, decay)
        state.step += 1

        # Every so often: look at the losses, save pictures, keep the state.
        last = state.step == options.num_steps
        judge_due = last or state.step % options.checkpoint_interval_steps == 0
        pictures_due = last or state.step % options.sample_interval_steps == 0
        stop = state.step % STOP_INTERVAL_STEPS == 0 and distributed.any_rank(should_stop(), device)
        save_due = judge_due or stop
        if not (save_due or pictures_due or state.step % options.log_interval_steps == 0):
            continue

        # A non-finite loss or weight: go back to the last good checkpoint, draw other numbers.
        row = losses.take_means()
        good = all(np.isfinite(list(row.values()))) and (not save_due or state.is_finite())
        if distributed.any_rank(not good, device):
            if state.attempt == options.max_rollbacks:
                raise DivergedError(_divergence_report(state, row))
            attempt = state.attempt + 1
            # Not one of an early stop: where a run goes back to must not depend on stops.
            regular = distributed.from_rank_0(
                lambda: _load_newest(checkpoints, options.checkpoint_interval_steps), device
            )
            assert regular is not None  # every run begins with one, and one is always kept
            state.restore(*regular)
            state.attempt = attempt
            update = _update_functions(updates, cuda_graphs)
            if rank == 0:
                checkpoint.forget_after(checkpoints, state.step)
                _forget_rows_after(log, state.step)
            clock, clock_step = time.perf_counter(), state.step
            continue

        elapsed = time.perf_counter() - clock
        speed = (state.step - clock_step) * options.batch_size / elapsed
        state.seconds += elapsed
        clock, clock_step = time.perf_counter(), state.step
        if rank == 0:
            if pictures_due:
                _save_pictures(state, validation, run_folder / "samples")
            # But not an early stop: the best one must not depend on stops.
            if judge_due and len(validation):
                scores = validate(state.ema, validation, seed=options.seed)
                checkpoint.record_score(checkpoints, state.step, scores[selected_by])
                row |= scores
            state.seconds += time.perf_counter() - clock
            clock = time.perf_counter()
            timing = {"seconds": state.seconds, "images_per_second": speed}
            _append(log, {"step": state.step, "time": time.time(), **timing, **row})
            if save_due:
                state.save(checkpoints)
                checkpoint.prune(
                    checkpoints,
                    kept=options.checkpoints_kept,
                    interval=options.checkpoint_interval_steps,
                )
        if save_due:
            report({"step": state.step, "images_per_second": speed, **row})
        if stop and not last:
            return Outcome(finished=False, step=state.step)
    return Outcome(finished=True, step=state.step)


def _update_functions(
    updates: Updates, cuda_graphs: bool
) -> dict[str, Callable[[Tensor, Tensor], Terms]]:
    """What a step calls with x and z; with graphs, made anew after the optimisers' state moved."""
    functions: dict[str, Callable[[Tensor, Tensor], Terms]] = {
        "all": updates.on_one_batch,
        "encoder_generator": updates.of_encoder_generator,
        **{kind: partial(updates.of_discriminators, kind) for kind in ROUND},
    }
    return {
        name: Graphed(function) if cuda_graphs else function for name, function in functions.items()
    }


class _LossLog:
    """Means of the loss terms since they were last taken, kept on the device: no hidden waiting.

    A non-finite loss stays visible in the mean.
    """

    def __init__(self) -> None:
        self._sums: Terms = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Terms) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def take_means(self) -> dict[str, float]:
        sums = torch.stack([value.float() for value in self._sums.values()]).tolist()
        means = {
            name: total / self._counts[name] for name, total in zip(self._sums, sums, strict=True)
        }
        self._sums, self._counts = {}, {}
        return means


def _load_newest(
    checkpoints: Path, interval: int = 1
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    newest = checkpoint.latest(checkpoints, interval=interval)
    return None if newest is None else checkpoint.load(newest)


def _seed(*key: int) -> int:
    """Independent for different keys, but a key that ends in 0 equals the one without the 0."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def _save_pictures(state: TrainingState, validation: Tensor, folder: Path) -> None:
    """8x8 grids: fixed prior draws; validation images, if any, beside their reconstructions."""
    name = f"step-{state.step:08d}"
    latents = random_latents(64, state.model.latent_dim, seed=0)
    save_png(grid(decode(state.ema, latents).numpy(), columns=8), folder / f"{name}-samples.png")
    if state.ema.encoder is not None and len(validation):
        real = validation[:32]
        pairs = torch.stack([real, reconstruct(state.ema, real)], dim=1).flatten(0, 1)
        save_png(grid(pairs.numpy(), columns=8), folder / f"{name}-reconstructions.png")


def _append(log: Path, row: dict[str, float]) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())  # a row must not be lost when its checkpoint is not


def _forget_rows_after(log: Path, step: int) -> None:
    """Drop what a run that was cut off logged beyond the checkpoint it goes on from."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    kept = [line for line in lines if _step_of(line) <= step]
    aside = log.with_suffix(".tmp")
    aside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    aside.replace(log)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except ValueError:  # cut off in the middle of a line
        return float("inf")


def _divergence_report(state: TrainingState, row: dict[str, float]) -> str:
    values = ", ".join(f"{name} {value:.4g}" for name, value in row.items())
    return (
        f"training diverged at step {state.step} after {state.attempt} returns to the last good "
        f"checkpoint (training.max_rollbacks); last means: {values}. Lower training.learning_rate "
        "or training.discriminator_learning_rate, or look at the sample "
        "pictures for when it began"
    )

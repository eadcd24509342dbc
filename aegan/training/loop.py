"""The training loop of AEGAN. Open this file first.

Everything random in a step follows from (seed, attempt, step, rank), so the step's number is the
whole state of every random generator and of the reader: to resume, run the same command again.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aegan import schedules
from aegan.augment import ADJUST_INTERVAL_STEPS, DRAWS
from aegan.config import TrainConfig, check, check_batch_size, check_classes
from aegan.data.dataset import load_images, read_manifest
from aegan.data.reader import resident_reader, streamed_reader
from aegan.losses import OBJECTIVES
from aegan.metrics.diagnosis import IN_A_ROW, has_collapsed
from aegan.pictures import grid, is_sound_png, save_png
from aegan.pixels import to_float
from aegan.sampling import decode, random_latents, reconstruct
from aegan.training import checkpoint, distributed, training_log
from aegan.training.checkpoint import CheckpointError
from aegan.training.ema import ema_decay, update_ema
from aegan.training.run_folder import Row, RunFolder, append_row
from aegan.training.state import TrainingState
from aegan.training.updates import ROUND, Updates
from aegan.training.validation import VARIETY, Judge, selected_by

VALIDATION_IMAGES = 512  # how many judge a checkpoint
STOP_INTERVAL_STEPS = 10  # how often workers agree whether to stop


class DivergedError(Exception):
    """A loss or weight was not finite again after every permitted rollback."""


COLLAPSED = "the generator has collapsed"  # by which others know the error, too


class CollapsedError(DivergedError):
    """Samples stayed too alike, and `training.stop_on_collapse` is set."""


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
    report: Callable[[dict[str, float]], None] = lambda metrics: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train until `num_steps`, going on from the newest checkpoint in `run_folder` if there is one.

    So a finished run with a larger `num_steps` goes on, as if that had been asked for at once.

    A worker's share of a batch goes through the networks in parts of `micro_batch_size` (0: whole).
    The process group, if any, is up already. Rank 0 reads and writes `run_folder`: checkpoints,
    `metrics.jsonl`, sample pictures; the other ranks get the checkpoint from it. Every rank calls
    `report` at every checkpoint and asks `should_stop` every few steps. A run whose log, pictures
    or newest checkpoint were damaged is whole again at the end.
    Raises ConfigError, CheckpointError, DivergedError, CollapsedError, and OSError on every rank if
    rank 0 cannot write.
    """
    options, folder = config.training, RunFolder(run_folder)
    manifest = read_manifest(shards)
    check(config)
    check_batch_size(
        options.batch_size,
        images=manifest["splits"]["train"]["rows"],
        workers=world_size,
        packing=config.loss.packing,
    )
    check_classes(config.model, manifest.get("classes", []))
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = options.precision == "tf32"
        torch.backends.cudnn.allow_tf32 = options.precision == "tf32"

    # Load the data. A global batch is the same for any number of workers; each keeps its share,
    # which is of whole packs.
    packing = config.loss.packing
    packs = options.batch_size // packing
    share = slice(*(packs * r // world_size * packing for r in (rank, rank + 1)))
    reader = resident_reader if options.reader == "resident" else streamed_reader
    open_reader = partial(
        reader, shards, batch_size=options.batch_size, share=share, seed=options.seed, device=device
    )
    read_images = open_reader()
    read_labels = open_reader(column="label") if config.model.num_classes else None
    validation = _validation_images(shards, rank)

    def read_batch(number: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """x [N, C, H, W] in [-1, 1]; z [N, latent_dim], which may hold x's classes; and draws for
        the augmentation, if any.
        """
        generator = torch.Generator().manual_seed(_seed(options.seed, state.attempt, number))
        z = state.model.prior.sample(options.batch_size, generator)
        mirrored = torch.rand(options.batch_size, 1, 1, 1, generator=generator) < 0.5
        x = to_float(read_images(number))
        if options.horizontal_flip:
            x = torch.where(mirrored[share].to(device), x.flip(3), x)
        z = z[share].to(device)
        if read_labels is not None:
            z = state.model.prior.with_labels(z, read_labels(number))
        draws = None
        if state.augmentation.is_on:
            draws = torch.rand(options.batch_size, *DRAWS, generator=generator)[share].to(device)
        return x, z, draws

    # Construct networks and optimisers; resume, or keep the starting point.
    state = TrainingState(config, manifest, device)
    newest = distributed.from_rank_0(lambda: _load_newest(folder), device)
    if newest is not None:
        state.restore(*newest)
    elif options.start_from:
        raise CheckpointError(
            f"{folder.checkpoints} lacks step 0, which holds the weights of training.start_from "
            "(aegan.training.start.begin writes it)"
        )
    distributed.from_rank_0(partial(_begin, state, config, folder, anew=newest is None), device)
    judge = Judge(validation, features=state.features, device=device)
    distributed.from_rank_0(judge.get_ready, device)

    # Train.
    updates = Updates(
        state, config, device, world_size=world_size, micro_batch_size=micro_batch_size
    )
    clock, clock_step = time.perf_counter(), state.step
    speed = options.batch_size * state.step / state.seconds if state.seconds else 0.0
    while state.step < options.num_steps:
        step = state.step
        torch.manual_seed(_seed(options.seed, state.attempt, step, rank + 1))  # networks' noise

        # Set what is scheduled.
        images_shown = step * options.batch_size
        now = schedules.at(config, images_shown)
        state.set_rates(now.training)
        updates.weights = now.loss

        # Update the networks.
        if options.update_rule == "shared":
            state.log.add(updates.on_one_batch(*read_batch(step)))
        else:  # the author's rule: rounds of updates, each on a fresh batch
            position = step % len(ROUND)
            first_batch = 2 * (step - position)  # of this round, which reads one an update
            if position == 0:
                for number, turn in enumerate(updates.round, start=first_batch):
                    state.log.add(updates.of_discriminators(turn, *read_batch(number)))
            fresh = read_batch(first_batch + len(ROUND) + position)
            state.log.add(updates.of_encoder_generator(*fresh))

        # Update the averages, and what D_x sees.
        decay = ema_decay(options.batch_size, options.ema_half_life_images, images_shown)
        update_ema(state.ema, state.model, decay)
        state.step += 1
        if state.augmentation.is_adaptive and state.step % ADJUST_INTERVAL_STEPS == 0:
            state.augmentation.adjust(ADJUST_INTERVAL_STEPS * options.batch_size)

        # Every so often: look at the losses, save pictures, keep the state.
        last = state.step == options.num_steps
        judge_due = state.step % options.checkpoint_interval_steps == 0
        pictures_due = state.step % options.sample_interval_steps == 0
        row_due = judge_due or pictures_due or state.step % options.log_interval_steps == 0
        stop = state.step % STOP_INTERVAL_STEPS == 0 and distributed.any_rank(should_stop(), device)
        if not (row_due or stop or last):
            continue

        # A non-finite loss or weight: go back to the last good checkpoint, draw other numbers.
        means = state.log.means()
        save_due = judge_due or stop or last
        good = all(np.isfinite(list(means.values()))) and (not save_due or state.is_finite())
        if distributed.any_rank(not good, device):
            if state.attempt >= options.max_rollbacks:
                raise DivergedError(_divergence_report(state, means))
            attempt = state.attempt + 1
            # Not one of an early stop: where a run goes back to must not depend on stops.
            regular = distributed.from_rank_0(
                lambda: _load_newest(folder, options.checkpoint_interval_steps), device
            )
            assert regular is not None  # every run begins with one, and one is always kept
            state.restore(*regular)
            state.attempt = attempt
            distributed.from_rank_0(partial(_begin, state, config, folder), device)
            clock, clock_step = time.perf_counter(), state.step
            continue

        elapsed = time.perf_counter() - clock
        speed = (state.step - clock_step) * options.batch_size / elapsed
        state.seconds += elapsed
        row = _row(state, config, speed, means)
        if row_due:
            state.log.append(row)
        keep = partial(
            _keep,
            *(state, row, config, folder, judge),
            judge_due=judge_due,
            pictures=pictures_due and not last,  # of the end, see below
            log=row_due,
            save=save_due and not last,
        )
        row = distributed.from_rank_0(keep, device)
        clock, clock_step = time.perf_counter(), state.step
        if save_due and not last:
            report(_reported(row))
        if stop and not last:
            return Outcome(finished=False, step=state.step)

    # The end: a row, a score and pictures, due or not; only a run that goes on forgets them.
    end = partial(_end, state, config, folder, judge, speed)
    ending = distributed.from_rank_0(end, device)
    if ending is not None:
        report(_reported(ending))
    return Outcome(finished=True, step=state.step)


def _validation_images(shards: Path, rank: int) -> Tensor:
    """What rank 0 judges checkpoints by, uint8 [N, H, W, C]; the others load none."""
    limit = VALIDATION_IMAGES if rank == 0 else 0
    return torch.from_numpy(load_images(shards, "validation", limit=limit))


def _load_newest(
    folder: RunFolder, interval: int = 1
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest one at a multiple of `interval`; any if the interval was another one before."""
    latest = partial(checkpoint.latest, folder.checkpoints)
    newest = latest(interval=interval) or latest()
    return None if newest is None else checkpoint.load(newest)


# -- what rank 0 does to the run folder; each raises OSError --------------------------------------


def _begin(
    state: TrainingState, config: TrainConfig, folder: RunFolder, *, anew: bool = False
) -> None:
    """Make the folder that of a run at this step, whatever was there beyond it."""
    if anew:
        state.save(folder.checkpoints)
    checkpoint.forget_after(folder.checkpoints, state.step)
    if state.step < config.training.num_steps:
        state.log.ending = None
    folder.write_rows(training_log.all_rows(state.log.as_json()))


def _keep(
    state: TrainingState,
    row: Row,
    config: TrainConfig,
    folder: RunFolder,
    judge: Judge,
    *,
    judge_due: bool,
    pictures: bool,
    log: bool,
    save: bool,
) -> Row:
    """Keep what is due at this moment; returns the row, to which scores were added."""
    clock = time.perf_counter()
    if pictures:
        _save_pictures(state, judge.images, folder)
    # But not an early stop: the best one must not depend on stops.
    if judge_due and len(judge.images):
        row |= judge.scores(state.ema, seed=config.training.seed)
        row |= _variety(state, config, judge)
    state.seconds += time.perf_counter() - clock
    row["seconds"] = state.seconds
    if log:
        append_row(folder.log, row)
    if save:
        _save(state, config, folder)
    if VARIETY in row:
        varieties = [row[VARIETY] for row in state.log.rows if VARIETY in row]
        if has_collapsed(varieties):
            raise CollapsedError(_collapse_report(row, varieties))
    return row


def _variety(state: TrainingState, config: TrainConfig, judge: Judge) -> Row:
    """That of samples, where it is asked for and the arm trains them."""
    if not (config.training.stop_on_collapse and OBJECTIVES[config.training.arm].x_hat):
        return {}
    variety = judge.variety(state.ema, seed=config.training.seed)
    return {} if variety is None else {VARIETY: variety}


def _collapse_report(row: Row, varieties: list[float]) -> str:
    last = ", ".join(f"{variety:.0%}" for variety in varieties[-IN_A_ROW:])
    judge = row.get("image_discriminator")
    told = "" if judge is None else f"; the image discriminator's loss is {judge:.2g}"
    return (
        f"{COLLAPSED}: at step {row['step']:,} its samples differ from each other only {last} as "
        f"much as real images do, at the last {IN_A_ROW} validations{told}. Try training.arm: "
        "aegan, a lower training.learning_rate or a higher loss.gamma_image; or set "
        "training.stop_on_collapse: false to go on from the checkpoint"
    )


def _end(
    state: TrainingState, config: TrainConfig, folder: RunFolder, judge: Judge, speed: float
) -> Row | None:
    """Complete a finished run; returns its last row, or None if it was complete already."""
    log, validation = state.log, judge.images
    if log.ending is not None and all(map(is_sound_png, _pictures(state, validation, folder))):
        return None
    _save_pictures(state, validation, folder)
    if log.ending is None:
        logged = bool(log.rows) and log.rows[-1]["step"] == state.step
        row = dict(log.rows[-1]) if logged else _row(state, config, speed, log.means())
        if selected_by(config.training.arm) not in row and len(validation):
            row |= judge.scores(state.ema, seed=config.training.seed)
        log.ending = row
        _save(state, config, folder)
        folder.write_rows(training_log.all_rows(log.as_json()))
    return log.ending


def _save(state: TrainingState, config: TrainConfig, folder: RunFolder) -> None:
    options = config.training
    state.save(folder.checkpoints)
    checkpoint.prune(
        folder.checkpoints,
        kept=options.checkpoints_kept,
        interval=options.checkpoint_interval_steps,
        best=training_log.best_step(state.log.rows, selected_by(options.arm)),
    )


def _row(state: TrainingState, config: TrainConfig, speed: float, means: Row) -> Row:
    timing = {"time": time.time(), "seconds": state.seconds, "images_per_second": speed}
    scheduled = schedules.values_at(config, (state.step - 1) * config.training.batch_size)
    return {"step": state.step, **timing, **means, **scheduled}


def _reported(row: Row) -> Row:
    return {name: value for name, value in row.items() if name not in ("time", "seconds")}


def _pictures(state: TrainingState, validation: Tensor, folder: RunFolder) -> list[Path]:
    """The files of this step's pictures."""
    reconstructed = state.ema.encoder is not None and len(validation) > 0
    kinds = ["samples"] + ["reconstructions"] * reconstructed
    return [folder.picture(state.step, kind) for kind in kinds]


def _seed(*key: int) -> int:
    """Independent for different keys, but a key that ends in 0 equals the one without the 0."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def _save_pictures(state: TrainingState, validation: Tensor, folder: RunFolder) -> None:
    """8x8 grids: fixed prior draws; validation images, if any, beside their reconstructions."""
    samples, *reconstructions = _pictures(state, validation, folder)
    latents = random_latents(state.model, 64, seed=0)
    save_png(grid(decode(state.ema, latents).numpy(), columns=8), samples)
    for file in reconstructions:
        real = validation[:32]
        pairs = torch.stack([real, reconstruct(state.ema, real)], dim=1).flatten(0, 1)
        save_png(grid(pairs.numpy(), columns=8), file)


def _divergence_report(state: TrainingState, row: dict[str, float]) -> str:
    values = ", ".join(f"{name} {value:.4g}" for name, value in row.items())
    return (
        f"training diverged at step {state.step} after {state.attempt} returns to the last good "
        f"checkpoint (training.max_rollbacks); last means: {values}. Lower training.learning_rate "
        "or training.discriminator_learning_rate, or look at the sample "
        "pictures for when it began"
    )

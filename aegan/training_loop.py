"""The training loop of AEGAN. Open this file first.

Everything random in a step follows from (seed, attempt, step, rank), so the step's number is the
whole state of every random generator and of the reader: to resume, run the same command again.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from aegan import checkpoint, distributed
from aegan.config import ConfigError, TrainConfig
from aegan.dataset import load_images, read_manifest
from aegan.ema import ema_decay, update_ema
from aegan.images import grid, save_png, to_float
from aegan.losses import (
    ARMS,
    Fakes,
    Terms,
    discriminator_loss,
    encoder_generator_loss,
    single_kind_loss,
)
from aegan.networks import AEGAN
from aegan.reader import resident_reader, streamed_reader
from aegan.sampling import decode, random_latents, reconstruct
from aegan.state import TrainingState
from aegan.validation import validate

ROUND = ("real", "hat", "real", "tilde")  # what the author's rule shows the discriminators in turn
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
    report: Callable[[dict[str, float]], None] = lambda metrics: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train until `num_steps`, going on from the newest checkpoint in `run_folder` if there is one.

    The process group, if any, is up already. Rank 0 writes checkpoints, `metrics.jsonl` and sample
    pictures. Every rank calls `report` at every checkpoint and asks `should_stop` every
    few steps. Raises ConfigError, CheckpointError, DivergedError.
    """
    options, terms = config.training, ARMS[config.training.arm]
    manifest = read_manifest(shards)
    if options.batch_size % world_size:
        raise ConfigError(
            f"training.batch_size is {options.batch_size}: it must be a multiple of the number of "
            f"workers, {world_size}"
        )

    if options.update_rule == "reference" and (config.loss.adversarial, config.loss.gamma) != (
        "bce",
        0,
    ):
        raise ConfigError(
            "training.update_rule: reference needs loss.adversarial: bce and loss.gamma: 0"
        )

    # Load the data. A global batch is the same for any number of workers; each keeps its share.
    size = options.batch_size // world_size
    share = slice(rank * size, (rank + 1) * size)
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
    encoder_generator = distributed.wrap(EncoderGenerator(state.model, terms), device)
    plain_discriminators = Discriminators(state.model)
    discriminators = distributed.wrap(plain_discriminators, device)
    discriminators_optimizer = state.optimizers.get("discriminators")
    checkpoints, log = run_folder / "checkpoints", run_folder / "metrics.jsonl"
    newest = checkpoint.latest(checkpoints)
    if newest is not None:
        state.restore(newest)
    distributed.barrier()  # nobody writes before everybody has looked
    if rank == 0 and newest is None:
        state.save(checkpoints)
    if not distributed.same_on_all_ranks(state.step, device):
        raise ConfigError(f"{run_folder} is not the same folder on every worker: use a shared disk")
    if rank == 0:
        checkpoint.forget_after(checkpoints, state.step)
        _forget_rows_after(log, state.step)

    # Train.
    realism = "x_hat" in terms  # does the arm train samples, or reconstructions only?
    selected_by = f"validation_{'frechet_distance' if realism else 'image_reconstruction'}"
    losses = _LossLog()
    clock, clock_step = time.perf_counter(), state.step
    while state.step < options.num_steps:
        step = state.step
        torch.manual_seed(_seed(options.seed, state.attempt, step, rank + 1))  # networks' noise

        # Update the discriminators.
        if options.update_rule == "shared":
            x, z = read_batch(step)
            fakes = encoder_generator(x, z)
            if discriminators_optimizer is not None:
                loss, values = discriminator_loss(
                    discriminators, x, z, fakes.detach(), terms=terms, weights=config.loss
                )
                _update(discriminators_optimizer, loss, options.max_gradient_norm)
                losses.add(values)
        else:  # the author's rule: rounds of updates, each on a fresh batch
            if step % len(ROUND) == 0 and discriminators_optimizer is not None:
                for turn, kind in enumerate(ROUND):
                    x, z = read_batch(2 * step + turn)
                    images, latents = shown_to_discriminators(state.model, x, z, kind, terms)
                    if images is None and latents is None:
                        continue  # the arm has no fake of this kind
                    real = kind == "real"
                    target = config.loss.real_target if real else config.loss.fake_target
                    loss = single_kind_loss(discriminators, images, latents, target=target)
                    _update(discriminators_optimizer, loss, options.max_gradient_norm)
                    losses.add({f"discriminators_{kind}": loss.detach()})
            x, z = read_batch(2 * step + len(ROUND) - step % len(ROUND))
            fakes = encoder_generator(x, z)

        # Update encoder and generator against the discriminators as they are now.
        with _frozen(plain_discriminators):
            loss, values = encoder_generator_loss(
                plain_discriminators, x, z, fakes, terms=terms, weights=config.loss
            )
            _update(state.optimizers["encoder_generator"], loss, options.max_gradient_norm)
        losses.add(values)

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
            saved = checkpoint.steps(checkpoints)
            regular = [step for step in saved if step % options.checkpoint_interval_steps == 0]
            state.restore(checkpoint.path_of(checkpoints, regular[-1]))
            state.attempt = attempt
            distributed.barrier()  # nobody writes before everybody has read
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
            if judge_due:  # but not an early stop: the best one must not depend on stops
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
            report({"step": state.step, **row})
        if stop and not last:
            return Outcome(finished=False, step=state.step)
    return Outcome(finished=True, step=state.step)


class EncoderGenerator(nn.Module):
    """G and E as one module, so that DDP averages their gradients in one backward pass."""

    def __init__(self, model: AEGAN, terms: frozenset[str]) -> None:
        super().__init__()
        self.generator, self.encoder, self.terms = model.generator, model.encoder, terms

    def forward(self, x: Tensor, z: Tensor) -> Fakes:
        return make_fakes(self.generator, self.encoder, x, z, self.terms)


class Discriminators(nn.Module):
    """D_x and D_z as one module; None goes in and comes out where the arm has no such fake."""

    def __init__(self, model: AEGAN) -> None:
        super().__init__()
        self.image_discriminator = model.image_discriminator
        self.latent_discriminator = model.latent_discriminator

    def forward(
        self, images: Tensor | None, latents: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        on_images, on_latents = self.image_discriminator, self.latent_discriminator
        return (
            on_images(images) if on_images is not None and images is not None else None,
            on_latents(latents) if on_latents is not None and latents is not None else None,
        )


def make_fakes(
    generator: nn.Module, encoder: nn.Module | None, x: Tensor, z: Tensor, terms: frozenset[str]
) -> Fakes:
    """The fakes that the terms need, each computed once, in one pass of G and at most two of E."""
    z_tilde_used = not terms.isdisjoint({"z_tilde", "latent_reconstruction"})
    x_hat_used = z_tilde_used or "x_hat" in terms
    x_tilde_used = not terms.isdisjoint({"x_tilde", "image_reconstruction"})
    z_hat = encoder(x) if encoder is not None and (x_tilde_used or "z_hat" in terms) else None
    latents = ([z] if x_hat_used else []) + ([z_hat] if x_tilde_used and z_hat is not None else [])
    images = list(generator(torch.cat(latents)).chunk(len(latents))) if latents else []
    x_hat = images.pop(0) if x_hat_used else None
    return Fakes(
        x_hat=x_hat,
        z_hat=z_hat,
        x_tilde=images.pop() if images else None,
        z_tilde=encoder(x_hat)
        if encoder is not None and x_hat is not None and z_tilde_used
        else None,
    )


@torch.no_grad()
def shown_to_discriminators(
    model: AEGAN, x: Tensor, z: Tensor, kind: str, terms: frozenset[str]
) -> tuple[Tensor | None, Tensor | None]:
    """Images and latents of one kind, `real`, `hat` or `tilde`, that the arm's terms use."""
    if kind == "real":
        kinds_used = {term[:2] for term in terms}
        return x if "x_" in kinds_used else None, z if "z_" in kinds_used else None
    names = terms & {f"x_{kind}", f"z_{kind}"}
    fakes = make_fakes(model.generator, model.encoder, x, z, names)
    return (
        fakes.x_hat if "x_hat" in names else fakes.x_tilde,
        fakes.z_hat if "z_hat" in names else fakes.z_tilde,
    )


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


def _update(optimizer: torch.optim.Optimizer, loss: Tensor, max_gradient_norm: float) -> None:
    """One optimiser step; clips the gradient norm of each variable, as the author does."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if max_gradient_norm > 0:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms = torch._foreach_norm(gradients)
        torch._foreach_clamp_min_(norms, max_gradient_norm)
        torch._foreach_div_(gradients, norms)
        torch._foreach_mul_(gradients, max_gradient_norm)
    optimizer.step()


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No gradient reaches the module's parameters inside."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    yield
    for parameter in trainable:
        parameter.requires_grad_(True)


def _seed(*key: int) -> int:
    """Independent for different keys, but a key that ends in 0 equals the one without the 0."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def _save_pictures(state: TrainingState, validation: Tensor, folder: Path) -> None:
    """8x8 grids: fixed prior draws; validation images beside their reconstructions."""
    name = f"step-{state.step:08d}"
    latents = random_latents(64, state.model.latent_dim, seed=0)
    save_png(grid(decode(state.ema, latents).numpy(), columns=8), folder / f"{name}-samples.png")
    if state.ema.encoder is not None:
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

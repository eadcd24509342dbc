"""The known manifold of Berthelot et al. 2018 (ACAI): interpolations between images of lines.

A line of length 15 from the centre of a 32x32 image, at an angle that is uniform on the circle.
Networks are the `demo` ones of `aegan.networks`, the loop is that of the mixtures.
"""

import argparse
import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from aegan.config import Arm
from aegan.networks import AEGAN
from aegan.priors import lerp, slerp
from benchmarks.collapse.demo import prepare
from benchmarks.collapse.objectives import loss_of
from benchmarks.collapse.train import train
from benchmarks.rows import Results, as_table

IMAGE_SIZE, LENGTH, WIDTH = 32, 15, 2
NUM_RENDERED = 10_000  # an image's angle is that of the nearest of these, evenly spaced
NUM_TRAINING, NUM_PATHS, NUM_FRAMES = 20_000, 256, 16
ARMS: tuple[Arm, ...] = ("ae", "aae", "egan", "aegan")
PATHS = {"linear": lerp, "spherical": slerp}
LATENT_DIM = 4  # not ACAI's 64: so many numbers cannot be read off a line, as E(G(z)) = z asks
KEYS = ("arm", "path")


def render(angles: Tensor) -> Tensor:
    """Antialiased lines, [N] => [N, 1, 32, 32], -1 (background) to 1."""
    offsets = torch.arange(IMAGE_SIZE) + 0.5 - IMAGE_SIZE / 2  # of pixels' centres
    right, down = offsets[None, None, :], offsets[None, :, None]
    cos, sin = angles.cos()[:, None, None], angles.sin()[:, None, None]
    along, across = right * cos - down * sin, (right * sin + down * cos).abs()
    inside = (WIDTH / 2 + 0.5 - across).clamp(0, 1)
    inside = inside * (along + 0.5).clamp(0, 1) * (LENGTH + 0.5 - along).clamp(0, 1)
    return 2 * inside[:, None] - 1


def evenly_spaced(count: int) -> Tensor:
    """Angles, [count]."""
    return torch.arange(count) * (2 * math.pi / count)


def nearest(images: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine distance to the nearest rendered line, and its angle; both [N]."""
    angles = evenly_spaced(NUM_RENDERED)
    rendered = F.normalize(render(angles).flatten(1))
    similarity, index = (F.normalize(images.flatten(1)) @ rendered.T).max(1)
    return 1 - similarity, angles[index]


def score(paths: Tensor) -> dict[str, float]:
    """Mean distance and smoothness of paths of images, [P, T, 1, 32, 32].

    Smoothness is the largest step of the angle as a share of the whole way, less what it is if all
    steps are equal; a path that leads nowhere counts as one step.
    """
    distance, angles = (values.view(paths.shape[:2]) for values in nearest(paths.flatten(0, 1)))
    steps = torch.remainder(angles.diff(dim=1) + math.pi, 2 * math.pi) - math.pi
    way = steps.sum(1).abs()
    largest = torch.where(way > 1e-4, steps.abs().amax(1) / way, 1)
    return {
        "distance": float(distance.mean()),
        "smoothness": float(largest.mean()) - 1 / (paths.shape[1] - 1),
    }


def references() -> dict[str, dict[str, float]]:
    """Scores of what needs no learning: the manifold itself, a pixel blend, an abrupt switch."""
    start, end = held_out_angles()
    way = torch.remainder(end - start + math.pi, 2 * math.pi) - math.pi
    t = torch.linspace(0, 1, NUM_FRAMES)
    true = render((start[:, None] + way[:, None] * t).flatten()).unflatten(0, (-1, NUM_FRAMES))
    first, last = render(start)[:, None], render(end)[:, None]
    t = t[:, None, None, None]
    return {
        "true path": score(true),
        "pixel blend": score(torch.lerp(first, last, t)),
        "abrupt switch": score(torch.where(t < 0.5, first, last)),
    }


def held_out_angles() -> tuple[Tensor, Tensor]:
    """Of the two ends of each path."""
    generator = torch.Generator().manual_seed(1)
    start, end = 2 * math.pi * torch.rand(2, NUM_PATHS, generator=generator)
    return start, end


@torch.no_grad()
def paths_of(model: AEGAN, join: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Images between the codes of held-out lines, [P, T, 1, 32, 32]."""
    start, end = (model.encoder(render(angles)) for angles in held_out_angles())
    latents = join(start, end, torch.linspace(0, 1, NUM_FRAMES))
    return model.generator(latents.flatten(0, 1)).unflatten(0, latents.shape[:2])


def train_model(arm: Arm, data: Tensor, seed: int, options: argparse.Namespace) -> AEGAN:
    """One arm, one seed; under `l1` the empty image, 97% right, is where training stays."""
    lambdas = tuple(options.lambdas)
    loss = loss_of("bce", gamma=1.0, lambdas=lambdas, image_reconstruction="l2")
    model, settings = prepare(
        *(arm, loss, seed),
        image_size=IMAGE_SIZE,
        latent_dim=LATENT_DIM,
        base_channels=options.base_channels,
        learning_rate=options.learning_rate,
    )
    for _ in train(model, data, settings, seeds=[seed], stops=[options.steps]):
        pass
    return model


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--arm", nargs="+", choices=ARMS, default=[*ARMS])
    command.add_argument("--base-channels", type=int, default=8)
    command.add_argument("--lambdas", type=float, nargs=2, default=(30.0, 0.1), metavar="LAMBDA")
    command.add_argument("--learning-rate", type=float, default=5e-4)
    command.add_argument("--seeds", type=int, default=3)
    command.add_argument("--steps", type=int, default=2_000)


def measure(options: argparse.Namespace) -> str:
    """Trains what is missing in the file of results; returns the table."""
    names = ("steps", "base_channels", "learning_rate", "lambdas")
    results = Results(options.json, {name: getattr(options, name) for name in names}, keys=KEYS)
    if not results.rows:
        results.add(*({"arm": name} | scores for name, scores in references().items()))
    angles = torch.rand(NUM_TRAINING, generator=torch.Generator().manual_seed(0))
    data = render(2 * math.pi * angles)
    for seed, arm in itertools.product(range(options.seeds), options.arm):
        if results.find(arm=arm, seed=seed):
            continue
        model = train_model(arm, data, seed, options)
        paths = {name: score(paths_of(model, join)) for name, join in PATHS.items()}
        results.add(*({"arm": arm, "path": name, "seed": seed} | s for name, s in paths.items()))
    return as_table(results.rows, KEYS, {"distance": 5, "smoothness": 3})

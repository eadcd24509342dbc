"""The designed faces, whose factors are known: what each arm learns of them.

Whether codes tell the factors; whether samples have all combinations of them and lie on the
manifold; whether the way between two faces is short in factors and stays on it.
"""

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import aegan
from aegan.config import Arm
from aegan.data import designed_faces
from aegan.data.designed_faces import FACTORS
from aegan.losses import OBJECTIVES
from aegan.metrics.factors import FactorReader, principal_components, r_squared, read_codes
from benchmarks.rows import Results, Row, as_table
from benchmarks.trainings import JUDGES, add_fitted_latents, shared_settings, train
from pipelines.evaluate import factor_distances

ARMS: tuple[Arm, ...] = ("gan", "ae", "aae", "egan", "aegan")
CIRCULAR = np.array([factor.circular for factor in FACTORS])
NUM_READ = 4_000  # training images that regressions are fitted on
NUM_PATHS, NUM_FRAMES = 200, 12
KEYS = ("arm", "steps", "samples_from")
SCORES = {
    "recovery": 2,
    "recovery_nonlinear": 2,
    "marginal_distance": 3,
    "joint_distance": 3,
    "off_manifold": 3,
    "path_detour": 2,
    "path_largest_step": 2,
    "path_off_manifold": 3,
}


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--arm", nargs="+", choices=ARMS, default=[*ARMS])
    command.add_argument("--images", type=int, default=8_000)
    command.add_argument("--size", type=int, default=32, help="side in pixels")
    command.add_argument("--looks", type=int, nargs="+", default=[1_200])
    command.add_argument("--seeds", type=int, default=3)


def measure(options: argparse.Namespace) -> str:
    """Trains what is missing in the file of results; returns the table."""
    stated = {key: vars(options)[key] for key in ("images", "size", "looks")}
    results = Results(options.json, stated | shared_settings(), keys=KEYS)
    faces = Faces(options.images, options.size)
    if not results.rows:
        results.add(*faces.references())
    for seed, arm in itertools.product(range(options.seeds), options.arm):
        if not results.find(arm=arm, seed=seed):
            settings = {"training.arm": arm}
            with tempfile.TemporaryDirectory() as scratch:
                folder, budget = Path(scratch), {"seed": seed, "looks": options.looks}
                rows: list[Row] = []
                for step, _ in train(
                    *(faces.images, options.images, settings), folder=folder, **budget
                ):
                    add_fitted_latents(folder, settings, seed=seed)
                    found = faces.scores(aegan.load(folder / "model"), arm)
                    rows += [{"arm": arm, "steps": step, "seed": seed} | row for row in found]
            results.add(*rows)
    return as_table(results.rows, KEYS, SCORES)


class Faces:
    """Faces to train on, others to measure on, and what reads factors off images."""

    def __init__(self, images: int, size: int) -> None:
        count = images + 2 * JUDGES
        self.size = size
        self.images, factors = designed_faces.generate(0, count, seed=0, image_size=size)
        self.known, self.factors = (factors[part].astype(float) for part in parts())
        self.read_from, self.test = (torch.from_numpy(self.images[part]) for part in parts())
        self.reader = FactorReader(self.read_from, self.known, FACTORS)
        self.readings = self.reader.read(self.test)

    def references(self) -> Iterator[Row]:
        """What needs no training: other faces, principal components, and three ways."""
        others = torch.from_numpy(self.images[-2 * JUDGES : -JUDGES])
        yield {"arm": "other faces"} | self.of_samples(others)
        codes = principal_components(self.read_from, self.test, count=16)
        yield {"arm": "16 principal components"} | self.of_codes(*codes)
        start, end = self.ends(self.factors)
        low, width = self.ranges()
        turns = (end - start) / width
        way = shorter_way(turns) * width
        t = np.linspace(0, 1, NUM_FRAMES)[:, None]
        between = start[:, None] + t * way[:, None]
        between = np.where(CIRCULAR, low + (between - low) % width, between)
        true = designed_faces.render(between.reshape(-1, len(FACTORS)), image_size=self.size)
        first, last = (ends[:, None].float() for ends in self.ends(self.test))
        blend = torch.lerp(first, last, torch.linspace(0, 1, NUM_FRAMES).view(-1, 1, 1, 1))
        half = NUM_FRAMES // 2
        switch = torch.cat([first.expand_as(blend)[:, :half], last.expand_as(blend)[:, half:]], 1)
        ways = {"true path": torch.from_numpy(true).view(*blend.shape)}
        ways |= {"pixel blend": blend.round(), "abrupt switch": switch}
        for name, frames in ways.items():
            yield {"arm": name} | self.of_paths(frames.byte())

    def scores(self, model: aegan.Model, arm: Arm) -> Iterator[Row]:
        """Of samples of the prior and, with an encoder, of fitted latents, codes and paths."""
        has_encoder = OBJECTIVES[arm].has_encoder
        of_encoder: Row = {}
        if has_encoder:
            codes = [aegan.encode(model, images) for images in (self.read_from, self.test)]
            start, end = self.ends(codes[1])
            z = model.prior.path(start, end, torch.linspace(0, 1, NUM_FRAMES)).flatten(0, 1)
            frames = aegan.decode(model, z).unflatten(0, (NUM_PATHS, NUM_FRAMES))
            of_encoder = self.of_codes(*codes) | self.of_paths(frames)
        for latents in ("prior", "fitted")[: 1 + has_encoder]:
            made = aegan.sample(model, JUDGES, seed=0, latents=latents)
            yield {"samples_from": latents} | of_encoder | self.of_samples(made)

    def of_codes(self, train_codes: Tensor, test_codes: Tensor) -> Row:
        """Share of the factors' variance that codes [N, D] tell."""
        codes = [part.double().numpy() for part in (train_codes, test_codes)]
        read = read_codes(codes[0], self.known, codes[1], FACTORS)
        endings = {"linear": "", "nonlinear": "_nonlinear"}
        return {
            f"recovery{endings[name]}": statistics.mean(
                r_squared(found, self.factors, FACTORS).values()
            )
            for name, found in read.items()
        }

    def of_samples(self, images: Tensor) -> Row:
        """How samples depart from the faces' factors, uint8 [N, H, W, C]."""
        readings = self.reader.read(images)
        distances = factor_distances(self.readings, readings, [*FACTORS])
        return {
            "marginal_distance": distances["factor_marginal_distance"],
            "joint_distance": distances["factor_joint_distance"],
            "off_manifold": self.off_manifold(images, readings),
        }

    def of_paths(self, frames: Tensor) -> Row:
        """Of ways between faces, uint8 [P, T, H, W, C].

        `path_detour`: length in factors over the distance of the ends, 1 of a straight one;
        `path_largest_step`: as a share of the length, 1 / (T - 1) if all are equal.
        """
        images = frames.flatten(0, 1)
        readings = self.reader.read(images)
        factors = readings.reshape(len(frames), -1, len(FACTORS))
        lengths = np.linalg.norm(shorter_way(np.diff(factors, axis=1)), axis=2)
        direct = np.linalg.norm(shorter_way(factors[:, -1] - factors[:, 0]), axis=1)
        return {
            "path_detour": float(np.median(lengths.sum(1) / direct)),
            "path_largest_step": float((lengths.max(1) / lengths.sum(1)).mean()),
            "path_off_manifold": self.off_manifold(images, readings),
        }

    def off_manifold(self, images: Tensor, readings: np.ndarray) -> float:
        """Mean absolute difference from the faces of the factors read; pixels in [-1, 1]."""
        low, width = self.ranges()
        faces = designed_faces.render(low + readings * width, image_size=self.size)
        return float((images.float() - torch.from_numpy(faces).float()).abs().mean() / 127.5)

    def ends(self, values: Any) -> tuple[Any, Any]:
        """Of each path, of test images."""
        return values[:NUM_PATHS], values[NUM_PATHS : 2 * NUM_PATHS]

    def ranges(self) -> tuple[np.ndarray, np.ndarray]:
        low = np.array([factor.low for factor in FACTORS])
        return low, np.array([factor.high for factor in FACTORS]) - low


def parts() -> tuple[slice, slice]:
    """Images that regressions are fitted on, and those that are measured on."""
    return slice(NUM_READ), slice(-JUDGES, None)


def shorter_way(turns: np.ndarray) -> np.ndarray:
    """Differences of factors in [0, 1], [..., F]: the shorter way round where they are circular."""
    return np.where(CIRCULAR, (turns + 0.5) % 1 - 0.5, turns)

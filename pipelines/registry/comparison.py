"""What the gate measures: a model's figures on the reference split, draw by draw.

Two models see the same images, the same seeds and, where both have the same prior, the same
latents, so a difference between them is one of the models.
"""

import hashlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

import aegan
from aegan.files import new_file, save_tensors
from aegan.metrics.comparison import worsening
from aegan.metrics.features import (
    LEARNED_FEATURES,
    RANDOM_FEATURES,
    extract,
    feature_extractor,
)
from aegan.metrics.frechet import frechet_distance
from aegan.metrics.neighbours import precision_recall_density_coverage
from pipelines.registry.reference import MIN_IMAGES, Reference

DRAWS = 5  # of samples, and parts of the reference that are reconstructed
SAMPLES = 256  # a draw, or as many as the reference has images
NEIGHBOURS = 5  # of coverage
FEATURES = (LEARNED_FEATURES, RANDOM_FEATURES)
# Few, since each is one more chance to refuse a good model by mistake: nearness of samples in the
# features that choose checkpoints, their variety in features that chose nothing, and the encoder.
GATED: dict[str, Literal["lower", "higher"]] = {
    "frechet_distance": "lower",
    "coverage_random": "higher",
    "reconstruction_mae": "lower",
}
VARIETY = "variety"  # of samples' features, as a share of the reference's: no champion is asked
MIN_VARIETY = 0.3  # real images have 1, copies of one image 0
CACHE = Path("artifacts/gate")

Row = dict[str, float]  # figures of one draw


@dataclass(frozen=True, kw_only=True)
class Change:
    """One figure of two models, in the mean over the draws."""

    metric: str
    candidate: float
    champion: float
    worse: float  # by this share of the champion's; below 0 it is better
    error: float  # standard error of `worse` over the draws
    allowed: float
    allowed_by: str  # where that comes from, in words

    @property
    def refused(self) -> bool:
        return not self.worse <= self.allowed  # NaN is refused


@dataclass(frozen=True, kw_only=True)
class OnNewImages:
    """Both models on test images that came after the champion; it decides nothing."""

    count: int
    candidate: Sequence[Row] = ()  # empty for too few images
    champion: Sequence[Row] = ()
    changes: Sequence[Change] = ()

    @property
    def is_better(self) -> bool:
        """Whether the candidate is, in every figure."""
        return bool(self.changes) and all(change.worse < 0 for change in self.changes)


class Examination:
    """Measures models by one reference, whose features are extracted once and kept."""

    def __init__(self, reference: Reference, *, cache: Path = CACHE) -> None:
        self.reference = reference
        channels = reference.images.shape[3]
        self._extractors = {name: feature_extractor(name, channels) for name in FEATURES}
        self.features = self._features_of_reference(cache / f"{reference.sha256}.safetensors")
        self._spread = _total_variance(self.features[LEARNED_FEATURES])

    def examine(self, model: aegan.AEGAN) -> list[Row]:
        """A row of figures a draw; without those of reconstructions where there is no encoder."""
        return [self._draw(model, seed) for seed in range(DRAWS)]

    def _draw(self, model: aegan.AEGAN, seed: int) -> Row:
        images = self.reference.images
        samples = aegan.sample(model, min(SAMPLES, len(images)), seed=seed)
        features = self._extract(samples)
        learned, random = (self.features[name] for name in FEATURES)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        neighbourhood = precision_recall_density_coverage(  # of sets of one size, as elsewhere
            random[order[: len(samples)]], features[RANDOM_FEATURES], neighbours=NEIGHBOURS
        )
        row = {
            "frechet_distance": frechet_distance(learned, features[LEARNED_FEATURES]),
            "coverage_random": neighbourhood["coverage"],
            VARIETY: _total_variance(features[LEARNED_FEATURES]) / self._spread,
        }
        if model.encoder is not None:
            part = images[seed::DRAWS]
            row["reconstruction_mae"] = mean_absolute_error(aegan.reconstruct(model, part), part)
        return row

    def _extract(self, images: Tensor) -> dict[str, Tensor]:
        return {name: extract(network, images) for name, network in self._extractors.items()}

    def _features_of_reference(self, file: Path) -> dict[str, Tensor]:
        """By the extractor's name, [N, D] each; from the file, if it holds all of them."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found = load_file(file)
            if found.keys() == {*FEATURES}:
                return found
        except (OSError, SafetensorError):
            pass
        features = self._extract(self.reference.images)
        with new_file(file) as temporary:
            save_tensors(features, temporary)
        return features


def compare(
    candidate: Sequence[Row], champion: Sequence[Row], *, margin: float, noise: dict[str, float]
) -> list[Change]:
    """Every gated figure that both have; it may be worse by the margin or the noise, by more."""
    changes = []
    for metric, better in GATED.items():
        if metric not in candidate[0] or metric not in champion[0]:
            continue
        ours, theirs = mean(candidate, metric), mean(champion, metric)
        shares = [
            worsening(theirs + one[metric] - other[metric], theirs, better)
            for one, other in zip(candidate, champion, strict=True)
        ]
        by_noise = noise.get(metric, 0.0) > margin
        changes.append(
            Change(
                metric=metric,
                candidate=ours,
                champion=theirs,
                worse=worsening(ours, theirs, better),
                error=float(np.std(shares, ddof=1)) / math.sqrt(len(shares)),
                allowed=noise[metric] if by_noise else margin,
                allowed_by="noise over training seeds" if by_noise else "register.gate_margin",
            )
        )
    return changes


def compare_on_new(images: Tensor, candidate: aegan.AEGAN, champion: aegan.AEGAN) -> OnNewImages:
    """The figures of the gate on other images, uint8 [N, H, W, C], by the same code and seeds."""
    if len(images) < MIN_IMAGES:
        return OnNewImages(count=len(images))
    name = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    examination = Examination(Reference(sha256=name, images=images, facts={}))
    ours, theirs = examination.examine(candidate), examination.examine(champion)
    changes = compare(ours, theirs, margin=0.0, noise={})
    return OnNewImages(count=len(images), candidate=ours, champion=theirs, changes=changes)


def has_variety(rows: Sequence[Row]) -> bool:
    """Whether samples have not collapsed."""
    return mean(rows, VARIETY) >= MIN_VARIETY  # NaN has not


def mean(rows: Sequence[Row], metric: str) -> float:
    return statistics.fmean(row[metric] for row in rows)


def mean_absolute_error(a: Tensor, b: Tensor) -> float:
    """Of two uint8 [N, H, W, C]; pixels span [-1, 1]."""
    return float((a.float() - b.float()).abs().mean() / 127.5)


def error_of_the_mean_image(images: Tensor) -> float:
    """What an encoder that says nothing would leave: the mean image for every one."""
    return float((images.float() - images.float().mean(0)).abs().mean() / 127.5)


def _total_variance(features: Tensor) -> float:
    """Of [N, D], over all dimensions."""
    return float(torch.var(features.double(), dim=0).sum())

"""Where latents come from: how they are drawn, read off E's output, compared and joined by a path.

    prior          latents of D dimensions                E's output    latent reconstruction
    normal         N(0, I)                                as it is      mean squared error
    uniform        each dimension U(-1, 1)                tanh          mean squared error
    sphere         all directions alike, length sqrt(D)   normalised    the same, 2 - 2 cosine
    bernoulli      fair bits, 0 or 1                      logits        binary cross entropy
    categorical    one of D categories, one-hot           logits        cross entropy
    label          the image's class, of D, one-hot       logits        cross entropy
    a * b          those of a beside those of b           part by part  sum of the parts'

Of a discrete prior D_z sees E's probabilities, which it can push towards certainty (as adversarial
autoencoders do, Makhzani et al. 2015). G is given the likeliest value, of the same kind as a draw,
with the gradient of the probabilities (straight-through: Bengio et al. 2013).
"""

import itertools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from aegan.arguments import as_tensor, described
from aegan.config import prior_parts

Array = Tensor | np.ndarray


class Moments(NamedTuple):
    """Of a prior's dimensions, [D] each, and `correlation` [D, D] between them."""

    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    skewness: NDArray[np.float64]
    kurtosis: NDArray[np.float64]  # excess: 0 for a normal distribution
    correlation: NDArray[np.float64]


class Prior(ABC):
    """A distribution of latents z [N, latent_dim]. `output` is E's, [N, latent_dim], linear."""

    latent_dim: int

    @abstractmethod
    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws on the generator's device, [count, latent_dim]."""

    def given(self, output: Tensor) -> Tensor:
        """The latents that G is given for E's output: of the same kind as draws."""
        return output

    def seen(self, output: Tensor) -> Tensor:
        """What D_z sees of E's output, beside draws."""
        return self.given(output)

    def distance(self, output: Tensor, z: Tensor) -> Tensor:
        """The latent reconstruction term, in equation (4) of docs/method.md."""
        return (self.given(output) - z).square().mean()

    def path(self, start: Array, end: Array, t: Array) -> Tensor:
        """From latent to latent through likely ones: [..., D], [..., D], [T] => [..., T, D]."""
        return lerp(start, end, t)

    @property
    def label(self) -> slice | None:
        """Where in a latent the class of its image stands; None: nowhere."""
        return None

    def with_labels(self, z: Tensor, labels: Tensor) -> Tensor:
        """Latents with the classes [N], whole numbers, in their place."""
        where = self._place_of_label()
        z = z.clone()
        z[:, where] = F.one_hot(labels, where.stop - where.start).to(z)
        return z

    def label_distance(self, output: Tensor, z: Tensor) -> Tensor:
        """How well E tells the classes that stand in z: cross entropy."""
        where = self._place_of_label()
        return F.cross_entropy(output[:, where], z[:, where].to(output))

    def _place_of_label(self) -> slice:
        if self.label is None:
            raise ValueError("this prior has no part called label")
        return self.label

    # What the metrics of aegan/metrics/latent.py compare E(x) with.

    @abstractmethod
    def moments(self) -> Moments: ...

    @abstractmethod
    def kernel_mean(self, z: Tensor, bandwidth: float) -> Tensor:
        """Mean over draws y of exp(-|z - y|^2 / (2 bandwidth)), [N, D] => [N], in float64."""

    @abstractmethod
    def kernel_among(self, bandwidth: float) -> float:
        """The same mean over two independent draws."""


@dataclass(frozen=True)
class NormalPrior(Prior):
    latent_dim: int

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randn(count, self.latent_dim, generator=generator, device=generator.device)

    def path(self, start: Array, end: Array, t: Array) -> Tensor:
        return slerp(start, end, t)

    def moments(self) -> Moments:
        return _alike(self.latent_dim)

    def kernel_mean(self, z: Tensor, bandwidth: float) -> Tensor:
        factor = float((bandwidth / (bandwidth + 1)) ** (self.latent_dim / 2))
        return factor * torch.exp(-z.square().sum(1) / (2 * (bandwidth + 1)))

    def kernel_among(self, bandwidth: float) -> float:
        return float((bandwidth / (bandwidth + 2)) ** (self.latent_dim / 2))


@dataclass(frozen=True)
class UniformPrior(Prior):
    latent_dim: int

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        shape = count, self.latent_dim
        return 2 * torch.rand(shape, generator=generator, device=generator.device) - 1

    def given(self, output: Tensor) -> Tensor:
        return torch.tanh(_wide(output))

    def moments(self) -> Moments:
        return _alike(self.latent_dim, std=math.sqrt(1 / 3), kurtosis=-1.2)

    def kernel_mean(self, z: Tensor, bandwidth: float) -> Tensor:
        scale = math.sqrt(2 * bandwidth)
        between = torch.erf((z + 1) / scale) - torch.erf((z - 1) / scale)
        return (math.sqrt(math.pi) / 4 * scale * between).prod(1)

    def kernel_among(self, bandwidth: float) -> float:
        scale = math.sqrt(2 * bandwidth)  # the difference of two draws has density (2 - |u|) / 4
        one = math.sqrt(math.pi) / 2 * scale * math.erf(2 / scale)
        one += bandwidth / 2 * math.expm1(-2 / bandwidth)
        return float(one**self.latent_dim)


@dataclass(frozen=True)
class SpherePrior(Prior):
    """Of length sqrt(D), so that each dimension has variance 1, as a normal one."""

    latent_dim: int

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        shape = count, self.latent_dim
        return self.given(torch.randn(shape, generator=generator, device=generator.device))

    def given(self, output: Tensor) -> Tensor:
        return math.sqrt(self.latent_dim) * F.normalize(_wide(output), dim=-1)

    def path(self, start: Array, end: Array, t: Array) -> Tensor:
        return slerp(start, end, t)

    def moments(self) -> Moments:
        return _alike(self.latent_dim, kurtosis=-6 / (self.latent_dim + 2))

    def kernel_mean(self, z: Tensor, bandwidth: float) -> Tensor:
        from scipy.special import hyp0f1  # the mean of exp(z . y), a Bessel function in disguise

        squares, dim = z.square().sum(1), self.latent_dim
        mean = hyp0f1(dim / 2, (squares * dim / (2 * bandwidth) ** 2).numpy())
        return torch.exp(-(squares + dim) / (2 * bandwidth)) * torch.from_numpy(mean)

    def kernel_among(self, bandwidth: float) -> float:
        anywhere = torch.ones(1, self.latent_dim, dtype=torch.float64)
        return float(self.kernel_mean(anywhere, bandwidth))


@dataclass(frozen=True)
class BernoulliPrior(Prior):
    latent_dim: int

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        shape = count, self.latent_dim
        return torch.randint(2, shape, generator=generator, device=generator.device).float()

    def given(self, output: Tensor) -> Tensor:
        return _straight_through((output > 0).to(_wide(output)), self.seen(output))

    def seen(self, output: Tensor) -> Tensor:
        return torch.sigmoid(_wide(output))

    def distance(self, output: Tensor, z: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(output, z.to(output))

    def moments(self) -> Moments:
        return _alike(self.latent_dim, mean=0.5, std=0.5, kurtosis=-2.0)

    def kernel_mean(self, z: Tensor, bandwidth: float) -> Tensor:
        to_0, to_1 = (torch.exp(-(z - bit).square() / (2 * bandwidth)) for bit in (0, 1))
        return ((to_0 + to_1) / 2).prod(1)

    def kernel_among(self, bandwidth: float) -> float:
        return float(((1 + math.exp(-1 / (2 * bandwidth))) / 2) ** self.latent_dim)


@dataclass(frozen=True)
class CategoricalPrior(Prior):
    latent_dim: int

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        drawn = torch.randint(
            self.latent_dim, (count,), generator=generator, device=generator.device
        )
        return F.one_hot(drawn, self.latent_dim).float()

    def given(self, output: Tensor) -> Tensor:
        likeliest = F.one_hot(output.argmax(-1), self.latent_dim)
        return _straight_through(likeliest.to(_wide(output)), self.seen(output))

    def seen(self, output: Tensor) -> Tensor:
        return torch.softmax(_wide(output), dim=-1)

    def distance(self, output: Tensor, z: Tensor) -> Tensor:
        return F.cross_entropy(output, z.to(output))

    def moments(self) -> Moments:
        mean = 1 / self.latent_dim
        variance = mean * (1 - mean)
        return _alike(
            self.latent_dim,
            mean=mean,
            std=math.sqrt(variance),
            skewness=(1 - 2 * mean) / math.sqrt(variance),
            kurtosis=1 / variance - 6,
            correlation=-1 / (self.latent_dim - 1),
        )

    def kernel_mean(self, z: Tensor, bandwidth: float) -> Tensor:
        squares = z.square().sum(1, keepdim=True) - 2 * z + 1  # distances to each category
        return torch.exp(-squares / (2 * bandwidth)).mean(1)

    def kernel_among(self, bandwidth: float) -> float:
        others = (self.latent_dim - 1) * math.exp(-1 / bandwidth)
        return (1 + others) / self.latent_dim


@dataclass(frozen=True)
class LabelPrior(CategoricalPrior):
    """The class of the image. In training it is that of the batch's images; drawn, any of them."""

    @property
    def label(self) -> slice:
        return slice(0, self.latent_dim)


@dataclass(frozen=True)
class ProductPrior(Prior):
    """Independent parts side by side."""

    parts: tuple[Prior, ...]

    @property
    def latent_dim(self) -> int:  # type: ignore[override]
        return sum(self._sizes)

    @property
    def label(self) -> slice | None:
        stops = itertools.accumulate(self._sizes)
        places = (slice(stop - size, stop) for size, stop in zip(self._sizes, stops, strict=True))
        told = zip(self.parts, places, strict=True)
        return next((place for part, place in told if part.label is not None), None)

    @property
    def _sizes(self) -> list[int]:
        return [part.latent_dim for part in self.parts]

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.cat([part.sample(count, generator) for part in self.parts], dim=1)

    def given(self, output: Tensor) -> Tensor:
        pieces = zip(self.parts, output.split(self._sizes, -1), strict=True)
        return torch.cat([part.given(piece) for part, piece in pieces], dim=-1)

    def seen(self, output: Tensor) -> Tensor:
        pieces = zip(self.parts, output.split(self._sizes, -1), strict=True)
        return torch.cat([part.seen(piece) for part, piece in pieces], dim=-1)

    def distance(self, output: Tensor, z: Tensor) -> Tensor:
        pieces = (output.split(self._sizes, -1), z.split(self._sizes, -1))
        terms = zip(self.parts, *pieces, strict=True)
        return torch.stack([part.distance(*piece) for part, *piece in terms]).sum()

    def path(self, start: Array, end: Array, t: Array) -> Tensor:
        start, end, t = _path_arguments(start, end, t)
        starts, ends = start.split(self._sizes, -1), end.split(self._sizes, -1)
        ways = zip(self.parts, starts, ends, strict=True)
        return torch.cat([part.path(first, last, t) for part, first, last in ways], dim=-1)

    def moments(self) -> Moments:
        from scipy.linalg import block_diag

        *each, correlation = zip(*(part.moments() for part in self.parts), strict=True)
        mean, std, skewness, kurtosis = map(np.concatenate, each)
        return Moments(mean, std, skewness, kurtosis, block_diag(*correlation))

    def kernel_mean(self, z: Tensor, bandwidth: float) -> Tensor:
        pieces = zip(self.parts, z.split(self._sizes, 1), strict=True)
        means = [part.kernel_mean(piece, bandwidth) for part, piece in pieces]
        return torch.stack(means).prod(0)

    def kernel_among(self, bandwidth: float) -> float:
        return math.prod(part.kernel_among(bandwidth) for part in self.parts)


PRIORS: dict[str, type[Prior]] = {
    "normal": NormalPrior,
    "uniform": UniformPrior,
    "sphere": SpherePrior,
    "bernoulli": BernoulliPrior,
    "categorical": CategoricalPrior,
    "label": LabelPrior,
}


def make_prior(text: str, latent_dim: int) -> Prior:
    """The prior that `model.prior` names; raises ConfigError if its sizes do not fit latent_dim."""
    parts = [PRIORS[name](size) for name, size in prior_parts(text, latent_dim)]  # type: ignore[call-arg]
    return parts[0] if len(parts) == 1 else ProductPrior(tuple(parts))


def _alike(
    dim: int,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    skewness: float = 0.0,
    kurtosis: float = 0.0,
    correlation: float = 0.0,
) -> Moments:
    """Dimensions that are all alike, each pair of them with this correlation."""
    return Moments(
        mean=np.full(dim, mean),
        std=np.full(dim, std),
        skewness=np.full(dim, skewness),
        kurtosis=np.full(dim, kurtosis),
        correlation=np.full((dim, dim), correlation) + (1 - correlation) * np.eye(dim),
    )


def _straight_through(value: Tensor, soft: Tensor) -> Tensor:
    """Exactly `value`, with the gradient of `soft`."""
    return value + (soft - soft.detach())


def _wide(output: Tensor) -> Tensor:
    """In float32 or better: bfloat16 knows no probability between .996 and 1."""
    return output.to(torch.promote_types(output.dtype, torch.float32))


def lerp(start: Array, end: Array, t: Array) -> Tensor:
    """Straight line: [..., D], [..., D], [T] => [..., T, D]."""
    start, end, t = _path_arguments(start, end, t)
    return torch.lerp(start.unsqueeze(-2), end.unsqueeze(-2), t.unsqueeze(-1))


def slerp(start: Array, end: Array, t: Array) -> Tensor:
    """Great-circle path of Shoemake 1985, for Gaussian latents; shapes as `lerp`.

    The angle is that between the two directions; lengths interpolate through the same weights.
    Falls back to `lerp` where the directions are (anti)parallel and no great circle is singled out.
    """
    start, end, t = _path_arguments(start, end, t)
    unit_start = torch.nn.functional.normalize(start, dim=-1)
    unit_end = torch.nn.functional.normalize(end, dim=-1)
    angle = torch.acos((unit_start * unit_end).sum(-1).clamp(-1, 1))[..., None, None]
    sine = torch.sin(angle)
    weights_start = torch.sin((1 - t.unsqueeze(-1)) * angle) / sine
    weights_end = torch.sin(t.unsqueeze(-1) * angle) / sine
    curved = weights_start * start.unsqueeze(-2) + weights_end * end.unsqueeze(-2)
    return torch.where(sine.abs() < 1e-3, lerp(start, end, t), curved)


def _path_arguments(start: Array, end: Array, t: Array) -> tuple[Tensor, Tensor, Tensor]:
    start, end, t = as_tensor("start", start), as_tensor("end", end), as_tensor("t", t)
    floating = start.is_floating_point() and end.is_floating_point()
    if start.shape != end.shape or start.ndim == 0 or not floating:
        raise ValueError(
            f"start is {described(start)}, end is {described(end)}; expected float [..., D]"
        )
    if t.ndim != 1:
        raise ValueError(f"t is {described(t)}; expected shares of the way [T]")
    return start, end.to(start), t.to(start)

"""The quick scores that choose among checkpoints; `pipelines/evaluate.py` does the full account."""

from functools import cached_property

import torch
from torch import Tensor, nn

from aegan.config import Arm
from aegan.losses import OBJECTIVES
from aegan.metrics.diagnosis import relative_variety
from aegan.metrics.diversity import ms_ssim
from aegan.metrics.features import extract, feature_extractor
from aegan.metrics.frechet import frechet_distance
from aegan.metrics.kernel import kernel_distance
from aegan.networks import AEGAN
from aegan.sampling import reconstruct, sample

VARIETY = "sample_variety"  # of a row of the log; measured if training is to end on a collapse
VARIETY_IMAGES = 64  # samples of the same latents each time, and real images beside them


def selected_by(arm: Arm) -> str:
    """The score that chooses the best checkpoint: of samples, if the arm trains them at all."""
    realism = OBJECTIVES[arm].x_hat
    return f"validation_{'frechet_distance' if realism else 'image_reconstruction'}"


class Judge:
    """Scores models by the same images, uint8 [N, H, W, C], against as many samples.

    Distances are measured in features of one name (`aegan.metrics.features`), computed on `device`;
    they cannot be compared with distances in other features.
    """

    def __init__(
        self, images: Tensor, *, features: str, device: torch.device | str = "cpu"
    ) -> None:
        self.images, self._name, self._device = images, features, device

    def get_ready(self) -> None:
        """Look at the images, if any; raises ConfigError if the features' weights are missing."""
        if len(self.images):
            _ = self.real_features

    @cached_property
    def real_features(self) -> Tensor:
        """[N, D], of the images."""
        return self.features_of(self.images)

    def features_of(self, images: Tensor) -> Tensor:
        """uint8 [M, H, W, C] => [M, D]."""
        return extract(self._extractor, images)

    @cached_property
    def _extractor(self) -> nn.Module:
        return feature_extractor(self._name, self.images.shape[3]).to(self._device)

    def scores(self, model: AEGAN, *, seed: int) -> dict[str, float]:
        """`validation_<score>` of a model; lower is better for each."""
        return self.scores_of(model, self.features_of(sample(model, len(self.images), seed=seed)))

    def scores_of(self, model: AEGAN, samples: Tensor) -> dict[str, float]:
        """The same, given the features [N, D] of its samples."""
        scores = {"validation_frechet_distance": frechet_distance(self.real_features, samples)}
        if len(samples) > 1:  # its unbiased form compares pairs
            distance = kernel_distance(self.real_features, samples)
            scores["validation_kernel_distance"] = distance
        if model.encoder is not None:
            difference = reconstruct(model, self.images).float() - self.images.float()
            scores["validation_image_reconstruction"] = float(difference.abs().mean() / 127.5)
        return scores

    def variety(self, model: AEGAN, *, seed: int) -> float | None:
        """How much samples differ from each other, 1 as the images do; None for too few images."""
        if len(self.images) < 2:
            return None
        made = sample(model, VARIETY_IMAGES, seed=seed, latents="prior")
        return relative_variety(
            {"ms_ssim": {"ema": ms_ssim(made, seed=0), "floor": self._likeness_of_images}}
        )

    @cached_property
    def _likeness_of_images(self) -> float:
        """Of some from all over the split, whose images may lie class by class."""
        every = max(1, len(self.images) // VARIETY_IMAGES)
        return ms_ssim(self.images[::every], seed=0)

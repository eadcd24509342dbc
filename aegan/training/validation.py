"""The quick scores that choose among checkpoints; `pipelines/evaluate.py` does the full account."""

from torch import Tensor

from aegan.config import Arm
from aegan.losses import OBJECTIVES
from aegan.metrics.features import extract, random_features
from aegan.metrics.frechet import frechet_distance
from aegan.networks import AEGAN
from aegan.sampling import reconstruct, sample


def selected_by(arm: Arm) -> str:
    """The score that chooses the best checkpoint: of samples, if the arm trains them at all."""
    realism = OBJECTIVES[arm].x_hat
    return f"validation_{'frechet_distance' if realism else 'image_reconstruction'}"


def validate(model: AEGAN, images: Tensor, *, seed: int) -> dict[str, float]:
    """Scores of a model on validation images, uint8 [N, H, W, C]; lower is better for each."""
    extractor = random_features(model.image_channels)
    samples = sample(model, len(images), seed=seed)
    scores = {
        "validation_frechet_distance": frechet_distance(
            extract(extractor, samples), extract(extractor, images)
        )
    }
    if model.encoder is not None:
        difference = reconstruct(model, images).float() - images.float()
        scores["validation_image_reconstruction"] = float(difference.abs().mean() / 127.5)
    return scores

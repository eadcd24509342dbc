"""The quick scores that choose among checkpoints; `pipelines/evaluate.py` does the full account."""

from torch import Tensor

from aegan.networks import AEGAN
from aegan.sampling import reconstruct


def validate(model: AEGAN, images: Tensor, *, seed: int) -> dict[str, float]:
    """Scores of a model on validation images, uint8 [N, H, W, C]; lower is better for each."""
    scores = {}
    if model.encoder is not None:
        difference = reconstruct(model, images).float() - images.float()
        scores["validation_image_reconstruction"] = float(difference.abs().mean() / 127.5)
    return scores

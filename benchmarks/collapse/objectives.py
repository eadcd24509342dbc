"""The two losses that the tables compare."""

from typing import Any, Literal

from aegan.config import LossConfig

LOSSES: dict[str, dict[str, Any]] = {
    "bce": {"adversarial": "bce", "gamma": 0.0},
    "relativistic": {"adversarial": "relativistic", "gamma": 0.1},
}


def loss_of(
    adversarial: str,
    gamma: float,
    lambdas: tuple[float, float],
    *,
    image_reconstruction: Literal["l1", "l2"] = "l1",
) -> LossConfig:
    """All adversarial weights 1, both penalties `gamma`; lambdas of image and latent."""
    image, latent = lambdas
    return LossConfig(
        lambda_image_reconstruction=image,
        lambda_latent_reconstruction=latent,
        lambda_x_hat_adversarial=1.0,
        lambda_x_tilde_adversarial=1.0,
        lambda_z_hat_adversarial=1.0,
        lambda_z_tilde_adversarial=1.0,
        adversarial=adversarial,
        real_target=0.95,
        fake_target=0.05,
        image_reconstruction=image_reconstruction,
        gamma_image=gamma,
        gamma_latent=gamma,
        packing=1,  # neighbouring rows are of different seeds: `networks.packed` joins them
    )

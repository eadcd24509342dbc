"""What is measured, which way is better, and what each figure stands beside (docs/metrics.md)."""

from typing import Literal, NamedTuple

Better = Literal["lower", "higher", "floor"]
SECOND_OPINION = "_random"  # ends the names of figures in random features


class Metric(NamedTuple):
    """The words a report shows beside a figure."""

    better: Better  # `floor`: the nearer to the floor the better, on either side
    explanation: str
    floor: str  # what the figure beside it is


_HALVES = "two halves of the real test images"
_NEAREST = "the most similar training image instead of the reconstruction"
_PRIOR = "as many draws of the prior"
_PIXELS = "the same number of principal components of the pixels"

_SECOND_OPINIONS: tuple[tuple[str, Better, str], ...] = (
    ("frechet_distance", "lower", "the Fréchet distance"),
    ("kernel_distance", "lower", "the kernel distance"),
    ("precision", "higher", "precision"),
    ("recall", "higher", "recall"),
    ("density", "higher", "density"),
    ("coverage", "higher", "coverage"),
)

METRICS: dict[str, Metric] = {
    "reconstruction_mae": Metric(
        "lower", "Mean absolute error of G(E(x)) on unseen images; pixels span [-1, 1].", _NEAREST
    ),
    "reconstruction_psnr": Metric(
        "higher", "Peak signal-to-noise ratio of G(E(x)) on unseen images, in decibels.", _NEAREST
    ),
    "reconstruction_ssim": Metric(
        "higher", "Structural similarity of G(E(x)) to unseen images; 1 is identical.", _NEAREST
    ),
    "latent_reconstruction_mse": Metric(
        "lower",
        "Mean squared error of E(G(z)): can the encoder tell which latent made an image?",
        "an encoder that always answers the prior's mean",
    ),
    "latent_mean_error": Metric(
        "lower", "How far the means of E(x)'s dimensions are from the prior's, on average.", _PRIOR
    ),
    "latent_std_error": Metric(
        "lower",
        "How far the spreads of E(x)'s dimensions are from the prior's, on average.",
        _PRIOR,
    ),
    "latent_skewness_error": Metric(
        "lower", "How much more or less lopsided E(x)'s dimensions are than the prior's.", _PRIOR
    ),
    "latent_kurtosis_error": Metric(
        "lower", "How far E(x)'s tails are from the prior's (excess kurtosis).", _PRIOR
    ),
    "latent_correlation": Metric(
        "lower", "How much E(x)'s dimensions depend on each other beyond the prior's.", _PRIOR
    ),
    "latent_mmd": Metric(
        "lower", "Kernel distance between E(x) and the prior: one figure for all.", _PRIOR
    ),
    "latent_two_sample_accuracy": Metric(
        "floor",
        "How well E(x) is told from the prior by its nearest neighbour: .5 not at all, 1 always.",
        _PRIOR,
    ),
    "frechet_distance": Metric(
        "lower", "Distance between samples and real images: means and covariances.", _HALVES
    ),
    "kernel_distance": Metric(
        "lower", "Distance between samples and real images without assuming normality.", _HALVES
    ),
    "precision": Metric("higher", "Share of samples that look like some real image.", _HALVES),
    "recall": Metric("higher", "Share of real images that look like some sample.", _HALVES),
    "density": Metric(
        "higher", "How many real images samples resemble; robust precision.", _HALVES
    ),
    "coverage": Metric("higher", "Share of real images with a sample close by.", _HALVES),
    **{
        f"{name}{SECOND_OPINION}": Metric(
            better, f"A second opinion: {words} in features of random weights.", _HALVES
        )
        for name, better, words in _SECOND_OPINIONS
    },
    "sliced_wasserstein": Metric(
        "lower", "Difference of small patches at every scale: colours, edges, texture.", _HALVES
    ),
    "ms_ssim": Metric(
        "floor",
        "Similarity of samples to each other: above real images' own means less variety.",
        "pairs of real test images",
    ),
    "factor_recovery_linear": Metric(
        "higher",
        "How much of the true factors a linear map reads off E(x) (R², 1 is all).",
        _PIXELS,
    ),
    "factor_recovery_nonlinear": Metric(
        "higher", "The same with a curved map (kernel regression).", _PIXELS
    ),
    "factor_marginal_distance": Metric(
        "lower",
        "How differently single factors are spread in samples: 0 equal, 1 disjoint.",
        _HALVES,
    ),
    "factor_joint_distance": Metric(
        "lower", "The same for pairs of factors: are all combinations made?", _HALVES
    ),
}

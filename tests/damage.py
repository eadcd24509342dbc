"""What can be wrong with generated images, uint8 [N, H, W, 3], in any strength."""

from collections.abc import Callable
from io import BytesIO

import numpy as np
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image
from scipy import ndimage

Damage = Callable[[np.ndarray, float], np.ndarray]


def noise(images: np.ndarray, gray_levels: float) -> np.ndarray:
    added = gray_levels * np.random.default_rng(1).normal(size=images.shape)
    return (images + added).round().clip(0, 255).astype(np.uint8)


def blur(images: np.ndarray, sigma: float) -> np.ndarray:
    smooth = ndimage.gaussian_filter(images.astype(float), (0, sigma, sigma, 0))
    return smooth.round().astype(np.uint8)


def swapped_patches(images: np.ndarray, share: float) -> np.ndarray:
    """In a share of the images two of their 16 squares have changed places."""
    damaged, side, random = images.copy(), images.shape[1] // 4, np.random.default_rng(1)
    for image in damaged[: round(share * len(images))]:
        one, other = (
            np.s_[row * side : (row + 1) * side, column * side : (column + 1) * side]
            for row, column in (divmod(int(cell), 4) for cell in random.choice(16, 2, False))
        )
        image[one], image[other] = image[other].copy(), image[one].copy()
    return damaged


def lost_variety(images: np.ndarray, share: float) -> np.ndarray:
    """A share of the distinct images is replaced by copies of the others."""
    return images[np.arange(len(images)) % round(len(images) * (1 - share))]


def jpeg(images: np.ndarray, quality: float) -> np.ndarray:
    def stored(image: np.ndarray) -> np.ndarray:
        file = BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=int(quality))
        return np.asarray(Image.open(file))

    return np.stack([stored(image) for image in images])


def colour(images: np.ndarray, gray_levels: float) -> np.ndarray:
    """More red, less blue."""
    return (images + np.array([gray_levels, 0, -gray_levels])).clip(0, 255).round().astype(np.uint8)


def turned_hue(images: np.ndarray, degrees: float) -> np.ndarray:
    hsv = rgb_to_hsv(images / 255)
    hsv[..., 0] = (hsv[..., 0] + degrees / 360) % 1
    return (255 * hsv_to_rgb(hsv)).round().astype(np.uint8)


def gray(images: np.ndarray, share: float) -> np.ndarray:
    """Colours that have lost a share of their distance from gray."""
    luma = images @ np.array([0.299, 0.587, 0.114])
    return (images + share * (luma[..., None] - images)).round().astype(np.uint8)

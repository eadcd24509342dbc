"""AEGAN: a generator and an encoder trained towards a bijection between latents and images.

Notation, the paper's (Lazarou 2020, arXiv 2004.05472) beside ours:

    G, E, D_x, D_z    generator, encoder, image_discriminator, latent_discriminator
    x, z              real image, prior draw
    G(z), E(x)        x_hat, z_hat        generated image, encoded latent
    G(E(x)), E(G(z))  x_tilde, z_tilde    reconstructed image, reconstructed latent
"""

from aegan.images import grid, read_images, save_png
from aegan.networks import AEGAN
from aegan.sampling import (
    decode,
    encode,
    interpolate,
    lerp,
    load,
    random_latents,
    reconstruct,
    sample,
    slerp,
)

__all__ = [
    "AEGAN",
    "decode",
    "encode",
    "grid",
    "interpolate",
    "lerp",
    "load",
    "random_latents",
    "read_images",
    "reconstruct",
    "sample",
    "save_png",
    "slerp",
]

"""AEGAN: a generator and an encoder trained towards a bijection between latents and images.

Notation, the paper's (Lazarou 2020, arXiv 2004.05472) beside ours:

    G, E, D_x, D_z    generator, encoder, image_discriminator, latent_discriminator
    x, z              real image, prior draw
    G(z), E(x)        x_hat, z_hat        generated image, encoded latent
    G(E(x)), E(G(z))  x_tilde, z_tilde    reconstructed image, reconstructed latent

Public names are loaded when first used: a process that only decodes images needs no torch.

What goes wrong is one sentence that names the thing and what was expected (docs/library.md):

ValueError                  an argument that does not fit
|-- ModelError              a model's folder that cannot be loaded
|-- UnusableImageError      a file that is missing or no usable image
|-- ConfigError             networks of such sizes cannot be built
OSError                     a file cannot be written
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aegan.config import ConfigError
    from aegan.data.image_files import UnusableImageError
    from aegan.model_folder import Model, ModelError, load
    from aegan.networks import AEGAN
    from aegan.pictures import grid, save_animation, save_png
    from aegan.priors import lerp, slerp
    from aegan.projection import project
    from aegan.sampling import (
        decode,
        encode,
        interpolate,
        random_latents,
        read_images,
        reconstruct,
        sample,
    )

__all__ = [
    "AEGAN",
    "ConfigError",
    "Model",
    "ModelError",
    "UnusableImageError",
    "decode",
    "encode",
    "grid",
    "interpolate",
    "lerp",
    "load",
    "project",
    "random_latents",
    "read_images",
    "reconstruct",
    "sample",
    "save_animation",
    "save_png",
    "slerp",
]
_HOMES = (  # the least costly to import first
    "config",
    "data.image_files",
    "pictures",
    "networks",
    "model_folder",
    "priors",
    "sampling",
    "projection",
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        for home in _HOMES:
            module = importlib.import_module(f"aegan.{home}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

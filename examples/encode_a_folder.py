"""The latents of all pictures in a folder, as a NumPy archive: names, and latents [N, latent_dim].

.venv/bin/python examples/encode_a_folder.py artifacts/train/model my_images latents.npz
"""

import argparse
from pathlib import Path

import numpy as np

import aegan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a model's folder, as `make run` leaves it")
    parser.add_argument("images", type=Path, help="a folder of pictures")
    parser.add_argument("output", help="the archive to write, .npz")
    options = parser.parse_args()

    model = aegan.load(options.model)
    names, latents = [], []
    for file in sorted(options.images.iterdir()):
        try:
            image = aegan.read_images([file], model)
        except aegan.UnusableImageError as error:
            print(f"left out: {error}")
            continue
        names.append(file.name)
        latents.append(aegan.encode(model, image).numpy())
    np.savez(options.output, names=np.array(names), latents=np.concatenate(latents))
    print(f"{len(names)} pictures -> {options.output}")


if __name__ == "__main__":
    main()

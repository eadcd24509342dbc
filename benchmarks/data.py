"""Images per second of the data path: shards written and read, against the image files themselves.

    .venv/bin/python -m benchmarks.data --json FILE

Every repeat measures all ways once, one after the other, so that a busy machine slows all alike.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from aegan.config import DataConfig, PreprocessConfig
from aegan.data import designed_faces
from aegan.data.dataset import load_images
from aegan.data.image_files import decode_image
from aegan.data.reader import resident_reader, streamed_reader
from aegan.files import write_json
from benchmarks.machine import describe
from pipelines.base import params
from pipelines.download import download
from pipelines.preprocess import preprocess

IMAGE_SIZE = 64
BATCH_SIZE = 64
BATCHES = 400  # read by a reader of shards, its start included
WORKERS = 2


class ImageFiles(Dataset[torch.Tensor]):
    """The usual way: one file per image, decoded when it is its turn."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        content = self.files[index].read_bytes()
        return torch.from_numpy(
            decode_image(content, image_size=IMAGE_SIZE, image_channels=3).copy()
        )


def write_image_files(folder: Path, count: int) -> None:
    """PNG files of the designed faces."""
    folder.mkdir()
    images, _ = designed_faces.generate(0, count, seed=0, image_size=IMAGE_SIZE)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:06d}.png", compress_level=1)


def ways(folder: Path) -> dict[str, Callable[[], int]]:
    """Each way handles some images and returns how many."""
    files, raw, shards = folder / "files", folder / "raw", folder / "shards"
    source = DataConfig(
        source=str(files), in_place=False, manifold_images=1, manifold_size=8, manifold_seed=0
    )
    preprocessing = replace(params.load(PreprocessConfig), image_size=IMAGE_SIZE)
    share = slice(0, BATCH_SIZE)
    loader = DataLoader(ImageFiles(files), BATCH_SIZE, shuffle=True, num_workers=WORKERS)

    def write_snapshot() -> int:
        return int(download(source, raw)["files"])

    def write_shards() -> int:
        result = preprocess(
            preprocessing,
            raw,
            shards=shards,
            artifacts=folder / "artifacts",
            runs=folder / "runs",
        )
        return int(result["files"])

    def decode_files() -> int:
        return sum(
            len(decode_image(file.read_bytes(), image_size=IMAGE_SIZE, image_channels=3)) > 0
            for file in files.iterdir()
        )

    def load_whole_split() -> int:
        return len(load_images(shards, "train"))

    def read_batches(open_reader: Callable[..., Callable[[int], torch.Tensor]]) -> int:
        read = open_reader(
            shards, batch_size=BATCH_SIZE, share=share, seed=0, device=torch.device("cpu")
        )
        return sum(len(read(number)) for number in range(BATCHES))

    def read_files() -> int:
        return sum(len(batch) for batch in loader)

    return {
        "write snapshot of image files": write_snapshot,
        "write shards from the snapshot (all cores)": write_shards,
        "only decode the files (one core)": decode_files,
        "load the training shards": load_whole_split,
        "random batches, resident": lambda: read_batches(resident_reader),
        "random batches, streamed": lambda: read_batches(streamed_reader),
        f"random batches, DataLoader over files ({WORKERS} workers)": read_files,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()

    machine = describe("torch", "pyarrow", "pillow", "numpy")
    rates = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_image_files(folder / "files", options.images)
        for _ in range(options.repeats):
            for way, run in ways(folder).items():
                start = time.perf_counter()
                count = run()
                rates[way].append(count / (time.perf_counter() - start))
    results = {
        way: {
            "median_images_per_second": round(statistics.median(values)),
            "lowest": round(min(values)),
            "highest": round(max(values)),
        }
        for way, values in rates.items()
    }
    for way, result in results.items():
        print(f"{way:58}{result['median_images_per_second']:>10,} images/s")
    if options.json:
        settings = {"images": options.images, "image_size": IMAGE_SIZE, "repeats": options.repeats}
        report = {"machine": machine, "settings": settings, "results": results}
        write_json(options.json, report)


if __name__ == "__main__":
    main()

"""Images per second of the whole stage `preprocess`, against the decoder alone on all cores.

    .venv/bin/python -m benchmarks.preprocessing --json FILE

The stage runs as users run it, in a process of its own that starts, decodes, deduplicates, splits
and writes. Its limit is `decode_image` on the same files in warm processes, one for every core.
Both in turn in every repeat, so that a busy machine slows both alike.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from aegan.config import DataConfig
from aegan.data.image_files import decode_image
from aegan.files import write_json
from benchmarks.machine import describe, spread
from benchmarks.photographs import FORMATS, encode, photograph
from pipelines.base import params
from pipelines.download import download
from pipelines.ingest.decode import available_cores

OUTPUT_SIZE = 64
FILES = {64: 12_000, 1024: 200}  # size of the images => how many
FEW = 200  # small files: the stage takes as long as its start and its end
CORES = available_cores()


def write_files(folder: Path, *, size: int, count: int) -> dict[str, list[Path]]:
    """The same photographs in every format, a folder each."""
    files: dict[str, list[Path]] = {format: [] for format in FORMATS}
    for index in range(count):
        picture = photograph(index, size)
        for format, written in files.items():
            file = folder / f"{format}-{size}" / f"{index:06d}.{format}"
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(encode(picture, format))
            written.append(file)
    return files


def make_project(project: Path, files: list[Path]) -> Path:
    """A project folder up to the stage `download`, from the folder of the first file."""
    project.mkdir()
    text = params.PARAMS_FILE.read_text(encoding="utf-8")
    image_size = next(line for line in text.splitlines() if line.startswith("  image_size:"))
    text = text.replace(image_size, f"  image_size: {OUTPUT_SIZE}")
    (project / "params.yaml").write_text(text, encoding="utf-8")
    source = DataConfig(
        source=str(files[0].parent),
        in_place=False,
        manifold_images=1,
        manifold_size=8,
        manifold_seed=0,
    )
    download(source, project / "artifacts/raw")
    return project


def run_stage(project: Path) -> float:
    """Seconds of the stage, the start of Python included."""
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "pipelines.preprocess"],
        cwd=project,
        env=environment,
        check=True,
        capture_output=True,
    )
    return time.perf_counter() - start


def run_decoder(pool: ProcessPoolExecutor, files: list[Path]) -> float:
    """Seconds of decoding alone; reading the files is left out as far as it can be."""
    chunks = [files[start::CORES] for start in range(CORES)]
    return max(pool.map(_decode_chunk, chunks))


def _decode_chunk(files: list[Path]) -> float:
    contents = [file.read_bytes() for file in files]
    start = time.perf_counter()
    for content in contents:
        decode_image(content, image_size=OUTPUT_SIZE, image_channels=3)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    machine = describe("pillow", "numpy", "pyarrow")
    results: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory() as name,
        ProcessPoolExecutor(CORES, get_context("spawn")) as pool,
    ):
        folder = Path(name)
        (folder / "few").mkdir()
        few = write_files(folder / "few", size=64, count=FEW)["jpeg"]
        start_up_project = make_project(folder / "start-up", few)
        kinds = {
            f"{format} {size}x{size}": (
                make_project(folder / f"project-{format}-{size}", made),
                made,
            )
            for size, count in FILES.items()
            for format, made in write_files(folder, size=size, count=count).items()
        }
        start_up: list[float] = []
        found: dict[str, tuple[list[float], list[float]]] = {kind: ([], []) for kind in kinds}
        for _ in range(options.repeats):
            start_up.append(run_stage(start_up_project))
            for kind, (project, files) in kinds.items():
                stage, decoder = found[kind]
                stage.append(run_stage(project))
                decoder.append(run_decoder(pool, files))
        fixed = statistics.median(start_up)
        for kind, (stage, decoder) in found.items():
            count = len(kinds[kind][1])
            rates = {
                "whole_stage": [count / seconds for seconds in stage],
                "stage_after_start_up": [count / max(seconds - fixed, 1e-9) for seconds in stage],
                "decoder_alone": [count / seconds for seconds in decoder],
            }
            results[kind] = {"files": count} | {
                name: spread(values, 2) for name, values in rates.items()
            }
    results["start_up_seconds"] = spread(start_up, 2)
    print(json.dumps(results, indent=1))
    if options.json:
        settings = {"output_size": OUTPUT_SIZE, "cores": CORES, "repeats": options.repeats}
        report = {"machine": machine, "settings": settings, "results": results}
        write_json(options.json, report)


if __name__ == "__main__":
    main()

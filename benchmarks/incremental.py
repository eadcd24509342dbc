"""Seconds until new images are ready to train on: look, fetch and preprocess, anew and again.

    .venv/bin/python -m benchmarks.incremental folder --archive ZIP --json FILE
    .venv/bin/python -m benchmarks.incremental bucket --archive ZIP --json FILE --images 5000

From a folder, or from an S3 server on this machine (moto). First all files from nothing; then with
an earlier run that knew all of them but 0, 1 or 10%, which lie evenly among the others. The stages
run as users run them, in processes of their own. Processor time counts theirs, not the server's; on
a busy machine it is the one to compare.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import boto3

from aegan.config import DataConfig
from aegan.files import write_json
from benchmarks.machine import describe
from pipelines.base import params
from pipelines.retraining.look import look
from tests.s3 import s3_server

NEW = (0.0, 0.01, 0.1)  # fractions of the files
BUCKET = "incremental"
KEPT = ("runs", "artifacts/.last-raw")  # what DVC leaves in place between two runs


class Folder:
    """A source whose files come and go."""

    def __init__(self, place: Path) -> None:
        self.place, self.source = place, str(place)
        place.mkdir()

    def add(self, files: list[Path]) -> None:
        for file in files:
            shutil.copy(file, self.place)

    def remove(self, files: list[Path]) -> None:
        for file in files:
            (self.place / file.name).unlink()


class Bucket:
    """The same below a prefix."""

    source = f"s3://{BUCKET}/images"

    def __init__(self) -> None:
        self.client = boto3.client("s3", region_name="us-east-1")
        self.client.create_bucket(Bucket=BUCKET)

    def add(self, files: list[Path]) -> None:
        for file in files:
            self.client.put_object(Bucket=BUCKET, Key=f"images/{file.name}", Body=file.read_bytes())

    def remove(self, files: list[Path]) -> None:
        for file in files:
            self.client.delete_object(Bucket=BUCKET, Key=f"images/{file.name}")


def make_project(project: Path, source: str) -> None:
    project.mkdir()
    shutil.copy(params.PARAMS_FILE, project)
    settings = {"data": {"source": source}, "preprocess": {"image_size": 64}}
    params.change(settings, project / params.PARAMS_FILE, said_by="the benchmark")


def run(project: Path, stage: str) -> dict[str, float]:
    """Seconds of a stage and of the processor, the start of Python included."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", f"pipelines.{stage}"]
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    subprocess.run(command, cwd=project, env=environment, check=True, capture_output=True)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu}


def run_all(project: Path) -> dict[str, dict[str, float]]:
    """Look, fetch and preprocess, as a retraining does."""
    for output in ("artifacts/raw", "artifacts/shards", "artifacts/preprocess"):  # as DVC does
        shutil.rmtree(project / output, ignore_errors=True)
    start, cpu = time.perf_counter(), time.process_time()
    look(params.load(DataConfig, project / params.PARAMS_FILE))
    looked = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,  # with the server's
    }
    return {
        "look": looked,
        "fetch": run(project, "download"),
        "preprocess": run(project, "preprocess"),
    }


def measure(source: Folder | Bucket, files: list[Path], project: Path) -> dict[str, Any]:
    make_project(project, source.source)
    source.add(files)
    found = {"nothing known": run_all(project)}
    for fraction in NEW:
        new = files[:: round(1 / fraction)] if fraction else []
        for kept in KEPT:
            shutil.rmtree(project / kept, ignore_errors=True)
        source.remove(new)
        run_all(project)
        source.add(new)
        found[f"{fraction:.0%} new"] = run_all(project)
    return found


def table(found: dict[str, Any]) -> str:
    """Lines of Markdown: wall seconds and, in brackets, processor seconds."""
    stages = ("look", "fetch", "preprocess")
    lines = [f"| {' | '.join(('files', *stages, 'fetch and preprocess'))} |"]
    for case, by_stage in found.items():
        cells = [(by_stage[name]["seconds"], by_stage[name]["cpu_seconds"]) for name in stages]
        cells.append((cells[1][0] + cells[2][0], cells[1][1] + cells[2][1]))
        told = " | ".join(f"{wall:.1f} ({cpu:.1f})" for wall, cpu in cells)
        lines.append(f"| {case} | {told} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", choices=("folder", "bucket"))
    parser.add_argument("--archive", type=Path, required=True, help=".zip of images")
    parser.add_argument("--images", type=int, help="use so many of them")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    options = parser.parse_args()
    os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    with tempfile.TemporaryDirectory() as name, s3_server() as endpoint:
        os.environ["AWS_ENDPOINT_URL"] = endpoint
        folder = Path(name)
        with zipfile.ZipFile(options.archive) as archive:
            archive.extractall(folder / "all")
        paths = sorted(path for path in (folder / "all").rglob("*") if path.is_file())
        files = paths[: options.images]
        source = Folder(folder / "images") if options.source == "folder" else Bucket()
        found = measure(source, files, folder / "project")
    print(table(found))
    settings = {
        "source": options.source,
        "archive": options.archive.name,
        "files": len(files),
        "image_size": 64,
    }
    write_json(options.json, {"machine": describe(), "settings": settings, "results": found})


if __name__ == "__main__":
    main()

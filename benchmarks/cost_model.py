"""A cost model of training, fitted to measurements and shown up to 64 GPUs.

    .venv/bin/python -m benchmarks.cost_model --scaling SCALING.json --json FILE --picture FILE

Seconds of a step with b images a worker and n workers:

    operations * seconds_per_operation                  starting operations, whatever their size
    + FLOPs * (1 + half_batch / b) / flops_per_second   matrix products, slower on few images
    + bytes / bytes_per_second                          what all other operations read and write
    + all-reduce                                        of the gradients, for n > 1

Operations, FLOPs and bytes are counted on the real step of the real loop. The four constants are
those of least relative error, none negative, on a small grid; other points tell the model's error.
An all-reduce of S bytes in k buckets takes k * 2 log2(n) * latency + 2 (n - 1) / n * S / bandwidth;
nothing of it is hidden behind the backward pass unless `--hidden` says what share is.

GPUs: what is assumed stands in the options and in the JSON. With `--device cuda` the constants are
fitted to the GPU of this machine instead.
"""

import argparse
import itertools
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.optimize import nnls

from aegan.config import TrainConfig
from aegan.files import write_json
from aegan.networks.layers import winograd_from
from aegan.training.loop import train
from aegan.training.updates import ROUND
from benchmarks.limits import Counter
from benchmarks.machine import describe
from benchmarks.scaling import environment, gradients, read_log
from benchmarks.speed import configuration, make_shards

IMAGES = 256
COUNTED_BATCHES = 2, 4  # images; what is counted grows by the same amount with every image
GPUS_PER_NODE = 8
GPUS = [1, 2, 4, 8, 16, 32, 64]
STRONG = [256, 2048]  # global batch
WEAK = [32, 256]  # images a GPU
SPEEDS = [1_000, 3_000, 10_000, 30_000, 100_000, 300_000]  # labelled on the picture


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What decides the work of a step besides the batch."""

    preset: Literal["demo", "paper"]
    image_size: int
    base_channels: int
    update_rule: Literal["shared", "reference"] = "shared"
    on_gpu: bool = False  # where no convolution is Winograd's


@dataclass(frozen=True, kw_only=True)
class Work:
    """Of one step."""

    operations: float
    flops: float  # of matrix products and convolutions; a product and a sum are two
    bytes: float  # read and written by the other operations


@dataclass(frozen=True, kw_only=True)
class Device:
    """The fitted or assumed constants."""

    seconds_per_operation: float
    flops_per_second: float
    half_batch: float  # images with which matrix products reach half of that
    bytes_per_second: float


@dataclass(frozen=True, kw_only=True)
class Link:
    """A worker's connection to the next one."""

    bytes_per_second: float
    latency_seconds: float


def points(
    preset: Literal["demo", "paper"], *rows: tuple[int, int, int]
) -> list[tuple[Shape, int]]:
    return [(Shape(preset=preset, image_size=s, base_channels=w), batch) for s, w, batch in rows]


FITTED = [  # image size, base channels, batch
    *points("demo", (16, 16, 32), (32, 8, 32), (32, 16, 8), (32, 16, 32), (32, 16, 128)),
    *points("demo", (32, 32, 32), (64, 16, 8)),
    *points("paper", (32, 16, 8), (32, 32, 16), (64, 16, 16), (64, 32, 8), (64, 64, 4)),
]
HELD_OUT = [
    *points("demo", (16, 32, 64), (32, 16, 64), (64, 16, 16)),
    *points("paper", (32, 32, 32), (64, 32, 16), (64, 64, 8)),
    *(
        (replace(shape, update_rule="reference"), batch)
        for shape, batch in [*points("demo", (32, 16, 32)), *points("paper", (64, 32, 8))]
    ),
]
SHOWN = Shape(preset="paper", image_size=64, base_channels=64, on_gpu=True)
NVLINK = Link(bytes_per_second=450e9, latency_seconds=10e-6)
LINKS = {  # between nodes; inside a node it is NVLink for all
    "NVLink, 450 GB/s": NVLINK,
    "InfiniBand, 200 Gb/s a node": Link(bytes_per_second=25e9, latency_seconds=20e-6),
    "Ethernet, 25 Gb/s a node": Link(bytes_per_second=3.125e9, latency_seconds=50e-6),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--picture", type=Path, help="where the curves go")
    parser.add_argument("--scaling", type=Path, help="JSON of benchmarks.scaling, to compare with")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="fitted to")
    parser.add_argument("--threads", type=int, default=1, help="of a worker")
    parser.add_argument("--repeats", type=int, default=2)
    assumed = parser.add_argument_group(
        "a GPU, assumed or measured elsewhere (not with --device cuda)"
    )
    assumed.add_argument("--matrix-flops-per-second", type=float, default=700e12, help="H100, bf16")
    assumed.add_argument(
        "--matrix-share", type=float, default=0.35, help="of it that a step reaches"
    )
    assumed.add_argument("--half-batch", type=float, default=16, help="images")
    assumed.add_argument("--bytes-per-second", type=float, default=2e12, help="60%% of 3.35 TB/s")
    assumed.add_argument("--bytes-per-number", type=float, default=2, help="bf16; 4: float32")
    assumed.add_argument("--seconds-per-operation", type=float, default=5e-6)
    assumed.add_argument("--hidden", type=float, default=0.0, help="share of the all-reduce")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = describe("torch")
    with tempfile.TemporaryDirectory() as name:
        lab = Lab(Path(name), device=options.device, threads=options.threads)
        fitted, held_out = (
            [(replace(shape, on_gpu=options.device == "cuda"), batch) for shape, batch in group]
            for group in (FITTED, HELD_OUT)
        )
        seconds = lab.measure([*fitted, *held_out], repeats=options.repeats)
        work = {point: lab.count(*point) for point in seconds}
        shown = {
            rule: lab.count(replace(SHOWN, update_rule=rule), 32)
            for rule in ("shared", "reference")
        }
        device = fit([(work[point], point[1], seconds[point]) for point in fitted])
        print(f"{options.device}: {device}")
        found = {
            name: [compare(device, *point, work[point], seconds[point]) for point in group]
            for name, group in (("fitted", fitted), ("held_out", held_out))
        }
        errors = {name: error_summary(rows) for name, rows in found.items()}
        print(json.dumps(errors))
        gpu = device if options.device == "cuda" else assumed_gpu(options)
        report: dict[str, Any] = {
            "machine": machine,
            "settings": {"device": options.device, "threads": options.threads},
            "step_of_32_images": {rule: asdict(counted) for rule, counted in shown.items()},
            "constants": asdict(device),
            "relative_error": errors,
            "points": found,
            "gpus": predict_gpus(lab, gpu, hidden=options.hidden),
        }
        if options.scaling:
            measured = json.loads(options.scaling.read_text(encoding="utf-8"))
            report["two_workers"] = compare_workers(lab, device, measured)
            print(json.dumps(report["two_workers"], indent=1))
    for curve in report["gpus"]["curves"]:
        print(f"{curve['scaling']}, {curve['batch']} images, {curve['link']}:")
        for row in curve["rows"]:
            speed, efficiency = row["images_per_second"], row["efficiency"]
            print(f"  {row['gpus']:3} GPUs {speed:10,.0f} images/s, {efficiency:.0%}")
    if options.picture:
        draw(report["gpus"]["curves"], options.picture)
    write_json(options.json, report)


def assumed_gpu(options: argparse.Namespace) -> Device:
    """From the command line; bytes are counted in float32, so shorter numbers go faster."""
    return Device(
        seconds_per_operation=options.seconds_per_operation,
        flops_per_second=options.matrix_flops_per_second * options.matrix_share,
        half_batch=options.half_batch,
        bytes_per_second=options.bytes_per_second * 4 / options.bytes_per_number,
    )


class Lab:
    """Runs the real loop on the designed faces, to count its work and to take its time."""

    def __init__(self, folder: Path, *, device: str, threads: int) -> None:
        self._folder = folder
        self._device = device
        self._threads = threads
        self._runs = 0
        self.count_of_batch = cache(self._count_of_batch)
        self._shards = cache(self._make_shards)

    def measure(
        self, points: list[tuple[Shape, int]], *, repeats: int
    ) -> dict[tuple[Shape, int], float]:
        """Median seconds of a step at each (shape, batch), without a run's first log interval."""
        order = [*points] * repeats
        random.Random(0).shuffle(order)  # a machine that slows down shall not favour any point
        plan = [(point, self._run(*point, rounds=4)) for point in order]
        settings = {
            "threads": self._threads,
            "device": self._device,
            "rendezvous": None,
            "runs": [run for _, run in plan],
        }
        file = self._folder / "measure.json"
        file.write_text(json.dumps(settings), encoding="utf-8")
        subprocess.run(
            [sys.executable, "-m", "benchmarks.launch_torch", str(file)],
            env=environment(self._threads),
            check=True,
        )
        seconds: dict[tuple[Shape, int], list[float]] = {point: [] for point in points}
        for point, run in plan:
            rows = read_log(Path(run["run_folder"]))[1:]
            seconds[point] += [point[1] / row["images_per_second"] for row in rows]
        return {point: statistics.median(values) for point, values in seconds.items()}

    def count(self, shape: Shape, batch: float) -> Work:
        """The work of a step; both counts are affine in the batch."""
        small, large = COUNTED_BATCHES
        first, second = self.count_of_batch(shape, small), self.count_of_batch(shape, large)
        images = (batch - small) / (large - small)
        return Work(
            operations=first.operations,
            flops=first.flops + images * (second.flops - first.flops),
            bytes=first.bytes + images * (second.bytes - first.bytes),
        )

    def gradient_bytes(self, shape: Shape) -> list[int]:
        """Of each bucket of the all-reduce."""
        config, _ = self._config(shape, batch=1, rounds=1)
        parts = gradients(config, shape.image_size, 3).values()
        return [size for part in parts for size in part["bucket_bytes"]]

    def _count_of_batch(self, shape: Shape, batch: int) -> Work:
        """Difference of a run of two rounds and one of one: set-up and validation cancel."""
        one, two = (self._count_run(shape, batch, rounds=rounds) for rounds in (1, 2))
        steps = steps_of_round(shape)
        return Work(
            operations=(two.operations - one.operations) / steps,
            flops=(two.flops - one.flops) / steps,
            bytes=(two.bytes - one.bytes) / steps,
        )

    def _count_run(self, shape: Shape, batch: int, *, rounds: int) -> Counter:
        config, shards = self._config(shape, batch=batch, rounds=rounds)
        self._runs += 1
        form = winograd_from(sys.maxsize) if shape.on_gpu else nullcontext()
        with form, Counter() as counter:
            train(
                config,
                shards=shards,
                run_folder=self._folder / f"run-{self._runs}",
                device=torch.device("cpu"),
            )
        return counter

    def _run(self, shape: Shape, batch: int, *, rounds: int) -> dict[str, Any]:
        config, shards = self._config(shape, batch=batch, rounds=rounds)
        self._runs += 1
        run_folder = self._folder / f"run-{self._runs}"
        return {"config": asdict(config), "shards": str(shards), "run_folder": str(run_folder)}

    def _config(self, shape: Shape, *, batch: int, rounds: int) -> tuple[TrainConfig, Path]:
        base, shards = self._shards(shape.preset, shape.image_size)
        steps = rounds * steps_of_round(shape)
        training = replace(
            base.training,
            update_rule=shape.update_rule,
            batch_size=batch,
            num_steps=steps,
            log_interval_steps=steps_of_round(shape),
            sample_interval_steps=steps + 1,
            checkpoint_interval_steps=steps + 1,
        )
        model = replace(base.model, base_channels=shape.base_channels)
        loss = base.loss
        if shape.update_rule == "reference":  # which knows no gradient penalties
            loss = replace(loss, adversarial="bce", gamma_image=0.0, gamma_latent=0.0)
        return replace(base, model=model, loss=loss, training=training), shards

    def _make_shards(self, preset: str, image_size: int) -> tuple[TrainConfig, Path]:
        folder = self._folder / f"{preset}-{image_size}"
        folder.mkdir()
        config, preprocessing = configuration(preset, folder)
        shards = make_shards(replace(preprocessing, image_size=image_size), folder, IMAGES)
        return config, shards


def steps_of_round(shape: Shape) -> int:
    """Steps after which the discriminators have had their share of updates."""
    return len(ROUND) if shape.update_rule == "reference" else 1


def fit(measured: list[tuple[Work, int, float]]) -> Device:
    """The constants from (work, batch, seconds) of each point."""
    rows = np.array([[w.operations, w.flops, w.flops / b, w.bytes] for w, b, _ in measured])
    seconds = np.array([value for _, _, value in measured])
    scale = rows.max(0)
    found, _ = nnls(rows / scale / seconds[:, None], np.ones(len(rows)))
    operation, flop, flop_of_few, byte = found / scale
    return Device(
        seconds_per_operation=operation,
        flops_per_second=1 / flop,
        half_batch=flop_of_few / flop,
        bytes_per_second=1 / byte if byte else math.inf,
    )


def compute_seconds(device: Device, work: Work, batch: float) -> float:
    """A step of one worker, without communication."""
    return (
        work.operations * device.seconds_per_operation
        + work.flops * (1 + device.half_batch / batch) / device.flops_per_second
        + work.bytes / device.bytes_per_second
    )


def all_reduce_seconds(link: Link, bucket_bytes: list[int], workers: int) -> float:
    if workers == 1:
        return 0.0
    latency = len(bucket_bytes) * 2 * math.log2(workers) * link.latency_seconds
    return latency + 2 * (workers - 1) / workers * sum(bucket_bytes) / link.bytes_per_second


def fit_link(seconds: Mapping[int, float]) -> Link:
    """From the seconds of an all-reduce between two workers by size."""
    rows = np.array([[2.0, size] for size in seconds]) / np.array([*seconds.values()])[:, None]
    (latency, per_byte), _ = nnls(rows, np.ones(len(rows)))
    return Link(bytes_per_second=1 / per_byte, latency_seconds=latency)


def compare(device: Device, shape: Shape, batch: int, work: Work, seconds: float) -> dict[str, Any]:
    predicted = compute_seconds(device, work, batch)
    return {
        **asdict(shape),
        "batch_size": batch,
        **asdict(work),
        "measured_seconds": seconds,
        "predicted_seconds": predicted,
        "relative_error": predicted / seconds - 1,
    }


def error_summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    errors = [abs(row["relative_error"]) for row in rows]
    return {"points": len(rows), "median": statistics.median(errors), "largest": max(errors)}


def compare_workers(lab: Lab, device: Device, measured: dict[str, Any]) -> dict[str, Any]:
    """The model against `benchmarks.scaling`: one worker, and two over the measured link."""
    sizes = {int(size): row["seconds"]["median"] for size, row in measured["all_reduce"].items()}
    link = fit_link(sizes)
    ways = {1: "one process, 1 thread", 2: "torchrun, 2 workers, 1 thread each"}
    rows = []
    for preset, results in measured["presets"].items():
        settings = results["settings"]
        shape = Shape(
            preset=preset,
            image_size=settings["image_size"],
            base_channels=settings["base_channels"],
        )
        predicted, found = {}, {}
        for workers, way in ways.items():
            batch = settings["batch_size"] / workers
            seconds = compute_seconds(device, lab.count(shape, batch), batch)
            seconds += all_reduce_seconds(link, lab.gradient_bytes(shape), workers)
            predicted[workers] = settings["batch_size"] / seconds
            found[workers] = results["ways"][way]["images_per_second"]["median"]
        for name, speeds in (("predicted", predicted), ("measured", found)):
            row = {"preset": preset, "figures": name, "speed_up": speeds[2] / speeds[1]}
            rows.append(row | {f"images_per_second_{n}": speed for n, speed in speeds.items()})
    return {"link": asdict(link), "rows": rows}


def predict_gpus(lab: Lab, device: Device, *, hidden: float) -> dict[str, Any]:
    """Images/s and efficiency, for a fixed global batch (strong) and a fixed one a GPU (weak)."""
    buckets = lab.gradient_bytes(SHOWN)

    def row(link: Link, gpus: int, batch: float) -> dict[str, float]:
        """With `batch` images a GPU."""
        used = NVLINK if gpus <= GPUS_PER_NODE else link
        exposed = (1 - hidden) * all_reduce_seconds(used, buckets, gpus)
        work = lab.count(SHOWN, batch)
        seconds = compute_seconds(device, work, batch) + exposed
        return {
            "images_per_second": batch * gpus / seconds,
            "step_milliseconds": 1e3 * seconds,
            "all_reduce_milliseconds": 1e3 * exposed,
            "flops_per_second_a_gpu": work.flops / seconds,
        }

    curves = []
    for kind, batches in (("strong", STRONG), ("weak", WEAK)):
        for batch, (name, link) in itertools.product(batches, LINKS.items()):
            rows = [
                {"gpus": n, **row(link, n, batch / n if kind == "strong" else batch)} for n in GPUS
            ]
            for each in rows:
                alone = rows[0]["images_per_second"] * each["gpus"]
                each["efficiency"] = each["images_per_second"] / alone
            curves.append({"scaling": kind, "batch": batch, "link": name, "rows": rows})
    return {
        "assumed": {
            "device": asdict(device),
            "links": {name: asdict(link) for name, link in LINKS.items()},
            "gpus_per_node": GPUS_PER_NODE,
            "hidden_share_of_all_reduce": hidden,
        },
        "shape": asdict(SHOWN),
        "bucket_bytes": buckets,
        "curves": curves,
    }


def draw(curves: list[dict[str, Any]], picture: Path) -> None:
    """One panel a batch: images/s against GPUs, one line a link, and what would be ideal."""
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    groups = itertools.groupby(curves, key=lambda curve: (curve["scaling"], curve["batch"]))
    for axes, ((kind, batch), group) in zip(panels.flat, groups, strict=True):
        for curve, marker in zip(group, "osv", strict=True):
            speeds = [row["images_per_second"] for row in curve["rows"]]
            axes.loglog(GPUS, speeds, marker=marker, markersize=4, label=curve["link"])
        axes.loglog(GPUS, [speeds[0] * n for n in GPUS], "k:", linewidth=1, label="ideal")
        axes.set_title(
            f"{batch} images " + ("in all" if kind == "strong" else "a GPU"), fontsize=10
        )
        axes.set_xticks(GPUS, map(str, GPUS))
        axes.set_yticks(SPEEDS, [f"{speed:,}" for speed in SPEEDS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=8)
    figure.supxlabel("GPUs", fontsize=10)
    figure.supylabel("images/s", fontsize=10)
    figure.suptitle(
        "Predicted, not measured: paper preset, 64x64, assumed GPU and links", fontsize=11
    )
    figure.savefig(picture, dpi=80)


if __name__ == "__main__":
    main()

"""Seconds of a training step: the fast forms, the plain eager form, both update rules, all
interleaved in one run, beside what the machine allows; then images/s of the real loop. The plain
form runs under the update rule of the preset.

    .venv/bin/python -m benchmarks.speed --preset paper --json FILE

A step is one update of encoder and generator with its share of the discriminators' updates: four
steps, one round of the author's rule, are timed as one. Plain eager: tests/plain.py.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from aegan.config import (
    DataConfig,
    Precision,
    PreprocessConfig,
    TrainConfig,
)
from aegan.files import write_json
from aegan.networks.layers import winograd_from
from aegan.priors import make_prior
from aegan.training.ema import update_ema
from aegan.training.loop import train
from aegan.training.run_folder import RunFolder
from aegan.training.state import TrainingState
from aegan.training.updates import ROUND, Updates
from benchmarks.limits import (
    Counter,
    copy_rate,
    keep_memory,
    matrix_product_rate,
    seconds,
)
from benchmarks.machine import describe
from pipelines.base import params
from pipelines.download import download
from pipelines.preprocess import preprocess
from tests.plain import PlainUpdates, make_plain, take_step

PRESETS = ("demo", "paper")  # the first one: params.yaml as it is
INTERVAL = len(ROUND)  # steps; one round of the author's rule
LOOP_STEPS = {"demo": 80, "paper": 16}
TOP = 5  # costs named in the profile


@dataclass(frozen=True, kw_only=True)
class Form:
    """One way to compute the same step."""

    rule: str
    precision: Precision = "float32"
    plain: bool = False
    allocator: Literal["ours", "default"] = "ours"  # ours: `limits.keep_memory`

    @property
    def name(self) -> str:
        extras = ["default allocator"] if self.allocator == "default" else []
        return ", ".join(["plain" if self.plain else "fast", self.rule, self.precision, *extras])


def forms(rule_of_preset: str, device: torch.device) -> list[Form]:
    plain = Form(rule=rule_of_preset, plain=True)
    found = [plain]
    if device.type == "cpu":
        found.append(replace(plain, allocator="default"))
    for precision in get_args(Precision):
        if precision == "tf32" and device.type != "cuda":
            continue
        found += [Form(rule=rule, precision=precision) for rule in ("shared", "reference")]
    return found


def round_of(
    form: Form, config: TrainConfig, sizes: dict[str, Any], device: torch.device
) -> Callable[..., None]:
    """A function that takes one round's steps, `INTERVAL` of them unless told otherwise.

    What the allocator does cannot be undone, so another one means another process.
    """
    if form.allocator == "default":
        process = ProcessPoolExecutor(
            1, get_context("spawn"), torch.set_num_threads, (torch.get_num_threads(),)
        )
        arguments = form, config, sizes, device
        return lambda steps=INTERVAL: process.submit(_take_steps, steps, *arguments).result()
    keep_memory()
    return _round_of(form, config, sizes, device)


_rounds: dict[Form, Callable[..., None]] = {}


def _take_steps(steps: int, form: Form, *arguments: Any) -> None:
    """In a process that has this form alone."""
    if form not in _rounds:
        _rounds[form] = _round_of(form, *arguments)
    _rounds[form](steps)


def _round_of(
    form: Form, config: TrainConfig, sizes: dict[str, Any], device: torch.device
) -> Callable[..., None]:
    training = replace(config.training, update_rule=form.rule, precision=form.precision)
    # The author's rule knows neither gradient penalties nor relativistic losses.
    author = replace(config.loss, adversarial="bce", gamma_image=0.0, gamma_latent=0.0)
    config = replace(
        config, training=training, loss=config.loss if form.rule == "shared" else author
    )
    state = TrainingState(config, sizes, device)
    updates: Updates | PlainUpdates
    if form.plain:
        make_plain(state.model)
        updates = PlainUpdates(state.model, config)
    else:
        updates = Updates(state, config, device)
    x, z = batch(config, sizes, device, plain=form.plain)

    def take_round(steps: int = INTERVAL) -> None:
        torch.backends.cuda.matmul.allow_tf32 = form.precision == "tf32"
        torch.backends.cudnn.allow_tf32 = form.precision == "tf32"
        for step in range(steps):
            take_step(updates, step, form.rule, lambda number: (x, z))
            update_ema(state.ema, state.model, 0.999)

    return take_round


def batch(
    config: TrainConfig, sizes: dict[str, Any], device: torch.device, *, plain: bool
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    size, side = config.training.batch_size, sizes["image_size"]
    x = torch.rand(size, side, side, sizes["image_channels"], generator=generator) * 2 - 1
    z = make_prior(config.model.prior, config.model.latent_dim).sample(size, generator)
    x = x.permute(0, 3, 1, 2)
    return (x.contiguous() if plain else x).to(device), z.to(device)


def top_costs(work: Callable[[], None], device: torch.device) -> list[dict[str, Any]]:
    """The operations that take the most time of their own, with their share."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    for _ in range(2):  # the second one finds memory for its records and the tensors beside them
        with profile(activities=activities) as recorded:
            work()
    kind = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    costs = {event.key: getattr(event, kind) for event in recorded.key_averages()}
    total = sum(costs.values())
    largest = sorted(costs.items(), key=lambda item: -item[1])[:TOP]
    return [{"operation": name, "share": round(time / total, 3)} for name, time in largest]


def measure_steps(
    config: TrainConfig,
    sizes: dict[str, Any],
    device: torch.device,
    *,
    repeats: int,
) -> dict[str, Any]:
    chosen = forms(config.training.update_rule, device)
    rounds = {form: round_of(form, config, sizes, device) for form in chosen}
    times: dict[Form, list[float]] = {form: [] for form in rounds}
    memory: dict[Form, int] = {}
    for form, take_round in rounds.items():  # warm up
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        take_round(1)
        if device.type == "cuda":
            memory[form] = torch.cuda.max_memory_allocated(device)
    rates: dict[str, list[float]] = {form.precision: [] for form in rounds}
    for _ in range(repeats):
        for form, take_round in rounds.items():
            times[form].append(seconds(take_round, device) / INTERVAL)
        for precision, found in rates.items():
            torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
            dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
            found.append(matrix_product_rate(dtype, device))
    bandwidth = copy_rate(device)
    results = {}
    for form, found in times.items():
        median = statistics.median(found)
        results[form.name] = {
            "seconds_per_step": round(median, 5),
            "lowest": round(min(found), 5),
            "highest": round(max(found), 5),
            "images_per_second": round(config.training.batch_size / median, 1),
        }
        if form.rule == config.training.update_rule:
            results[form.name]["times_faster_than"] = {
                plain.name: round(statistics.median(times[plain]) / median, 2)
                for plain in chosen
                if plain.plain
            }
        if form in memory:
            results[form.name]["peak_memory_mib"] = memory[form] // 2**20
        if form.plain:
            continue
        rate = max(rates[form.precision])  # what the machine can do
        with Counter() as count:
            rounds[form]()
        with winograd_from(sys.maxsize), Counter() as direct:
            rounds[form]()
        flops, traffic = count.flops / INTERVAL, count.bytes / INTERVAL
        results[form.name] |= {
            "gflop_per_step": round(flops / 1e9, 1),
            "share_of_matrix_product_rate": round(flops / median / rate, 3),
            "gflop_per_step_without_winograd": round(direct.flops / INTERVAL / 1e9, 1),
            "gbyte_per_step_outside_products": round(traffic / 1e9, 2),
            "limit_seconds_per_step": round(flops / rate + traffic / bandwidth, 5),
            "top_costs": top_costs(rounds[form], device),
        }
    return {
        "matrix_product_gflop_per_second": {
            precision: round(max(found) / 1e9) for precision, found in rates.items()
        },
        "copy_gbyte_per_second": round(bandwidth / 1e9, 1),
        "forms": results,
    }


def configuration(preset: str, folder: Path) -> tuple[TrainConfig, PreprocessConfig]:
    """params.yaml, or params.yaml under a preset's overlay."""
    file = folder / "params.yaml"
    file.write_text(params.PARAMS_FILE.read_text(encoding="utf-8"), encoding="utf-8")
    if preset != "demo":
        params.apply_overlay(Path("presets") / f"{preset}.yaml", file)
    return params.load(TrainConfig, file), params.load(PreprocessConfig, file)


def make_shards(config: PreprocessConfig, folder: Path, count: int) -> Path:
    source = DataConfig(
        source="manifold",
        in_place=False,
        manifold_images=count,
        manifold_size=config.image_size,
        manifold_seed=0,
    )
    download(source, folder / "raw")
    preprocess(
        config,
        folder / "raw",
        shards=folder / "shards",
        artifacts=folder / "artifacts",
        runs=folder / "runs",
    )
    return folder / "shards"


def measure_loop(
    config: TrainConfig, preprocessing: PreprocessConfig, device: torch.device, folder: Path
) -> dict[str, float]:
    """Images per second of `aegan.training.loop.train`: reading, averaging and logging included."""
    shards = make_shards(preprocessing, folder, 2000)
    steps = LOOP_STEPS[config.model.architecture]
    training = replace(
        config.training,
        num_steps=steps,
        log_interval_steps=INTERVAL,
        sample_interval_steps=steps + 1,
        checkpoint_interval_steps=steps + 1,
    )
    config = replace(config, training=training)
    train(config, shards=shards, run_folder=folder / "run", device=device)
    rows = RunFolder(folder / "run").rows()[1:]  # without the first interval, which warms up
    quartiles = statistics.quantiles((row["images_per_second"] for row in rows), n=4)
    names = ("quartile_1", "images_per_second", "quartile_3")
    return {name: round(value, 1) for name, value in zip(names, quartiles, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-size", type=int, help="default: the preset's")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    machine = describe("torch", "numpy", "pyarrow")
    with tempfile.TemporaryDirectory() as name:
        config, preprocessing = configuration(options.preset, Path(name))
        if options.batch_size:
            training = replace(config.training, batch_size=options.batch_size)
            config = replace(config, training=training)
        sizes = {"dataset_sha256": "", "fit": "crop"} | {
            key: getattr(preprocessing, key) for key in ("image_size", "image_channels")
        }
        steps = measure_steps(config, sizes, device, repeats=options.repeats)
        loop = measure_loop(config, preprocessing, device, Path(name))
    result = {
        "preset": options.preset,
        "device": options.device,
        "threads": options.threads,
        "batch_size": config.training.batch_size,
        "rounds_timed": options.repeats,
        "machine": machine,
        **steps,
        "training_loop": loop,
    }
    write_json(options.json, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

"""Stage `train`: run the training loop under Ray Train and publish the best checkpoint's model.

Works in runs/<name>/, where the name is a hash of data, parameters and code: the same command
resumes, a changed one starts afresh. See docs/architecture.md.
"""

import ast
import csv
import hashlib
import json
import logging
import os
import platform
import shutil
import statistics
import subprocess
import threading
import uuid
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from aegan import checkpoint
from aegan.config import (
    ComputeConfig,
    ConfigError,
    LossConfig,
    ModelConfig,
    TrainConfig,
    TrainingConfig,
)
from aegan.dataset import read_manifest
from pipelines import params
from pipelines.cluster import ray_session
from pipelines.errors import UserError, run_stage
from pipelines.files import new_folder
from pipelines.follow import follow

SHARDS, RUNS, OUTPUT = Path("data/shards"), Path("runs"), Path("artifacts/train")
LIBRARY = Path(__file__).parent.parent / "aegan"
CODE = (  # what determines the weights, besides data and parameters; dvc.yaml names the same
    "checkpoint.py",
    "dataset.py",
    "distributed.py",
    "ema.py",
    "graphs.py",
    "images.py",
    "layers.py",
    "losses.py",
    "metrics/features.py",
    "metrics/frechet.py",
    "networks.py",
    "reader.py",
    "sampling.py",
    "state.py",
    "training_loop.py",
    "updates.py",
    "validation.py",
)
STOP_FILE, OUTCOME_FILE = "stop", "outcome.json"
ORPHAN_WAIT_SECONDS = 60
WORKER_ENVIRONMENT = {  # keep large tensors' memory instead of mapping it anew each time (glibc)
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
}

log = logging.getLogger(__name__)


def main() -> None:
    config = TrainConfig(
        model=params.load(ModelConfig),
        loss=params.load(LossConfig),
        training=params.load(TrainingConfig),
    )
    run_folder = train(config, params.load(ComputeConfig), shards=SHARDS, runs=RUNS)
    publish(run_folder, OUTPUT)
    if (run_folder / STOP_FILE).exists():  # asked to stop, but it was the end anyway
        raise KeyboardInterrupt


def train(config: TrainConfig, compute: ComputeConfig, *, shards: Path, runs: Path) -> Path:
    """Train to the end and return the run's folder; an interrupted run is resumed.

    Raises UserError; KeyboardInterrupt after a checkpoint was saved.
    """
    _check(config, compute)
    if not (shards / "manifest.json").exists():
        raise UserError(f"{shards} has no images: run `dvc repro preprocess` first")
    manifest = read_manifest(shards)
    run_folder = (runs / run_name(config, manifest["dataset_sha256"])).resolve()
    run_folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(run_folder / "driver.lock", timeout=0):
            _clear(run_folder)
            _train(config, compute, manifest, shards=shards.resolve(), run_folder=run_folder)
    except Timeout:
        raise UserError(f"another training works in {run_folder}: wait for it or end it") from None
    return run_folder


def _train(
    config: TrainConfig,
    compute: ComputeConfig,
    manifest: dict[str, Any],
    *,
    shards: Path,
    run_folder: Path,
) -> None:
    done = checkpoint.steps(run_folder / "checkpoints")
    if done and done[-1] == config.training.num_steps:
        log.info("run %s is complete already", run_folder.name)
        return
    if done:
        log.info("resuming at step %d of run %s", done[-1], run_folder.name)
    else:
        images, arm = manifest["splits"]["train"]["rows"], config.training.arm
        log.info("starting run %s: %d images, arm %s", run_folder.name, images, arm)
    facts = {
        "run_name": run_folder.name,
        "dataset_sha256": manifest["dataset_sha256"],
        "code_sha256": code_sha256(),
        "params": params.as_dict(config.model, config.loss, config.training, compute),
        "world_size": compute.num_workers,
        "git_commit": _git_commit(),
        "versions": {package: version(package) for package in ("torch", "ray", "numpy")},
        "python": platform.python_version(),
        "machine": platform.platform(),
    }
    checkpoint.write_json(run_folder / "run.json", facts)
    outcome = _run(config, compute, shards=shards, run_folder=run_folder)
    if "error" in outcome:
        raise UserError(outcome["error"])
    if not outcome["finished"]:
        log.info("stopped at step %d; the same command goes on from there", outcome["step"])
        raise KeyboardInterrupt


def _check(config: TrainConfig, compute: ComputeConfig) -> None:
    """What types alone cannot say about the parameters."""
    options = config.training
    positive = {
        "model.latent_dim": config.model.latent_dim,
        "model.base_channels": config.model.base_channels,
        "training.num_steps": options.num_steps,
        "training.batch_size": options.batch_size,
        "training.log_interval_steps": options.log_interval_steps,
        "training.sample_interval_steps": options.sample_interval_steps,
        "training.checkpoint_interval_steps": options.checkpoint_interval_steps,
        "training.checkpoints_kept": options.checkpoints_kept,
        "compute.num_workers": compute.num_workers,
    }
    not_negative = {
        "loss.gamma": config.loss.gamma,
        "training.seed": options.seed,
        "training.max_rollbacks": options.max_rollbacks,
        "training.max_gradient_norm": options.max_gradient_norm,
        "compute.threads_per_worker": compute.threads_per_worker,
        "compute.max_failures": compute.max_failures,
        "compute.micro_batch_size": compute.micro_batch_size,
    }
    for least, values in ((1, positive), (0, not_negative)):
        for key, value in values.items():
            if value < least:
                raise UserError(f"params.yaml: {key} is {value}; it must be {least} or more")


def run_name(config: TrainConfig, dataset_sha256: str) -> str:
    """A name that changes with data, parameters, code and PyTorch, and with nothing else."""
    content = [asdict(config), dataset_sha256, code_sha256(), version("torch")]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return f"{config.training.arm}-{digest[:12]}"


def code_sha256() -> str:
    """Hash of what the code says; layout and comments do not count."""
    trees = [ast.dump(ast.parse((LIBRARY / file).read_bytes())) for file in CODE]
    return hashlib.sha256("\0".join(trees).encode()).hexdigest()


def _clear(run_folder: Path) -> None:
    """Remove what a run that was cut off left behind, but not its checkpoints and logs."""
    for stale in (STOP_FILE, OUTCOME_FILE):
        (run_folder / stale).unlink(missing_ok=True)
    for rendezvous in run_folder.glob("rendezvous-*"):
        rendezvous.unlink()
    shutil.rmtree(run_folder / "ray", ignore_errors=True)


def _run(
    config: TrainConfig, compute: ComputeConfig, *, shards: Path, run_folder: Path
) -> dict[str, Any]:
    """Run the workers and show their progress; returns what rank 0 said of the end."""
    with ray_session() as local:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        from pipelines.loopback import LoopbackTorchConfig

        gpus = ray.cluster_resources().get("GPU", 0)
        use_gpu = compute.device == "cuda" or (compute.device == "auto" and gpus > 0)
        if use_gpu and gpus < compute.num_workers:
            raise UserError(
                f"compute.num_workers is {compute.num_workers}, but there are {gpus:.0f} GPUs: "
                "lower it or set compute.device: cpu"
            )
        cpus = ray.cluster_resources().get("CPU", 1)
        if not use_gpu and cpus < compute.num_workers:
            raise UserError(
                f"compute.num_workers is {compute.num_workers}, but there are {cpus:.0f} CPUs: "
                "lower it"
            )
        environment = WORKER_ENVIRONMENT | {
            "TORCHINDUCTOR_CACHE_DIR": str(run_folder.parent / "compiled")  # kept for later runs
        }
        threads = compute.threads_per_worker or max(int(cpus) // compute.num_workers, 1)
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={
                "config": asdict(config),
                "shards": str(shards),
                "run_folder": str(run_folder),
                "threads": threads,
                "execution": {
                    "micro_batch_size": compute.micro_batch_size,
                    "compile_networks": compute.compile,
                    "cuda_graphs": compute.cuda_graphs,
                },
            },
            torch_config=LoopbackTorchConfig(folder=str(run_folder)) if local else TorchConfig(),
            scaling_config=ScalingConfig(num_workers=compute.num_workers, use_gpu=use_gpu),
            run_config=RunConfig(
                # A name of its own each time: Ray hands back the old result for a reused one.
                # Resuming is the business of our own checkpoints.
                name=uuid.uuid4().hex[:12],
                storage_path=str(run_folder / "ray"),
                failure_config=FailureConfig(max_failures=compute.max_failures),
                worker_runtime_env={"env_vars": environment},
            ),
        )
        failure: list[BaseException] = []
        ended = threading.Event()

        def fit() -> None:
            try:
                trainer.fit()
            except BaseException as error:  # handed to the main thread below
                failure.append(error)
            finally:
                ended.set()

        # Ray runs beside the main thread, which keeps Ctrl-C: workers save before they end.
        threading.Thread(target=fit, daemon=True).start()
        follow(
            run_folder,
            ended,
            num_steps=config.training.num_steps,
            stop_file=run_folder / STOP_FILE,
            outcome_file=run_folder / OUTCOME_FILE,
        )
    outcome = run_folder / OUTCOME_FILE
    if not outcome.exists():
        reason = failure[0] if failure else "no worker said why"
        raise UserError(f"training failed: {reason} (AEGAN_RAY_LOGS=1 shows all that Ray says)")
    shutil.rmtree(run_folder / "ray", ignore_errors=True)
    return dict(json.loads(outcome.read_text(encoding="utf-8")))


def train_worker(settings: dict[str, Any]) -> None:
    """What runs on each worker. An error that a retry cannot cure goes into the outcome file."""
    import ray.train
    import ray.train.torch
    import torch

    from aegan.checkpoint import CheckpointError
    from aegan.training_loop import DivergedError
    from aegan.training_loop import train as training_loop

    torch.set_num_threads(settings["threads"])
    context = ray.train.get_context()
    rank = context.get_world_rank()
    run_folder = Path(settings["run_folder"])
    config = TrainConfig(
        model=ModelConfig(**settings["config"]["model"]),
        loss=LossConfig(**settings["config"]["loss"]),
        training=TrainingConfig(**settings["config"]["training"]),
    )
    if rank == 0:  # wait for the worker of a killed run, which would write there too
        lock = FileLock(run_folder / "worker.lock", timeout=ORPHAN_WAIT_SECONDS)
        lock.acquire()
    try:
        outcome = asdict(
            training_loop(
                config,
                shards=Path(settings["shards"]),
                run_folder=run_folder,
                device=ray.train.torch.get_device(),
                rank=rank,
                world_size=context.get_world_size(),
                report=ray.train.report,
                should_stop=(run_folder / STOP_FILE).exists,
                **settings["execution"],
            )
        )
    except (CheckpointError, ConfigError, DivergedError) as error:
        if rank != 0:
            raise
        outcome = {"error": str(error)}
    if rank == 0:
        checkpoint.write_json(run_folder / OUTCOME_FILE, outcome)
        lock.release()


def publish(run_folder: Path, output: Path) -> None:
    """Copy what the later stages use out of the run's folder: best model, curves, pictures."""
    from aegan.state import export_model

    checkpoints = run_folder / "checkpoints"
    last_step = checkpoint.steps(checkpoints)[-1]
    best = checkpoint.best(checkpoints)
    chosen = best[0] if best else last_step
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    facts = json.loads((run_folder / "run.json").read_text(encoding="utf-8"))
    _, last_state = checkpoint.load(checkpoint.path_of(checkpoints, last_step))
    summary = {
        "step": last_step,
        "chosen_step": chosen,
        "images_shown": last_step * facts["params"]["training"]["batch_size"],
        "seconds": rows[-1]["seconds"],
        "images_per_second": statistics.median(row["images_per_second"] for row in rows),
        "rollbacks": last_state["attempt"],
    }
    # Losses are those of the last step, scores those of the chosen one.
    losses = {key: value for key, value in rows[-1].items() if key not in ("time", "seconds")}
    scores = {
        key: value
        for row in rows
        if row["step"] == chosen
        for key, value in row.items()
        if key.startswith("validation_")
    }
    with new_folder(output) as folder:
        export_model(checkpoint.path_of(checkpoints, chosen), folder / "model")
        shutil.copytree(run_folder / "samples", folder / "samples")
        _write_curves(rows, folder / "curves.csv")
        checkpoint.write_json(folder / "run.json", {**facts, **summary})
        checkpoint.write_json(folder / "metrics.json", {**losses, **scores, **summary})
    log.info("trained %d steps; best checkpoint: step %d, in %s", last_step, chosen, output)


def _write_curves(rows: list[dict[str, Any]], path: Path) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "time"))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows({key: row[key] for key in row if key in columns} for row in rows)


def _git_commit() -> str:
    """The commit and whether files differ from it; empty without git."""
    if "AEGAN_GIT_COMMIT" in os.environ:  # a submitted job has the files, not the repository
        return os.environ["AEGAN_GIT_COMMIT"]
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


if __name__ == "__main__":
    run_stage(main)

"""Stage `train`: run the training loop under Ray Train and publish the best checkpoint's model.

Works in runs/<name>/, where the name is a hash of data, parameters and code: the same command
resumes, a changed one starts afresh. With `compute.storage: s3://...` the run lives in the bucket
and comes into that folder at the end. See docs/architecture.md, docs/cluster.md.
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
from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from aegan import checkpoint
from aegan.config import ComputeConfig, TrainConfig
from aegan.dataset import read_manifest
from pipelines import locks, params
from pipelines.cluster import ray_session, shipped_environment, uses_gpu
from pipelines.errors import UserError, run_stage
from pipelines.files import new_folder
from pipelines.follow import follow
from pipelines.outputs import FOLDERS, SHARDS, TRAIN
from pipelines.run_store import CHECKPOINTS, LOG, OUTCOME, STOP, RunStore, claim, shown_progress
from pipelines.shard_store import send_shards
from pipelines.storage import is_s3

RUNS = Path("runs")
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
    "winograd.py",
)
WORKER_HANGS_SECONDS = 120  # how long a worker may not answer before it is replaced
WORKER_ENVIRONMENT = {  # keep large tensors' memory instead of mapping it anew each time (glibc)
    "MALLOC_ARENA_MAX": "1",  # Ray trains in a thread, whose own arena holds no more than 64 MiB
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
}

log = logging.getLogger(__name__)


def main() -> None:
    config = params.load_train_config()
    with locks.hold("train"):
        run_folder = train(config, params.load(ComputeConfig), shards=SHARDS, runs=RUNS)
        publish(run_folder, TRAIN)
    if (run_folder / STOP).exists():  # asked to stop, but it was the end anyway
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
    store = _open_store(compute.storage, shards=shards, run_folder=run_folder)
    done = store.steps() if store else checkpoint.steps(run_folder / CHECKPOINTS)
    if done and done[-1] == config.training.num_steps:
        log.info("run %s is complete already", run_folder.name)
        if store:
            store.fetch(run_folder)
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
    reached = -1
    while True:
        outcome = _run(config, compute, facts, shards=shards, run_folder=run_folder, store=store)
        if "error" in outcome:
            raise UserError(outcome["error"])
        if outcome["finished"]:
            break
        if (run_folder / STOP).exists():
            log.info("stopped at step %d; the same command goes on from there", outcome["step"])
            raise KeyboardInterrupt
        if outcome["step"] <= reached:
            raise UserError(f"workers are told to end again and again at step {reached}")
        reached = outcome["step"]
        log.info("a worker was told to end: going on from step %d without it", reached)
    if store:
        store.look()
        store.fetch(run_folder)


def _open_store(storage: str, *, shards: Path, run_folder: Path) -> RunStore | None:
    """The run's place in the bucket, with the shards there; None without a bucket."""
    if not is_s3(storage):
        return None
    send_shards(shards, storage)
    store = RunStore(f"{storage.rstrip('/')}/runs/{run_folder.name}")
    store.look()
    local = checkpoint.steps(run_folder / CHECKPOINTS)
    if local and local[-1] > max(store.steps(), default=-1):  # trained here before
        store.exchange(run_folder)
    return store


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
        "compute.min_workers": compute.min_workers,
        "compute.threads_per_worker": compute.threads_per_worker,
        "compute.max_failures": compute.max_failures,
        "compute.micro_batch_size": compute.micro_batch_size,
    }
    for least, values in ((1, positive), (0, not_negative)):
        for key, value in values.items():
            if value < least:
                raise UserError(f"params.yaml: {key} is {value}; it must be {least} or more")
    if compute.min_workers > compute.num_workers:
        raise UserError(
            f"params.yaml: compute.min_workers is {compute.min_workers}; it must be at most "
            f"compute.num_workers, {compute.num_workers}"
        )
    gpus = compute.gpus_per_worker
    if gpus != 1 and not (0 < gpus < 1 and compute.num_workers == 1):
        raise UserError(
            f"params.yaml: compute.gpus_per_worker is {gpus}; it must be 1, or a part of one for a "
            "single worker (a worker trains on one GPU: use more workers)"
        )
    if compute.storage != "runs" and not is_s3(compute.storage):
        raise UserError(
            f"params.yaml: compute.storage is {compute.storage!r}; it must be runs or "
            "s3://bucket/prefix (for another folder make runs a link to it)"
        )


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
    for stale in (STOP, OUTCOME):
        (run_folder / stale).unlink(missing_ok=True)
    for rendezvous in run_folder.glob("rendezvous-*"):
        rendezvous.unlink()
    shutil.rmtree(run_folder / "ray", ignore_errors=True)


def _run(
    config: TrainConfig,
    compute: ComputeConfig,
    facts: dict[str, Any],
    *,
    shards: Path,
    run_folder: Path,
    store: RunStore | None,
) -> dict[str, Any]:
    """Run the workers and show their progress; returns what rank 0 said of the end."""
    (run_folder / OUTCOME).unlink(missing_ok=True)
    driver = claim(store) if store else ""
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(WORKER_HANGS_SECONDS))
    results: list[Any] = []
    ended = threading.Event()
    with (
        shown_progress(store, run_folder, driver) if store else nullcontext(),
        ray_session() as local,
    ):
        from ray.train import FailureConfig, RunConfig
        from ray.train.torch import TorchTrainer

        from pipelines.process_group import ClusterTorchConfig, LoopbackTorchConfig
        from pipelines.worker import Assignment, train_worker

        assignment = Assignment(
            config=config,
            run_folder=run_folder,
            shards=shards,
            dataset_sha256=facts["dataset_sha256"],
            storage=compute.storage if store else "",
            run_store=store.url if store else "",
            driver=driver,
            compute=compute,
        )
        environment = WORKER_ENVIRONMENT | shipped_environment()
        if compute.compile and not store:  # workers see this folder: kept for later runs
            environment["TORCHINDUCTOR_CACHE_DIR"] = str(run_folder.parent / "compiled")
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"assignment": assignment},
            torch_config=LoopbackTorchConfig(folder=str(run_folder))
            if local
            else ClusterTorchConfig(),
            scaling_config=_scaling(compute, local=local),
            run_config=RunConfig(
                # A name of its own each time: Ray hands back the old result for a reused one.
                # Resuming is the business of our own checkpoints.
                name=uuid.uuid4().hex[:12],
                storage_path=str(run_folder / "ray"),  # only this process's node writes there
                failure_config=FailureConfig(max_failures=compute.max_failures),
                worker_runtime_env={"env_vars": environment},
            ),
        )

        def fit() -> None:
            try:
                results.append(trainer.fit().return_value)
            except BaseException as error:  # handed to the main thread below
                results.append(error)
            finally:
                ended.set()

        # Ray runs beside the main thread, which keeps Ctrl-C: workers save before they end.
        threading.Thread(target=fit, daemon=True).start()
        follow(
            run_folder,
            ended,
            num_steps=config.training.num_steps,
            stop_file=run_folder / STOP,
            outcome_file=run_folder / OUTCOME,
        )
    if results and isinstance(results[0], dict):
        outcome = results[0]
    elif (run_folder / OUTCOME).exists():  # rank 0 ended alone, the others wait in vain
        outcome = json.loads((run_folder / OUTCOME).read_text(encoding="utf-8"))
    else:
        reason = results[0] if results else "no worker said why"
        raise UserError(f"training failed: {reason} (AEGAN_RAY_LOGS=1 shows all that Ray says)")
    shutil.rmtree(run_folder / "ray", ignore_errors=True)
    return outcome


def _scaling(compute: ComputeConfig, *, local: bool) -> Any:
    """Ray's ScalingConfig; raises UserError where this machine can never have so many workers."""
    import ray
    from ray.train import ScalingConfig

    present = ray.cluster_resources()
    use_gpu = uses_gpu(compute, present)
    kind, share = ("GPU", compute.gpus_per_worker) if use_gpu else ("CPU", 1)
    least = compute.min_workers or compute.num_workers
    if present.get(kind, 0) < least * share:
        found = f"there are {present.get(kind, 0):.0f} {kind}s"
        if local:
            key = "min_workers" if compute.min_workers else "num_workers"
            raise UserError(
                f"compute.{key} is {least}, but {found}: lower it"
                + (" or set compute.device: cpu" if use_gpu else "")
            )
        log.info("waiting for nodes: %d workers are wanted, but %s", least, found)
    elastic = compute.min_workers not in (0, compute.num_workers)
    return ScalingConfig(
        num_workers=(least, compute.num_workers) if elastic else compute.num_workers,
        use_gpu=use_gpu,
        resources_per_worker={"CPU": 1, "GPU": share} if use_gpu else None,
    )


def publish(run_folder: Path, output: Path) -> None:
    """Copy what the later stages use out of the run's folder: best model, curves, pictures."""
    from aegan.state import export_model

    checkpoints = run_folder / CHECKPOINTS
    last_step = checkpoint.steps(checkpoints)[-1]
    best = checkpoint.best(checkpoints)
    chosen = best[0] if best else last_step
    rows = [json.loads(line) for line in (run_folder / LOG).read_text().splitlines()]
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
    with new_folder(output, written=FOLDERS[TRAIN]) as folder:
        export_model(checkpoint.path_of(checkpoints, chosen), folder / "model")
        shutil.copytree(run_folder / "samples", folder / "samples")
        _write_curves(rows, folder / "curves.csv")
        checkpoint.write_json(folder / "run.json", {**facts, **summary})
        checkpoint.write_json(folder / "metrics.json", {**losses, **scores, **summary})
    kind = "best" if best else "no validation images, so last"
    log.info("trained %d steps; %s checkpoint: step %d, in %s", last_step, kind, chosen, output)


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

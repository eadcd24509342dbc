"""Stage `train`: run the training loop under Ray Train and publish the best checkpoint's model.

Works in runs/<name>/, where the name is a hash of data, parameters and code: the same command
resumes, one with a larger num_steps goes on, a changed one starts afresh. With
`compute.storage: s3://...` the run lives in the bucket and comes into that folder at the end.
See docs/architecture.md, docs/cluster.md, docs/training.md.
"""

import json
import logging
import os
import platform
import shutil
import subprocess
import threading
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from aegan import schedules
from aegan.config import (
    ComputeConfig,
    RegisterConfig,
    TrainConfig,
    check_batch_size,
    check_classes,
)
from aegan.data.dataset import read_manifest
from aegan.training import checkpoint
from aegan.training.checkpoint import CheckpointError
from aegan.training.run_folder import RENDEZVOUS, RunFolder
from aegan.training.start import Start, begin, record
from pipelines.base import locks, params
from pipelines.base.errors import UserError, run_stage
from pipelines.base.files import clear_disk_errors, read_json
from pipelines.base.identity import weights_code_sha256
from pipelines.base.outputs import SHARDS, TRAIN
from pipelines.base.run_name import run_name
from pipelines.bucket.finished_run import is_complete, keep_facts, publish, write_facts, write_log
from pipelines.bucket.run_store import RunStore, shown_progress, sound_step, take_over
from pipelines.bucket.shard_store import send_shards
from pipelines.bucket.storage import is_s3
from pipelines.cluster import checks
from pipelines.cluster.follow import follow
from pipelines.cluster.session import machine, ray_session, shipped_environment, uses_gpu
from pipelines.cluster.worker_death import explain
from pipelines.registry.live_run import FINISHED, record_end, recorded_end
from pipelines.registry.sender import sending
from pipelines.registry.start_from import read_start

RUNS = Path("runs")
LOOK_SECONDS = 0.5  # between two looks of Ray Train at its workers
WORKER_HANGS_SECONDS = 120  # how long a worker may not answer before it is replaced
WORKER_ENVIRONMENT = {  # keep large tensors' memory instead of mapping it anew each time (glibc)
    "MALLOC_ARENA_MAX": "1",  # Ray trains in a thread, whose own arena holds no more than 64 MiB
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
}

log = logging.getLogger(__name__)


def main() -> None:
    config = params.load(TrainConfig)
    checks.before_training()
    with locks.hold("train"):
        folder = train(
            *(config, params.load(ComputeConfig)),
            shards=SHARDS,
            runs=RUNS,
            experiment="" if _is_unseen() else params.load(RegisterConfig).experiment,
        )
        publish(folder, TRAIN, shards=SHARDS)
    if folder.stop.exists():  # asked to stop, but it was the end anyway
        raise KeyboardInterrupt


def train(
    config: TrainConfig,
    compute: ComputeConfig,
    *,
    shards: Path,
    runs: Path,
    experiment: str = "",
    run_workers: Callable[..., dict[str, Any]] | None = None,
) -> RunFolder:
    """Train to the end and return the run's folder; an interrupted run is resumed.

    MLflow shows it in `experiment` meanwhile (with `compute.live_tracking`; empty: it does not).
    `run_workers` stands in for Ray. Raises UserError; KeyboardInterrupt after a checkpoint was
    saved.
    """
    manifest = read_json(shards / "manifest.json", stage="preprocess")
    start = read_start(config, manifest, output=TRAIN)
    name = run_name(config, manifest["dataset_sha256"], start_sha256=start.sha256 if start else "")
    folder = RunFolder((runs / name).resolve())
    try:
        with clear_disk_errors(folder.path):
            folder.path.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.driver_lock, timeout=0):
                _clear(folder)
                _train(
                    *(config, compute, manifest, start, shards.resolve(), folder),
                    experiment=experiment if compute.live_tracking else "",
                    run_workers=run_workers or _run,
                )
    except Timeout:
        raise UserError(f"another training works in {folder.path}: wait for it or end it") from None
    except CheckpointError as error:
        raise UserError(str(error)) from None
    return folder


def _train(
    config: TrainConfig,
    compute: ComputeConfig,
    manifest: dict[str, Any],
    start: Start | None,
    shards: Path,
    folder: RunFolder,
    *,
    experiment: str,
    run_workers: Callable[..., dict[str, Any]],
) -> None:
    num_steps, name = config.training.num_steps, folder.path.name
    store = _open_store(compute.storage, shards=shards, folder=folder)
    if store and max(store.steps(), default=-1) >= num_steps:  # finished elsewhere
        store.fetch(folder)
    done = _step_to_go_on_from(folder, store)
    facts = _facts(config, compute, manifest, start, name)
    fixed = schedules.fixed_num_steps(config)
    if fixed and (newest := checkpoint.latest(folder.checkpoints)):
        checkpoint.check_num_steps(checkpoint.read_state(newest), fixed)
    if done is not None and done > num_steps:
        raise UserError(
            f"training.num_steps is {num_steps}, but {folder.path} was trained for {done} steps "
            f"already: set it to {done} or more, or take another training.seed for a run of its "
            "own, or delete that folder to train anew"
            + (f" (with everything below {store.url})" if store else "")
        )
    if done == num_steps and is_complete(folder, config, store):
        log.info("run %s is complete already", name)
        keep_facts(facts, folder, store)
        record_end(folder, FINISHED)
        return
    if not os.environ.get("RAY_ADDRESS"):  # what a cluster has, Ray alone knows
        checks.require(checks.places(compute, machine()))
    check_classes(config.model, manifest.get("classes", []))
    check_batch_size(
        config.training.batch_size,
        images=manifest["splits"]["train"]["rows"],
        workers=compute.num_workers,
        packing=config.loss.packing,
    )
    if done == num_steps:
        log.info("run %s is trained, but lacks a last piece: making it anew", name)
        keep_facts(facts, folder, store)
    else:
        if done is not None:
            log.info("resuming at step %d of run %s", done, name)
        else:
            images, arm = manifest["splits"]["train"]["rows"], config.training.arm
            log.info("starting run %s: %d images, arm %s", name, images, arm)
            if start is not None:
                _begin(start, config, manifest, folder, store)
        write_facts(facts, folder, store)
    with sending(folder, experiment) if experiment else nullcontext(), recorded_end(folder):
        _run_to_the_end(partial(run_workers, config, compute, facts, shards=shards), folder, store)
        if store:
            store.refresh()
            store.fetch(folder)
            write_log(folder)
            keep_facts(facts, folder, store)


def _run_to_the_end(
    run_workers: Callable[..., dict[str, Any]], folder: RunFolder, store: RunStore | None
) -> None:
    """Run the workers again while it is they who are asked to stop, and not the training."""
    reached = -1
    while True:
        outcome = run_workers(folder=folder, store=store)
        if "error" in outcome:
            raise UserError(outcome["error"])
        if outcome["finished"]:
            return
        if folder.stop.exists():
            log.info("stopped at step %d; the same command goes on from there", outcome["step"])
            raise KeyboardInterrupt
        if outcome["step"] <= reached:
            raise UserError(f"workers are asked to stop again and again at step {reached}")
        reached = outcome["step"]
        log.info("a worker was asked to stop: going on from step %d without it", reached)


def _facts(
    config: TrainConfig,
    compute: ComputeConfig,
    manifest: dict[str, Any],
    start: Start | None,
    name: str,
) -> dict[str, Any]:
    """What is known of a run before it is trained: run.json."""
    return {
        "run_name": name,
        "dataset_sha256": manifest["dataset_sha256"],
        "code_sha256": weights_code_sha256(),
        "params": params.as_dict(config.model, config.loss, config.training, compute),
        "start": record(start, config.training.start_from) if start else None,
        "world_size": compute.num_workers,
        "git_commit": _git_commit(),
        "ray_job": _ray_job(),
        "versions": {package: version(package) for package in ("torch", "ray", "numpy")},
        "python": platform.python_version(),
        "machine": platform.platform(),
    }


def _begin(
    start: Start,
    config: TrainConfig,
    manifest: dict[str, Any],
    folder: RunFolder,
    store: RunStore | None,
) -> None:
    """Put the weights to start from where the workers find them: into the checkpoint of step 0."""
    address = config.training.start_from
    begin(start, config, manifest, folder.path, address=address)
    taken = ", ".join(name.replace("_", " ") for name in start.networks)
    log.info("starting from %s (sha256 %s): its %s", address, start.sha256[:12], taken)
    if not any("discriminator" in name for name in start.networks):
        log.info("the discriminators start from random weights: only a checkpoint's are taken")
    if store:
        store.exchange(folder)


def _step_to_go_on_from(folder: RunFolder, store: RunStore | None) -> int | None:
    """The newest step that a sound checkpoint has, here or in the store; None for a new run."""
    newest = max(sound_step(folder), *(store.steps() if store else ()), -1)
    if newest == -1:
        checkpoint.latest(folder.checkpoints)  # raises if there are damaged ones
        return None
    for step in checkpoint.steps(folder.checkpoints):
        if step > newest:
            log.warning("%s is damaged: going on from step %d", folder.checkpoint(step), newest)
    return newest


def _open_store(storage: str, *, shards: Path, folder: RunFolder) -> RunStore | None:
    """The run's place in the bucket, with the shards there; None without a bucket."""
    if not is_s3(storage):
        return None
    send_shards(shards, storage)
    store = RunStore(f"{storage.rstrip('/')}/runs/{folder.path.name}")
    store.refresh()
    if sound_step(folder) > max(store.steps(), default=-1):  # trained here before
        store.exchange(folder)
    return store


def _clear(folder: RunFolder) -> None:
    """Remove what a run that was cut off left behind, but not its checkpoints and logs."""
    for stale in (folder.stop, folder.outcome, *folder.path.glob(RENDEZVOUS.format("*"))):
        stale.unlink(missing_ok=True)
    shutil.rmtree(folder.ray, ignore_errors=True)


def _run(
    config: TrainConfig,
    compute: ComputeConfig,
    facts: dict[str, Any],
    *,
    shards: Path,
    folder: RunFolder,
    store: RunStore | None,
) -> dict[str, Any]:
    """Run the workers and show their progress; returns what rank 0 said of the end."""
    folder.outcome.unlink(missing_ok=True)
    driver = take_over(store) if store else ""
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(WORKER_HANGS_SECONDS))
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(LOOK_SECONDS))
    # None of a private Ray's before they are wanted: a trainer's have an environment of their own.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    results: list[Any] = []
    ended = threading.Event()
    with (
        shown_progress(store, folder, driver) if store else nullcontext(),
        ray_session() as local,
    ):
        from ray.train import FailureConfig, RunConfig
        from ray.train.torch import TorchTrainer

        from pipelines.cluster.process_group import ClusterTorchConfig, LoopbackTorchConfig
        from pipelines.cluster.ray_private import local_trainer
        from pipelines.cluster.worker import Assignment, train_worker

        assignment = Assignment(
            config=config,
            run_folder=folder,
            shards=shards,
            manifest=read_manifest(shards),
            storage=compute.storage if store else "",
            run_store=store.url if store else "",
            driver=driver,
            compute=compute,
        )
        trainer = (local_trainer() if local else TorchTrainer)(
            train_worker,
            train_loop_config={"assignment": assignment},
            torch_config=LoopbackTorchConfig(folder=str(folder.path))
            if local
            else ClusterTorchConfig(),
            scaling_config=_scaling(compute),
            run_config=RunConfig(
                # A name of its own each time: Ray hands back the old result for a reused one.
                # Resuming is the business of our own checkpoints.
                name=uuid.uuid4().hex[:12],
                storage_path=str(folder.ray),  # only this process's node writes there
                failure_config=FailureConfig(max_failures=compute.max_failures),
                worker_runtime_env={"env_vars": WORKER_ENVIRONMENT | shipped_environment()},
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
        follow(folder, ended, num_steps=config.training.num_steps)
    if results and isinstance(results[0], dict):
        outcome = results[0]
    elif folder.outcome.exists():  # rank 0 ended alone, the others wait in vain
        outcome = json.loads(folder.outcome.read_text(encoding="utf-8"))
    else:
        reason = explain(results[0]) if results else "no worker said why"
        row = folder.newest_row()
        seen = f"last seen at step {row['step']}" if row else "no step was logged"
        raise UserError(f"training failed ({seen}): {reason}")
    shutil.rmtree(folder.ray, ignore_errors=True)
    return outcome


def _scaling(compute: ComputeConfig) -> Any:
    """Ray's ScalingConfig."""
    import ray
    from ray.train import ScalingConfig

    present = ray.cluster_resources()
    use_gpu = uses_gpu(compute, present)
    finding = checks.places(compute, present)
    if finding.status == "fail":
        log.info("waiting for nodes: %s", finding.found)
    least, share = compute.min_workers or compute.num_workers, compute.gpus_per_worker
    elastic = compute.min_workers not in (0, compute.num_workers)
    return ScalingConfig(
        num_workers=(least, compute.num_workers) if elastic else compute.num_workers,
        use_gpu=use_gpu,
        resources_per_worker={"CPU": 1, "GPU": share} if use_gpu else None,
    )


def _git_commit() -> str:
    """The commit and whether files differ from it; empty without git."""
    if "AEGAN_GIT_COMMIT" in os.environ:  # a submitted job has the files, not the repository
        return os.environ["AEGAN_GIT_COMMIT"]
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def _is_unseen() -> bool:
    """Whether the store of MLflow would be lost: a submitted job's, where no server is named."""
    return bool(_ray_job()) and not os.environ.get("MLFLOW_TRACKING_URI")


def _ray_job() -> str:
    """The id of the submitted job that this is part of; empty without one."""
    try:
        job = json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])
        return str(job["metadata"]["job_submission_id"])
    except (KeyError, ValueError, TypeError):
        return ""


if __name__ == "__main__":
    run_stage(main)

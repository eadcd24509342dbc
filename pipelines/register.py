"""Stage `register`: the trained model and all that is known of it go to MLflow (docs/serving.md).

A run holds parameters, curves, metrics, data version and pictures; a version of the registered
model holds the weights and answers requests. The same content registered again is that version.
"""

import csv
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aegan import model_folder
from aegan.config import RegisterConfig
from aegan.files import sha256_of_json, write_json
from aegan.training.run_folder import RunFolder
from pipelines.base import locks, package, params
from pipelines.base.errors import UserError, run_stage
from pipelines.base.files import clear_disk_errors, hash_files, project_folder, read_json
from pipelines.base.identity import code_of, code_sha256
from pipelines.base.outputs import EXPLORE, INTERPOLATE, PREPROCESS, SHARDS, TRAIN
from pipelines.ingest.source_address import without_secrets
from pipelines.registry import card, gate, mlflow_store, registration, training_record
from pipelines.registry.live_run import send_rest, tags_of_all
from pipelines.registry.mlflow_runs import Point
from pipelines.registry.tracking import PICTURES

TRAINED, MODEL = RunFolder(TRAIN), TRAIN / "model"
CURVES, SCORES = TRAIN / "curves.csv", Path("artifacts/evaluate/metrics.json")
MANIFEST, DVC_LOCK = SHARDS / "manifest.json", Path("dvc.lock")
OUTPUT = Path("artifacts/register/registration.json")
FILES = {  # folder among the run's artifacts -> what goes there, if present
    "samples": [TRAINED.samples],
    "interpolations": [INTERPOLATE],
    "artifacts": [EXPLORE],  # where the report's link leads
    "report": [Path("report/index.html")],
    "metrics": [TRAINED.facts, CURVES, SCORES.parent],
    "data": [MANIFEST, PREPROCESS],
}


def register(config: RegisterConfig) -> registration.Version:
    """Register what the working folder holds, then write `registration.json`."""
    package.signing_key()  # one that cannot be used is said before anything is stored
    record = collect()
    folder = RunFolder(Path("runs") / record.run_name)
    live_run = send_rest(folder, config.experiment) if folder.tracking.exists() else ""
    version = registration.register(
        record,
        live_run=live_run,
        experiment=config.experiment,
        model_name=config.model_name,
        alias=config.alias,
    )
    made = {
        "model_name": config.model_name,
        "version": version.number,
        "alias": config.alias,
        "model_uri": f"models:/{config.model_name}@{config.alias}",
        "run_id": version.run_id,
        "tracking_uri": mlflow_store.without_credentials(mlflow_store.tracking_uri()),
        "model_sha256": record.version_tags["model_sha256"],
    }
    with clear_disk_errors(OUTPUT):
        write_json(OUTPUT, made)
    return version


def collect() -> registration.Record:
    """What the earlier stages left in the working folder; raises UserError where it is missing."""
    run = read_json(TRAINED.facts, stage="train")
    scores = read_json(SCORES, stage="evaluate")
    manifest = read_json(MANIFEST, stage="preprocess")
    if manifest["dataset_sha256"] != run["dataset_sha256"]:
        raise UserError(f"{MANIFEST} is not the data the model was trained on: run `dvc repro`")
    if not (MODEL / "config.json").exists():
        raise UserError(f"{MODEL}/config.json not found: run `dvc repro` first")

    final = {f"evaluate/{name}": value for name, value in numbers(scores)}
    measured, step = SCORES.stat().st_mtime, run["chosen_step"]
    identity = {
        "run_name": run["run_name"],
        "model_sha256": hash_files([MODEL]),
        "dataset_sha256": run["dataset_sha256"],
    }
    known = training_record.tags(run)
    identity |= {name: known[name] for name in ("start_from", "start_sha256") if name in known}
    if DVC_LOCK.exists():
        known["dvc_lock_sha256"] = hash_files([DVC_LOCK])
    for stage, measured_in in (
        ("train", run.get("features")),
        ("evaluate", scores.get("features")),
    ):
        if measured_in:
            identity[f"{stage}/features"] = measured_in
    folder = RunFolder(Path("runs") / run["run_name"])
    code = code_sha256(code_of(["pipelines.registry.model_from_code"]))
    settings = {**params.read(), **run["params"]}
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    described: dict[str, Any] = {
        "model": model_folder.read_description(MODEL / model_folder.CONFIG),
        "run": run,
        "scores": scores,
        "manifest": manifest,
    }
    pictures = sorted(path for path in INTERPOLATE.glob("*") if path.suffix in (".png", ".webp"))
    networks = sorted(EXPLORE.glob("*.onnx"))
    names = [f"{PICTURES}/{path.name}" for path in pictures if path.suffix == ".png"]
    return registration.Record(
        run_name=run["run_name"],
        model_folder=MODEL,
        content_sha256=sha256_of_json([hash_files([MODEL, SCORES]), code]),
        params={
            f"{section}.{key}": without_secrets(value) if "://" in str(value) else value
            for section, values in settings.items()
            for key, value in values.items()
        },
        curves=list(curves(folder, run)),
        scores=[Point(name, value, step, measured) for name, value in final.items()],
        run_tags=identity | known | tags_of_all(folder),
        version_tags=identity
        | {name: f"{value:.6g}" for name, value in final.items() if "frechet_distance" in name},
        dataset={
            "name": "shards",
            "sha256": run["dataset_sha256"],
            "source": manifest["source"],
            "profile": {
                "rows": {name: split["rows"] for name, split in manifest["splits"].items()},
                "shards": {shard["file"]: shard["sha256"] for shard in shards},
            },
        },
        files={
            folder: [path for path in paths if path.exists()] for folder, paths in FILES.items()
        },
        card=card.write(**described, pictures=names),
        description=card.write(**described),
        pictures=pictures,
        networks=networks,
    )


def curves(folder: RunFolder, run: Mapping[str, Any]) -> Iterator[Point]:
    """Curves of the training and of the machine it ran on, with the times they were measured.

    A run that was trained elsewhere has no run folder here; its losses are among the artifacts.
    """
    if rows := folder.rows():
        yield from training_record.train_points(rows, run)
    elif CURVES.exists():
        table = csv.DictReader(CURVES.read_text(encoding="utf-8").splitlines())
        timed = ({"time": CURVES.stat().st_mtime, **row} for row in table)
        yield from training_record.train_points(timed, run)
    yield from training_record.system_points(folder.system_rows())


def numbers(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every finite number in nested mappings, under its path: `ema/frechet_distance`."""
    for key, value in tree.items():
        name = prefix + re.sub(r"[^\w .:/-]", "_", key)  # the characters MLflow takes
        if isinstance(value, Mapping):
            yield from numbers(value, f"{name}/")
        elif not isinstance(value, (str, bool)) and training_record.is_finite(value):
            yield name, float(value)


def main() -> None:
    config = params.load(RegisterConfig)
    with locks.hold("register"):
        version = register(config)
    uri, where = mlflow_store.without_credentials(mlflow_store.tracking_uri()), ""
    if uri == mlflow_store.DEFAULT_URI and project_folder() != Path.cwd():  # in a copy of DVC's
        uri, where = f"sqlite:///{project_folder() / 'mlflow.db'}", f" -C {project_folder()}"
    done = "this content is registered already:" if version.reused else "registered:"
    print(f"{done} {config.model_name} version {version.number}, alias {config.alias}")
    if version.reused and os.environ.get(package.SIGNING_KEY):
        print(f"not signed anew: aegan sign models:/{config.model_name}/{version.number}")
    print(f"model: models:/{config.model_name}@{config.alias} in {uri}")
    print(f"MLflow page: {uri if uri.startswith('http') else f'make{where} mlflow'}")
    if config.promote == "gate":
        print(gate.said(gate.gate(config, version.number)))


if __name__ == "__main__":
    run_stage(main)

"""The steps of a retraining, in their order; each returns what the ledger keeps of it."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aegan.config import RegisterConfig, RetrainConfig
from pipelines.base.files import read_json
from pipelines.base.outputs import RAW, SHARDS
from pipelines.registry import decisions, gate, tracking
from pipelines.registry.reference import current_reference
from pipelines.retraining import check
from pipelines.retraining.lease import Lease
from pipelines.retraining.ledger import Entry
from pipelines.retraining.workplace import Workplace

REGISTRATION = Path("artifacts/register/registration.json")
QUARANTINE = Path("artifacts/preprocess/quarantine.csv")
BEFORE = "images_before"  # a copy of the champion's images, beside the worktree

OUTCOME, REASONS = "outcome", "reasons"  # of a result that ends the retraining
EXIT_CODES = {"promoted": 0, "nothing new": 0, "waits": 0, "refused": 3, "asks": 3}


@dataclass(frozen=True, kw_only=True)
class Retraining:
    """What the steps share."""

    entry: Entry
    commit: str  # what runs
    config: RetrainConfig
    registry: RegisterConfig
    work: Workplace
    lease: Lease
    deadline: float  # seconds since 1970

    def result(self, step: str) -> dict[str, Any]:
        return self.entry.steps[step].result

    @property
    def images_before(self) -> Path:
        return self.work.folder.with_name(BEFORE)

    def prepare(self, start: str = "") -> None:
        """The worktree at the commit, set to begin with these weights; the gate is ours."""
        settings: dict[str, dict[str, Any]] = {"register": {"promote": "manual"}}
        if start:
            settings["training"] = {"start_from": start}
        self.work.prepare(self.commit, settings)


def fetch(retraining: Retraining) -> dict[str, Any]:
    """Read the source again."""
    retraining.prepare()
    _keep_images_of_champion(retraining)
    retraining.work.dvc(
        "repro", "--force", "--single-item", "download", deadline=retraining.deadline
    )
    raw = read_json(retraining.work.folder / RAW / "manifest.json", stage="download")
    return {key: raw[key] for key in ("source_sha256", "files", "bytes")}


def _keep_images_of_champion(retraining: Retraining) -> None:
    """Copy the shards that the champion was trained on, before new ones take their place.

    They lie where the last retraining or the last `make run` left them, or nowhere on this machine.
    """
    wanted, kept = _champions_dataset(retraining), retraining.images_before
    work = retraining.work
    for place in (kept, work.folder / SHARDS, work.project / SHARDS):
        if wanted and _dataset_of(place) == wanted:
            if place != kept:
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(place, kept)
            return
    shutil.rmtree(kept, ignore_errors=True)


def _dataset_of(shards: Path) -> str:
    """The hash of the images in a folder; "" where there are none."""
    manifest = shards / "manifest.json"
    return read_json(manifest, stage="preprocess")["dataset_sha256"] if manifest.exists() else ""


def _champions_dataset(retraining: Retraining) -> str:
    """The hash of the images that the champion was trained on; "" without one."""
    if not retraining.entry.champion:
        return ""
    tags = tracking.tags_of(retraining.registry.model_name, retraining.entry.champion)
    return tags.get("dataset_sha256", "")


def check_images(retraining: Retraining) -> dict[str, Any]:
    """Decode what is new, and look whether it is fit to train on and like what was there."""
    retraining.prepare()
    retraining.work.dvc("repro", "preprocess", deadline=retraining.deadline)
    shards = retraining.work.folder / SHARDS
    dataset = _dataset_of(shards)
    if dataset == _champions_dataset(retraining):
        return {OUTCOME: "nothing new", REASONS: ["the images are those of the champion"]}
    before = retraining.images_before if retraining.images_before.exists() else None
    model = None
    if retraining.entry.champion:
        address = f"models:/{retraining.registry.model_name}/{retraining.entry.champion}"
        model = tracking.load_model(address)
    findings = check.examine(
        shards,
        before,
        quarantine=retraining.work.folder / QUARANTINE,
        reference=current_reference(),
        model=model,
        config=retraining.config,
        odd_images=retraining.work.folder.parent / f"{retraining.entry.id}-odd.png",
    )
    return {"dataset_sha256": dataset, "findings": [finding.as_dict() for finding in findings]}


def decide(retraining: Retraining) -> dict[str, Any]:
    """What follows from the findings: wait, refuse, ask, or train, and from which weights on."""
    findings: list[Mapping[str, Any]] = retraining.result("check")["findings"]

    def said(verdict: str) -> list[str]:
        return [str(found["sentence"]) for found in findings if found["verdict"] == verdict]

    for verdict, outcome in (("refuse", "refused"), ("wait", "waits")):
        if said(verdict):
            return {OUTCOME: outcome, REASONS: said(verdict)}
    shifted = said("ask")
    if shifted and retraining.config.on_drift == "ask" and not retraining.entry.accepted:
        cure = f"look at the images, then `aegan retrain --accept-drift {retraining.entry.id}`"
        return {OUTCOME: "asks", REASONS: [*shifted, cure]}
    champion = retraining.entry.champion
    if champion and not shifted and retraining.config.start == "champion":
        return {"start": f"models:/{retraining.registry.model_name}/{champion}"}
    return {"start": ""}


def train(retraining: Retraining) -> dict[str, Any]:
    """All stages, up to a registered version."""
    retraining.prepare(retraining.result("decide")["start"])
    retraining.work.dvc("repro", deadline=retraining.deadline)
    registered = read_json(retraining.work.folder / REGISTRATION, stage="register")
    return {key: registered[key] for key in ("version", "model_sha256")}


def publish(retraining: Retraining) -> dict[str, Any]:
    """Push the data to the project's DVC remote, if it has one; commit what it was made from."""
    version = retraining.result("train")["version"]
    retraining.lease.check()
    pushed = retraining.work.has_remote()
    if pushed:
        retraining.work.dvc("push", "--run-cache", deadline=retraining.deadline)
    name = retraining.registry.model_name
    message = f"{name} version {version}: retraining {retraining.entry.id}"
    commit = retraining.work.commit(retraining.entry.id, message)
    return {"commit": commit, "pushed": pushed}


def pass_gate(retraining: Retraining) -> dict[str, Any]:
    """Compare with the champion on the reference, and promote or refuse: the only such place."""
    version = retraining.result("train")["version"]
    retraining.lease.check()
    passed = gate.decide(retraining.registry.model_name, version)
    outcome = "promoted" if passed.promoted else "refused"
    champion = decisions.champion(retraining.registry.model_name) or ""
    return {
        "decision": passed.number, "champion": champion, OUTCOME: outcome,
        REASONS: list(passed.reasons),
    }  # fmt: skip


STEPS: dict[str, Callable[[Retraining], dict[str, Any]]] = {
    "fetch": fetch,
    "check": check_images,
    "decide": decide,
    "train": train,
    "publish": publish,
    "gate": pass_gate,
}


def cost(seconds: float, config: RetrainConfig) -> str:
    """`1 h 12 min, 3.60` of the currency that retrain.price_per_hour is in."""
    hours = seconds / 3600
    spent = f"{int(hours)} h {round(hours % 1 * 60)} min"
    return f"{spent}, {hours * config.price_per_hour:.2f}" if config.price_per_hour else spent

"""The steps of a retraining, in their order; each returns what the ledger keeps of it."""

import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import chdir
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from aegan.config import PreprocessConfig, RegisterConfig, RetrainConfig
from aegan.files import remove
from aegan.metrics.features import installed_features
from aegan.training.loop import COLLAPSED
from pipelines.base import params
from pipelines.base.errors import UserError
from pipelines.base.files import read_json
from pipelines.base.outputs import PREPROCESS, RAW, REFERENCE_DVC, SHARDS
from pipelines.registry import decisions, gate, reference, tracking
from pipelines.registry.decision_log import succession
from pipelines.retraining import check, history_page
from pipelines.retraining.lease import Lease
from pipelines.retraining.ledger import Entry
from pipelines.retraining.workplace import BudgetError, Workplace

QUARANTINE = PREPROCESS / "quarantine.csv"
REGISTRATION = Path("artifacts/register/registration.json")
BEFORE = "before"  # a copy of the champion's images, beside the worktree

FETCHED = "fetched"  # of what fetch has found: the mark that it has left in the worktree
OUTCOME, REASONS = "outcome", "reasons"  # of a result that ends the retraining
EXIT_CODES = {"promoted": 0, "nothing new": 0, "waits": 0, "refused": 3, "asks": 3}

log = logging.getLogger(__name__)


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
    def before(self) -> check.Preprocessed:
        """The champion's images, if they are on this machine."""
        return preprocessed(self.work.folder.with_name(BEFORE))

    def prepare(self, start: str = "", *, anew: bool = False) -> None:
        """The worktree at the commit, set to begin with these weights; the gate is ours.

        What is near to the reference is not trained on, wherever its images are by now. Unless
        anew, what the steps before have left in dvc.lock stays.
        """
        training: dict[str, Any] = {"stop_on_collapse": True}
        if start:
            training["start_from"] = start
        self.work.prepare(
            self.commit,
            {
                "register": {"promote": "manual"},
                "preprocess": {"keep_out": reference.path_of_current()},
                "training": training,
            },
            anew=anew,
        )


def fetch(retraining: Retraining) -> dict[str, Any]:
    """Read the source again."""
    _pull_reference(retraining)
    retraining.prepare(anew=True)
    _keep_images_of_champion(retraining)
    mark = retraining.work.mark()
    retraining.work.dvc(
        "repro", "--force", "--single-item", "download", deadline=retraining.deadline
    )
    raw = read_json(retraining.work.folder / RAW / "manifest.json", stage="download")
    return {key: raw[key] for key in ("source_sha256", "files", "bytes")} | {FETCHED: mark}


def _pull_reference(retraining: Retraining) -> None:
    """In a new clone: what all steps keep out of training, and the gate compares on."""
    if not reference.is_to_be_pulled():
        return
    log.info("the reference split is not here yet: `dvc pull %s`", REFERENCE_DVC)
    work = retraining.work
    try:  # also from a cache that clones share, where no remote is set
        work.dvc("pull", str(REFERENCE_DVC), folder=work.project, deadline=retraining.deadline)
    except BudgetError:
        raise
    except UserError as error:
        reason = str(error).rstrip(":")  # before a list of DVC's
        raise UserError(
            f"{REFERENCE_DVC} names a reference split that is not here ({reason}): where it was "
            f"cut, `.venv/bin/dvc push {REFERENCE_DVC}` to a remote that git knows (docs/dvc.md)"
        ) from None


def preprocessed(folder: Path) -> check.Preprocessed:
    """What the stage preprocess has left in a project's folder, or a copy of that."""
    return check.Preprocessed(shards=folder / SHARDS, quarantine=folder / QUARANTINE)


def _keep_images_of_champion(retraining: Retraining) -> None:
    """Copy the images that the champion was trained on, before new ones take their place.

    They lie where the last retraining or the last `make run` left them, or nowhere on this machine.
    """
    work, wanted = retraining.work, _champions_dataset(retraining)
    place = work.folder.with_name(BEFORE)
    if wanted and _dataset_of(preprocessed(place)) == wanted:
        return
    remove(place)
    for found in (preprocessed(work.folder), preprocessed(work.project)):
        if wanted and _dataset_of(found) == wanted:
            aside = place.with_name(f".{BEFORE}.tmp")
            remove(aside)
            copy = preprocessed(aside)
            shutil.copytree(found.shards, copy.shards)
            copy.quarantine.parent.mkdir(parents=True)
            shutil.copy(found.quarantine, copy.quarantine)
            aside.rename(place)  # whole or not there
            return


def _dataset_of(images: check.Preprocessed) -> str:
    """Their hash; "" where there are none."""
    manifest = images.shards / "manifest.json"
    if not manifest.exists():
        return ""
    sha256: str = read_json(manifest, stage="preprocess")["dataset_sha256"]
    return sha256


def _champions_dataset(retraining: Retraining) -> str:
    """The hash of the images that the champion was trained on; "" without one."""
    champion = retraining.entry.champion
    if not champion:
        return ""
    return tracking.tags_of(retraining.registry.model_name, champion).get("dataset_sha256", "")


def check_images(retraining: Retraining) -> dict[str, Any]:
    """Decode what is new, and look whether it is fit to train on and like what was there."""
    if _dataset_of(retraining.before):
        with chdir(retraining.work.folder):  # before anything is near to it and trained on
            reference.current_or_first(retraining.before.shards)
    retraining.prepare()
    retraining.work.dvc("repro", "preprocess", deadline=retraining.deadline)
    new, old = preprocessed(retraining.work.folder), retraining.before
    found: dict[str, Any] = {"dataset_sha256": _dataset_of(new), "findings": []}
    if not retraining.entry.champion:
        return found | {"note": "there is no champion to compare with"}
    if _dataset_of(new) == _champions_dataset(retraining):
        return found | {OUTCOME: "nothing new", REASONS: ["the images are the champion's"]}
    if not _dataset_of(old):
        return found | {"note": "the champion's images are not on this machine: not compared"}
    model = tracking.load_model(_address(retraining, retraining.entry.champion))
    with chdir(retraining.work.folder):
        frozen = reference.current_or_first(old.shards)
        done = check.check(
            new,
            old,
            reference=reference.file_of(frozen.sha256),
            model=model,
            features=installed_features(),
            preprocess=params.load(PreprocessConfig),
            config=retraining.config,
            sheet=retraining.work.folder.with_name(f"{retraining.entry.id}-odd.png"),
        )
    return found | {
        "findings": [asdict(finding) for finding in done.findings],
        "near_reference": list(done.left_out),
    }


def _address(retraining: Retraining, version: str) -> str:
    return f"models:/{retraining.registry.model_name}/{version}"


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
        return {"start": _address(retraining, champion)}
    return {"start": ""}


def train(retraining: Retraining) -> dict[str, Any]:
    """All stages, up to a registered version; a collapse of the generator is a refusal."""
    retraining.prepare(retraining.result("decide")["start"])
    try:
        retraining.work.dvc("repro", deadline=retraining.deadline)
    except UserError as error:
        if COLLAPSED not in str(error):
            raise
        return {OUTCOME: "refused", REASONS: [str(error)]}
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
    with chdir(retraining.work.folder):  # where the images are that a first reference is cut from
        verdict = gate.gate(retraining.registry, version, new_images=_new_test_images(retraining))
        images = reference.current_or_first(SHARDS).images
    model = tracking.load_model(_address(retraining, version))
    history_page.draw(model, images, retraining.work.folder.with_name(f"{retraining.entry.id}.png"))
    if not verdict.passed:
        champion, outcome, reasons = retraining.entry.champion, "refused", verdict.reasons
    else:  # by the log, which has the reasons also if we were killed after it was passed before
        [*_, made] = succession(decisions.history(retraining.registry.model_name))
        champion, outcome, reasons = version, "promoted", made.reasons
    return {"champion": champion, OUTCOME: outcome, REASONS: list(reasons)}


def _new_test_images(retraining: Retraining) -> Tensor | None:
    """Those that came after the champion; None where its own are not on this machine."""
    if not retraining.entry.champion or not _dataset_of(retraining.before):
        return None
    near = retraining.result("check").get("near_reference", [])
    new = preprocessed(retraining.work.folder)
    return check.new_test_images(new, retraining.before, without=near)


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

"""Whether a registered version may become the champion: checks in order, and what they found.

Its files are those that were registered; they load, all weights finite; they answer in a process of
their own without network; its samples have not collapsed; and on the reference split no gated
figure is worse than the champion's by more than its noise and the margin. The first one that fails
ends it. What was found goes into the log of decisions, the version's tags and description, and a
page.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

import aegan
from aegan.config import RegisterConfig
from aegan.files import write_json, write_text
from pipelines.base.errors import UserError
from pipelines.base.files import clear_disk_errors
from pipelines.base.names import shown
from pipelines.base.outputs import SHARDS
from pipelines.registry import decisions, gate_page, tracking
from pipelines.registry.comparison import (
    CACHE,
    MIN_VARIETY,
    VARIETY,
    Change,
    Examination,
    OnNewImages,
    Row,
    compare,
    compare_on_new,
    error_of_the_mean_image,
    has_variety,
    mean,
)
from pipelines.registry.mlflow_store import UnsoundModelError
from pipelines.registry.reference import ANOTHER, MIN_IMAGES, Reference, current_or_first

PAGE, FIGURES = CACHE / "index.html", CACHE / "comparison.json"
FRESH_PROCESS = Path(__file__).with_name("fresh_process.py")
FRESH_SECONDS = 300  # also where other programs leave it little of the machine
PASSED, REFUSED = "passed", "refused"
ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "TMPDIR")  # of the process, which needs no password

log = logging.getLogger(__name__)


class _RefusedError(Exception):
    """A check that a version does not pass; its arguments are the reasons, sentences."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the gate decided."""

    version: str
    champion: str | None  # that it was compared with
    passed: bool
    reasons: tuple[str, ...]  # sentences


def gate(config: RegisterConfig, version: str, *, new_images: Tensor | None = None) -> Verdict:
    """Check a version; make it the champion, or log why not. Raises UserError, Outrun.

    How both do on `new_images`, uint8 [N, H, W, C] that neither was trained on, is said, too.
    """
    name = config.model_name
    tracking.check_version(name, version)
    champion = decisions.champion(name)
    if version == champion:
        said = f"version {version} is the champion already"
        return Verdict(version=version, champion=champion, passed=True, reasons=(said,))
    reference = current_or_first(SHARDS)
    PAGE.unlink(missing_ok=True)  # of an earlier version
    FIGURES.unlink(missing_ok=True)
    with TemporaryDirectory() as folder:
        try:
            candidate = _sound_model(name, version, Path(folder) / "candidate")
            other = _champion(name, champion, Path(folder) / "champion") if champion else None
            margin = config.gate_margin
            reasons = _compare(candidate, other, reference, version, champion, margin, new_images)
            passed = True
        except _RefusedError as error:
            reasons, passed = error.args, False
    verdict = Verdict(version=version, champion=champion, passed=passed, reasons=reasons)
    _record(name, verdict, reference)
    return verdict


# -- the files ------------------------------------------------------------------------------------


def _sound_model(name: str, version: str, folder: Path) -> aegan.AEGAN:
    """A version's model, once its files have passed every check of files."""
    uri = f"models:/{name}/{version}"
    folder.mkdir()
    try:
        tracking.check_files(name, version)
        files = tracking.fetch_model(uri, folder)
        aegan.load(files, weights="raw", discriminators=True)
        model = aegan.load(files)
    except (UnsoundModelError, aegan.ModelError) as error:
        raise _RefusedError(str(error).replace(f"{folder}/", "")) from None
    if said := _answer_alone(files):
        raise _RefusedError(f"in a process of its own it does not answer its example: {said}")
    return model


def _answer_alone(files: Path) -> str:
    """Why a model does not answer in a fresh process without network; empty if it does."""
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    environment["PYTHONPATH"] = str(Path(aegan.__file__).parents[1])
    try:
        done = subprocess.run(
            [sys.executable, str(FRESH_PROCESS), str(files)],
            env=environment,
            cwd=files,
            timeout=FRESH_SECONDS,
            capture_output=True,
            text=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {FRESH_SECONDS} s"
    if done.returncode == 0:
        return ""
    return shown(done.stderr.strip().rpartition("\n")[2])[:300] or f"exit {done.returncode}"


def _champion(name: str, version: str, folder: Path) -> aegan.AEGAN:
    uri = f"models:/{name}/{version}"
    folder.mkdir()
    try:
        return aegan.load(tracking.fetch_model(uri, folder))
    except (UserError, aegan.ModelError) as error:
        raise UserError(
            f"the champion, {uri}, cannot be compared with: {error}. Bring its files back, or name "
            "another one: `aegan rollback` or `aegan promote VERSION --force --reason TEXT`"
        ) from None


# -- the figures ----------------------------------------------------------------------------------


def _compare(
    candidate: aegan.AEGAN,
    other: aegan.AEGAN | None,
    reference: Reference,
    version: str,
    champion: str | None,
    margin: float,
    new_images: Tensor | None,
) -> tuple[str, ...]:
    """Why it may pass; _RefusedError with the reasons if it may not. Leaves page and figures."""
    for model, number in ((candidate, version), (other, champion)):
        _check_size(model, f"version {number}", reference)
    examination = Examination(reference)
    ours = examination.examine(candidate)
    theirs = examination.examine(other) if other else []
    noise = reference.noise.get("shares", {})
    changes = compare(ours, theirs, margin=margin, noise=noise) if other else []
    failed, notes = _floors(ours, reference), _notes(candidate, other, reference)
    failed += [_said(change) for change in changes if change.refused]
    passed = [_said(change) for change in changes if not change.refused]
    on_new = None
    if other and new_images is not None:
        on_new = compare_on_new(new_images, candidate, other)
    new = _said_of_new(on_new, refused=bool(failed)) if on_new else ()
    with clear_disk_errors(PAGE):
        write_json(
            FIGURES,
            {
                "reference": reference.sha256,
                "candidate": {"version": version, "draws": ours},
                "champion": {"version": champion, "draws": theirs},
                "changes": [asdict(change) for change in changes],
                "noise": reference.noise,
                "new_images": asdict(on_new) if on_new else None,
            },
        )
        write_text(
            PAGE,
            gate_page.render(
                candidate=(version, candidate, ours),
                champion=(champion, other, theirs) if champion and other else None,
                reference=reference,
                changes=changes,
                refusals=failed,
                notes=notes,
                on_new=on_new,
            ),
        )
    if failed:
        raise _RefusedError(*failed, *new, *notes)
    return (*passed, *new, *notes)


def _check_size(model: aegan.AEGAN | None, name: str, reference: Reference) -> None:
    height, width, channels = reference.images.shape[1:]
    if model and (model.image_size, model.image_channels) != (height, channels):
        raise UserError(
            f"{name} makes images of {model.image_size}x{model.image_size}x{model.image_channels}, "
            f"the reference split has {height}x{width}x{channels}: {ANOTHER} of the shards that "
            "are here; versions of two sizes are compared by nobody but you (`aegan promote "
            "VERSION --force --reason TEXT`)"
        )


def _floors(rows: Sequence[Row], reference: Reference) -> list[str]:
    """What no model may fall below, whatever the champion; a sentence for each that it does."""
    found = []
    if not has_variety(rows):
        found.append(
            f"its samples have collapsed: their variety is {mean(rows, VARIETY):.2f} of real "
            f"images', at least {MIN_VARIETY} is needed"
        )
    if "reconstruction_mae" in rows[0]:
        error = mean(rows, "reconstruction_mae")
        floor = error_of_the_mean_image(reference.images)
        if not error < floor:
            found.append(
                f"its reconstructions are {error:.3f} off, and the mean image only {floor:.3f}"
            )
    return found


def _notes(
    candidate: aegan.AEGAN, other: aegan.AEGAN | None, reference: Reference
) -> tuple[str, ...]:
    """What a reader must know of how it was decided."""
    notes = []
    if other is None:
        notes.append("there is no champion to compare with: only absolute floors were held")
    elif not reference.noise:
        notes.append(
            "the noise over training seeds is not measured on this reference, so the margin alone "
            "counts: `aegan gate --measure-noise`"
        )
    without = [
        name
        for name, model in (("it", candidate), ("the champion", other))
        if model is not None and model.encoder is None
    ]
    if without:
        notes.append(f"{' and '.join(without)} cannot encode: reconstructions were not compared")
    return tuple(notes)


def _said(change: Change) -> str:
    return f"{_figures_of(change)}, {change.allowed:.1%} worse is allowed ({change.allowed_by})"


def _figures_of(change: Change) -> str:
    word = "worse" if change.worse > 0 else "better"
    return (
        f"{change.metric} {change.candidate:.4g}, the champion's {change.champion:.4g}: "
        f"{abs(change.worse):.1%} {word}"
    )


def _said_of_new(on_new: OnNewImages, *, refused: bool) -> tuple[str, ...]:
    """How both did on images that came after the champion, which decides nothing."""
    if not on_new.changes:
        few = f"{on_new.count} test images came after the champion, {MIN_IMAGES} are needed"
        return (f"on the new images nothing was compared: {few}",)
    figures = "; ".join(map(_figures_of, on_new.changes))
    said = [f"on the new images ({on_new.count} test images): {figures}"]
    if on_new.is_better:
        old = "the reference decides" if refused else "within what is allowed on the reference"
        said.append(f"it is better on the new images and {old}")
    return tuple(said)


# -- what is left behind --------------------------------------------------------------------------


def _record(name: str, verdict: Verdict, reference: Reference) -> None:
    """The decision, which counts and describes the version; then the version's tags."""
    decisions.decide(
        name,
        kind="promotion" if verdict.passed else "refusal",
        start=verdict.champion,
        to=verdict.version,
        reasons=verdict.reasons,
        reference=reference.sha256,
        files=[file for file in (PAGE, FIGURES) if file.exists()],
    )
    word = PASSED if verdict.passed else REFUSED
    tags = {
        "gate": word,
        "gate_reference": reference.sha256,
        "gate_champion": verdict.champion or "",
    }
    tracking.set_tags(name, verdict.version, tags)


def said(verdict: Verdict) -> str:
    """A verdict in lines for a terminal."""
    word = PASSED if verdict.passed else REFUSED
    return "\n".join([f"gate: version {verdict.version} {word}", *verdict.reasons])

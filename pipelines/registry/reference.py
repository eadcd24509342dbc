"""The reference split: held-out images that stay the same while data grows, kept under their hash.

`reference/` is the user's, no output of a stage: DVC deletes outputs, and new data would change
them. `dvc add` keeps it, so that `dvc push` and `dvc pull` bring it along; `reference.dvc` belongs
into git.

    current.json        which of them counts
    <sha256>.parquet    images, at most MAX_IMAGES; named by the hash of the file
    <sha256>.json       why, when and of what it was cut; how figures on it scatter over seeds
"""

import hashlib
import io
import logging
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from aegan.config import IMAGE_SIZES, Split
from aegan.data import dataset
from aegan.files import new_file, sha256_of, write_json
from pipelines.base import locks
from pipelines.base.errors import UserError
from pipelines.base.files import clear_disk_errors, project_folder, read_json
from pipelines.base.names import shown
from pipelines.base.outputs import REFERENCE, REFERENCE_DVC
from pipelines.base.trained_model import shown_split

CURRENT = "current.json"
MAX_IMAGES, MAX_BYTES = 2000, 2**28  # of pixels, for large images
MIN_IMAGES = 8  # fewer say nothing about distances
SHA256 = re.compile("[0-9a-f]{64}")
FIRST = "the first one"
ANOTHER = "`aegan reference new --reason TEXT` cuts another"

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Images that models are compared on, uint8 [N, H, W, C], and what is known of them."""

    sha256: str
    images: Tensor
    facts: dict[str, Any]  # reason, time, split, dataset_sha256, source; noise, once it is measured

    @property
    def noise(self) -> dict[str, Any]:
        """`shares`: by which a figure worsens by chance; `seeds` and `steps` of what was trained.

        Empty until it is measured.
        """
        found: dict[str, Any] = self.facts.get("noise", {})
        return found


def current() -> Reference | None:
    """The reference that counts; None if none was cut yet. Raises UserError."""
    folder = _folder()
    if not (folder / CURRENT).exists():
        return None
    sha256 = read_json(folder / CURRENT, stage="register").get("sha256")
    if not isinstance(sha256, str) or not SHA256.fullmatch(sha256):
        raise UserError(f"{folder / CURRENT} names no reference split; {_cure()}")
    return _read(sha256)


def current_or_first(shards: Path) -> Reference:
    """The reference that counts, cut now if there is none; raises UserError."""
    return current() or cut(shards, reason=FIRST)


def is_to_be_pulled() -> bool:
    """Whether this is a clone of a project that has a reference, which DVC has not brought yet."""
    project = project_folder()
    return (project / REFERENCE_DVC).exists() and not (project / REFERENCE / CURRENT).exists()


def cut(shards: Path, *, reason: str) -> Reference:
    """Make a reference of held-out images the one that counts; the others stay. Raises UserError.

    Images in the order of their hashes, so that it does not depend on the order of files; those of
    the validation split if there are no test images.
    """
    split = shown_split(shards)
    manifest = dataset.read_manifest(shards)
    if split == "train" or manifest["splits"][split]["rows"] < MIN_IMAGES:
        raise UserError(
            f"{shards} has fewer than {MIN_IMAGES} test images to cut a reference split from: add "
            "images, or raise preprocess.test_fraction"
        )
    content = _table(shards, split)
    sha256 = hashlib.sha256(content).hexdigest()
    facts = {
        "reason": reason,
        "time": time.time(),
        "split": split,
        "dataset_sha256": manifest["dataset_sha256"],
        "preprocess_sha256": manifest["preprocess_sha256"],
    }
    folder = _folder()
    with locks.hold(str(REFERENCE)), clear_disk_errors(folder):
        if not _facts_of(sha256).exists():  # else its noise would be lost
            write_json(_facts_of(sha256), facts)
        if not file_of(sha256).exists() or sha256_of(file_of(sha256)) != sha256:
            with new_file(file_of(sha256)) as temporary:
                temporary.write_bytes(content)
        write_json(folder / CURRENT, {"sha256": sha256})
    _track()
    reference = _read(sha256)
    log.info("reference split %s: %d %s images", sha256[:12], len(reference.images), split)
    return reference


def file_of(sha256: str) -> Path:
    """Where the images of a reference lie, a Parquet file with the columns of a shard."""
    return _folder() / f"{sha256}.parquet"


def most_images(size: int) -> int:
    """How many images of so many bytes a reference has at most."""
    return min(MAX_IMAGES, MAX_BYTES // size)


def path_of_current() -> str:
    """Of the reference that counts, from the project's folder; "" if none was cut yet."""
    found = current()
    return str(file_of(found.sha256).relative_to(project_folder())) if found else ""


def keep_noise(reference: Reference, noise: dict[str, Any]) -> None:
    """Keep with a reference how figures on it scatter over training seeds; raises UserError."""
    file = _facts_of(reference.sha256)
    with clear_disk_errors(file):
        write_json(file, reference.facts | {"noise": noise})
    _track()


def said(reference: Reference | None) -> tuple[str, dict[str, Any]]:
    """A reference in words, and what is known of it."""
    if reference is None:
        return "no reference split yet: the first `aegan gate` cuts one", {}
    facts, noise = reference.facts, reference.noise
    height, width, channels = reference.images.shape[1:]
    when = time.strftime("%Y-%m-%d", time.localtime(facts["time"]))
    measured = f"{len(noise['seeds'])} trainings of {noise['steps']} steps" if noise else ""
    text = (
        f"reference {reference.sha256}\n"
        f"{len(reference.images)} {facts['split']} images, {height}x{width}x{channels}, "
        f"cut {when}: {shown(facts['reason'])}\n"
        f"noise over training seeds: {measured or 'not measured (`aegan gate --measure-noise`)'}"
    )
    known = {"sha256": reference.sha256, "file": str(file_of(reference.sha256))}
    return text, known | {"images": len(reference.images)} | facts


def _folder() -> Path:
    """Where references are kept; UserError in a clone that has not fetched them yet."""
    folder = project_folder() / REFERENCE
    if is_to_be_pulled():
        raise UserError(
            f"{REFERENCE_DVC} names a reference split that is not here: run "
            f"`.venv/bin/dvc pull {REFERENCE_DVC}`"
        )
    return folder


def _facts_of(sha256: str) -> Path:
    return file_of(sha256).with_suffix(".json")


def _table(shards: Path, split: Split) -> bytes:
    """A Parquet file of a split's first images in the order of their hashes."""
    ids = dataset.load_columns(shards, split, ["image_id"])["image_id"]
    images = dataset.load_images(shards, split)
    size = images[0].size
    chosen = np.argsort(ids)[: most_images(size)]
    height, width, channels = images.shape[1:]
    pixels = images[chosen].reshape(len(chosen), -1)
    columns = {
        "image_id": pa.array(ids[chosen], pa.string()),
        "image": pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(size), len(chosen), [None, pa.py_buffer(pixels)]
        ),
    }
    metadata = {"height": str(height), "width": str(width), "channels": str(channels)}
    file = io.BytesIO()
    table = pa.table(columns).replace_schema_metadata(metadata)
    pq.write_table(table, file, compression="none", use_dictionary=False)
    return file.getvalue()


def _read(sha256: str) -> Reference:
    """A reference whose file is the one that its name says; raises UserError."""
    file = file_of(sha256)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): {_cure()}") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{file} is not what its name says, it was changed or damaged: {_cure()}")
    try:
        table = pq.read_table(io.BytesIO(content))
        sizes = [int(table.schema.metadata[name]) for name in (b"height", b"width", b"channels")]
        pixels = np.stack([np.frombuffer(row, np.uint8) for row in table["image"].to_pylist()])
        images = pixels.reshape(-1, *sizes)
        if sizes[0] not in IMAGE_SIZES or sizes[0] != sizes[1] or sizes[2] not in (1, 3):
            raise ValueError(f"images of {sizes}")
    except (ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise UserError(f"{file} holds no images ({shown(str(error))[:100]}): {_cure()}") from None
    try:
        facts = read_json(_facts_of(sha256), stage="register")
    except UserError:  # which only says what stage writes it
        raise UserError(f"{_facts_of(sha256)} is missing or damaged: {_cure()}") from None
    return Reference(sha256=sha256, images=torch.from_numpy(images), facts=facts)


def _cure() -> str:
    return f"`.venv/bin/dvc checkout {REFERENCE_DVC}` puts it back; {ANOTHER}"


def _track() -> None:
    """Let DVC keep the folder; where it cannot, say what is to be done."""
    project = project_folder()
    if not (project / ".dvc").is_dir():
        return
    # Not DVC itself: what it does is checked and locked.
    dvc = [sys.executable, "-m", "pipelines.project.dvc_command"]
    command = [*dvc, "add", str(REFERENCE)]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        log.info("DVC keeps it: `git add %s`, and `.venv/bin/dvc push` shares it", REFERENCE_DVC)
    else:
        reason = (done.stderr or done.stdout).strip().rpartition("\n")[2]
        log.warning("warning: `.venv/bin/dvc add %s` failed: %s", REFERENCE, reason)

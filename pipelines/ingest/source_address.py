"""What `data.source` names: checked before DVC starts, and again before anything is read."""

import json
import os
import re
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit
from urllib.request import url2pathname

from pipelines.base import outputs
from pipelines.base.errors import UserError
from pipelines.base.files import project_folder

REMOTE = ("kaggle", "s3", "http", "https")
DESIGNED = "manifold"
EXPECTED = (
    "manifold, a folder, a .zip, .tar, .parquet, .npy or .npz file, kaggle:owner/name, "
    "s3://bucket/prefix or https://host/archive.zip"
)
# Where runs and tools write: no place for pictures. Below artifacts/, any folder may be a link.
WORKPLACES = (
    *("artifacts", "report", "runs", "retraining", "mlruns", ".dvc", ".git", ".venv"),
    *map(str, outputs.FOLDERS),
)
OLD_OUTPUTS = {"data/raw": outputs.RAW, "data/shards": outputs.SHARDS}  # earlier: where now
SECRETS = re.compile(  # in the names of what stands behind the `?` of an address
    r"sig$|signature|token|secret|passw|pwd|credential|^auth|session|(^|[-_])key$|keyid",
    re.IGNORECASE,
)


def resolve(address: str) -> str:
    """The address with `~` and `$NAME` filled in: remote, `manifold`, or a local path.

    Raises UserError for one that is empty, holds a secret, or lies where runs write. A secret may
    stand in an environment variable: only its name is ever recorded.
    """
    if not address.strip():
        raise UserError(f"data.source is empty: expected {EXPECTED}")
    _check_secrets(address)
    if address == DESIGNED or os.path.lexists(project_folder() / address):
        filled = address
    else:
        filled = os.path.expandvars(
            Path(address).expanduser() if address.startswith("~") else address
        )
        if unknown := re.search(r"\$(\w+|\{\w+\})", filled):
            raise UserError(
                f"data.source {address}: the environment variable {unknown[0]} is not set"
            )
    scheme = scheme_of(filled)
    if filled == DESIGNED or scheme in REMOTE:
        if scheme == "s3":  # where errors show the address as it is
            _check_secrets(filled)
        return filled
    if scheme == "file":
        parts = urlsplit(filled)
        if parts.netloc not in ("", "localhost"):
            raise UserError(
                f"data.source {address} names another machine: expected file:///path or https://..."
            )
        filled = url2pathname(parts.path)
    path = project_folder() / filled
    _check_place(path, address)
    return str(path)


def scheme_of(address: str) -> str:
    """`https` of `https://host`, `kaggle` of `kaggle:owner/name`; of a path nothing, mostly."""
    return address.partition(":")[0].lower() if ":" in address else ""


def without_secrets(url: str) -> str:
    """The address without user, password and query, fit for messages and manifests."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


def _check_secrets(address: str) -> None:
    """DVC writes data.source into dvc.lock, its cache and its remotes: it must hold no password."""
    if "://" not in address:
        return
    parts, shown = urlsplit(address), without_secrets(address)
    if "@" in parts.netloc:
        place = (
            "~/.netrc"
            if parts.scheme in ("http", "https")
            else "the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"
        )
        raise UserError(
            f"data.source {shown} holds a user name or password, which would be recorded: leave it "
            f"out, and put it into {place}"
        )
    queried = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True)]
    if any(SECRETS.search(name) for name in queried):
        raise UserError(
            f"data.source {shown} holds a key or signature behind the `?`, which would be "
            "recorded: put the whole address into an environment variable, say AEGAN_SOURCE, and "
            "set data.source to '$AEGAN_SOURCE'"
        )


def _check_place(path: Path, address: str) -> None:
    """UserError for a source that a run would write into, delete, or read itself from."""
    place, project = path.resolve(), project_folder().resolve()
    if project.is_relative_to(place):
        raise UserError(
            f"data.source {address} is or contains the folder of this project: put the images "
            "into a folder of their own (data/faces, say)"
        )
    for name in OLD_OUTPUTS:
        if _overlap(place, (project / name).resolve()) and is_old_output(project / name):
            raise UserError(f"data.source {address}: {about_old_output(name)}")
    for name in WORKPLACES:
        if _overlap(place, (project / name).resolve()):
            raise UserError(
                f"data.source {address} lies at, in or above {name}, where runs write and delete: "
                "move the images to a place of their own (data/faces, say)"
            )


def _overlap(one: Path, other: Path) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)


def about_old_output(name: str) -> str:
    """What to do with a folder below data/ that an earlier version has left."""
    written = outputs.FOLDERS[OLD_OUTPUTS[name]]
    kept = sorted(outputs.find_foreign(project_folder() / name, written))
    first = f"move your own files out of it ({outputs.listed(kept)}), then " if kept else ""
    return (
        f"{name} is what an earlier version of this project wrote, and nothing reads it any more "
        f"(outputs are in artifacts/ now): {first}delete it with `rm -r {name}`"
    )


def is_old_output(folder: Path) -> bool:
    """Whether a folder below data/ is a snapshot or shards of an earlier version."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and {"schema_version", "source_sha256"} <= manifest.keys()

"""The ledger: one JSON file a retraining, which says which of its steps are whole.

It lies in the project's folder, or in the bucket of `compute.storage`, where all machines see it.
A file is written whole or not at all, after each step; a step that has no `output` there is run
again. One process at a time writes there (`lease.py`).
"""

import json
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from aegan.files import sha256_of_json, write_text
from pipelines.base.errors import UserError
from pipelines.base.files import clear_disk_errors, project_folder
from pipelines.bucket import storage

FOLDER = "retraining"
LOOKED = "looked"  # holds when a source was last looked at: `aegan health`
FORMAT = 1
ID = re.compile(r"[0-9a-f]{12}")


class Place(Protocol):
    """Where files of a ledger lie: a folder or a bucket."""

    def read(self, name: str) -> bytes | None: ...
    def write(self, name: str, content: str) -> None: ...
    def names(self) -> list[str]: ...


class Folder:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, name: str) -> bytes | None:
        file = self._folder / name
        return file.read_bytes() if file.exists() else None

    def write(self, name: str, content: str) -> None:
        with clear_disk_errors(self._folder):
            write_text(self._folder / name, content)

    def names(self) -> list[str]:
        return sorted(path.name for path in self._folder.glob("*.json"))


class Bucket:
    def __init__(self, url: str) -> None:
        self.url = url

    def read(self, name: str) -> bytes | None:
        return storage.retry(lambda: storage.read_object_if_any(f"{self.url}/{name}"))

    def write(self, name: str, content: str) -> None:
        storage.retry(lambda: storage.write_object(f"{self.url}/{name}", content.encode()))

    def names(self) -> list[str]:
        found = storage.retry(lambda: [url for url, _ in storage.list_objects(f"{self.url}/")])
        return sorted(url.rpartition("/")[2] for url in found)


def place_of(address: str) -> Folder | Bucket:
    """Where the ledger of this project lies; `address` is `compute.storage`."""
    if storage.is_s3(address):
        return Bucket(f"{address.rstrip('/')}/{FOLDER}")
    return Folder(project_folder() / FOLDER)


@dataclass
class Step:
    """One step of a retraining; whole once it has an output."""

    input: str  # hash of all that it depends on
    begun: float  # seconds since 1970
    output: str = ""  # hash of its result
    seconds: float = 0.0
    result: dict[str, Any] = field(default_factory=dict)


@dataclass
class Entry:
    """What is known of one retraining."""

    id: str
    seen: str  # hash of the source's state
    source: str  # its address, without secrets
    settings: str  # hash of params.yaml and code
    champion: str  # version that it began with, "" for none
    begun: float
    steps: dict[str, Step] = field(default_factory=dict)
    outcome: str = ""  # empty while it goes on
    reasons: list[str] = field(default_factory=list)
    champion_after: str = ""
    accepted: str = ""  # why a drift was accepted by hand
    told: bool = False  # whether the webhook has taken the message of its outcome
    format: int = FORMAT

    @property
    def trained_version(self) -> str:
        """What it has registered; "" for nothing."""
        return str(self.steps["train"].result.get("version", "")) if "train" in self.steps else ""


class Ledger:
    def __init__(self, place: Place) -> None:
        self._place = place

    def find(self, name: str) -> Entry | None:
        """The entry of that id; UserError for one that cannot be read."""
        content = self._place.read(f"{name}.json")
        return None if content is None else _parse(name, content)

    def entries(self) -> list[Entry]:
        """All of them, oldest first."""
        names = [name.removesuffix(".json") for name in self._place.names()]
        found = [self.find(name) for name in names if ID.fullmatch(name)]
        return sorted((entry for entry in found if entry), key=lambda entry: entry.begun)

    def save(self, entry: Entry) -> None:
        self._place.write(f"{entry.id}.json", json.dumps(asdict(entry), indent=1) + "\n")

    def looked(self) -> None:
        """Remember that somebody has looked at the source now."""
        self._place.write(LOOKED, json.dumps({"time": time.time()}))


def new_entry(*, seen: str, source: str, settings: str, champion: str) -> Entry:
    """An entry that nothing has been done of; the same facts give the same id."""
    name = sha256_of_json([seen, source, settings, champion])[:12]
    return Entry(name, seen, source, settings, champion, begun=time.time())


def _parse(name: str, content: bytes) -> Entry:
    try:
        values = json.loads(content)
        steps = {key: Step(**step) for key, step in values.pop("steps").items()}
        entry = Entry(**values, steps=steps)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(
            f"retraining {name}: its entry in the ledger is damaged or of another version: move "
            f"{FOLDER}/{name}.json away to begin it anew"
        ) from None
    if entry.id != name or entry.format != FORMAT:
        raise UserError(f"{FOLDER}/{name}.json is of another retraining or version: move it away")
    return entry

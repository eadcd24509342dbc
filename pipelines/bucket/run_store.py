"""A run in a bucket: what a worker leaves behind there, another one goes on from.

<storage>/runs/<run name>/
    driver.json               which driver the run belongs to, and whether it asks to stop
    progress.json             the newest row of metrics.jsonl, for the driver to show
    outcome.json              how the run ended
    run.json  metrics.jsonl  samples/   as in the run folder
    checkpoints/step-00000500/<sha256 of the tensors>.safetensors
                              state.json, written last: it names the tensors by their hash

So a checkpoint is whole or not there at every moment, whoever writes. The run folder stays what
the training loop works in: rank 0's `Uploader` carries it into the store, the driver's
`shown_progress` carries progress and outcome out of it, and `exchange` resumes from it.
"""

import json
import logging
import os
import re
import shutil
import socket
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

from aegan import files
from aegan.training import checkpoint
from aegan.training.checkpoint import CheckpointError
from aegan.training.run_folder import NAMES, STEP, RunFolder, append_row, step_of
from pipelines.base.errors import UserError
from pipelines.base.names import shown
from pipelines.base.outputs import listed
from pipelines.base.outside import SHA256, UntrustedError, check_name, path_inside
from pipelines.bucket.storage import (
    LARGER,
    MAX_READ_BYTES,
    StorageError,
    delete_object,
    download_object,
    list_objects,
    read_object_if_any,
    retry,
    upload_object,
    write_object,
)

POLL_SECONDS = 2.0
DRIVER, PROGRESS = "driver.json", "progress.json"
FACTS, OUTCOME = str(NAMES.facts), str(NAMES.outcome)
OBJECT = re.compile(  # whatever else lies there is none of ours: it is neither read nor deleted
    rf"{'|'.join(map(re.escape, (DRIVER, PROGRESS, FACTS, OUTCOME, str(NAMES.log))))}"
    rf"|{NAMES.samples}/{STEP}-[a-z]+\.png"
    rf"|{NAMES.checkpoints}/{STEP}/({re.escape(checkpoint.STATE)}|[0-9a-f]{{64}}\.safetensors)"
)

log = logging.getLogger(__name__)


class RunStore:
    """One run's objects below an address. Moving checkpoints waits for a bucket."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._names: set[str] = set()  # of its objects, as far as known
        self._states: dict[int, str] = {}  # hashes of the checkpoints' states, as far as known

    def refresh(self) -> None:
        """Ask the bucket what is there."""
        found = retry(lambda: list(list_objects(f"{self.url}/")))
        names = {url.removeprefix(f"{self.url}/") for url, _ in found}
        self._names = {name for name in names if OBJECT.fullmatch(name)}
        if foreign := sorted(names - self._names):
            log.warning("%s holds what no run writes, left alone: %s", self.url, listed(foreign))

    def steps(self) -> list[int]:
        """The steps that have a whole checkpoint, ascending."""
        return [step for step in self._all_steps() if _state_of(step) in self._names]

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON object; None if there is none, or a damaged one."""
        content = read_object_if_any(f"{self.url}/{name}")
        try:
            value = None if content is None else json.loads(content)
        except ValueError:
            return None
        return value if isinstance(value, dict) else None

    def write(self, name: str, value: Any) -> None:
        write_object(f"{self.url}/{name}", json.dumps(value).encode())

    def exchange(self, folder: RunFolder) -> None:
        """Bring store and run folder to the same state: that of the newer checkpoint."""
        shutil.rmtree(folder.outbox, ignore_errors=True)
        self.refresh()
        local, stored = sound_step(folder), self.steps()
        if local > max(stored, default=-1):
            checkpoint.forget_after(folder.checkpoints, local)  # damaged ones
            self.send(self.pack(folder), checkpoint.steps(folder.checkpoints))
        elif stored:
            self.fetch(folder)

    def fetch(self, folder: RunFolder) -> None:
        """Make the run folder what is stored: its whole checkpoints, its facts and pictures.

        A stored checkpoint that turns out to be damaged is deleted.
        """
        temporary = folder.checkpoints / ".fetched"
        shutil.rmtree(temporary, ignore_errors=True)
        for step in {*checkpoint.steps(folder.checkpoints), *self.steps()}:
            final = folder.checkpoint(step)
            if not (_is_sound(final) and self._is_stored(final)):
                shutil.rmtree(final, ignore_errors=True)
                if step in self.steps():
                    self._fetch_checkpoint(step, temporary, final)
        for name in sorted(self._names):
            if name == FACTS or name.startswith(f"{NAMES.samples}/"):
                file = path_inside(folder.path, name, origin=self.url)
                if not file.exists():
                    self._download(name, file, most_bytes=MAX_READ_BYTES)

    def discard(self, name: str) -> None:
        """Delete an object, to be uploaded anew."""
        self._delete({name})

    def remove(self) -> None:
        """Delete the run."""
        self.refresh()
        self._delete(set(self._names))

    def pack(self, folder: RunFolder) -> RunFolder:
        """Set aside what the store lacks, as it is now: files stay there when they are pruned."""
        outbox = RunFolder(folder.outbox)
        shutil.rmtree(outbox.path, ignore_errors=True)
        outbox.checkpoints.mkdir(parents=True)
        outbox.samples.mkdir()
        for step in checkpoint.steps(folder.checkpoints):
            path = folder.checkpoint(step)
            if _has_state(path) and not self._is_stored(path):
                shutil.copytree(path, outbox.checkpoint(step), copy_function=os.link)
        for picture in folder.pictures():
            if f"{NAMES.samples}/{picture.name}" not in self._names:
                shutil.copy(picture, outbox.samples)
        if folder.log.exists():
            shutil.copyfile(folder.log, outbox.log)
        return outbox

    def send(self, outbox: RunFolder, kept: list[int]) -> None:
        """Upload what was packed, a checkpoint's state last; then delete those not in `kept`."""
        for file in filter(Path.exists, (outbox.log, *outbox.pictures())):
            self._upload(file, str(file.relative_to(outbox.path)))
        for step in checkpoint.steps(outbox.checkpoints):
            path = outbox.checkpoint(step)
            self._upload(path / checkpoint.TENSORS, _tensors_of(path))
            self._upload(path / checkpoint.STATE, _state_of(step))
            self._states[step] = checkpoint.read_state(path)["state_sha256"]
            self._delete(
                self._names_in(NAMES.checkpoint(step)) - {_tensors_of(path), _state_of(step)}
            )
        for step in set(self._all_steps()) - set(kept):
            self._delete({_state_of(step)})  # first: a checkpoint without it does not count
            self._delete(self._names_in(NAMES.checkpoint(step)))
        shutil.rmtree(outbox.path)

    def _is_stored(self, path: Path) -> bool:
        """Whether this very checkpoint, and no other of its step, is in the store."""
        state, step = checkpoint.read_state(path), step_of(path)
        if self._names_in(NAMES.checkpoint(step)) != {_tensors_of(path), _state_of(step)}:
            return False
        if step not in self._states:
            stored = retry(partial(self.read, _state_of(step))) or {}
            self._states[step] = str(stored.get("state_sha256"))
        return bool(self._states[step] == state["state_sha256"])

    def _fetch_checkpoint(self, step: int, temporary: Path, final: Path) -> None:
        temporary.mkdir(parents=True)
        try:
            self._download(_state_of(step), temporary / checkpoint.STATE, most_bytes=MAX_READ_BYTES)
            _check_state(checkpoint.read_state(temporary), step)
            self._download(_tensors_of(temporary), temporary / checkpoint.TENSORS)
            checkpoint.verify(temporary)
        except (StorageError, UntrustedError, CheckpointError) as error:
            if isinstance(error, StorageError) and error.code not in ("NoSuchKey", "404", LARGER):
                raise
            log.warning("checkpoint %d in %s is left out: %s", step, self.url, error)
            shutil.rmtree(temporary)
            self._delete({_state_of(step)})
        else:
            self._states[step] = checkpoint.read_state(temporary)["state_sha256"]
            temporary.rename(final)

    def _download(self, name: str, file: Path, *, most_bytes: int | None = None) -> None:
        url = f"{self.url}/{check_name(name, origin=self.url, pattern=OBJECT)}"
        with files.new_file(file) as temporary:
            retry(partial(download_object, url, temporary, most_bytes=most_bytes))

    def _upload(self, file: Path, name: str) -> None:
        retry(partial(upload_object, file, f"{self.url}/{name}"))
        self._names.add(name)

    def _delete(self, names: set[str]) -> None:
        for name in sorted(names & self._names):
            retry(partial(delete_object, f"{self.url}/{name}"))
            self._names.discard(name)

    def _all_steps(self) -> list[int]:
        """The steps of which anything is stored, ascending."""
        return sorted({step_of(Path(name).parent) for name in self._names_in(NAMES.checkpoints)})

    def _names_in(self, folder: Path) -> set[str]:
        return {name for name in self._names if name.startswith(f"{folder}/")}


class Uploader:
    """Carries rank 0's run folder into the store while training goes on.

    One upload at a time, in a thread; another one looks for a request to stop and shows progress.
    An upload that fails for good makes `should_stop` true: training ends with a checkpoint on
    this machine's disk, and that one is the last to try.
    """

    def __init__(self, store: RunStore, folder: RunFolder, driver: str) -> None:
        self._store, self._folder, self._driver = store, folder, driver
        self._uploads = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._upload: Future[None] | None = None
        self._stop, self._closed = threading.Event(), threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._watcher.start()

    def should_stop(self) -> bool:
        return self._stop.is_set()

    def checkpoint_saved(self) -> None:
        """Upload the folder as it is now; waits for the upload before: one is pending at most."""
        if self._upload is not None:
            self._upload.exception()
        kept = checkpoint.steps(self._folder.checkpoints)
        outbox = self._store.pack(self._folder)
        self._upload = self._uploads.submit(self._send, outbox, kept)

    def close(self) -> None:
        """Wait for the last upload; raises UserError if it failed for good."""
        self._closed.set()
        self._watcher.join()
        self._uploads.shutdown()
        error = self._upload.exception() if self._upload is not None else None
        if isinstance(error, StorageError):
            raise UserError(
                f"{error} (the newest checkpoint is in {self._folder.path} on "
                f"{socket.gethostname()}; the same command goes on from there or from the newest "
                "one in the bucket)"
            )
        if error is not None:
            raise error

    def _send(self, outbox: RunFolder, kept: list[int]) -> None:
        try:
            retry(partial(is_asked_to_stop, self._store, self._driver))
            self._store.send(outbox, kept)
        except BaseException:
            self._stop.set()
            raise

    def _watch(self) -> None:
        """Progress out, a request to stop in; what fails here is tried again, and harms nothing."""
        shown = None
        while not self._closed.wait(POLL_SECONDS):
            try:
                if is_asked_to_stop(self._store, self._driver):
                    self._stop.set()
                row = self._folder.newest_row()
                if row is not None and row != shown:
                    self._store.write(PROGRESS, row)
                    shown = row
            except StorageError as error:
                log.warning("progress is not shown: %s", error)
            except UserError:  # another driver took over: what the next upload will say
                self._stop.set()


def take_over(store: RunStore) -> str:
    """Make this process the run's driver and forget how the run ended before; returns its token."""
    driver = uuid.uuid4().hex
    words = {"driver": driver, "host": socket.gethostname(), "stop": False}
    retry(partial(store.write, DRIVER, words))
    for name in (OUTCOME, PROGRESS):
        retry(partial(delete_object, f"{store.url}/{name}"))
    return driver


def is_asked_to_stop(store: RunStore, driver: str) -> bool:
    """Whether the run's driver wants it to end; raises UserError if it is another one by now."""
    found = store.read(DRIVER) or {}
    if found.get("driver") != driver:
        host = shown(str(found.get("host", "another machine")))
        raise UserError(
            f"another training of {store.url} was started on {host}: this one has ended"
        )
    return found.get("stop") is True


@contextmanager
def shown_progress(store: RunStore, folder: RunFolder, driver: str) -> Iterator[None]:
    """The driver's side: progress and outcome appear in its run folder; a stop file goes out."""
    ended = threading.Event()

    def watch() -> None:
        step, asked = -1, False
        while not ended.wait(POLL_SECONDS):
            try:
                if not asked and folder.stop.exists():
                    request = {"driver": driver, "host": socket.gethostname(), "stop": True}
                    store.write(DRIVER, request)
                    asked = True
                row = store.read(PROGRESS)
                if _is_row(row) and row["step"] > step:
                    step = row["step"]
                    folder.path.mkdir(parents=True, exist_ok=True)  # this disk may be another now
                    append_row(folder.log, row)
                outcome = store.read(OUTCOME)
                if _is_outcome(outcome) and outcome["driver"] == driver:
                    files.write_json(folder.outcome, outcome)
            except (OSError, StorageError) as error:
                log.warning("progress is not shown: %s", error)

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=POLL_SECONDS)


def sound_step(folder: RunFolder) -> int:
    """The step of a run folder's newest sound checkpoint; -1 without one."""
    try:
        newest = checkpoint.latest(folder.checkpoints)
    except CheckpointError:
        return -1
    return -1 if newest is None else step_of(newest)


def _is_sound(path: Path) -> bool:
    try:
        checkpoint.verify(path)
    except CheckpointError:
        return False
    return True


def _has_state(path: Path) -> bool:
    try:
        checkpoint.read_state(path)
    except CheckpointError:
        return False
    return True


def _check_state(state: dict[str, Any], step: int) -> None:
    """CheckpointError for a state that is as it was written, but not as the training loop writes.

    Its hash says nothing of who wrote it.
    """
    log, tensors = state.get("log"), state.get("sha256")
    rows = log.get("rows") if isinstance(log, dict) else None
    ending = log.get("ending") if isinstance(log, dict) else None
    sound = isinstance(rows, list) and all(map(_is_row, [*rows, *([ending] if ending else [])]))
    if not sound or state.get("step") != step or not SHA256.fullmatch(str(tensors)):
        raise CheckpointError("it is none of this step")


def _is_row(value: Any) -> TypeGuard[dict[str, Any]]:
    """Whether this is a row of a log: numbers, the step among them."""
    return (
        isinstance(value, dict)
        and all(type(number) in (int, float) for number in value.values())
        and type(value.get("step")) is int
        and {"seconds", "images_per_second"} <= value.keys()
    )


def _is_outcome(value: Any) -> TypeGuard[dict[str, Any]]:
    """Whether this says how a run ended, as workers do."""
    if not isinstance(value, dict) or not isinstance(value.get("driver"), str):
        return False
    ended = type(value.get("finished")) is bool and type(value.get("step")) is int
    return ended or isinstance(value.get("error"), str)


def _state_of(step: int) -> str:
    return f"{NAMES.checkpoint(step)}/{checkpoint.STATE}"


def _tensors_of(path: Path) -> str:
    """The stored name of a local checkpoint's tensors."""
    state = checkpoint.read_state(path)
    return f"{NAMES.checkpoint(int(state['step']))}/{state['sha256']}.safetensors"

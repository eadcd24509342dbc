"""The model that is served, and the one after it: an alias is followed while requests go on.

Of a registered version only the weights and their config.json are fetched and read, as untrusted
files: nothing that a registry holds is executed.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import aegan
from aegan import model_folder
from aegan.config import RegisterConfig
from aegan.files import sha256_of
from aegan.operations import BATCH_SIZE, run
from pipelines.base import params
from pipelines.base.errors import UserError
from pipelines.registry import decisions, tracking

LOOK_SECONDS = 3.0  # between two looks at the alias
AGAIN_SECONDS = 60.0  # until a version that could not be loaded is tried again

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """A model and what `/version` says of it."""

    model: aegan.Model
    about: dict[str, Any]


def registered_model() -> tuple[str, str]:
    """The address of the champion, else of what was registered last, and why; raises UserError."""
    config = params.load(RegisterConfig)
    if decisions.champion(config.model_name):
        return f"models:/{config.model_name}@champion", "the champion"
    address = f"models:/{config.model_name}@{config.alias}"
    return address, "registered last: there is no champion yet"


def load(address: str) -> Served:
    """The model at an MLflow address or in a folder; raises UserError."""
    registered = tracking.is_address(address)
    if registered:
        address = tracking.pinned(address)
    with tracking.model_at(address) as folder:
        try:
            model = aegan.load(folder)
        except aegan.ModelError as error:
            raise UserError(str(error)) from None
        files = [model_folder.CONFIG, model_folder.FILES["ema"]]
        files += [model_folder.LATENTS] * (model.latent_density is not None)
        about = {
            "model": address if registered else Path(address).name,
            "sha256": {name: sha256_of(folder / name) for name in files},
            "latent_dim": model.latent_dim,
            "classes": model.classes,
            "image_size": model.image_size,
            "image_channels": model.image_channels,
            "has_encoder": model.encoder is not None,
            "has_fitted_latents": model.latent_density is not None,
        }
        return Served(model, about)


def check_encoder(model: aegan.AEGAN, *, called: str) -> None:
    """UserError for a model that cannot take pictures."""
    if model.encoder is None:
        raise UserError(
            f"{called} has no encoder (it was trained as a plain GAN, training.arm), so it "
            "cannot take pictures: `aegan generate` draws random ones"
        )


def warm_up(model: aegan.AEGAN) -> None:
    """Run the networks once in the smallest and the largest batch: first passes are slow."""
    shape = (model.image_size, model.image_size, model.image_channels)
    for rows in (1, BATCH_SIZE):
        run(model, "decode", torch.zeros(rows, model.latent_dim))
        if model.encoder is not None:
            run(model, "encode", torch.zeros(rows, *shape, dtype=torch.uint8))


def follow(
    alias: str,
    served: str,
    *,
    replace: Callable[[Served], None],
    report: Callable[[str], None],
) -> None:
    """Look at `models:/NAME@ALIAS` for ever, in a thread of its own that ends with the process.

    Another version than `served` is loaded beside it, warmed up and handed to `replace`. `report`
    is told when what the alias means is not served, and "" once it is.
    """
    follower = _Follower(alias, served, replace, report)
    threading.Thread(target=follower.run, name="follow", daemon=True).start()


class _Follower:
    def __init__(
        self,
        alias: str,
        served: str,
        replace: Callable[[Served], None],
        report: Callable[[str], None],
    ) -> None:
        self._alias, self._served = alias, served
        self._replace, self._report = replace, report
        self._problem = self._failed = ""
        self._failed_at = 0.0

    def run(self) -> None:
        while True:
            time.sleep(LOOK_SECONDS)
            try:
                self._look()
            except UserError as error:
                self._say(str(error))
            except Exception as error:
                log.debug("the alias could not be followed", exc_info=True)
                self._say(f"{self._alias} cannot be followed ({type(error).__name__}: {error})")

    def _look(self) -> None:
        version = tracking.pinned(self._alias)
        if version == self._failed and time.monotonic() - self._failed_at < AGAIN_SECONDS:
            return
        if version != self._served:
            self._failed, self._failed_at = version, time.monotonic()
            new = load(version)
            warm_up(new.model)
            self._replace(new)
            self._served = version
            log.info("%s is served from now on (%s)", version, self._alias)
        self._failed = ""
        self._say("")

    def _say(self, problem: str) -> None:
        if problem == self._problem:
            return
        self._problem = problem
        if problem:
            log.warning("%s stays served: %s", self._served, problem)
        # Whoever may ask the server need not read what its disks and registry are called.
        self._report(f"{self._alias} cannot be followed: the log says why" if problem else "")

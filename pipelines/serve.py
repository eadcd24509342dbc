"""`make serve`: our own code answers HTTP requests with a model's weights (docs/serving.md).

Of a registered version only the weights and their config.json are fetched and read, as untrusted
files: nothing that a registry holds is executed. `pipelines/serving/endpoint.py` is what listens.
"""

import argparse
import logging
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn

import aegan
from aegan import model_folder
from aegan.config import RegisterConfig
from aegan.files import sha256_of
from pipelines.base import params
from pipelines.base.errors import UserError, run_stage
from pipelines.registry import tracking

HOST, PORT = "127.0.0.1", 5001
MAX_CONNECTIONS = 128
END_SECONDS = 30  # that requests at work have when the server is asked to end

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pipelines.serve", description=__doc__)
    parser.add_argument("--model", default="", help="models:/NAME@ALIAS, models:/NAME/3, a folder")
    parser.add_argument("--port", default=str(PORT), help="on 127.0.0.1; 0 takes a free one")
    given = parser.parse_args(arguments)
    with _listen(given.port) as listener:
        from pipelines.serving import endpoint  # slow to import: a taken port is said before

        address = given.model or _registered_model()
        model, about = load(address)
        config = uvicorn.Config(
            endpoint.Application(model, about),
            http=endpoint.Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=END_SECONDS,
        )
        port = listener.getsockname()[1]
        log.info("%s answers at http://%s:%d/invocations; Ctrl-C ends it", address, HOST, port)
        with suppress(KeyboardInterrupt):  # Ctrl-C or SIGTERM, once the last answer is sent
            uvicorn.Server(config).run(sockets=[listener])


def load(address: str) -> tuple[aegan.AEGAN, dict[str, Any]]:
    """The model at an MLflow address or in a folder, and what /version says; raises UserError."""
    registered = tracking.is_address(address)
    if registered:
        address = tracking.pinned(address)
    with tracking.local_folder(address) as folder:
        try:
            model = aegan.load(folder)
        except aegan.ModelError as error:
            raise UserError(str(error)) from None
        served = [model_folder.CONFIG, model_folder.FILES["ema"]]
        served += [model_folder.LATENTS] * (model.latent_density is not None)
        return model, {
            "model": address if registered else Path(address).name,
            "sha256": {name: sha256_of(folder / name) for name in served},
            "latent_dim": model.latent_dim,
            "classes": model.classes,
            "image_size": model.image_size,
            "image_channels": model.image_channels,
            "has_encoder": model.encoder is not None,
            "has_fitted_latents": model.latent_density is not None,
        }


def _registered_model() -> str:
    config = params.load(RegisterConfig)
    return f"models:/{config.model_name}@{config.alias}"


def _listen(port: str) -> socket.socket:
    """A socket that listens on loopback; raises UserError."""
    cure = "choose another: make serve PORT=5002"
    if not port.isdecimal() or int(port) > 65535:
        raise UserError(f"the port must be a number from 0 to 65535; {cure}")
    try:
        return socket.create_server((HOST, int(port)))
    except OSError as error:
        raise UserError(f"port {port} of {HOST}: {error.strerror}; {cure}") from None


if __name__ == "__main__":
    run_stage(main)

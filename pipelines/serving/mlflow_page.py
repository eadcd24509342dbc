"""MLflow's page on this machine, behind a password: `make mlflow`.

MLflow itself lets in whoever reaches its port, and every user of this machine does; who may move an
alias decides what is served. So all of its application answers only to a password (HTTP basic
authentication) that is made at each start and shown in the terminal alone.
"""

import errno
import hmac
import os
import secrets
import socket
import sys
import warnings
from base64 import b64encode
from typing import Any

from pipelines.base.errors import UserError, run_stage
from pipelines.registry import mlflow_store
from pipelines.registry.mlflow_store import without_credentials

USER = "aegan"
PORT = 5000
HOSTS = ("127.0.0.1", "localhost")  # whatever name leads here else is another site's trick


class Guard:
    """An ASGI application that passes on only what the owner's browser or program asks for."""

    def __init__(self, app: Any, password: str) -> None:
        self._app = app
        self._expected = b"Basic " + b64encode(f"{USER}:{password}".encode())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._answer(scope)(scope, receive, send)

    def _answer(self, scope: Any) -> Any:
        from starlette.responses import PlainTextResponse

        if scope["type"] == "lifespan":
            return self._app
        headers = dict(scope["headers"])
        if scope["type"] != "http" or not _from_here(headers, scope["method"]):
            return PlainTextResponse("for pages of this address only", 403)
        if not hmac.compare_digest(headers.get(b"authorization", b""), self._expected):
            login = {"WWW-Authenticate": 'Basic realm="MLflow", charset="UTF-8"'}
            return PlainTextResponse("user and password: see `make mlflow`", 401, login)
        return self._app


def _from_here(headers: dict[bytes, bytes], method: str) -> bool:
    """Whether a request is for this machine, and not one that another site's page makes.

    A browser adds the password to those, too.
    """
    host = headers.get(b"host", b"").decode("latin-1")
    if host.partition(":")[0] not in HOSTS:
        return False
    if headers.get(b"origin", b"").decode("latin-1") not in ("", f"http://{host}"):
        return False
    follows_link = method == "GET" and headers.get(b"sec-fetch-mode") == b"navigate"
    return follows_link or headers.get(b"sec-fetch-site", b"none") in (b"none", b"same-origin")


def serve(port: int) -> None:
    """Serve the page until Ctrl-C, or say where it is; raises UserError."""
    uri = mlflow_store.tracking_uri()
    if uri.startswith(("http://", "https://")):
        print(f"MLflow page: {without_credentials(uri)} (MLFLOW_TRACKING_URI)")
        return
    with _listener(port) as listener:
        password = secrets.token_urlsafe(24)
        app = Guard(_application(), password)
        print(f"MLflow page: http://{HOSTS[0]}:{listener.getsockname()[1]}")
        print(f"user: {USER}\npassword: {password}", flush=True)
        import uvicorn

        config = uvicorn.Config(app, log_level="warning", access_log=False, ws="none")
        uvicorn.Server(config).run(sockets=[listener])


def _listener(port: int) -> socket.socket:
    try:
        return socket.create_server((HOSTS[0], port))
    except OverflowError:
        raise UserError(f"port {port}: expected 1024 to 65535") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            reason = "is taken, perhaps by another page"
        else:
            reason = f"cannot be used ({error.strerror})"
        raise UserError(f"port {port} {reason}: make mlflow PORT={PORT + 1}") from None


def _application() -> Any:
    """MLflow's own application on the store that the stages use, which is checked."""
    warnings.simplefilter("ignore")  # of MLflow and its libraries about each other
    with mlflow_store.readable_errors():
        mlflow = mlflow_store.open_store()
        import uvicorn  # noqa: F401 # before MLflow's server, which looks whether it serves
        from mlflow.server import constants

        uri, root = mlflow.get_tracking_uri(), str(mlflow_store.files_folder())
        os.environ |= {
            constants.BACKEND_STORE_URI_ENV_VAR: uri,
            constants.REGISTRY_STORE_URI_ENV_VAR: uri,
            constants.ARTIFACT_ROOT_ENV_VAR: root,
        }
        from mlflow.server.fastapi_app import app

        return app


def main() -> None:
    given = sys.argv[1] if len(sys.argv) > 1 else str(PORT)
    if not given.isascii() or not given.isdigit():
        raise UserError(f"PORT is {given}: expected a number, as in make mlflow PORT={PORT + 1}")
    serve(int(given))


if __name__ == "__main__":
    run_stage(main)

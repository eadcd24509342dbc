"""Fetching an archive over HTTPS."""

import ipaddress
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3 import Retry

from pipelines.errors import UserError
from pipelines.progress import progress
from pipelines.source_address import without_secrets

MAX_BYTES = 256 * 1024**3
MAX_REDIRECTS = 5
CHUNK_BYTES = 1024**2
TIMEOUT_SECONDS = 30  # to connect, and between two pieces
RETRIES = Retry(
    total=3, backoff_factor=0.3, status_forcelist=(429, 500, 502, 503, 504), raise_on_status=False
)


class _Checked(HTTPAdapter):
    """Sends a request, the first or a redirect's, only where that is safe."""

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> Any:
        _check_safe(urlsplit(str(request.url)))
        answer = super().send(request, *args, **kwargs)
        if answer.is_redirect:
            answer.close()  # requests would read its body, however long
        return answer


def fetch(url: str, file: Path) -> None:
    """Download an address into a file, whole or with a UserError."""
    shown = without_secrets(url)
    try:
        with requests.Session() as session:
            session.max_redirects = MAX_REDIRECTS
            for scheme in ("https://", "http://"):
                session.mount(scheme, _Checked(max_retries=RETRIES))
            plain_bytes = {"Accept-Encoding": "identity"}
            with session.get(
                url, stream=True, timeout=TIMEOUT_SECONDS, headers=plain_bytes
            ) as answer:
                if not answer.ok:
                    raise UserError(
                        f"{shown} answers {answer.status_code} {answer.reason}: check the address"
                    )
                _save(answer, file)
    except (requests.RequestException, ValueError) as error:  # the latter for no address
        raise UserError(
            f"{shown} cannot be fetched ({type(error).__name__}): check the address and "
            "the network, then run the same command again"
        ) from None


def _check_safe(parts: SplitResult) -> None:
    """Plain http lets anyone on the way replace the file: only this machine may use it."""
    try:
        local = ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        local = parts.hostname == "localhost"
    if parts.scheme != "https" and not local:
        raise UserError(f"{without_secrets(parts.geturl())} is not encrypted: use https://")


def _save(answer: requests.Response, file: Path) -> None:
    try:
        pieces = -(-int(answer.headers["Content-Length"]) // CHUNK_BYTES)
    except (KeyError, ValueError):  # not said, or no number
        pieces = None
    with file.open("wb") as out:
        chunks = answer.iter_content(CHUNK_BYTES)
        for chunk in progress(chunks, "fetching", unit="MiB", total=pieces):
            if out.tell() + len(chunk) > MAX_BYTES:
                raise UserError(
                    f"{without_secrets(answer.url)} is larger than {MAX_BYTES} bytes: "
                    "fetch it yourself and set data.source to the file"
                )
            out.write(chunk)

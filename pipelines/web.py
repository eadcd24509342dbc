"""Fetching an archive over HTTPS."""

import ipaddress
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3 import Retry

from pipelines.errors import UserError
from pipelines.progress import progress

CHUNK_BYTES = 1024**2
TIMEOUT_SECONDS = 30  # to connect, and between two pieces
RETRIES = Retry(
    total=3, backoff_factor=0.3, status_forcelist=(429, 500, 502, 503, 504), raise_on_status=False
)


def fetch(url: str, file: Path) -> None:
    """Download an address into a file, whole or with a UserError."""
    shown = without_secrets(url)
    _check_safe(urlsplit(url))
    try:
        with requests.Session() as session:
            for scheme in ("https://", "http://"):
                session.mount(scheme, HTTPAdapter(max_retries=RETRIES))
            plain_bytes = {"Accept-Encoding": "identity"}
            with session.get(
                url, stream=True, timeout=TIMEOUT_SECONDS, headers=plain_bytes
            ) as answer:
                for hop in (*answer.history[1:], answer):  # redirects
                    _check_safe(urlsplit(hop.url))
                if not answer.ok:
                    raise UserError(
                        f"{shown} answers {answer.status_code} {answer.reason}: check the address"
                    )
                _save(answer, file)
    except requests.RequestException as error:
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
    expected = answer.headers.get("Content-Length", "")
    pieces = -(-int(expected) // CHUNK_BYTES) if expected.isdigit() else None
    with file.open("wb") as out:
        chunks = answer.iter_content(CHUNK_BYTES)
        for chunk in progress(chunks, "fetching", unit="MiB", total=pieces):
            out.write(chunk)


def without_secrets(url: str) -> str:
    """The address without user, password and query, fit for messages and manifests."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"

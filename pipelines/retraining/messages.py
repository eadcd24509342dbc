"""Tell a webhook how a retraining ended: JSON, signed with HMAC-SHA256, at least once.

AEGAN_WEBHOOK holds the address and AEGAN_WEBHOOK_SECRET the key; neither is ever written down.
"""

import hashlib
import hmac
import json
import logging
import os
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from pipelines.base.errors import UserError
from pipelines.ingest.source_address import without_secrets

ADDRESS, SECRET = "AEGAN_WEBHOOK", "AEGAN_WEBHOOK_SECRET"
SIGNATURE = "X-Aegan-Signature"
TRIES, TIMEOUT_SECONDS = 3, 10
LOOPBACK = ("127.0.0.1", "::1", "localhost")

log = logging.getLogger(__name__)


def address() -> str:
    """Where messages go, "" for nowhere; UserError for an address that is not encrypted."""
    url = os.environ.get(ADDRESS, "")
    parts = urlsplit(url)
    if url and parts.scheme != "https" and parts.hostname not in LOOPBACK:
        raise UserError(f"{ADDRESS} is no https:// address: set it to one, or leave it unset")
    return url


def send(message: dict[str, Any]) -> bool:
    """Whether the receiver has taken it; an `id` says which it is when it comes twice."""
    url, content = address(), json.dumps(message).encode()
    if not url:
        return True
    headers = {"Content-Type": "application/json"}
    if secret := os.environ.get(SECRET):
        digest = hmac.new(secret.encode(), content, hashlib.sha256).hexdigest()
        headers[SIGNATURE] = f"sha256={digest}"
    again = Retry(
        TRIES - 1, backoff_factor=0.5, status_forcelist=[429, 502, 503, 504], allowed_methods=None
    )
    with requests.Session() as session:
        for scheme in ("https://", "http://"):
            session.mount(scheme, HTTPAdapter(max_retries=again))
        try:
            answer = session.post(
                url, data=content, headers=headers, timeout=TIMEOUT_SECONDS, allow_redirects=False
            )
            reason = "" if answer.ok else f"{answer.status_code}"
        except requests.RequestException as error:
            reason = type(error).__name__
    if reason:
        log.warning(
            "%s does not take messages (%s): it is told next time", without_secrets(url), reason
        )
    return not reason
